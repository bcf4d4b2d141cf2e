"""The two tasks of the benchmark: images of random pixels, a student and its teachers. Speed asks for no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.layout import FILE_NAME, Layout, fingerprint_of, fixed_binary, write_table
from pipeline.data.splits import SPLITS
from pipeline.models import nets

CLASSES = 10
LABELLED, TAUGHT = 64, 128  # of the images of a step; both are the loop's defaults
BATCH = LABELLED + TAUGHT
LR, WEIGHT_DECAY = 3e-3, 1e-4
MEAN, STD = 0.5, 0.5

Run = Callable[[], object]  # trains on every image of a `Task` once


@dataclass(frozen=True)
class World:
    """What is trained on what.

    Attributes
    ----------
    name : str
    shape : (int, int, int)
        Channels, height and width of an image.
    student : str
        A net of `pipeline.models.nets`, with its default width.
    teachers : tuple of (str, dict)
        Nets and their arguments; the teachers take them in turn.
    shift : int
        Pixels that an image is moved by at most; half of the images are mirrored.
    epoch : int
        Images of the data set that it stands for.
    steps : dict of str to int
        By type of device: steps of one measurement.
    """

    name: str
    shape: tuple[int, int, int]
    student: str
    teachers: tuple[tuple[str, dict[str, Any]], ...]
    shift: int
    epoch: int
    steps: dict[str, int] = field(hash=False)

    @property
    def title(self) -> str:
        """How the tables call it."""
        return f"{'x'.join(map(str, self.shape))}, {self.student}"

    def student_net(self) -> nn.Module:
        """Build the student's net, with the same weights every time."""
        torch.manual_seed(0)
        return getattr(nets, self.student)(CLASSES, in_channels=self.shape[0])

    def teacher_net(self, number: int) -> nn.Module:
        """Build a teacher's net, frozen, with the same weights every time."""
        torch.manual_seed(1 + number)
        name, kwargs = self.teachers[number % len(self.teachers)]
        net = getattr(nets, name)(CLASSES, in_channels=self.shape[0], **kwargs)
        # For every side: it is the faster way.
        return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


# A teacher is larger than its student: its forward pass costs about as much as a step of the student.
WORLDS = {
    "small": World(
        "small",
        (1, 28, 28),
        "small_cnn",
        (("resnet8", {}), ("small_vgg", {}), ("resnet14", {"width": 12}), ("small_cnn", {"width": 48})),
        shift=2,
        epoch=60_000,
        steps={"cpu": 40, "cuda": 300},
    ),
    "cifar": World(
        "cifar",
        (3, 32, 32),
        "resnet20",
        (("resnet20", {"width": 28}), ("resnet14", {"width": 36}), ("resnet20", {"width": 32}), ("resnet8", {})),
        shift=4,
        epoch=50_000,
        steps={"cpu": 6, "cuda": 250},
    ),
}


@dataclass(frozen=True)
class Task:
    """The images of one world, in memory and as an image table on disk.

    The first `LABELLED` / `BATCH` of them are the table's labelled images, the others its unlabelled ones: a step with
    teachers and a step without see equally many images, and an epoch of either sees each image once.

    Attributes
    ----------
    world : World
    steps : int
        Steps of an epoch; there are `steps` · `BATCH` images.
    folder : Path
        Of the table, and of what the teachers say.
    """

    world: World
    steps: int
    folder: Path

    def __len__(self) -> int:
        return self.steps * BATCH

    @property
    def table(self) -> Path:
        """The image table."""
        return self.folder / FILE_NAME

    @cached_property
    def images(self) -> Tensor:
        """All images, (N, C, H, W) uint8."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (len(self), *self.world.shape), dtype=torch.uint8, generator=generator)

    @cached_property
    def labels(self) -> Tensor:
        """All labels, (N,) int64."""
        return torch.arange(len(self)) % CLASSES

    def write(self) -> None:
        """Write the image table, if it is not there."""
        if self.table.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        count = len(self)
        ids = np.random.default_rng(0).integers(0, 256, (count, 16), dtype=np.uint8)
        labels = self.labels.numpy().astype(np.int32)  # also of those without: training without teachers uses them
        codes = np.full(count, SPLITS.index("train_unlabelled"), dtype=np.int8)
        codes[: self.steps * LABELLED] = SPLITS.index("train_labelled")
        classes = tuple(f"class {number}" for number in range(CLASSES))
        shape = self.world.shape
        layout = Layout(classes, shape, "raw", fingerprint_of(classes, shape, ids, labels, codes))
        pixels = self.images.numpy().reshape(count, -1)
        write_table(self.table, layout, ids, labels, codes, lambda part: fixed_binary(pixels[part]))
