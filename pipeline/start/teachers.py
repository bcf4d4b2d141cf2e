"""Rows of a zoo for weight files: what can be known of each, and what its owner must say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.class_names import class_names
from pipeline.models.files import file_sha256, missing
from pipeline.models.spec import BUILTIN_LABELS

FILL_IN = "FILL_IN"  # where it stands the zoo is refused, by the line's name
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass
class Draft:
    """One teacher of the zoo to write.

    Attributes
    ----------
    name : str
    path : Path
        Absolute.
    source : dict
        As a zoo has it, without `path`.
    recognised : bool
        Whether the weights themselves told the architecture.
    classes : tuple of str, str or None
        None: not known; the teacher then has "class 0", "class 1", …
    outputs : int or None
        How many classes it has.
    preprocessing : dict or None
    sha256 : str
    size_told : bool
        Whether the file itself told the size of the images.
    """

    name: str
    path: Path
    source: dict[str, Any]
    recognised: bool
    classes: tuple[str, ...] | str | None
    outputs: int | None
    preprocessing: dict[str, Any] | None
    sha256: str
    size_told: bool = False

    @property
    def complete(self) -> bool:
        """Whether nothing must be filled in before the zoo loads."""
        return FILL_IN not in self.source.values()


Ask = Callable[[str], str]


def draft_teachers(
    files: Sequence[Path],
    *,
    architectures: Mapping[str, str],
    classes: Mapping[str, str],
    side: int,
    channels: int,
    ask: Ask | None = None,
) -> list[Draft]:
    """Look at weight files, and make a row of each.

    Parameters
    ----------
    files : sequence of Path
        Weights (safetensors, ``torch.save``), or programs of ``torch.export`` (``.pt2``).
    architectures, classes : mapping of str to str
        What is given for a teacher, by its name; under the name "" for all of them.
    side, channels : int
        Of the task's images: what a teacher of which nothing is known is shown.
    ask : callable, optional
        Puts a question to the user and returns the answer, "" for none; None: nothing is asked.

    Raises
    ------
    UserError
        When a file can't be read, or something given belongs to no file.
    """
    names = _names(files)
    for option, given in (("--architecture", architectures), ("--classes", classes)):
        unknown = [name for name in given if name and name not in names]
        if unknown:
            raise UserError(
                f"{option} {unknown[0]}=…: there is no such teacher; the files' names are {', '.join(names)}"
            )
    return [
        _draft(
            name,
            path.absolute(),
            architectures.get(name, architectures.get("")),
            classes.get(name, classes.get("")),
            (side, channels),
            ask,
        )
        for name, path in zip(names, files, strict=True)
    ]


def _names(files: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own without the suffix, in letters that a zoo admits, each another."""
    names: list[str] = []
    for path in files:
        base = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.name.removesuffix(path.suffix)).lstrip("_.-")[:70] or "teacher"
        name, number = base, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def _draft(
    name: str, path: Path, architecture: str | None, classes: str | None, task: tuple[int, int], ask: Ask | None
) -> Draft:
    problem = missing(path)
    if problem:
        raise UserError(f"--teachers {path} {problem.split(';')[0]}; name a file of weights")
    side, channels = task
    size_told = False
    outputs: int | None
    preprocessing: dict[str, Any] | None
    if path.suffix == ".pt2":
        source, recognised = {"type": "exported"}, True
        plain = {"size": side, "channels": channels, "mean": [0.5], "std": [0.5]}
        outputs, preprocessing, size_told = _from_program(path, plain)
    elif path.suffix in _WEIGHTS:
        source, outputs, recognised, preprocessing = _from_weights(path, architecture, task, ask)
    else:
        raise UserError(f"--teachers {path}: has the suffix {path.suffix!r}; known: .pt2, {', '.join(_WEIGHTS)}")
    found = _classes(name, path, classes, outputs, ask)
    if outputs is not None and found is not None:
        count = len(class_names(found)) if isinstance(found, str) else len(found)
        if count != outputs:
            where = f"--classes {name}=…" if classes is not None else str(_beside(path))
            raise UserError(
                f"{where}: names {count} classes, the net of {path} has {outputs} outputs; correct the list"
            )
    return Draft(name, path, source, recognised, found, outputs, preprocessing, file_sha256(path), size_told)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--teachers {path}: can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"--teachers {path}: {error}") from None


def _from_program(path: Path, plain: dict[str, Any]) -> tuple[int | None, dict[str, Any] | None, bool]:
    """Return the outputs of an exported program, its preprocessing, and whether the program tells the size."""
    import torch

    from pipeline.models.archive import load_program, output_widths
    from pipeline.models.program import input_of

    with _reading(path):
        program = load_program(path)
    outputs = next(iter(output_widths(program)), None)
    traced = input_of(program)
    if traced is None or len(traced[0]) != 4:
        return outputs, plain, False
    (_, channels, *sides), dtype = traced
    if dtype == torch.uint8:  # its preprocessing is inside
        return outputs, None, True
    told = dict(plain) if channels not in (1, 3) else plain | {"channels": channels}
    if min(sides) < 1:
        return outputs, told, False
    return outputs, told | {"size": sides[0] if sides[0] == sides[1] else sides}, True


def _from_weights(
    path: Path, architecture: str | None, task: tuple[int, int], ask: Ask | None
) -> tuple[dict[str, Any], int | None, bool, dict[str, Any]]:
    """Return the source, the number of outputs, whether the weights told them, and the preprocessing."""
    from pipeline.models.weights import read_state_dict
    from pipeline.start.weights import outputs_of, recognise

    with _reading(path):
        state = read_state_dict(path)
    kind = "safetensors" if path.suffix == ".safetensors" else "state_dict"
    side, channels = task
    plain = {"size": side, "channels": channels, "mean": [0.5], "std": [0.5]}
    found = recognise(state) if architecture is None else None
    if found is not None and found.torchvision:
        return {"type": "torchvision", **found.source}, found.classes, True, {"size": 224, "channels": 3, **_IMAGENET}
    if found is not None:
        return {"type": kind, **found.source}, found.classes, True, plain | {"channels": found.channels}
    if architecture is None and ask is not None:
        architecture = ask(
            f"{path.name}: its architecture is none of torchvision's nor of this package. What builds the net? "
            "torchvision:NAME, timm:NAME or module:callable (empty: fill it in later)"
        )
    outputs = outputs_of(state)
    if not architecture:
        return {"type": kind, "factory": FILL_IN}, outputs, False, plain
    library, _, model = architecture.partition(":")
    if library in ("torchvision", "timm") and model:
        return {"type": library, "model": model}, outputs, False, {"size": 224, "channels": 3, **_IMAGENET}
    if not model:
        raise UserError(f"--architecture {architecture!r}: give torchvision:NAME, timm:NAME or module:callable")
    return {"type": kind, "factory": architecture}, outputs, False, plain


def _beside(path: Path) -> Path:
    """Return the file of class names beside a weight file."""
    return path.with_name(f"{path.name.removesuffix(path.suffix)}.classes.txt")


def _classes(
    name: str, path: Path, given: str | None, outputs: int | None, ask: Ask | None
) -> tuple[str, ...] | str | None:
    """Return the class names: as given, from a file beside the weights, a list of the package, or asked for."""
    if given is None and _beside(path).is_file():
        given = str(_beside(path))
    if given is None and outputs == 1000:
        return "imagenet-1k"
    if given is None and ask is not None:
        count = "" if outputs is None else f" ({outputs} of them)"
        given = ask(
            f"{path.name}: the names of its classes{count}, in the order of its outputs? Separated by commas, or a "
            f"file with one a line, or one of {', '.join(BUILTIN_LABELS)} (empty: class 0, class 1, …)"
        )
    if not given:
        return None
    if given in BUILTIN_LABELS:
        return given
    if "," not in given:
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--classes {name}={given}: is no file that can be read ({type(error).__name__}); give names separated "
                "by commas, or a file with one a line"
            ) from None
    else:
        lines = given.split(",")
    return tuple(line.strip() for line in lines if line.strip())
