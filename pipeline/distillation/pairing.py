"""Which layer of the student goes with which of a teacher, and the learnt map between their shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pair_layers(student: Sequence[str], teacher: Sequence[str]) -> list[tuple[str, str]]:
    """Give every layer of the student the layer of the teacher at about the same relative depth.

    Layer i of S goes with layer round(i (K − 1) / (S − 1)) of K, halves up: first meets first, last meets last, and a
    higher layer never goes with a lower one than those below it. A single layer of the student goes with the
    teacher's last. Layers of the teacher are left out where it has more, and taken again where it has fewer. The rule
    is ours.

    Parameters
    ----------
    student, teacher : sequence of str
        From low to high.

    Returns
    -------
    list of (str, str)
        One pair for each layer of the student, from low to high.

    Raises
    ------
    ValueError
        When either has no layer, or one twice.
    """
    for who, layers in (("student", student), ("teacher", teacher)):
        if not layers:
            raise ValueError(f"{who} must have at least one layer, got none")
        if len(set(layers)) < len(layers):
            raise ValueError(f"{who} must not name a layer twice, got {list(layers)}")
    steps, last = len(student) - 1, len(teacher) - 1
    if steps == 0:
        return [(student[0], teacher[-1])]
    # round(i · last / steps), in whole numbers
    return [(name, teacher[(2 * i * last + steps) // (2 * steps)]) for i, name in enumerate(student)]


def is_map(shape: Sequence[int]) -> bool:
    """Return whether a tensor of this shape, without the batch, has positions to tell apart: (C, H, W), H · W > 1."""
    return len(shape) == 3 and shape[1] * shape[2] > 1


class Adapter(nn.Module):
    """A learnt linear map from a shape of the student's to one of a teacher's.

    - (C, H, W) to (C', H', W'): a 1×1 convolution without a bias, and a bilinear resize (``align_corners=False``). The
      two commute, so that whichever leaves fewer positions to the convolution comes first.
    - (D,) to (D',): a linear layer.
    - (C, H, W) to (D',): the mean over positions, and a linear layer.
    - (D,) to (C', H', W'): a linear layer to C', the same at every position.

    The published regressors are convolutions that fit the sizes at hand; these four rules are ours.

    Parameters
    ----------
    student, teacher : tuple of int
        Shapes without the batch.

    Raises
    ------
    ValueError
        For shapes that are neither (C, H, W) nor (D,) with sizes ≥ 1.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        self.student, self.teacher = _shape("student", student), _shape("teacher", teacher)
        self.map: nn.Conv2d | nn.Linear
        if len(self.student) == len(self.teacher) == 3:
            self.map = nn.Conv2d(self.student[0], self.teacher[0], kernel_size=1, bias=False)
        else:
            self.map = nn.Linear(self.student[0], self.teacher[0])

    def forward(self, features: Tensor) -> Tensor:
        """Bring features of the student (B, …) to the teacher's shape.

        Raises
        ------
        ValueError
            For features of another shape.
        """
        if tuple(features.shape[1:]) != self.student:
            raise ValueError(
                f"features must have shape (B, {', '.join(map(str, self.student))}), got {tuple(features.shape)}"
            )
        features = features.to(self.map.weight.dtype)  # the student may have run in half precision
        mapped: Tensor
        if len(self.student) == len(self.teacher) == 3:
            size, others = self.student[1:], self.teacher[1:]
            if size == others:
                mapped = self.map(features)
            elif math.prod(others) < math.prod(size):
                mapped = self.map(_resized(features, others))
            else:
                mapped = _resized(self.map(features), others)
            return mapped
        mapped = self.map(features.mean(dim=(2, 3)) if len(self.student) == 3 else features)
        return mapped if len(self.teacher) == 1 else mapped[:, :, None, None].expand(-1, *self.teacher)


def _resized(features: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def _shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in shape)
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise ValueError(f"{name} must have shape (C, H, W) or (D,) without the batch, got {tuple(shape)}")
    return sizes


def each_squared_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean squared difference of each row, at least in single precision; no gradient flows to `theirs`.

    Parameters
    ----------
    mine, theirs : (B, …) tensor

    Returns
    -------
    (B,) tensor

    Raises
    ------
    ValueError
        For shapes that differ.
    """
    if mine.ndim < 2 or mine.shape != theirs.shape:
        raise ValueError(f"both must have one shape (B, ...), got {tuple(mine.shape)} and {tuple(theirs.shape)}")
    mine = mine.to(torch.promote_types(mine.dtype, torch.float32))
    return (mine - theirs.detach().to(mine)).square().flatten(1).mean(1)
