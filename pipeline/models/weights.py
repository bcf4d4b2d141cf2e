"""Weight files: reading state dicts without running code, putting them into a net."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name, from safetensors or from what ``torch.save`` wrote; nothing in the file is executed.

    A checkpoint that keeps them under ``state_dict`` or ``model`` is understood; ``module.``, which data-parallel
    training puts before every key, is dropped.

    Raises
    ------
    ValueError
        When the file is damaged, holds more than tensors and plain containers, or no tensors; one line.
    OSError
        When it can't be read.
    """
    if Path(path).suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    elif Path(path).suffix in _PICKLED:
        content = _read_pickled(path)
    else:
        raise ValueError(f"has the suffix {Path(path).suffix!r}; known: .safetensors, {', '.join(_PICKLED)}")
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not tensors by name; save `net.state_dict()`")
    odd = [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"holds {odd[0]!r}, which is no tensor; save `net.state_dict()`")
    if not content:
        raise ValueError("holds no tensors")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"is truncated or no safetensors file ({str(error).splitlines()[0]})") from None


def _read_pickled(path: str | Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of formats which it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        if "GLOBAL" in text or "weights_only" in text.lower() or "Unsupported" in text:
            wanted = re.search(r"GLOBAL ([\w.]+)", text)
            what = f" (it asks for {wanted.group(1)})" if wanted else ""
            raise ValueError(
                f"is refused: it holds a pickle of more than tensors, which can run any code{what}; "
                "save `net.state_dict()` as safetensors"
            ) from None
        line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"is truncated or no file of torch.save ({line[:160]})") from None


def fill(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put weights into a net, all of them or none.

    A batch norm's ``num_batches_tracked`` may be missing: files from before it existed lack it, and it has no effect on
    a net that does not train.

    Raises
    ------
    ValueError
        When names or shapes differ; counts them and names the first.
    """
    wanted = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    lacking = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in wanted]
    shapes = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    problems = []
    if lacking:
        problems.append(f"lacks {len(lacking)} of the net's {len(wanted)} weights (first: {lacking[0]})")
    if surplus:
        problems.append(f"holds {len(surplus)} that the net does not have (first: {surplus[0]})")
    if shapes:
        first = shapes[0]
        problems.append(
            f"holds {len(shapes)} of another shape (first: {first} is {tuple(state[first].shape)} in the file, "
            f"{tuple(wanted[first].shape)} in the net)"
        )
    if problems:
        raise ValueError("; ".join(problems))
    net.load_state_dict(dict(state), strict=False)
