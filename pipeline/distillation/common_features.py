"""Common feature learning: student and teachers meet in one feature space that is learnt beside the student.

Shapes: B taught images, T teachers, D_t features of teacher t, D_s of the student, d dimensions of the common space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distillation.kd import no_loss, weighted_mean
from pipeline.distillation.pairing import each_squared_error
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks

_SIGMAS = (0.001, 0.01, 0.05, 0.1, 0.2, 1.0, 2.0)


def mmd(x: Tensor, y: Tensor, sigmas: Sequence[float] = _SIGMAS) -> Tensor:
    """Return the squared maximum mean discrepancy of two samples, mean k(x, x') + mean k(y, y') − 2 mean k(x, y).

    k(a, b) = Σ_σ exp(−‖a − b‖² / 2 σ²). The means are over all pairs, a row with itself among them: the biased
    estimate, which is never negative but for rounding, and 0 for equal samples. Kernels that are narrow beside the
    distances add about 1 / N + 1 / M each, and no gradient.

    Parameters
    ----------
    x : (N, d) tensor
    y : (M, d) tensor
    sigmas
        > 0.

    Returns
    -------
    () tensor

    Raises
    ------
    ValueError
        For shapes that do not match, no rows, and sigmas that are none or not > 0.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"x and y must have shapes (N, d) and (M, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not sigmas:
        raise ValueError("sigmas must hold at least one width, got none")
    for sigma in sigmas:
        _checks.positive("sigmas", sigma)
    x, y = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (x, y))
    total = x.new_zeros(())
    for a, b, factor in ((x, x, 1), (y, y, 1), (x, y, -2)):
        # From the differences: through |a|² + |b|² − 2ab, rounding is as large as the narrowest kernel.
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        for sigma in sigmas:
            total = total + factor * torch.exp(squares / (-2 * sigma**2)).mean()
    return total


def common_feature_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    rebuilt: Sequence[Tensor],
    features: Sequence[Tensor],
    *,
    reconstruction: float = 1.0,
    sigmas: Sequence[float] = _SIGMAS,
) -> Tensor:
    """Return Σ_t MMD²(h_s / ‖h_s‖, h_t / ‖h_t‖) + β Σ_t MSE(rebuilt_t, f_t).

    Parameters
    ----------
    student : (B, d) tensor
        h_s, common features of the student.
    teachers : T tensors (B, d)
        h_t, those of the teachers. The gradient flows to them: the common space is learnt.
    rebuilt : T tensors (B, D_t)
        What is made of h_t again.
    features : T tensors (B, D_t)
        f, the teachers' features. No gradient flows to them.
    reconstruction
        β ≥ 0.
    sigmas
        Widths of the kernels, see `mmd`.

    Raises
    ------
    ValueError
        For shapes that do not match, β < 0, and what `mmd` refuses.
    """
    if not reconstruction >= 0:
        raise ValueError(f"reconstruction must be >= 0, got {reconstruction}")
    if not len(teachers) == len(rebuilt) == len(features):
        raise ValueError(
            f"teachers, rebuilt and features must be as many, got {len(teachers)}, {len(rebuilt)} and {len(features)}"
        )
    total = student[:0].sum()
    h = F.normalize(student, dim=1)
    for common, made, given in zip(teachers, rebuilt, features, strict=True):
        total = total + mmd(h, F.normalize(common, dim=1), sigmas)
        total = total + reconstruction * weighted_mean(each_squared_error(made, given), None)
    return total


class CommonFeatures(Objective):
    """Common feature learning (CFL [1]_): the student's features follow those of all teachers in a common space.

    A linear layer and ReLU for each net bring its features to 2 d dimensions, an extractor that all share brings these
    to d, and a small decoder for each teacher makes its features from them again, so that the common space keeps what
    the teachers know. loss = Σ_t MMD²(h_s, h_t) + β Σ_t MSE(rebuilt_t, f_t), h of length 1. Part:
    ``common_features``.

    As in the authors' code: sums over teachers; the biased MMD with seven Gaussian kernels; the extractor of three
    residual blocks without normalisation; β = 1. There this loss has the weight 10, d is 128, and the student learns
    the teachers' concatenated soft labels beside it.

    What differs (ours): published are the feature maps before the pooling, with convolutions, flattened for the MMD;
    here they are the penultimate vectors, which the teachers may have said before the training, with linear layers.
    All teachers count alike for every image: the shares have no part in it.

    An MMD is no mean over rows. In data-parallel training it is that of the rows of each rank by itself, averaged over
    ranks: not the same number as that of the whole batch, and more biased the fewer rows a rank has.

    Parameters
    ----------
    about : About
        The widths of the student and of its teachers.
    dim
        d ≥ 1.
    reconstruction
        β ≥ 0.
    sigmas
        Widths of the kernels, > 0, between features of length 1.

    Raises
    ------
    ValueError
        Without teachers or the width of one of the nets, and for settings out of range.

    References
    ----------
    .. [1] Luo et al., "Knowledge amalgamation from heterogeneous networks by common feature learning", IJCAI 2019
       (arXiv 1906.10546).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "said.features", "features"})

    def __init__(
        self, about: About, *, dim: int = 64, reconstruction: float = 1.0, sigmas: Sequence[float] = _SIGMAS
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        if not reconstruction >= 0:
            raise ValueError(f"reconstruction must be >= 0, got {reconstruction}")
        self.reconstruction, self.sigmas = reconstruction, tuple(_checks.positive("sigmas", one) for one in sigmas)
        if not self.sigmas:
            raise ValueError("sigmas must hold at least one width, got none")
        if not about.teachers:
            raise ValueError("common_features needs at least one teacher, got none")
        width = _width("the student", about.feature_dim)
        widths = [_width(f"teacher {teacher.name!r}", teacher.feature_dim) for teacher in about.teachers]
        self.align_student = _aligned(width, 2 * dim)
        self.align_teachers = nn.ModuleList(_aligned(one, 2 * dim) for one in widths)
        self.extractor = nn.Sequential(_Residual(2 * dim, dim), _Residual(dim, dim), _Residual(dim, dim))
        self.decoders = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, one, bias=False), nn.ReLU(), nn.Linear(one, one, bias=False)) for one in widths
        )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "common_features"}``; 0 when nobody is taught."""
        if step.said is None or not step.said.shares.shape[1]:
            return no_loss(step, "common_features", objective=self)
        assert step.said.features is not None
        assert step.features is not None
        kind = next(self.parameters()).dtype
        features = [one.detach().to(kind) for one in step.said.features]
        student = self.extractor(self.align_student(step.features[step.taught].to(kind)))
        teachers = [self.extractor(align(one)) for align, one in zip(self.align_teachers, features, strict=True)]
        rebuilt = [decoder(one) for decoder, one in zip(self.decoders, teachers, strict=True)]
        loss = no_loss(step)["loss"] + common_feature_loss(
            student, teachers, rebuilt, features, reconstruction=self.reconstruction, sigmas=self.sigmas
        )
        return {"loss": loss, "common_features": loss.detach()}


class _Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, out, bias=False)
        self.second = nn.Linear(out, out, bias=False)
        self.shortcut = nn.Linear(width, out, bias=False) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(torch.relu(self.first(x)))
        return torch.relu(inner + self.shortcut(x))


def _aligned(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out, bias=False), nn.ReLU())


def _width(who: str, width: int | None) -> int:
    if width is None:
        raise ValueError(f"common_features needs penultimate features, and {who} has none")
    return width
