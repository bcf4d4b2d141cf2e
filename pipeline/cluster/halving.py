"""Successive halving as a scheduler of Ray Tune: trials wait between rungs, and only the best go on."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from pipeline.assessment.halving import Standing
from pipeline.cluster.trainable import ROW


class HalvingScheduler(FIFOScheduler):
    """Lets a trial climb once it is certain to be among the best of its rung, and ends it once it is certain not to be.

    A trial that has finished a rung is paused until then; its process serves the others meanwhile. Unlike ASHA [1]_,
    which promotes from what it has seen so far, no rung is run for a trial that ends below the cut: a rung is dear (a
    teacher over many images), and the trials are all known beforehand.

    Parameters
    ----------
    standing : Standing
        Of a search among all trials, by the names in their configurations.
    limit
        How many trials may run side by side.

    Attributes
    ----------
    reasons : dict of str to str
        Why a trial was ended, by name.

    References
    ----------
    .. [1] Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (arXiv 1810.05934).
    """

    def __init__(self, standing: Standing, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._active: dict[str, Trial] = {}
        self.reasons: dict[str, str] = {}
        self._standing = standing
        self._waiting: dict[str, Trial] = {}
        self._may_climb: set[str] = set()

    def occupied(self) -> int:
        """Return how many trials run, or are about to."""
        self._active = {name: t for name, t in self._active.items() if t.status in (Trial.PENDING, Trial.RUNNING)}
        return len(self._active)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Count a trial that is new, or that is tried again."""
        self._active[trial.config["name"]] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Enter a score, then tell the trial, and those that wait, what they may do."""
        if result.get("done"):
            return TrialScheduler.CONTINUE  # the last rung, or an error: `on_trial_complete` counts it
        name = trial.config["name"]
        self._waiting[name] = trial
        self._may_climb.discard(name)  # it has
        if self._standing.climbed(name, result[f"{ROW}/rung"]):
            return TrialScheduler.CONTINUE  # its process died later on, and it had to start over
        # Tune hands a scheduler the result flattened.
        self._standing.enter(name, result[f"{ROW}/rung"], result.get(f"{ROW}/score"))
        return self._decide(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Count a trial that ended by itself, with an error or at the last rung."""
        self._left(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Count a trial whose process died once too often; Tune also calls this when it is going to try again."""
        if trial.status == Trial.PENDING or not trial.should_recover():
            self._left(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return a trial that has not started, else one that waits and may climb, within the limit."""
        occupied = self.occupied()
        for trial in self._active.values():
            if trial.status == Trial.PENDING:
                return trial
        for name in sorted(self._may_climb) if occupied < self.limit else ():
            if self._waiting[name].status == Trial.PAUSED:
                self._active[name] = self._waiting[name]
                return self._waiting[name]
        return None

    def _left(self, controller: Any, trial: Trial) -> None:
        name = trial.config["name"]
        self._waiting.pop(name, None)
        self._may_climb.discard(name)
        self._standing.leave(name)
        self._decide(controller, None)

    def _decide(self, controller: Any, current: Trial | None) -> str:
        answer = TrialScheduler.PAUSE
        for decision in self._standing.settle():
            trial = self._waiting[decision.name]
            if decision.climbs:
                if trial is current:
                    answer = TrialScheduler.CONTINUE
                else:
                    self._may_climb.add(decision.name)
                continue
            del self._waiting[decision.name]
            self.reasons[decision.name] = decision.reason
            if trial is current:
                answer = TrialScheduler.STOP
            else:
                controller.stop_trial(trial)
        return answer


class PausingGenerator(BasicVariantGenerator):
    """Adds trials while there is room, a paused one taking none: Tune's own limit would wait for it forever."""

    def __init__(self, scheduler: HalvingScheduler) -> None:
        super().__init__()
        self._scheduler: HalvingScheduler | None = scheduler

    def next_trial(self) -> Trial | None:
        """Return the next trial, None while there is no room or when there is none left."""
        if self._scheduler is not None and self._scheduler.occupied() >= self._scheduler.limit:
            return None
        return super().next_trial()

    def get_state(self) -> dict[str, Any] | bool:
        """Return what Tune may save: without the scheduler, which holds live trials."""
        state = super().get_state()
        return state | {"_scheduler": None} if isinstance(state, dict) else state
