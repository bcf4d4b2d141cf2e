"""Teacher dropping: the teacher that the student is furthest from stays, the others come and go.

Shapes: T teachers, B taught images, C_s classes of the task.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pipeline.distillation.kd import no_loss, soften, softened_divergence
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks


def teacher_losses(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return T² KL(soften(target_tb, T) ‖ softmax(z_b / T)) of every teacher and image.

    Parameters
    ----------
    logits : (B, C_s) tensor
        z, the student's.
    target : (T, B, C_s) tensor
        Distributions at temperature 1. No gradient flows to them.
    temperature
        T > 0.

    Returns
    -------
    (T, B) tensor

    Raises
    ------
    ValueError
        Without teachers, for shapes that do not match, rows that are no distributions, and T ≤ 0.
    """
    if target.ndim != 3 or not len(target) or target.shape[1:] != logits.shape:
        raise ValueError(
            "logits and target must have shapes (B, C_s) and (T, B, C_s) with T >= 1, got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}"
        )
    return torch.stack([softened_divergence(logits, soften(each, temperature), temperature) for each in target])


def kept_teachers(losses: Tensor, draws: Tensor, drop: float) -> Tensor:
    """Return which teachers stay for which image.

    The one with the highest loss always (the first of equals), any other unless its draw is below `drop` [1]_.

    Parameters
    ----------
    losses : (T, B) tensor
    draws : (T, B) tensor
        Uniform in [0, 1).
    drop
        Probability, in [0, 1].

    Returns
    -------
    (T, B) bool tensor, at least one True a column.

    Raises
    ------
    ValueError
        For shapes that do not match, no teachers, and a probability outside [0, 1].

    References
    ----------
    .. [1] Sariyildiz et al., "UNIC: Universal classification models via multi-teacher distillation", ECCV 2024
       (arXiv 2408.05088).
    """
    drop = _probability(drop)
    if losses.ndim != 2 or not len(losses) or draws.shape != losses.shape:
        raise ValueError(
            "losses and draws must have one shape (T, B) with T >= 1, got "
            f"{tuple(losses.shape)} and {tuple(draws.shape)}"
        )
    highest = losses.detach().argmax(0, keepdim=True)
    return (draws.to(losses.device) >= drop).scatter(0, highest, True)


def teacher_dropping_loss(losses: Tensor, kept: Tensor) -> Tensor:
    """Return mean_b of the mean of losses_tb over the teachers kept for image b.

    Every image counts alike, which is ours: the published code divides by the number of kept pairs of the whole batch,
    where images that keep more teachers count more, and the mean over data-parallel ranks is not that of the batch.

    Parameters
    ----------
    losses : (T, B) tensor
    kept : (T, B) bool tensor
        At least one True a column.

    Returns
    -------
    () tensor; 0, with a gradient of 0, when B is 0.

    Raises
    ------
    ValueError
        For shapes that do not match, and an image without a teacher.
    """
    if losses.ndim != 2 or kept.shape != losses.shape:
        raise ValueError(
            f"losses and kept must have one shape (T, B), got {tuple(losses.shape)} and {tuple(kept.shape)}"
        )
    if not bool(kept.any(0).all()):
        raise ValueError("kept must hold a teacher for every image")
    return (torch.where(kept, losses, 0).sum(0) / kept.sum(0)).sum() / max(losses.shape[1], 1)


def _probability(drop: float) -> float:
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be in [0, 1], got {drop}")
    return drop


class TeacherDropping(Objective):
    """Knowledge distillation from the teacher that the student is furthest from, and from some of the others.

    loss = mean_b mean_{t kept for b} T² KL(soften(p_tb, T) ‖ softmax(z_b / T)), see `kept_teachers` for who stays [1]_.
    It is the opposite of learning from the least ambiguous teacher, and ignores shares. Parts: ``teacher_dropping``,
    and ``kept_teachers``, how many stay for an image on average.

    The publication's losses are on features; distributions over the task's classes instead are ours, and so is that
    nothing is dropped in eval mode.

    Parameters
    ----------
    about : About
    drop
        Probability in [0, 1]. Random numbers come from torch's global generator on the CPU, one a teacher and image, so
        that a run does not depend on the device.
    temperature
        T > 0.

    Raises
    ------
    ValueError
        For a probability outside [0, 1], and T ≤ 0.

    References
    ----------
    .. [1] Sariyildiz et al., "UNIC: Universal classification models via multi-teacher distillation", ECCV 2024
       (arXiv 2408.05088).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "said.each"})

    def __init__(self, about: About, *, drop: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.drop, self.temperature = _probability(drop), _checks.positive("temperature", temperature)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "teacher_dropping", "kept_teachers"}``; 0 when nobody is taught."""
        if step.said is None:
            return no_loss(step, "teacher_dropping", "kept_teachers")
        losses = teacher_losses(step.logits[step.taught], step.said.target, self.temperature)
        if self.training:
            kept = kept_teachers(losses, torch.rand(losses.shape), self.drop)
        else:
            kept = torch.ones_like(losses, dtype=torch.bool)
        loss = teacher_dropping_loss(losses, kept)
        return {
            "loss": loss,
            "teacher_dropping": loss.detach(),
            "kept_teachers": kept.sum().to(loss.dtype) / max(losses.shape[1], 1),
        }
