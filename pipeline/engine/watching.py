"""A training that is judged while it goes on, and can be cut into legs: what a search among trainings needs.

Nothing of the training itself is touched: what it learns, and its checkpoints, are those of `train_arms`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.data.table import ImageTable
from pipeline.engine.arms import ArmsPayload, train_arms
from pipeline.engine.context import WorkerContext
from pipeline.engine.evaluation import HeadsEvaluation, evaluate, evaluate_heads, predict
from pipeline.engine.loop import batches_of

WATCHED = ("validation", "probe")
_BATCH = 512
_Judge = Callable[[nn.Module, torch.device], dict[str, float]]


@dataclass(frozen=True)
class WatchedPayload:
    """What travels to every worker.

    Attributes
    ----------
    arms : ArmsPayload
        With a single arm.
    until : int or None
        The epoch after which the leg ends; None: the training's end.
    """

    arms: ArmsPayload
    until: int | None = None


class _Enough(Exception):
    """The leg is over."""


def train_watched(context: WorkerContext, payload: WatchedPayload) -> None:
    """Train; each epoch's report has ``validation_accuracy`` and the like of the student as it then is.

    With an average of the weights (`LoopSpec.ema`) it is the student that is being averaged that is judged on the way.
    """
    table = ImageTable.open(payload.arms.table)
    splits = {name: table.split(name) for name in WATCHED}
    labels = {name: split.labels for name, split in splits.items() if len(split)}

    def judge(student: nn.Module, device: torch.device) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, right in labels.items():
            logits = predict(student, batches_of(splits[name], _BATCH), device)
            # A training that has gone astray ends by itself; until then there is nothing to judge.
            with contextlib.suppress(ValueError):
                found |= scores_of(name, logits, right, payload.arms)
        return found

    with contextlib.suppress(_Enough):
        train_arms(_Watched(context, judge, payload.until), payload.arms)


def scores_of(split: str, logits: Tensor, labels: Tensor, arms: ArmsPayload) -> dict[str, float]:
    """Return accuracy and negative log-likelihood on a split, in the mean over sub-tasks, under its name.

    Raises
    ------
    ValueError
        As `evaluate` does.
    """
    if arms.heads:
        found: HeadsEvaluation = evaluate_heads(logits, labels, arms.heads)
        nll = sum(one.nll for one in found.heads.values()) / len(found.heads)
        return {f"{split}_accuracy": found.accuracy, f"{split}_nll": nll}
    one = evaluate(logits, labels)
    return {f"{split}_accuracy": one.accuracy, f"{split}_nll": one.nll}


class _Watched:
    """The context of a training, with a judge at its reports."""

    def __init__(self, inner: WorkerContext, judge: _Judge, until: int | None) -> None:
        self.rank, self.world_size, self.device = inner.rank, inner.world_size, inner.device
        self.attempt, self.last_failure, self.memory_failures = inner.attempt, inner.last_failure, inner.memory_failures
        self._inner, self._judge, self._until = inner, judge, until
        self._learner: nn.Module | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Keep the learner at hand."""
        self._learner = model
        return self._inner.prepare(model)

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Add what the student is worth, on rank 0, whose metrics alone are kept; end where the leg does."""
        if "epoch" in metrics and self.rank == 0 and self._learner is not None:
            student = self._learner.get_submodule("student")
            metrics = metrics | self._judge(student, self.device)
        self._inner.report(metrics, checkpoint)
        if self._until is not None and metrics.get("epoch", 0) >= self._until:
            raise _Enough

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """Give the newest checkpoint."""
        return self._inner.restore()

    def leaving(self) -> bool:
        """Tell whether a worker's node is about to go."""
        return self._inner.leaving()

    def barrier(self) -> None:
        """Wait for every worker."""
        self._inner.barrier()
