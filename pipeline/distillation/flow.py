"""Knowledge flow: features of teachers flow into the student while it learns, and fade out [1]_.

Shapes: B images; a feature map is (C, H, W), a sequence (L, D), a vector (D,), all without the batch. K sources flow
into one layer of the student.

References
----------
.. [1] Liu, Peng, Schwing, "Knowledge flow: improve upon your teachers", ICLR 2019 (arXiv 1904.05878).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distillation.pairing import pair_layers

Taps = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """A layer of a teacher that flows into one of the student's.

    Attributes
    ----------
    teacher : int
        Its number.
    tap : str
        Name of the layer among what the teacher shows.
    shape : tuple of int
        Of its features, without the batch.
    """

    teacher: int
    tap: str
    shape: tuple[int, ...]


def transform(source_shape: Sequence[int], target_shape: Sequence[int]) -> nn.Module:
    """Build Q, a learnt linear map from a teacher's layer (B, …) to the shape of one of the student's (B, …).

    - Map to map: a 1×1 convolution and a bilinear resize (``align_corners=False``). The two commute, so that whichever
      leaves fewer positions to the convolution comes first.
    - Vector to vector, sequence to sequence of the same length: a linear layer.
    - All else: the mean over positions, and a linear layer to C' or D', the same at every position. A map of one
      position is a vector here.

    The publication leaves Q open; these rules are ours. Weights start as N(0, 1 / C) and biases at 0, so that what
    flows in has the mean square of the teacher's features.

    Parameters
    ----------
    source_shape, target_shape : tuple of int
        Without the batch.

    Raises
    ------
    ValueError
        For shapes that are neither (C, H, W), (L, D) nor (D,) with sizes ≥ 1; the module raises it for features of
        another shape.
    """
    return _Transform(source_shape, target_shape)


class _Transform(nn.Module):
    """See `transform`."""

    def __init__(self, source: Sequence[int], target: Sequence[int]) -> None:
        super().__init__()
        self.source, self.target = _shape("source", source), _shape("target", target)
        inputs, outputs = _channels(self.source), _channels(self.target)
        self.map: nn.Conv2d | nn.Linear
        if _is_map(self.source) and _is_map(self.target):
            self.map = nn.Conv2d(inputs, outputs, kernel_size=1)
        else:
            self.map = nn.Linear(inputs, outputs)
        nn.init.normal_(self.map.weight, std=inputs**-0.5)
        assert self.map.bias is not None
        nn.init.zeros_(self.map.bias)

    def forward(self, features: Tensor) -> Tensor:
        if tuple(features.shape[1:]) != self.source:
            raise ValueError(
                f"features must have shape (B, {', '.join(map(str, self.source))}), got {tuple(features.shape)}"
            )
        features = features.to(self.map.weight.dtype)  # the teacher may have run in half precision
        mapped: Tensor
        if isinstance(self.map, nn.Conv2d):
            size, wanted = self.source[1:], self.target[1:]
            if size == wanted:
                mapped = self.map(features)
            elif math.prod(wanted) < math.prod(size):
                mapped = self.map(_resized(features, wanted))
            else:
                mapped = _resized(self.map(features), wanted)
            return mapped
        if len(self.source) == len(self.target) == 2 and self.source[0] == self.target[0]:
            mapped = self.map(features)
            return mapped
        if len(self.source) == 3:
            features = features.mean(dim=(2, 3))
        elif len(self.source) == 2:
            features = features.mean(dim=1)
        mapped = self.map(features)
        if len(self.target) == 3:
            mapped = mapped[:, :, None, None]
        elif len(self.target) == 2:
            mapped = mapped[:, None]
        return mapped.expand(-1, *self.target)


def _resized(features: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def _is_map(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[1] * shape[2] > 1


def _channels(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def _shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in shape)
    if len(sizes) not in (1, 2, 3) or min(sizes) < 1:
        raise ValueError(f"{name} must be (C, H, W), (L, D) or (D,), without the batch, got {tuple(shape)}")
    return sizes


class Flow(nn.Module):
    """What flows into the layers of a student, and how much of it.

    With p_j = softmax(w_j) over the student and the K sources of layer j, w_j learnt [1]_,

        z_j = p_j^student h_j + Σ_l p_j^l Q_j^l(h_l),

    where h_j is the student's own output and h_l a teacher's, through which no gradient goes. Layers without a source
    have no part in it.

    `remaining`, r in [0, 1], is ours: the teachers' weights are r p_j^l, the student's is 1 − r (1 − p_j^student). The
    publication leaves it to the loss to bring p_j^student to 1, which takes more steps than a training on few images
    has. At r = 0 nothing flows; once it is independent, teachers need not be run.

    Parameters
    ----------
    layers : mapping of str to tuple
        Student layer to the shape of its output without the batch.
    sources : mapping of str to sequence of Source
    student_share : float
        p_j^student at the start, in (0, 1); the sources share the rest evenly. The publication does not say where the
        weights start; 1 / 2 is ours.

    Attributes
    ----------
    sources : dict of str to tuple of Source
        Of the layers that have any, in the order of `layers`.
    w : list of (1 + K,) parameters
        One a layer; the student comes first. Weight decay on them would draw the weights towards 1 / (1 + K), and the
        student back to its teachers.
    remaining : float
        r, 1 at the start. Not a part of the state.
    independent : bool
        True lets nothing flow: p_j^student = 1 in every layer. For evaluation and export, as the flow's parameters
        take no part then. Not a part of the state.

    Raises
    ------
    ValueError
        For a layer that does not exist, no source at all, and a share out of range.

    References
    ----------
    .. [1] Liu, Peng, Schwing, "Knowledge flow: improve upon your teachers", ICLR 2019 (arXiv 1904.05878).
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, Sequence[Source]],
        *,
        student_share: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < student_share < 1:
            raise ValueError(f"student_share must be in (0, 1), got {student_share}")
        for layer in sources:
            if layer not in layers:
                raise ValueError(f"there is no layer {layer!r} for sources to flow into; layers: {', '.join(layers)}")
        self.sources = {layer: tuple(sources[layer]) for layer in layers if sources.get(layer)}
        if not self.sources:
            raise ValueError("sources must name at least one layer of a teacher, got none")
        self.layers = {layer: tuple(layers[layer]) for layer in self.sources}
        self.independent = False
        # A buffer, so that a copy of former parameters (`Previous`) holds how much flowed when it was made.
        self.register_buffer("_remaining", torch.tensor(1.0), persistent=False)
        # In lists: names with dots can't be keys of a ModuleDict.
        self._place = {layer: place for place, layer in enumerate(self.sources)}
        self.w = nn.ParameterList()
        self.Q = nn.ModuleList()
        for layer, flowing in self.sources.items():
            start = torch.zeros(1 + len(flowing))
            start[0] = math.log(student_share / (1 - student_share) * len(flowing))
            self.w.append(nn.Parameter(start))
            self.Q.append(nn.ModuleList(transform(one.shape, self.layers[layer]) for one in flowing))

    def weights(self) -> dict[str, Tensor]:
        """Return the weights (1 + K,) of every layer, the student's first; with a gradient."""
        return {layer: self._weights(w) for layer, w in zip(self.sources, self.w, strict=True)}

    @property
    def remaining(self) -> float:
        """What remains of the teachers, r in [0, 1]."""
        return float(self.get_buffer("_remaining"))

    @remaining.setter
    def remaining(self, value: float) -> None:
        self.get_buffer("_remaining").fill_(value)

    def _weights(self, w: Tensor) -> Tensor:
        left = self.get_buffer("_remaining").to(w.dtype)
        own = torch.zeros_like(w)
        own[0] = 1 - left
        return own + left * torch.softmax(w, dim=0)

    def untouched(self) -> Tensor:
        """Return 0 with every parameter in its graph, for a step in which nothing flows."""
        return torch.stack([0 * parameter.sum() for parameter in self.parameters()]).sum()

    def dependency(self) -> Tensor:
        """Return L_dep = −Σ_j log p_j^student ≥ 0, p = softmax(w), which is 0 for a student that takes nothing."""
        return -torch.stack([torch.log_softmax(w, dim=0)[0] for w in self.w]).sum()

    def mix(self, layer: str, own: Tensor, taps: Taps) -> Tensor:
        """Return z_j (B, …); `own` itself when independent.

        Parameters
        ----------
        layer : str
        own : (B, …) tensor
            The student's output.
        taps : a mapping for each teacher
            What it shows: name to (B, …) tensor. No gradient flows to them.

        Raises
        ------
        ValueError
            For shapes that are not those that the flow was made for, and a tap that is missing.
        """
        if self.independent:
            return own
        if tuple(own.shape[1:]) != self.layers[layer]:
            raise ValueError(f"layer {layer!r} must have shape (B, *{self.layers[layer]}), got {tuple(own.shape)}")
        place = self._place[layer]
        p = self._weights(self.w[place])
        Q = self.Q[place]
        assert isinstance(Q, nn.ModuleList)
        mixed = p[0] * own
        for share, q, source in zip(p[1:], Q, self.sources[layer], strict=True):
            tap = _tap(source, taps)
            if len(tap) != len(own):
                raise ValueError(f"tap {source.tap!r} must be of {len(own)} images as the student is, got {len(tap)}")
            mixed = mixed + share * q(tap.detach()).to(own.dtype)
        return mixed

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let nothing flow inside the block."""
        before, self.independent = self.independent, True
        try:
            yield
        finally:
            self.independent = before


def _tap(source: Source, taps: Taps) -> Tensor:
    if not 0 <= source.teacher < len(taps):
        raise ValueError(f"taps must hold those of teacher {source.teacher}, got taps of {len(taps)} teachers")
    if source.tap not in taps[source.teacher]:
        shown = ", ".join(taps[source.teacher]) or "none"
        raise ValueError(f"teacher {source.teacher} must show tap {source.tap!r}, got {shown}")
    return taps[source.teacher][source.tap]


class FlowStudent(nn.Module):
    """A student into whose layers features of teachers flow.

    The output of each of the flow's layers is replaced by its mix, by hooks that live for one forward pass: the student
    itself stays as it is. They come before other hooks, so that `pipeline.models.capture.captured` sees the mix.

    Parameters
    ----------
    student : nn.Module
        Maps images to logits.
    flow : Flow
        Its layers are paths of modules below `root`, each of which runs once in a forward pass.
    root : str
        Path of the net in the student; "" where it is the student.

    Raises
    ------
    ValueError
        For a layer that does not exist; names the nearest ones.
    """

    def __init__(self, student: nn.Module, flow: Flow, root: str = "net") -> None:
        super().__init__()
        net = student.get_submodule(root)
        names = [name for name, _ in net.named_modules() if name]
        for layer in flow.layers:
            if layer not in names:
                near = difflib.get_close_matches(layer, names, n=3, cutoff=0.4) or names[:3]
                raise ValueError(f"there is no layer {layer!r} in the student; nearest: {', '.join(near)}")
        self.student, self.flow, self.root = student, flow, root

    def forward(self, images: Tensor, taps: Taps = ()) -> Tensor:
        """Return the student's logits (B, C_s) with what flows in from the teachers.

        Parameters
        ----------
        images : (B, C, H, W) tensor
        taps : a mapping for each teacher
            What it shows of these images: name to (B, …) tensor. None are needed when the flow is independent.

        Raises
        ------
        ValueError
            See `Flow.mix`; and for a layer that does not run, or runs more than once, or returns no tensor.
        """
        if self.flow.independent:
            logits: Tensor = self.student(images)
            return logits
        ran: list[str] = []

        def mixing(layer: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor:
                ran.append(layer)
                if not isinstance(output, Tensor):
                    raise ValueError(f"layer {layer!r} must return a tensor, got {type(output).__name__}")
                return self.flow.mix(layer, output, taps)

            return hook

        net = self.student.get_submodule(self.root)
        handles = []
        try:
            for layer in self.flow.layers:
                handles.append(net.get_submodule(layer).register_forward_hook(mixing(layer), prepend=True))
            logits = self.student(images)
        finally:
            for handle in handles:
                handle.remove()
        for layer in self.flow.layers:
            if ran.count(layer) != 1:
                raise ValueError(f"layer {layer!r} must run once in a forward pass, ran {ran.count(layer)} times")
        return logits


def default_sources(
    student_layers: Mapping[str, tuple[int, ...]], teachers: Sequence[Mapping[str, tuple[int, ...]]]
) -> dict[str, list[Source]]:
    """Choose which layers of the teachers flow into which of the student's: low feeds low, high feeds high.

    By relative depth, see `pair_layers`. A layer of the student takes at most one layer of each teacher. A layer of a
    teacher feeds one or two, as published [1]_, or none where the teacher has more layers than the student. Where a
    student has more than twice the layers of a teacher, the teacher's are spread over it from its lowest to its highest
    layer; a teacher's only layer feeds the student's highest. The rules beyond the published one are ours.

    Parameters
    ----------
    student_layers : mapping of str to tuple
        From low to high, with shapes without the batch.
    teachers : sequence of such mappings

    Returns
    -------
    dict of str to list of Source
        Every layer of the student; an empty list where nothing flows in.

    References
    ----------
    .. [1] Liu, Peng, Schwing, "Knowledge flow: improve upon your teachers", ICLR 2019 (arXiv 1904.05878).
    """
    wiring: dict[str, list[Source]] = {layer: [] for layer in student_layers}
    for number, shapes in enumerate(teachers):
        if not shapes or not wiring:
            continue
        for layer, tap in pair_layers(_spread(list(wiring), len(shapes)), list(shapes)):
            wiring[layer].append(Source(number, tap, tuple(shapes[tap])))
    return wiring


def _spread(layers: list[str], count: int) -> list[str]:
    """Return at most two of a student's layers for each of a teacher's `count`, evenly spread."""
    if count == 1:
        return layers[-1:]
    if len(layers) <= 2 * count:
        return layers
    last, steps = len(layers) - 1, 2 * count - 1
    return [layers[(2 * place * last + steps) // (2 * steps)] for place in range(2 * count)]
