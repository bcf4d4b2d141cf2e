"""What a training step is fed with: labelled and taught images, which views of them, and what the teachers say."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.views import view_keys
from pipeline.distillation.step import Said, Seen
from pipeline.engine.sampling import BatchSampler, Picked, seed_of
from pipeline.engine.spec import LoopSpec


class Images(Protocol):
    """Where the loop gets images and labels from."""

    @property
    def labels(self) -> Tensor:
        """Class numbers, (N,) int64; −1 where there is none."""
        ...

    @property
    def numbers(self) -> Tensor:
        """A number for each image that stands for its content, (N,) int64."""
        ...

    def __len__(self) -> int: ...

    def images(self, rows: Tensor) -> Tensor:
        """Return uint8 images (n, C, H, W) of the given rows."""
        ...


class Targets(Protocol):
    """What teachers say of every taught image."""

    @property
    def views(self) -> int | None:
        """Of how many views of each image; None: of the image as it is, whatever view the student sees."""
        ...

    def batch(self, rows: Tensor, views: Tensor, wants: Collection[str]) -> Said:
        """Return what they say of the given views of the given rows."""
        ...


class Teachers(Protocol):
    """Teachers that look at the images of a step."""

    def __call__(self, images: Tensor) -> tuple[Seen, ...]:
        """Return what each of them shows of the images."""
        ...


@dataclass(frozen=True)
class Lesson:
    """All that one student is trained on.

    Attributes
    ----------
    name : str
        Tells this training apart in a checkpoint.
    labelled : Images
        Images with a label in [0, C); may be empty where there are teachers.
    taught : Images
        Images that `targets` speak of, row by row; their labels are not used.
    targets : Targets or None
        None trains on the labels alone, with the same number of steps and the same labelled batches.
    live : Teachers or None
        Those of `targets`, in the same order, where the learner wants to see what they see.
    """

    name: str
    labelled: Images
    taught: Images
    targets: Targets | None
    live: Teachers | None = None


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Attributes
    ----------
    step : int
    images : (n, C, H, W) uint8 tensor
        Labelled ones first, then the taught ones.
    labels : (n,) int64 tensor
        −1 for taught images.
    keys : (n,) int64 tensor
        Which view of each image it is to be, see `pipeline.data.views`.
    said : Said or None
        Of the taught images.
    labelled : int
        How many images are labelled ones.
    """

    step: int
    images: Tensor
    labels: Tensor
    keys: Tensor
    said: Said | None
    labelled: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from pinned memory while the device computes."""
        move = _mover(device)
        said = None if self.said is None else self.said.map(move)
        return replace(self, images=move(self.images), labels=move(self.labels), keys=move(self.keys), said=said)

    def pinned(self) -> Batch:
        """Return the batch in memory that a GPU reads by itself."""
        said = None if self.said is None else self.said.map(Tensor.pin_memory)
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            keys=self.keys.pin_memory(),
            said=said,
        )


class Feed:
    """The batches of a training, each a pure function of the seed and its number.

    View v of an image is number v of `pipeline.data.views`. Where the teachers have spoken of V views, a taught image
    is seen in view k mod V when it is picked for the k-th time; else in view k + 1, which it never is again.

    Parameters
    ----------
    lesson : Lesson
    spec : LoopSpec
    seed : int
    rank, world_size : int
    wants : collection of str
        What the objective needs of the teachers.
    ahead : int
        Batches that a thread reads ahead; 0: each is read when it is needed.
    pin : bool
        Whether to put them into pinned memory.
    """

    def __init__(
        self,
        lesson: Lesson,
        spec: LoopSpec,
        *,
        seed: int,
        rank: int,
        world_size: int,
        wants: Collection[str],
        ahead: int = 0,
        pin: bool = False,
    ) -> None:
        self._lesson, self._wants, self._ahead, self._pin = lesson, wants, ahead, pin
        self._seed = seed_of(seed, 4)
        self._labels = lesson.labelled.labels
        self.steps = math.ceil(len(lesson.taught) / spec.batch_size)
        share = {"rank": rank, "world_size": world_size}
        self._labelled = None
        if len(lesson.labelled):
            self._labelled = BatchSampler(len(lesson.labelled), spec.labelled_batch, seed=seed_of(seed, 1), **share)
        self._taught = BatchSampler(len(lesson.taught), spec.batch_size, seed=seed_of(seed, 2), **share)

    def batches(self, first: int, stop: int, skipped: Collection[int] = ()) -> Generator[Batch, None, None]:
        """Yield the batches of steps `first` … `stop` − 1, but for those in `skipped`."""
        none = Picked(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        count = stop - first
        owns: Iterator[Picked] = iter([none] * count)
        if self._labelled is not None:
            owns = self._labelled.batches(first, count)
        picked = zip(range(first, stop), owns, self._taught.batches(first, count), strict=True)
        wanted = (one for one in picked if one[0] not in skipped)
        with contextlib.closing(_read_ahead(wanted, self._read, self._ahead)) as batches:
            yield from batches

    def _read(self, picked: tuple[int, Picked, Picked]) -> Batch:
        step, own, theirs = picked
        lesson, targets = self._lesson, self._lesson.targets
        images, labels = lesson.labelled.images(own.rows), self._labels[own.rows]
        keys = view_keys(lesson.labelled.numbers[own.rows], own.passes + 1, self._seed)
        said = None
        if targets is not None:
            images = torch.cat([images, lesson.taught.images(theirs.rows)])
            labels = torch.cat([labels, labels.new_full((len(theirs.rows),), -1)])
            # Kept views are the same for students of all seeds.
            views, seed = theirs.passes + 1, self._seed
            if targets.views is not None:
                views, seed = theirs.passes % targets.views, 0
            keys = torch.cat([keys, view_keys(lesson.taught.numbers[theirs.rows], views, seed)])
            said = targets.batch(theirs.rows, views, self._wants)
        batch = Batch(step, images, labels, keys, said, len(own.rows))
        return batch.pinned() if self._pin else batch


def _read_ahead(
    picked: Iterator[tuple[int, Picked, Picked]], read: Callable[[tuple[int, Picked, Picked]], Batch], ahead: int
) -> Generator[Batch, None, None]:
    if not ahead:
        yield from map(read, picked)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="faculty-feed")
    waiting: deque[Future[Batch]] = deque()
    try:
        for one in picked:
            waiting.append(pool.submit(read, one))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _mover(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda value: value.to(device, non_blocking=True)
