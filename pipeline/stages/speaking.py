"""The chosen teachers look at the training images, each image once: data-parallel inference on the cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.spec import RAW, SPOKEN
from pipeline.errors import StageError
from pipeline.stages.base import Run
from pipeline.stages.teachers import TeacherJob, load_bridge, save_tensors, table_of, teacher_folder

if TYPE_CHECKING:
    import torch

    from pipeline.cluster.blocks import Block
    from pipeline.engine.arms import TeacherReference

_BLOCK = 4096  # images: what a lost worker repeats at most
_FEW = 8  # blocks that are not worth the seconds which a pool of actors takes to start


@dataclass(frozen=True)
class SpeakPayload:
    """What travels to the workers that run a teacher over the training images.

    Attributes
    ----------
    teacher : TeacherReference
    table, folder : str
        The image table; where the result goes.
    batch_size : int
    bridge : str or None
        Folder of the bridge to the task's classes; None: its own classes are what it says.
    raw : bool
        Keep logits and features, too.
    """

    teacher: TeacherReference
    table: str
    folder: str
    batch_size: int
    bridge: str | None
    raw: bool

    @property
    def finished(self) -> bool:
        """Whether all that is wanted of the teacher is there."""
        return all((Path(self.folder) / name).exists() for name in ([SPOKEN, RAW] if self.raw else [SPOKEN]))

    def shard(self, start: int, stop: int) -> str:
        """Return the name of the file of some rows."""
        return f"rows-{start}-{stop}-{'raw' if self.raw else 'spoken'}.safetensors"


def spoken(run: Run, name: str) -> Path:
    """Return the folder of what a teacher says of the training images, keyed like its assessment."""
    return run.part("spoken", name, {"assessed": teacher_folder(run, name).name, "version": 2})


def speak(run: Run, names: Sequence[str], *, raw: bool = False) -> None:
    """Run teachers over the training images, those that have not been.

    Parameters
    ----------
    run : Run
    names : sequence of str
    raw : bool
        Keep logits and penultimate features, too.

    Raises
    ------
    StageError
        If one of them fails, naming it.
    """
    settings = run.settings.amalgamate
    payloads = {}
    for name in names:
        folder = spoken(run, name)
        job = TeacherJob.of(run, name, folder, settings.resources)
        payloads[name] = SpeakPayload(
            job, job.table, str(folder), settings.batch_size, str(teacher_folder(run, name)), raw
        )
    speak_all(run, payloads)


def speak_all(run: Run, payloads: dict[str, SpeakPayload]) -> None:
    """Run teachers over the training images on a pool of workers; what is done is not done again."""
    missing = {name: payload for name, payload in payloads.items() if not payload.finished}
    if not missing:
        return
    from pipeline.cluster.blocks import Group, map_blocks
    from pipeline.cluster.tasks import map_tasks
    from pipeline.engine.arms import TAUGHT

    settings, rows = run.settings.amalgamate, len(table_of(run).split(*TAUGHT))
    groups = [Group(name, payload, rows, _BLOCK) for name, payload in missing.items()]
    done = [
        (group.name, start, stop)
        for group in groups
        for start, stop in group.ranges()
        if (Path(group.payload.folder) / group.payload.shard(start, stop)).exists()
    ]
    todo = sum(len(group.ranges()) for group in groups) - len(done)
    limits: dict[str, Any] = {
        "resources": {"CPU": settings.resources.cpus, "GPU": settings.resources.gpus},
        "max_concurrent": settings.resources.max_concurrent,
        "max_failures": settings.resources.max_failures,
    }
    run.open_cluster()
    with run.display.bar("faculty", todo) as advance:
        if todo > _FEW:

            def on_result(block: Block) -> None:
                advance(1, block.name)

            blocks = map_blocks(make_speaker, groups, done=done, on_result=on_result, verbose=run.verbose, **limits)
            problems = [(block.name, block.error) for block in blocks]
        else:
            items = [
                (group.name, group.payload, start, stop)
                for group in groups
                for start, stop in group.ranges()
                if (group.name, start, stop) not in done
            ]
            results = map_tasks(
                speak_block,
                items,
                on_result=lambda index, value, error: advance(1, items[index][0]),
                **limits,
            )
            problems = [(item[0], error) for item, (_, error) in zip(items, results, strict=True)]
    for name, error in problems:
        if error is not None:
            raise StageError(f"amalgamate: teacher {name!r} failed over the training images: {error}")
    for group in groups:
        _join(group.payload, group.ranges())


def speak_block(item: tuple[str, SpeakPayload, int, int]) -> None:
    """Run one teacher over some rows, as a task of its own."""
    _, payload, start, stop = item
    make_speaker(payload)(start, stop)


def make_speaker(payload: SpeakPayload) -> Callable[[int, int], dict[str, Any]]:
    """Load a teacher; return the function that runs it over some rows. On a worker.

    It stores p over the teacher's label space (n, L) and what that stands for among the task's classes (n, C_s), in
    half precision; and logits and features where they are wanted.
    """
    from pipeline.data.table import ImageTable
    from pipeline.engine.arms import TAUGHT
    from pipeline.models.teacher import predict

    teacher = payload.teacher.load()
    split = ImageTable.open(payload.table).split(*TAUGHT)
    bridge = load_bridge(Path(payload.bridge)) if payload.bridge is not None else None

    def speak_rows(start: int, stop: int) -> dict[str, Any]:
        batches = (
            split.images(slice(first, min(first + payload.batch_size, stop)))
            for first in range(start, stop, payload.batch_size)
        )
        output = predict(teacher, batches)
        p = output.logits.softmax(1) if bridge is None else bridge.distribution(output.logits, output.features)
        tensors = {"p": p.half(), "carried": (p if bridge is None else bridge.carry(p)).half()}
        if payload.raw:
            tensors |= {"logits": _compact(output.logits), "features": _compact(output.features)}
        save_tensors(Path(payload.folder), payload.shard(start, stop), tensors)
        return {"rows": stop - start}

    return speak_rows


def _compact(values: torch.Tensor) -> torch.Tensor:
    """Return values in half precision, where they are of a size that it holds."""
    largest = float(values.abs().max()) if values.numel() else 1.0
    return values.half() if 1e-2 <= largest <= 6e4 else values.float()


def _join(payload: SpeakPayload, ranges: Sequence[tuple[int, int]]) -> None:
    """Make one file of the shards, and delete them."""
    import torch
    from safetensors import safe_open

    folder = Path(payload.folder)
    shards = [folder / payload.shard(start, stop) for start, stop in ranges]
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(safe_open(path, "pt")) for path in shards]
        # Name by name: all that is held twice is one block's part of one name.
        joined = {name: torch.cat([handle.get_tensor(name) for handle in handles]) for name in list(handles[0].keys())}
    if payload.raw:
        save_tensors(folder, RAW, {name: joined.pop(name) for name in ("logits", "features")})
    save_tensors(folder, SPOKEN, joined)
    for path in shards:
        path.unlink()
