"""The optimiser, its learning rate at each step, and the running average of the student's weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.spec import OptimSpec

_FUSED = frozenset({"cpu", "cuda"})  # where one kernel updates all parameters


def build_optimiser(
    parameters: list[nn.Parameter], spec: OptimSpec, *, undecayed: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name; weight decay leaves the parameters in `undecayed` alone."""
    exempt = {id(parameter) for parameter in undecayed}
    groups: list[dict[str, Any]] = [{"params": [one for one in parameters if id(one) not in exempt]}]
    if exempt:
        groups.append({"params": [one for one in parameters if id(one) in exempt], "weight_decay": 0.0})
    common: dict[str, Any] = {
        "lr": spec.lr,
        "weight_decay": spec.weight_decay,
        "fused": all(one.device.type in _FUSED and one.is_floating_point() for one in parameters),
    }
    if spec.name == "sgd":
        return _Sgd(groups, momentum=spec.momentum, nesterov=spec.momentum > 0, **common)
    return _AdamW(groups, **common)


def _plain(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """Return an optimiser without what torch wraps its methods in for the compiler: only the student is compiled.

    Those wrappers import the compiler at their first call, which takes a process a second or two before its first step.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_Sgd, _AdamW = _plain(torch.optim.SGD), _plain(torch.optim.AdamW)


def set_rate(optimiser: torch.optim.Optimizer, spec: OptimSpec, step: int, total: int) -> float:
    """Set the learning rate of a step; return it."""
    value = spec.lr * rate(step, total, spec)
    for group in optimiser.param_groups:
        group["lr"] = value
    return value


def rate(step: int, total: int, spec: OptimSpec) -> float:
    """Return the learning rate of a step as a fraction of its peak, see `OptimSpec`."""
    warmup = spec.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    if spec.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if spec.schedule == "one_cycle":
        return max(1 - done, 0.0)
    if spec.schedule == "step":
        return spec.gamma ** sum(step >= milestone * total for milestone in spec.milestones)
    return 1.0


class Average:
    """The running average of a module's parameters and statistics.

    m ← β_k m + (1 − β_k) θ after step k, with β_k = min(β, (1 + k) / (10 + k)), so that the first weights are soon
    forgotten. What is no floating-point number is taken over as it is.

    Parameters
    ----------
    module : Module
        Its values are the first average.
    decay : float
        β in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._source = {name: value.detach() for name, value in module.state_dict().items()}
        self.values = {name: value.clone() for name, value in self._source.items()}
        self._mean = [value for value in self.values.values() if value.is_floating_point()]
        self._current = [value for value in self._source.values() if value.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's values into the average."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._mean, self._current, 1 - decay)
        for name, value in self._source.items():
            if not value.is_floating_point():
                self.values[name].copy_(value)
        self._steps += 1

    @torch.no_grad()
    def put(self) -> None:
        """Give the module the average."""
        for name, value in self._source.items():
            value.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"steps": self._steps, "values": dict(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._steps = state["steps"]
        values: dict[str, Tensor] = state["values"]
        for name, value in self.values.items():
            value.copy_(values[name])
