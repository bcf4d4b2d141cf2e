"""What an objective sees: the student, what the teachers say and show, and what is known before the first step.

Shapes: n images of a step, of which the last B are taught; T teachers; C_s classes of the task; teacher t has a label
space of L_t, C_t classes of its own and D_t penultimate features; the student has D_s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """What a teacher shows of the images of a step, without a gradient.

    Attributes
    ----------
    logits : (n, C_t) tensor
        Over its own classes.
    features : (n, D_t) tensor
        Penultimate.
    taps : dict of str to (n, …) tensor
        Outputs of inner modules.
    """

    logits: Tensor
    features: Tensor
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """What the teachers say of the taught images of a step.

    Attributes
    ----------
    shares : (T, B) tensor
        How much each teacher counts for each image, ≥ 0. One non-zero entry a column where one teacher teaches an
        image; the same row everywhere where all teach with weights of their own.
    p : T tensors (B, L_t)
        Distributions over each teacher's label space.
    target : (T, B, C_s) tensor
        What these stand for among the task's classes.
    logits : T tensors (B, C_t), or None
        Over the teachers' own classes; there when an objective needs ``"said.logits"``.
    features : T tensors (B, D_t), or None
        Penultimate; there when an objective needs ``"said.features"``.
    """

    shares: Tensor
    p: tuple[Tensor, ...]
    target: Tensor
    logits: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Said:
        """Return what `function` makes of each tensor."""
        return Said(
            function(self.shares),
            tuple(function(one) for one in self.p),
            function(self.target),
            None if self.logits is None else tuple(function(one) for one in self.logits),
            None if self.features is None else tuple(function(one) for one in self.features),
        )

    def take(self, rows: Tensor | slice) -> Said:
        """Return what they say of some of the images."""
        return Said(
            self.shares[:, rows],
            tuple(one[rows] for one in self.p),
            self.target[:, rows],
            None if self.logits is None else tuple(one[rows] for one in self.logits),
            None if self.features is None else tuple(one[rows] for one in self.features),
        )

    def mixed(self) -> tuple[Tensor, Tensor]:
        """Return one distribution an image, Σ_t share_t target_t / Σ_t share_t (B, C_s), and Σ_t share_t (B,).

        An image that no teacher teaches gets the plain mean of all, and weight 0.
        """
        weight = self.shares.sum(0)
        none = (weight <= 0).to(self.shares.dtype)
        relative = (self.shares + none) / (weight + none * len(self.shares))
        return torch.einsum("tb,tbc->bc", relative, self.target), weight


@dataclass(frozen=True)
class Step:
    """One step of the training, as objectives see it.

    Attributes
    ----------
    logits : (n, C_s) tensor
        The student's; labelled images first, the B taught ones last.
    labels : (n,) int64 tensor
        −1 for images without a label, to which the taught ones belong.
    said : Said, or None
        None trains on the labels alone.
    features : (n, D_s) tensor, or None
        The student's penultimate features; there when an objective needs ``"features"``.
    taps : dict of str to (n, …) tensor
        Outputs of the student's inner modules; there when an objective needs ``"taps"``.
    live : T `Seen`, or None
        What the teachers show of these very views; there when an objective needs ``"live"``.
    progress : float
        Part of the training done, in [0, 1).
    """

    logits: Tensor
    labels: Tensor
    said: Said | None = None
    features: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    live: tuple[Seen, ...] | None = None
    progress: float = 0.0

    @property
    def taught(self) -> slice:
        """The rows of the taught images: the last B."""
        count = self.said.target.shape[1] if self.said is not None else 0
        return slice(len(self.logits) - count, None)


@dataclass(frozen=True)
class TeacherAbout:
    """What is known of a teacher before the training.

    Attributes
    ----------
    name : str
    classes : tuple of str
        Its own, C_t names.
    cost : (L_t, C_s) tensor
        Ground cost between its label space and the task's classes.
    gain : float
        Its transport gain, ≥ 0.
    feature_dim : int or None
        D_t.
    tap_shapes : dict of str to tuple
        Shape of each tap without the batch, from low to high.
    labelled_features : (A, D_t) tensor, or None
        Penultimate features of the A labelled images; there when an objective needs ``"labelled"``.
    labels : (A,) int64 tensor, or None
        Their classes.
    """

    name: str
    classes: tuple[str, ...]
    cost: Tensor
    gain: float = 1.0
    feature_dim: int | None = None
    tap_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labelled_features: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """One sub-task of a student with several: a part of its logits.

    Attributes
    ----------
    name : str
    place : slice
        Of the student's logits.
    members : tuple of int
        For each class of the images, the class of this head that it belongs to; −1 for none.
    """

    name: str
    place: slice
    members: tuple[int, ...]


@dataclass(frozen=True)
class About:
    """What an objective is built from, besides its settings.

    Attributes
    ----------
    classes : tuple of str
        What the student's logits stand for, C_s names: the task's classes, or those of all heads one after the other.
    feature_dim : int or None
        D_s of the student.
    tap_shapes : dict of str to tuple
        Shape of each of the student's taps without the batch, from low to high.
    teachers : tuple of TeacherAbout
    heads : tuple of Head
        Empty for a single task.
    """

    classes: tuple[str, ...]
    feature_dim: int | None = None
    tap_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    teachers: tuple[TeacherAbout, ...] = ()
    heads: tuple[Head, ...] = ()


class Objective(nn.Module):
    """A part of the loss: ``Objective(about, **settings)``; its weight and schedule are applied outside of it.

    A loss is a mean over a fixed number of rows, so that the mean over data-parallel ranks is that of the whole batch.
    Parameters of its own (projections, heads) are trained with the student and dropped after the training. Buffers that
    it changes are each rank's own: nobody sends them around.

    Attributes
    ----------
    needs : frozenset of str
        What it must be given beyond logits and labels: ``said``, ``said.logits``, ``said.features``, ``live``,
        ``features``, ``taps``, ``labelled``; and ``said.each`` where what the teachers say is to come from each of
        them, not from all as one.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss": with a gradient, NAME: detached, …}``."""
        raise NotImplementedError
