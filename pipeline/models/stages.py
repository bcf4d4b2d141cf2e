"""Where a net changes its resolution: the layers at which features are compared and mixed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.capture import _HEADS, find_penultimate, module_at

_QUIET = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


@dataclass(frozen=True)
class _Ran:
    """A module that ran once, and the shape of its output without the batch."""

    path: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1

    @property
    def is_leaf(self) -> bool:
        return next(self.module.children(), None) is None

    @property
    def learns(self) -> bool:
        return next(self.module.parameters(), None) is not None


def stages_of(net: nn.Module, images: Tensor, *, before_activation: bool = False) -> dict[str, tuple[int, ...]]:
    """Find the stages of a net by looking at one forward pass.

    In a net with feature maps: the last module at each spatial size, and the stem where it has the size of the first
    stage. Sizes that only pooling makes do not count. The modules are those at the shallowest depth that shows as many
    sizes as any depth does, or three and more and all but one.

    In a net without maps: its direct children with outputs (B, D), where what has no weight matrix (a norm, an
    activation) belongs to the child before it.

    The classifier is no stage. These rules are ours.

    Parameters
    ----------
    net : nn.Module
        Its modes stay as they are; it is run in evaluation mode, without a gradient.
    images : (B, C, H, W) tensor
        Preprocessed, on the net's device.
    before_activation : bool
        Take features before the activation [1]_: of a stage that ends in activations or dropout, the last module
        before them. An activation that is no module (the sum of a residual block) can't be told from the block, so
        that the block itself is taken.

    Returns
    -------
    dict of str to tuple
        Module path to the shape of its output without the batch, from low to high; empty where no module fits, as in
        nets whose features are sequences of tokens.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """
    ran = _run(net, images)
    shapes = {one.path: one.shape for one in ran}
    before_head = [one for one in ran if not set(one.path.split(".")) & set(_HEADS)]
    pieces = _map_pieces(before_head, tuple(images.shape[1:])) or _vector_pieces(net, ran)
    found = (_end(piece, shapes, before_activation) for piece in pieces)
    return {path: shapes[path] for path in found}


def shapes_of(net: nn.Module, images: Tensor, paths: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the output shapes, without the batch, of modules by path, in the order in which they run.

    Parameters
    ----------
    net : nn.Module
        Its modes stay as they are; it is run in evaluation mode, without a gradient.
    images : (B, C, H, W) tensor
        Preprocessed, on the net's device.
    paths : collection of str

    Raises
    ------
    ValueError
        For a path that does not exist (names the nearest), and a module that does not run, runs more than once or
        returns no tensor.
    """
    for path in paths:
        module_at(net, path)
    shapes = {one.path: one.shape for one in _run(net, images) if one.path in paths}
    for path in paths:
        if path not in shapes:
            raise ValueError(f"module {path!r} does not return one tensor once in a forward pass, so it is no layer")
    return shapes


def _run(net: nn.Module, images: Tensor) -> list[_Ran]:
    """Return the modules that ran once and returned a tensor (B, …), in the order in which they ended."""
    ended: list[_Ran] = []
    times: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            times[path] = times.get(path, 0) + 1
            if isinstance(output, Tensor) and output.ndim >= 2 and len(output) == len(images):
                ended.append(_Ran(path, module, tuple(output.shape[1:])))

        return hook

    handles = []
    with _evaluating(net), torch.no_grad():
        try:
            for path, module in net.named_modules():
                if path:
                    handles.append(module.register_forward_hook(note(path)))
            net(images)
        finally:
            for handle in handles:
                handle.remove()
    return [one for one in ended if times[one.path] == 1]


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    try:
        with suppress(NotImplementedError):  # what torch.export made has no modes
            net.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _map_pieces(ran: list[_Ran], image: tuple[int, ...]) -> list[list[_Ran]]:
    """Return modules that follow each other, a list for each stage."""
    levels = []
    for depth in range(1, max((one.depth for one in ran), default=0) + 1):
        level = [one for one in ran if one.depth == depth or (one.depth < depth and one.is_leaf)]
        runs = [(size, list(run)) for size, run in groupby(level, key=lambda one: _size(one, image))]
        # Without parameters a run is a pooling before the next size, or after the last.
        last = {size: run for size, run in runs if size is not None and any(one.learns for one in run)}
        levels.append(sorted(last.values(), key=lambda run: level.index(run[0])))
    most = max(map(len, levels), default=0)
    # The one more size that the inside of a block may show, in a branch of it, is not worth taking the block apart.
    pieces = next((level for level in levels if len(level) == most or len(level) >= max(most - 1, 3)), [])
    if pieces and (stem := _stem(pieces[0])):
        return [stem, *pieces]
    return pieces


def _size(one: _Ran, image: tuple[int, ...]) -> tuple[int, int] | None:
    """Return height and width of a feature map; None of anything else."""
    if len(one.shape) != 3 or len(image) != 3:
        return None
    _, height, width = one.shape
    # Some nets keep channels last inside; these sizes have another aspect than the image.
    skew = abs(height * image[2] - width * image[1])
    return (height, width) if height * width > 1 and skew <= 2 * max(image[1:]) else None


def _stem(run: list[_Ran]) -> list[_Ran]:
    """Return what comes before the first block of a run; empty where it has one block, or is not made of blocks."""
    first = next((place for place, one in enumerate(run) if not one.is_leaf), len(run))
    if first == len(run):
        return []
    stem, rest = (run[:first], run[first:]) if any(one.learns for one in run[:first]) else (run[:1], run[1:])
    return stem if any(one.learns for one in rest) else []


def _vector_pieces(net: nn.Module, ran: list[_Ran]) -> list[list[_Ran]]:
    classifier = find_penultimate(net) or ""
    pieces: list[list[_Ran]] = []
    for one in ran:
        if one.depth > 1 or len(one.shape) != 1 or f"{classifier}.".startswith(f"{one.path}."):
            continue
        if any(parameter.ndim > 1 for parameter in one.module.parameters()):
            pieces.append([one])
        elif pieces and pieces[-1][-1].shape == one.shape:
            pieces[-1].append(one)
    return pieces


def _end(piece: list[_Ran], shapes: dict[str, tuple[int, ...]], before_activation: bool) -> str:
    """Return the path of the module whose output is the piece's."""
    if not before_activation:
        return piece[-1].path
    last = next((one for one in reversed(piece) if not _is_quiet(one.module)), piece[-1])
    path, module = last.path, last.module
    while isinstance(module, nn.Sequential):
        inner = [(name, child) for name, child in module.named_children() if not _is_quiet(child)]
        ends_quietly = _is_quiet(module[-1]) if len(module) else False
        nested = bool(inner) and isinstance(inner[-1][1], nn.Sequential)
        if not inner or not (ends_quietly or nested) or f"{path}.{inner[-1][0]}" not in shapes:
            break
        path, module = f"{path}.{inner[-1][0]}", inner[-1][1]
    return path


def _is_quiet(module: nn.Module) -> bool:
    """Return whether a module only activates, drops or passes on what comes in."""
    kind = type(module)
    return kind is nn.Identity or (kind.__module__ in _QUIET and kind is not nn.MultiheadAttention)
