"""Reading inner activations of any net through hooks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Activations = dict[tuple[str, str], Any]

# Where nets of the usual libraries keep what follows the penultimate features.
_HEADS = ("classifier", "fc", "head")


def module_at(net: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path.

    Raises
    ------
    ValueError
        When there is none; names the nearest ones.
    """
    names = [name for name, _ in net.named_modules() if name]
    if path not in names:
        near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or names[:3]
        hint = f"nearest: {', '.join(near)}" if near else "the net has no inner modules"
        raise ValueError(f"there is no module {path!r} in the net; {hint}")
    return net.get_submodule(path)


def find_penultimate(net: nn.Module) -> str | None:
    """Find the linear layer whose input is the penultimate features.

    ``classifier``, ``fc`` or ``head`` if it is, or ends in, a linear layer; else the last linear layer of the net.

    Returns
    -------
    str or None
        Its path; None where the net has no linear layer.
    """
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    for head in _HEADS:
        inside = [name for name in linear if name == head or name.startswith(f"{head}.")]
        if inside:
            return inside[-1]
    return linear[-1] if linear else None


def watch(
    net: nn.Module, *, features: str | None, taps: Mapping[str, str]
) -> tuple[Activations, list[RemovableHandle]]:
    """Collect activations of the forward passes to come, until the handles are removed.

    Parameters
    ----------
    net : nn.Module
    features : str, optional
        Path of the module whose input is kept.
    taps : mapping of str to str
        Name to path of the modules whose output is kept.

    Returns
    -------
    seen : dict
        ``("features", "")`` and ``("tap", name)`` to what was seen, filled while the net runs.
    handles : list
    """
    seen: Activations = {}

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["features", ""] = args[0] if args else next(iter(kwargs.values()), None)

    def keep_output(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # Cloned, because what follows may work in place (a ReLU after a convolution).
            seen["tap", name] = output.clone() if isinstance(output, Tensor) else output

        return hook

    handles = []
    try:
        if features is not None:
            handles.append(module_at(net, features).register_forward_pre_hook(keep_input, with_kwargs=True))
        for name, path in taps.items():
            handles.append(module_at(net, path).register_forward_hook(keep_output(name)))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return seen, handles


@contextmanager
def captured(net: nn.Module, *, features: str | None, taps: Mapping[str, str]) -> Iterator[Activations]:
    """Collect activations of the forward pass that runs inside the block, see `watch`."""
    seen, handles = watch(net, features=features, taps=taps)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def pooled(features: Any) -> Tensor:
    """Bring penultimate features to (B, D): a feature map (B, D, H, W) is averaged over its positions.

    Raises
    ------
    ValueError
        On anything else.
    """
    if isinstance(features, Tensor) and features.ndim == 2:
        return features
    if isinstance(features, Tensor) and features.ndim == 4:
        return features.mean(dim=(2, 3))
    got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise ValueError(f"features must be (B, D) or (B, D, H, W), got {got}")
