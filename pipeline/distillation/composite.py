"""The whole loss: named objectives, each with a weight that may rise and fade as the training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.distillation.step import Objective, Step


@dataclass(frozen=True)
class Schedule:
    """A weight over the training.

    weight(t) = weight · min(t / rise, 1) · min((1 − t) / (1 − fade), 1), t the part of the training done in [0, 1].

    Attributes
    ----------
    weight : float
        ≥ 0.
    rise : float
        Part of the training over which the weight rises linearly from 0; 0: it starts in full.
    fade : float
        Point of the training from which it falls linearly, to 0 at the end; 1: it stays.
    """

    weight: float = 1.0
    rise: float = 0.0
    fade: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must be >= 0, got {self.weight}")
        for name in ("rise", "fade"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def at(self, progress: float) -> float:
        """Return the weight at `progress`."""
        rising = min(progress / self.rise, 1.0) if self.rise > 0 else 1.0
        falling = min((1 - progress) / (1 - self.fade), 1.0) if self.fade < 1 else 1.0
        return self.weight * rising * falling


class Composite(Objective):
    """loss = Σ_k weight_k(t) · loss_k.

    Parameters
    ----------
    parts : mapping of str to (Objective, Schedule)

    Raises
    ------
    ValueError
        When there is none.
    """

    def __init__(self, parts: Mapping[str, tuple[Objective, Schedule]]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("there must be at least one objective")
        # A module's name may hold no dot, which that of someone's own objective does.
        self.parts = nn.ModuleList([objective for objective, _ in parts.values()])
        self.names = tuple(parts)
        self.schedules = tuple(schedule for _, schedule in parts.values())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss"}`` and all that the parts report, without their weights."""
        total, reported = step.logits.sum() * 0, dict[str, Tensor]()
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            found = dict(part(step))
            loss = found.pop("loss")
            weight = schedule.at(step.progress)
            # A weight of 0 must not turn an infinite part into NaN, and all parameters stay in the graph.
            total = total + weight * loss if weight > 0 else total + self._untouched(part, loss)
            reported |= found
        return {"loss": total, **reported}

    @staticmethod
    def _untouched(part: nn.Module, loss: Tensor) -> Tensor:
        touched = [0 * parameter.sum() for parameter in part.parameters()]
        return torch.stack(touched).sum() if touched else loss.new_zeros(())
