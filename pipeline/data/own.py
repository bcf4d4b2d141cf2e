"""A source of one's own: code that the task's settings name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.sources import LabelReader, RawSample, named
from pipeline.data.spec import OwnSource
from pipeline.errors import DataError


class OwnImages:
    """What a callable gives, read as it comes.

    What it returns may be gone through once (a generator) or often; in the first case it is called again for each pass.
    Class names are the source's `classes`, or the attribute ``classes`` of what it returns.

    Parameters
    ----------
    spec : OwnSource

    Raises
    ------
    DataError
        When the callable can't be found or does not take its arguments, or nobody tells the class names.
    """

    def __init__(self, spec: OwnSource) -> None:
        self.where = f"source {spec.factory}"
        self._spec = spec
        self._factory = _found(spec.factory)
        self._made: Any = self._make()
        self.classes = named(spec.classes or getattr(self._made, "classes", None), self.where)
        self._label = LabelReader(self.classes, self.where)

    def __iter__(self) -> Iterator[RawSample]:
        """Yield the samples in its order."""
        if self._made is None:
            self._made = self._make()
        items, number = self._stream(), 0
        while True:
            origin = f"{self.where}, image {number}"
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:  # anyone's code
                raise _failed(origin, error) from error
            yield self._sample(item, origin)
            number += 1

    def _make(self) -> Any:
        try:
            return self._factory(**self._spec.kwargs)
        except Exception as error:
            raise _failed(f"{self.where}: calling it with `kwargs`", error) from error

    def _stream(self) -> Iterator[Any]:
        try:
            stream = iter(self._made)
        except TypeError:
            raise DataError(f"{self.where}: gives a {type(self._made).__name__}, which can't be gone through") from None
        if stream is self._made:  # it will be used up
            self._made = None
        return stream

    def _sample(self, item: Any, origin: str) -> RawSample:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"{origin}: is a {type(item).__name__}; each must be (image, label), the label None if unknown"
            )
        image, label = item
        if not isinstance(image, bytes | np.ndarray | Image.Image):
            raise DataError(
                f"{origin}: its image is a {type(image).__name__}; give a uint8 array (H, W) or (H, W, C), the "
                "bytes of a file, or a PIL image"
            )
        return RawSample(image, self._label(label, origin), origin)


def _found(factory: str) -> Any:
    module, _, attribute = factory.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise DataError(
            f"task.source.factory: {module!r} can't be imported ({_line(error)}); put its folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise DataError(f"task.source.factory: module {module!r} has no callable {attribute!r}; correct the name")
    return found


def _failed(what: str, error: Exception) -> DataError:
    return DataError(f"{what} fails with {type(error).__name__} ({_line(error)}); mend it, or check `kwargs`")


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]
