"""Who decides which trials of a sweep go on: Tune's schedulers, made to survive an interruption."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pbt import _PBTTrialState

TIME = "epoch"
OWN = ("name", "payload", "epochs")  # of a trial's configuration: what it keeps, whatever values it takes over


@dataclass(frozen=True)
class _Known:
    trial_id: str


class Asha(ASHAScheduler):
    """Asynchronous successive halving [1]_ over epochs, that knows of the trials of former calls.

    A trial's last epoch is no rung: to end it there would save nothing.

    Parameters
    ----------
    metric, mode : str
    epochs : int
        Of a whole training.
    grace : int
        The first rung [epochs].
    reduction : float
        One trial in so many goes on from a rung.

    References
    ----------
    .. [1] Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (arXiv 1810.05934).
    """

    def __init__(self, metric: str, mode: str, *, epochs: int, grace: int, reduction: float) -> None:
        super().__init__(
            time_attr=TIME,
            metric=metric,
            mode=mode,
            max_t=epochs,
            grace_period=min(grace, epochs),
            reduction_factor=reduction,
        )
        self._epochs = epochs

    def recall(self, name: str, curve: Sequence[tuple[int, float]]) -> None:
        """Enter a trial of a former call: its metric by epoch."""
        bracket: Any = self._brackets[0]
        for epoch, value in curve:
            if epoch < self._epochs:
                bracket.on_result(_Known(f"former {name}"), epoch, (self._metric_op or 1.0) * value)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide at the rungs."""
        if result.get(TIME, 0) >= self._epochs:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Forget the trial; at its last epoch there is nothing to decide."""
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Leave what a trial that failed had reached as it is; Tune also calls this when it is going to try again."""


class Pbt(PopulationBasedTraining):
    """Population-based training [1]_ over epochs, with every value kept inside its range.

    Parameters
    ----------
    metric, mode : str
    interval : int
        Epochs between two comparisons.
    quantile, resample : float
    draws : mapping of str to callable
        ``draw(u)`` gives a value of a setting for u in [0, 1).
    fit : mapping of str to callable or sequence
        ``fit(x)`` gives the nearest value that is allowed; a sequence: the allowed values, in order.
    seed : int

    References
    ----------
    .. [1] Jaderberg et al., "Population Based Training of Neural Networks", 2017 (arXiv 1711.09846).
    """

    def __init__(
        self,
        metric: str,
        mode: str,
        *,
        interval: int,
        quantile: float,
        resample: float,
        draws: Mapping[str, Callable[[float], Any]],
        fit: Mapping[str, Callable[[float], Any] | Sequence[Any]],
        seed: int,
    ) -> None:
        source = random.Random(seed)

        def mutation(path: str) -> Any:
            allowed = fit[path]
            return (lambda: draws[path](source.random())) if callable(allowed) else list(allowed)

        def inside(config: dict[str, Any]) -> dict[str, Any]:
            nearest = {path: allowed(config[path]) for path, allowed in fit.items() if callable(allowed)}
            return config | nearest

        super().__init__(
            time_attr=TIME,
            metric=metric,
            mode=mode,
            perturbation_interval=interval,
            quantile_fraction=quantile,
            resample_probability=resample,
            hyperparam_mutations={path: mutation(path) for path in draws},
            custom_explore_fn=inside,
            log_config=False,
            require_attrs=False,
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a trial with the values that it comes with.

        Tune refuses all search algorithms here, as one might learn from values that have changed on the way: ours
        learns nothing.
        """
        self._trial_state[trial] = _PBTTrialState(trial)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take over the values alone: a trial's folders stay its own."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return config | {key: trial.config[key] for key in OWN}, operations
