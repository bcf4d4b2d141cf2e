"""Attention transfer: the student's features are large where those of its teachers are.

Shapes: B taught images, T teachers; C channels of a map of H × W positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distillation.kd import no_loss, weighted_mean
from pipeline.distillation.pairing import is_map, pair_layers
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Return Q_bhw = mean_c |A_bchw|^power.

    Parameters
    ----------
    features : (B, C, H, W) tensor
        A.
    power
        > 0.

    Returns
    -------
    (B, H, W) tensor, at least in single precision.

    Raises
    ------
    ValueError
        For another shape, and power ≤ 0.
    """
    power = _checks.positive("power", power)
    if features.ndim != 4:
        raise ValueError(f"features must have shape (B, C, H, W), got shape {tuple(features.shape)}")
    size = features.to(torch.promote_types(features.dtype, torch.float32)).abs()
    if power < 1:
        size = size.clamp_min(1e-12)  # at 0 the slope of a root is infinite
    return size.pow(power).mean(1)


def attention_loss(student: Tensor, teacher: Tensor, *, power: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """Return mean_b w_b mean_i (Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖)²_bi, for one layer of the student and one of a teacher.

    Q is the `attention_map`, of H · W positions i. The larger of two maps is averaged down to the size of the smaller
    before it is normalised, along each axis by itself (ours; published are maps of one size). A map that is 0
    everywhere stays 0.

    Parameters
    ----------
    student : (B, C, H, W) tensor
    teacher : (B, C', H', W') tensor
        No gradient flows to it.
    power
        > 0.
    weights : (B,) tensor, optional
        w, ≥ 0; by default 1. The mean is over the B rows.

    Returns
    -------
    () tensor ≥ 0; at most 2 / (H · W) where the weights are 1.

    Raises
    ------
    ValueError
        For shapes that do not match, power ≤ 0, and weights that are not B finite numbers ≥ 0.
    """
    mine, theirs = attention_map(student, power), attention_map(teacher.detach(), power)
    if len(mine) != len(theirs):
        raise ValueError(f"student and teacher must have as many rows, got {len(mine)} and {len(theirs)}")
    size = min(mine.shape[1], theirs.shape[1]), min(mine.shape[2], theirs.shape[2])
    a, b = (F.normalize(F.adaptive_avg_pool2d(one, size).flatten(1), dim=1) for one in (mine, theirs))
    return weighted_mean((a - b.to(a)).square().mean(1), weights)


class AttentionTransfer(Objective):
    """Attention transfer [1]_ from several teachers.

    loss = mean_b Σ_t w_tb Σ_j mean_i (Q_s^j / ‖Q_s^j‖ − Q_t^j / ‖Q_t^j‖)²_bi over pairs j of layers and positions i,
    with Q^j = mean_c |A^j_c|^power and the shares w. Part: ``attention``.

    As in the authors' code, where its weight is β = 1000: a sum over layers, a mean over positions. Several teachers,
    the shares and the pairs are ours: `pair_layers` pairs the layers of either side that are maps of more than one
    position. A teacher that shows no such layer takes no part.

    Parameters
    ----------
    about : About
        The taps of the student and of its teachers.
    power
        > 0.

    Raises
    ------
    ValueError
        When there is no pair of maps at all, and for power ≤ 0.

    References
    ----------
    .. [1] Zagoruyko, Komodakis, "Paying more attention to attention: improving the performance of convolutional
       neural networks via attention transfer", ICLR 2017 (arXiv 1612.03928).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "live", "taps"})

    def __init__(self, about: About, *, power: float = 2.0) -> None:
        super().__init__()
        self.power = _checks.positive("power", power)
        mine = [name for name, shape in about.tap_shapes.items() if is_map(shape)]
        self.pairs: list[list[tuple[str, str]]] = []
        for teacher in about.teachers:
            theirs = [name for name, shape in teacher.tap_shapes.items() if is_map(shape)]
            self.pairs.append(pair_layers(mine, theirs) if mine and theirs else [])
        if not any(self.pairs):
            shown = {"student": dict(about.tap_shapes)} | {one.name: dict(one.tap_shapes) for one in about.teachers}
            raise ValueError(
                f"attention needs layers of shape (C, H, W) with H * W > 1 of the student and of a teacher, got {shown}"
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "attention"}``; 0 when nobody is taught."""
        loss = no_loss(step)["loss"]
        if step.said is not None:
            assert step.live is not None
            for share, seen, pairs in zip(step.said.shares, step.live, self.pairs, strict=True):
                rows = torch.nonzero(share > 0)[:, 0]
                for own, other in pairs if len(rows) else ():
                    mine, theirs = step.taps[own][step.taught][rows], seen.taps[other][step.taught][rows]
                    each = attention_loss(mine, theirs, power=self.power, weights=share[rows])
                    loss = loss + each * (len(rows) / len(share))
        return {"loss": loss, "attention": loss.detach()}
