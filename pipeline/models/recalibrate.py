"""After the training: statistics of BatchNorm for the student alone, and the proof that it is alone."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all BatchNorm layers by those of these batches.

    μ = mean_i μ_i and σ² = mean_i σ_i² (unbiased) over the batches i, each of which counts the same. All other modules
    are in evaluation mode meanwhile; modes, momenta and parameters stay as they are. Features that came from teachers
    had a part in the statistics that were collected in training, so that a student on its own needs new ones.

    Parameters
    ----------
    model : nn.Module
        Without BatchNorm layers that keep statistics nothing happens, and no batch is asked for.
    batches : iterable of (B, …) tensor
        What `model` takes, on its device. A batch of one sample has no variance and is left out.

    Raises
    ------
    ValueError
        When no batch has two samples; the statistics are then as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return
    usable = (batch for batch in batches if len(batch) > 1)
    first = next(usable, None)
    if first is None:
        raise ValueError(
            "batches must hold at least one batch of two samples or more to recalibrate BatchNorm, got none"
        )
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the cumulative average
        with torch.no_grad():
            model(first)
            for batch in usable:
                model(batch)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def assert_independent(student: nn.Module, expected: Collection[str] | int, teachers: Sequence[nn.Module] = ()) -> None:
    """Raise unless a student is nothing but itself: no tensor more or less than expected, no hook, no teacher.

    Teachers are looked for in everything that the student's modules keep: modules, tensors by their memory, plain
    attributes, containers, and what functions are closed over.

    Parameters
    ----------
    student : nn.Module
    expected : collection of str, or int
        Names of its state, as in ``state_dict()`` before the training; or the number of values of its parameters.
    teachers : sequence of nn.Module

    Raises
    ------
    ValueError
        Naming what does not belong to it, or is missing.
    """
    if isinstance(expected, int):
        count = sum(parameter.numel() for parameter in student.parameters())
        if count != expected:
            raise ValueError(f"the student must have {expected} parameter values, got {count}")
    else:
        state, own = set(student.state_dict()), set(expected)
        if state != own:
            found = [f"{name} is extra" for name in sorted(state - own)]
            found += [f"{name} is missing" for name in sorted(own - state)]
            raise ValueError(f"the student must have the state it was built with: {_listed(found)}")
    for path, module in student.named_modules():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():
                # weight_norm and spectral_norm, in their older form, are hooks that belong to the net.
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    raise ValueError(f"the student must have no hooks, got one of {kind} on {_shown(path)}")
    modules: dict[int, str] = {}
    memory: dict[int, str] = {}
    for number, teacher in enumerate(teachers):
        name = f"teacher {getattr(teacher, 'name', number)!r}"
        modules |= {id(module): f"{_shown(path)} of {name}" for path, module in teacher.named_modules()}
        for path, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
            if address := _address(tensor):
                memory[address] = f"{path} of {name}"
    for path, value in _kept(student):
        if isinstance(value, nn.Module) and id(value) in modules:
            raise ValueError(f"the student must not hold a teacher: student{path} is {modules[id(value)]}")
        if isinstance(value, Tensor) and _address(value) in memory:
            raise ValueError(f"the student must not hold a teacher: student{path} shares {memory[_address(value)]}")


def _kept(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield all modules and tensors that can be reached from a module, with the way to them."""
    seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used again
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield path, value
        elif not isinstance(value, type | types.ModuleType):
            if isinstance(value, nn.Module):
                yield path, value
            waiting.extend((path + step, inner) for step, inner in _inside(value))


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case str() | bytes() | int() | float() | None:
            return
        case Mapping():
            yield from ((f"[{key!r}]", inner) for key, inner in value.items())
        case list() | tuple() | set() | frozenset():
            yield from ((f"[{place}]", inner) for place, inner in enumerate(value))
        case types.FunctionType():
            yield from ((".__closure__", cell.cell_contents) for cell in value.__closure__ or () if not _empty(cell))
            yield from ((".__defaults__", value.__defaults__), (".__kwdefaults__", value.__kwdefaults__))
        case types.MethodType():
            yield ".__self__", value.__self__
        case partial():
            yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
        case nn.Module():
            plain = dict(vars(value))
            for part in ("_parameters", "_buffers", "_modules"):
                yield from ((f".{name}", inner) for name, inner in plain.pop(part, {}).items())
            yield from ((f".{name}", inner) for name, inner in plain.items())
        case _:
            yield from ((f".{name}", inner) for name, inner in getattr(value, "__dict__", {}).items())


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; 0 where it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def _shown(path: str) -> str:
    return path or "the whole"


def _listed(found: list[str], most: int = 5) -> str:
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
