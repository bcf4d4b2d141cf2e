"""Schedulers of a sweep: what they know of former calls, and what they leave alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from pipeline.cluster.sweep_schedulers import Asha, Pbt
from pipeline.sweep_spec import Domain

LR = "distill.loop.optim.lr"


def trial(number: str, **config: Any) -> Any:
    return SimpleNamespace(trial_id=number, config=config)


def told(scheduler: Asha, one: Any, epoch: int, value: float) -> str:
    return scheduler.on_trial_result(None, one, {"epoch": epoch, "accuracy": value})


def asha() -> Asha:
    return Asha("accuracy", "max", epochs=9, grace=1, reduction=3)


def test_a_trial_is_judged_against_those_of_former_calls() -> None:
    fresh, one = asha(), trial("a")
    fresh.on_trial_add(None, one)
    assert told(fresh, one, 1, 0.1) == TrialScheduler.CONTINUE  # nobody to compare it with
    knowing = asha()
    for number, value in enumerate((0.5, 0.6, 0.7)):
        knowing.recall(f"former{number}", [(1, value), (3, value), (9, value)])
    knowing.on_trial_add(None, one)
    assert told(knowing, one, 1, 0.1) == TrialScheduler.STOP
    better = trial("b")
    knowing.on_trial_add(None, better)
    assert [told(knowing, better, epoch, 0.9) for epoch in range(1, 10)] == [TrialScheduler.CONTINUE] * 9


def test_the_last_epoch_ends_no_trial() -> None:
    scheduler = asha()
    for number in range(3):
        scheduler.recall(f"former{number}", [(9, 0.9)])
    one = trial("a")
    scheduler.on_trial_add(None, one)
    # Whole, and worse than all others: its student is there, and to be judged.
    assert told(scheduler, one, 9, 0.0) == TrialScheduler.CONTINUE


def test_of_a_negative_log_likelihood_less_is_better() -> None:
    scheduler = Asha("accuracy", "min", epochs=9, grace=1, reduction=2)
    scheduler.recall("former", [(1, 1.0)])
    worse, better = trial("a"), trial("b")
    scheduler.on_trial_add(None, worse)
    scheduler.on_trial_add(None, better)
    assert told(scheduler, worse, 1, 2.0) == TrialScheduler.STOP
    assert told(scheduler, better, 1, 0.5) == TrialScheduler.CONTINUE


def test_a_member_takes_values_over_and_keeps_its_folders() -> None:
    domain = Domain(dist="loguniform", lower=1e-3, upper=1e-2)
    scheduler = Pbt(
        "accuracy", "max", interval=1, quantile=0.5, resample=0.0,
        draws={LR: domain.draw}, fit={LR: domain.fit}, seed=0,
    )  # fmt: skip
    mine = trial("a", name="mine", payload="my own", epochs=3, **{LR: 5e-3})
    theirs = trial("b", name="theirs", payload="their own", epochs=3, **{LR: 1e-2})
    found = {scheduler._get_new_config(mine, theirs)[0][LR] for _ in range(40)}
    assert found == {1e-2, 8e-3}  # 20 % more would leave the range
    config, _ = scheduler._get_new_config(mine, theirs)
    assert {key: config[key] for key in ("name", "payload", "epochs")} == {
        "name": "mine", "payload": "my own", "epochs": 3,
    }  # fmt: skip
