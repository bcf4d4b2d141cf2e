"""How large a net is and how much it computes, found without weights and without computing: on torch's meta device."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.capture import find_penultimate

_BATCH = 2  # a training BatchNorm needs two images


@dataclass(frozen=True)
class NetSize:
    """What is known of a net; bytes and operations are of one image where they are of images.

    Attributes
    ----------
    parameters : int
    parameter_bytes : int
        As they are in memory.
    weight_bytes : int
        Parameters and buffers.
    flops : float or None
        Of a forward pass: matrix products and convolutions, a multiplication with its addition being two operations.
        None where the net can't be run on the meta device.
    forward_bytes : int or None
        Highest sum of the activations that live at once in a forward pass without a gradient, the input included.
    training_bytes : int or None
        What autograd keeps for the backward pass.
    features : int or None
        Width of the penultimate features.
    outputs : int or None
        Width of the last layer.
    """

    parameters: int
    parameter_bytes: int
    weight_bytes: int
    flops: float | None = None
    forward_bytes: int | None = None
    training_bytes: int | None = None
    features: int | None = None
    outputs: int | None = None


def measure_net(net: nn.Module, shape: tuple[int, int, int], *, training: bool = False) -> NetSize:
    """Measure a net for images (C, H, W), on whatever device it is; on ``meta`` nothing is computed.

    Parameters
    ----------
    net : nn.Module
        Its modes, gradients and running statistics are as they were afterwards.
    shape : (C, H, W)
        Of what the net itself gets.
    training : bool
        Whether to find `training_bytes`.

    Raises
    ------
    RuntimeError, NotImplementedError, …
        Whatever the net raises where it can't take such images.
    """
    known = weights_of(net)
    first = next((value for value in net.parameters() if value.is_floating_point()), torch.empty(0))
    images = torch.zeros(_BATCH, *shape, dtype=first.dtype, device=first.device)
    modes = [(module, module.training) for module in net.modules()]
    buffers = [(value, value.clone()) for value in net.buffers()] if training else []
    try:
        _set_mode(net, False)
        with torch.no_grad(), _Living(net) as living, FlopCounterMode(display=False) as counter:
            living.add(images)
            net(images)
        kept = None
        if training:
            _set_mode(net, True)
            # What does not grow with the batch (statistics of a BatchNorm) is next to nothing for a real one.
            kept = _kept_for_backward(net, torch.cat([images, images])) - _kept_for_backward(net, images)
    finally:
        for module, mode in modes:
            module.training = mode
        for value, before in buffers:
            value.copy_(before)
    return NetSize(
        **known,
        flops=counter.get_total_flops() / _BATCH,
        forward_bytes=living.peak // _BATCH,
        training_bytes=None if kept is None else kept // _BATCH,
    )


def weights_of(net: nn.Module) -> dict[str, Any]:
    """Return what is known of a net that is not run: counts and bytes of its weights, and the width of its features."""
    parameters = list(net.parameters())
    own = sum(value.numel() * value.element_size() for value in parameters)
    buffers = sum(value.numel() * value.element_size() for value in net.buffers())
    path = find_penultimate(net)
    last = None if path is None else net.get_submodule(path)
    return {
        "parameters": sum(value.numel() for value in parameters),
        "parameter_bytes": own,
        "weight_bytes": own + buffers,
        "features": last.in_features if isinstance(last, nn.Linear) else None,
        "outputs": last.out_features if isinstance(last, nn.Linear) else None,
    }


def _set_mode(net: nn.Module, training: bool) -> None:
    for module in net.modules():  # what torch.export made refuses train() and eval()
        module.training = training


def _kept_for_backward(net: nn.Module, images: Tensor) -> int:
    """Return the bytes that autograd saves, each storage once and without the weights, which are there anyway."""
    gradients = [(value, value.requires_grad) for value in net.parameters()]
    weights = {value.untyped_storage()._cdata for value in (*net.parameters(), *net.buffers())}
    kept: dict[int, Any] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no later one gets its address
        return value

    try:
        net.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            net(images)
    finally:
        for value, wanted in gradients:
            value.requires_grad_(wanted)
    return sum(storage.nbytes() for storage in kept.values())


class _Living(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live; the weights of `net` are there before."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._weights = {value.untyped_storage()._cdata for value in (*net.parameters(), *net.buffers())}
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    def add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._weights:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
