"""What a weight file tells of the net that it belongs to: its architecture, its number of classes, its channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.models import nets
from pipeline.models.capture import find_penultimate

_ROOM = "pipeline.models.nets"
_OURS = ("small_cnn", "mlp", "small_vgg", "small_mobilenet", "resnet8", "resnet14", "resnet20")
# They draw their initial weights with SciPy, for seconds, and have a second head.
_NOT_TRIED = ("googlenet", "inception_v3")
# How the first weights of torchvision's families are called; of all others ``features.``. Building one takes a while.
_FIRST = {
    "resnet": "conv1.weight",
    "resnext": "conv1.weight",
    "wide_resnet": "conv1.weight",
    "shufflenet": "conv1.0.weight",
    "mnasnet": "layers.0.weight",
    "regnet": "stem.0.weight",
    "maxvit": "stem.0.0.weight",
    "vit": "conv_proj.weight",
}
_OFTEN = ("resnet", "mobilenet", "efficientnet_b", "densenet", "vgg", "convnext")  # are tried first


@dataclass(frozen=True)
class Architecture:
    """A net that has exactly the weights of a file.

    Attributes
    ----------
    source : dict
        The part of a teacher's `source` that builds it, without `path`: `model`, or `factory` and `kwargs`.
    torchvision : bool
        Whether it is a model of ``torchvision.models``.
    classes : int
        Outputs.
    channels : int
        Of the images that it takes.
    """

    source: dict[str, Any]
    torchvision: bool
    classes: int
    channels: int


def recognise(state: Mapping[str, Tensor]) -> Architecture | None:
    """Find the net of this package or of torchvision whose weights have these names and shapes.

    Parameters
    ----------
    state : mapping of str to Tensor
        Weights by name.

    Returns
    -------
    architecture : Architecture or None
        None where there is none, or the file holds something else.
    """
    for name, kwargs, build in _ours(state):
        found = _fits(build, state)
        if found is not None:
            classes, channels = found
            source = {"factory": f"{_ROOM}:{name}", "kwargs": kwargs | {"in_channels": channels}}
            return Architecture(source, False, classes, channels)
    for name, build in _torchvision(state):
        found = _fits(build, state)
        if found is not None:
            return Architecture({"model": name}, True, *found)
    return None


def outputs_of(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of outputs where one linear layer alone can be the last: the only one with a bias."""
    rows = {
        len(bias)
        for name, bias in state.items()
        if name.endswith(".bias") and bias.ndim == 1 and _weight_of(state, name) is not None
    }
    return rows.pop() if len(rows) == 1 else None


def _weight_of(state: Mapping[str, Tensor], bias: str) -> Tensor | None:
    weight = state.get(bias.removesuffix("bias") + "weight")
    return weight if weight is not None and weight.ndim == 2 else None


def _fits(build: Callable[[int], nn.Module], state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the number of classes and channels if a net has exactly these weights, its last layer aside in size."""
    net = _built(build, 2)
    if net is None or set(net.state_dict()) - {name for name in net.state_dict() if _optional(name)} - set(state):
        return None
    if set(state) - set(net.state_dict()):
        return None
    head = find_penultimate(net)
    if head is None or f"{head}.weight" not in state:
        return None
    classes = len(state[f"{head}.weight"])
    net = _built(build, classes)
    if net is None:
        return None
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items() if name in state}
    if any(tuple(state[name].shape) != shape for name, shape in wanted.items()):
        return None
    return classes, _channels(net)


def _optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # files from before it existed lack it


def _built(build: Callable[[int], nn.Module], classes: int) -> nn.Module | None:
    try:
        with torch.device("meta"):  # shapes alone: no memory, no drawing of weights
            return build(classes)
    except Exception:  # a net that can't be built with these arguments is not the one
        return None


def _channels(net: nn.Module) -> int:
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None:
        return first.in_channels
    if isinstance(net, nets.MLP):
        grid = int(net.pool.output_size)  # type: ignore[arg-type]
        return cast(nn.Linear, net.stage1[0]).in_features // (grid * grid)
    return 3


def _ours(state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any], Callable[[int], nn.Module]]]:
    """Yield this package's nets of the width, channels and grid that the first layer has."""
    first = state.get("stage1.0.weight", state.get("stem.0.weight"))
    if first is None:
        first = state.get("stage1.0.0.weight")
    if first is None or first.ndim not in (2, 4):
        return
    width = len(first)
    choices: list[tuple[dict[str, Any], int]] = []
    if first.ndim == 4:
        choices.append(({"width": width}, first.shape[1]))
    else:
        for channels in (1, 3):
            grid = math.isqrt(first.shape[1] // channels)
            if channels * grid * grid == first.shape[1]:
                choices.append(({"width": width, "grid": grid}, channels))
    for name in _OURS:
        for kwargs, channels in choices:
            if ("grid" in kwargs) == (name == "mlp"):
                yield name, kwargs, _partial(getattr(nets, name), in_channels=channels, **kwargs)


def _torchvision(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Callable[[int], nn.Module]]]:
    """Yield torchvision's classification models whose weights begin as these do; the usual ones first."""
    from torchvision import models  # costs seconds

    names = [name for name in models.list_models(module=models) if name not in _NOT_TRIED and _may_be(name, state)]
    ranks = {name: [name.startswith(prefix) for prefix in _OFTEN] for name in names}
    for name in sorted(names, key=lambda name: ranks[name].index(True) if any(ranks[name]) else len(_OFTEN)):
        yield name, _partial_model(models.get_model, name)


def _may_be(name: str, state: Mapping[str, Tensor]) -> bool:
    first = next((key for family, key in _FIRST.items() if name.startswith(family)), None)
    return any(key.startswith("features.") for key in state) if first is None else first in state


def _partial(factory: Callable[..., nn.Module], **kwargs: Any) -> Callable[[int], nn.Module]:
    return lambda classes: factory(num_classes=classes, **kwargs)


def _partial_model(get: Callable[..., nn.Module], name: str) -> Callable[[int], nn.Module]:
    return lambda classes: get(name, weights=None, num_classes=classes)
