"""Class names that ship with the package, and torchvision's of ImageNet."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from pipeline.models.spec import BUILTIN_LABELS


@cache
def class_names(name: str) -> tuple[str, ...]:
    """Return a built-in list of class names, in the order of the data set's integer labels.

    Parameters
    ----------
    name : str
        One of `pipeline.models.spec.BUILTIN_LABELS`. ``imagenet-1k`` comes from torchvision's published weights.

    Raises
    ------
    ValueError
        When there is no such list.
    """
    if name not in BUILTIN_LABELS:
        raise ValueError(f"name must be one of {', '.join(BUILTIN_LABELS)}, got {name!r}")
    if name == "imagenet-1k":
        from torchvision.models import ResNet18_Weights  # costs seconds to import, so only where it is needed

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    text = (files("pipeline.models") / "labels" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
