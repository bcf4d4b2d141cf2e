"""The student as an object, and the version that it becomes in a model registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.spec import ImageSpec
from pipeline.errors import DataError
from pipeline.face import html
from pipeline.face.results import Found

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pipeline.models.student import Student as Net

_BATCH = 256


@dataclass(frozen=True, repr=False)
class Student(Found):
    """A trained student beside its controls."""

    @cached_property
    def model(self) -> Net:
        """The net with its preprocessing: an nn.Module of images (B, C, H, W), uint8, as the task stores them."""
        from pipeline.models.student import load_student

        return load_student(self.folder("distill"), trusted_factories=None)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """What the logits stand for; ``subtask/class`` where there are sub-tasks."""
        from pipeline.models.student import saved_classes

        return saved_classes(self.folder("distill"))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """`evaluation.json`: every arm with its accuracies, calibration and confusion."""
        return self._json("evaluate", "evaluation.json")

    @property
    def arms(self) -> list[dict[str, Any]]:
        """Student and controls: ``title``, ``mean`` and ``std`` of the test accuracy, ``ece``, ``difference``."""
        return self.evaluation["arms"]

    @property
    def accuracy(self) -> float | None:
        """On the test images, mean over the trainings; None where there are none."""
        return self.arms[0]["mean"] if self.arms else None

    @property
    def verdict(self) -> str:
        """What teaching was good for, in one sentence."""
        return self.evaluation["verdict"]

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """The numbers of each epoch."""
        return self._json("distill", "history.json")

    def probabilities(self, images: Any) -> Any:
        """Return the classes' probabilities, (N, C) float32 array; with sub-tasks a mapping of them by name.

        Parameters
        ----------
        images : see `predict`
        """
        import torch

        stored = as_stored(images, self.settings.task.image)
        with torch.inference_mode():
            parts = [self.model(stored[start : start + _BATCH]) for start in range(0, len(stored), _BATCH)]
        logits = torch.cat(parts) if parts else torch.zeros(0, len(self.classes))
        found = {name: logits[:, columns].softmax(1).numpy() for name, columns, _ in self._heads()}
        return found[""] if "" in found else found

    def predict(self, images: Any) -> Any:
        """Return the most probable class of each image, (N,) array of names; with sub-tasks a mapping of them by name.

        Parameters
        ----------
        images : path, PIL image, sequence of these, array or tensor
            Brought to the task's size and channels as its own images were. Arrays are uint8 (N, H, W) or (N, H, W, C),
            tensors uint8 (N, C, H, W).

        Raises
        ------
        DataError
            When an image can't be read, or is none.
        """
        import numpy as np

        found = self.probabilities(images)
        names = {name: np.array(classes) for name, _, classes in self._heads()}
        if "" in names:
            return names[""][found.argmax(1)]
        return {name: names[name][one.argmax(1)] for name, one in found.items()}

    def _heads(self) -> Iterator[tuple[str, slice, list[str]]]:
        named = self.settings.task.subtasks
        if named is None:
            yield "", slice(None), list(self.classes)
            return
        start = 0
        for name, classes in named.items():
            yield name, slice(start, start + len(classes)), list(classes)
            start += len(classes)

    def __repr__(self) -> str:
        lines = [f"Student {self.settings.distill.student.name}: {self.verdict}"]
        return "\n".join([*lines, *(f"  {title}: {accuracy}" for title, _, accuracy, *_ in self._rows())])

    def _repr_html_(self) -> str:
        sides = {"student taught by": "left", "seeds": "right", "test accuracy, %": "right", "ECE": "right"}
        heads = {**sides, "difference, points": "right", "± 2 SE": "right"}
        rows = [[html.text(cell) for cell in row] for row in self._rows()]
        return html.table(heads, rows, title=f"Student {self.settings.distill.student.name}", notes=(self.verdict,))

    def _rows(self) -> list[list[str]]:
        rows = []
        for arm in self.arms:
            gap, error = arm.get("difference"), arm.get("difference_2se")
            spread = f" ± {100 * arm['std']:.1f}" if len(arm["accuracies"]) > 1 else ""
            rows.append(
                [
                    arm["title"],
                    str(len(arm["accuracies"])),
                    f"{100 * arm['mean']:.1f}{spread}",
                    f"{arm['ece']:.3f}",
                    "" if gap is None else f"{100 * gap:+.1f}",
                    "" if error is None else f"{100 * error:.1f}",
                ]
            )
        return rows


@dataclass(frozen=True, repr=False)
class Version(Found):
    """What became of a student in the model registry; false where it was kept out."""

    @property
    def _told(self) -> Mapping[str, Any]:
        return self.records["register"].summary

    @property
    def name(self) -> str:
        """The registered model."""
        return self._told["name"]

    @property
    def number(self) -> str | None:
        """The version; None where the gate kept it out."""
        return self._told.get("version")

    @property
    def uri(self) -> str | None:
        """What loads it: ``mlflow.pyfunc.load_model(version.uri)``."""
        return self._told.get("uri")

    @property
    def alias(self) -> str | None:
        """The alias that was moved to it."""
        return self._told.get("alias")

    @property
    def gate(self) -> str:
        """``passed``, ``failed`` or ``not judged``."""
        return self._told["gate"]

    @property
    def why(self) -> str:
        """What the gate found."""
        return self._told["why"]

    @property
    def promoted(self) -> bool:
        """Whether it is the champion now."""
        return self._told["promoted"]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Licences of teachers that ask for a look."""
        return tuple(self._told["warnings"])

    def __bool__(self) -> bool:
        return self.uri is not None

    def __repr__(self) -> str:
        if not self:
            return f"not registered: {self.why}"
        return f"{self.name} version {self.number}, alias {self.alias}: {self.uri} (gate {self.gate}: {self.why})"


def as_stored(images: Any, spec: ImageSpec) -> Tensor:
    """Return images as the task's table stores them, (N, C, H, W) uint8 tensor, see `Student.predict`."""
    import numpy as np
    import torch

    spec = spec.model_copy(update={"storage": "raw"})
    items = list(_items(images))
    stored = np.empty((len(items), *spec.shape), dtype=np.uint8)
    for number, item in enumerate(items):
        stored[number] = _one(item, spec, f"image {number}")
    return torch.from_numpy(stored)


def _items(images: Any) -> Any:
    import numpy as np

    if type(images).__module__.split(".")[0] == "torch":
        array = images.detach().cpu().numpy()
        if array.ndim != 4:
            raise DataError(f"predict: the tensor has shape {tuple(array.shape)}; give (N, C, H, W)")
        return array.transpose(0, 2, 3, 1)
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4):
            raise DataError(f"predict: the array has shape {images.shape}; give a batch, (N, H, W) or (N, H, W, C)")
        return images
    if isinstance(images, str | bytes | Path) or not isinstance(images, Sequence):
        return [images]
    return images


def _one(item: Any, spec: ImageSpec, origin: str) -> np.ndarray:
    import numpy as np
    from PIL import Image

    from pipeline.data.pixels import UnreadableImageError, canonical

    if isinstance(item, str | Path):
        origin = str(item)
        try:
            item = Path(item).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"predict: {origin} can't be read ({error.strerror or error})") from None
    if not isinstance(item, bytes | np.ndarray | Image.Image):
        raise DataError(f"predict: {origin} is a {type(item).__name__}; give a path, a PIL image or a uint8 array")
    try:
        payload = canonical(item, spec, origin).payload
    except UnreadableImageError as error:
        raise DataError(f"predict: {origin}: {error}") from None
    return np.frombuffer(payload, np.uint8).reshape(spec.shape)
