"""The chosen teachers look at the training images, each image once: data-parallel inference on the cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.mirror import forget, here, here_all, names_in
from pipeline.engine.spec import RAW, SPOKEN
from pipeline.errors import StageError
from pipeline.stages.base import Run
from pipeline.stages.outputs import CachedTeacher, Output, outputs_of, tell_kept, tidy_cache, view_name
from pipeline.stages.teachers import (
    TeacherJob,
    load_bridge,
    save_tensors,
    stream_tensors,
    table_of,
    teacher_folder,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.cluster.blocks import Block
    from pipeline.data.spec import AugmentSpec
    from pipeline.engine.arms import TeacherReference
    from pipeline.models.teacher import Teacher

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
    augment : AugmentSpec
        How many views of each image it is to see, and what these are.
    cached : CachedTeacher or None
        Where its outputs are kept; None: nowhere.
    precision : str
        What it computes in: ``fp32``, ``bfloat16`` or ``float16``.
    """

    teacher: TeacherReference
    table: str
    folder: str
    batch_size: int
    bridge: str | None
    raw: bool
    augment: AugmentSpec
    cached: CachedTeacher | None = None
    precision: str = "fp32"

    @property
    def finished(self) -> bool:
        """Whether all that is wanted of the teacher is there."""
        return all(here(Path(self.folder) / name).exists() for name in ([SPOKEN, RAW] if self.raw else [SPOKEN]))

    def shard(self, start: int, stop: int) -> str:
        """Return the name of the file of some rows."""
        return f"rows-{start}-{stop}-{'raw' if self.raw else 'spoken'}.safetensors"


def spoken(run: Run, name: str) -> Path:
    """Return the folder of what a teacher says of the training images, keyed like its assessment."""
    return run.part("spoken", name, {"assessed": teacher_folder(run, name).name, "version": 3} | views_seen(run))


def views_seen(run: Run) -> dict[str, Any]:
    """Return which views of the training images teachers see, beside the image as it is."""
    augment = run.settings.distill.augment
    return {} if augment.views is None else {"views": augment.model_dump(mode="json")}


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
    from pipeline.stages.assess import rows_of

    settings = run.settings.amalgamate
    precisions = {row["teacher"]: row["precision"] for row in rows_of(run)}
    payloads = {}
    for name in names:
        folder = spoken(run, name)
        job = TeacherJob.of(run, name, folder, settings.resources)
        payloads[name] = SpeakPayload(
            job,
            job.table,
            str(folder),
            settings.batch_size,
            str(teacher_folder(run, name)),
            raw,
            run.settings.distill.augment,
            CachedTeacher.of(run, name),
            precisions[name],  # that of its assessment, whose outputs are of use here
        )
    speak_all(run, payloads)
    tidy_cache(run)


def speak_all(run: Run, payloads: dict[str, SpeakPayload]) -> None:
    """Run teachers over the training images on a pool of workers; what is done is not done again."""
    missing = {name: payload for name, payload in payloads.items() if not payload.finished}
    if not missing:
        return
    from pipeline.cluster.blocks import Group, map_blocks
    from pipeline.cluster.session import beside
    from pipeline.cluster.tasks import map_tasks
    from pipeline.engine.arms import TAUGHT

    settings, rows = run.settings.amalgamate, len(table_of(run).split(*TAUGHT))
    groups = [Group(name, payload, rows, _BLOCK) for name, payload in missing.items()]
    there = {group.name: names_in(Path(group.payload.folder)) for group in groups}
    done = [
        (group.name, start, stop)
        for group in groups
        for start, stop in group.ranges()
        if group.payload.shard(start, stop) in there[group.name]
    ]
    todo = sum(len(group.ranges()) for group in groups) - len(done)
    limits: dict[str, Any] = {
        "resources": {"CPU": settings.resources.cpus, "GPU": settings.resources.gpus},
        "max_concurrent": settings.resources.max_concurrent,
        "max_failures": settings.resources.max_failures,
    }
    run.open_cluster()
    run.files.push()
    began, first = time.perf_counter(), list[float]()
    left = sum(stop - start for group in groups for start, stop in group.ranges()) - sum(
        stop - start for _, start, stop in done
    )
    at_once = beside(limits["resources"], todo, limits["max_concurrent"])
    with run.display.bar("faculty", todo, "images", work=left, at_once=at_once) as advance:
        if todo > _FEW:

            def on_result(block: Block) -> None:
                advance(1, block.name, block.stop - block.start, (block.row or {}).get("seconds"))

            blocks = map_blocks(make_speaker, groups, done=done, on_result=on_result, verbose=run.verbose, **limits)
            results = [(block.name, block.row, block.error) for block in blocks]
        else:
            items = [
                (group.name, group.payload, start, stop)
                for group in groups
                for start, stop in group.ranges()
                if (group.name, start, stop) not in done
            ]

            def on_task(index: int, row: dict[str, Any] | None, error: str | None) -> None:
                name, _, start, stop = items[index]
                advance(1, name, stop - start, None if row is None else row.get("seconds"))
                if row is not None and not first:
                    first.append(time.perf_counter() - began - row["seconds"])
                    run.timed["tasks"] = max(first[0], 0.0)

            answers = map_tasks(speak_block, items, on_result=on_task, **limits)
            results = [(item[0], row, error) for item, (row, error) in zip(items, answers, strict=True)]
    for name, _, error in results:
        if error is not None:
            raise StageError(f"amalgamate: teacher {name!r} failed over the training images: {error}")
    tell_kept(run, [(name, row) for name, row, _ in results if row is not None])
    for group in groups:
        _join(group.payload, group.ranges())


def speak_block(item: tuple[str, SpeakPayload, int, int]) -> dict[str, Any]:
    """Run one teacher over some rows, as a task of its own, see `make_speaker`."""
    _, payload, start, stop = item
    return make_speaker(payload)(start, stop)


def make_speaker(payload: SpeakPayload) -> Callable[[int, int], dict[str, Any]]:
    """Return the function that runs a teacher over some rows. On a worker.

    It stores p over the teacher's label space (V, n, L) and what that stands for among the task's classes (V, n, C_s),
    in half precision; and logits and features where they are wanted; V views of each image. It returns what there is
    to tell, see `tell_kept`.
    """
    import torch

    from pipeline.cache.store import compact
    from pipeline.data.table import ImageTable
    from pipeline.data.views import augment, view_keys
    from pipeline.engine.arms import TAUGHT

    split = ImageTable.open(payload.table).split(*TAUGHT)
    bridge = load_bridge(Path(payload.bridge)) if payload.bridge is not None else None
    autocast = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(payload.precision)
    loaded: list[Teacher] = []

    def teacher() -> Teacher:
        if not loaded:
            loaded.append(payload.teacher.load().fold())
        return loaded[0]

    def said(start: int, stop: int, view: int) -> tuple[dict[str, torch.Tensor], Output]:
        def read(rows: torch.Tensor) -> torch.Tensor:
            keys = view_keys(split.numbers[start + rows], view, 0)
            return augment(split.images(start + rows), payload.augment, keys)

        output = _asked(payload, teacher, split.raw_ids[start:stop], read, view, autocast)
        logits, features = output.logits, output.features
        p = logits.softmax(1) if bridge is None else bridge.distribution(logits, features)
        tensors = {"p": p.half(), "carried": (p if bridge is None else bridge.carry(p)).half()}
        if payload.raw:
            tensors |= {"logits": compact(logits, "fp16"), "features": compact(features, "fp16")}
        return tensors, replace(output, logits=logits[:0], features=features[:0])

    def speak_rows(start: int, stop: int) -> dict[str, Any]:
        began = time.perf_counter()
        views, told = zip(*(said(start, stop, view) for view in range(payload.augment.views or 1)), strict=True)
        tensors = {name: torch.stack([one[name] for one in views]) for name in views[0]}
        save_tensors(Path(payload.folder), payload.shard(start, stop), tensors)
        lost = sum(output.lost for output in told) / len(told)
        note = max(output.note for output in told)
        return {"rows": stop - start, "note": note, "lost": lost, "seconds": time.perf_counter() - began}

    return speak_rows


def _asked(
    payload: SpeakPayload,
    teacher: Callable[[], Teacher],
    ids: np.ndarray,
    read: Callable[[torch.Tensor], torch.Tensor],
    view: int,
    autocast: torch.dtype | None,
) -> Output:
    """Return what a teacher says of one view of some images."""
    import torch

    from pipeline.models.teacher import predict

    if payload.cached is None:
        batches = (read(rows) for rows in torch.arange(len(ids)).split(payload.batch_size))
        said = predict(teacher(), batches, autocast=autocast)
        return Output(said.logits, said.features, len(ids), 0.0)
    name = view_name(payload.augment, view)
    return outputs_of(payload.cached, teacher, ids, read, view=name, batch_size=payload.batch_size, autocast=autocast)


def _join(payload: SpeakPayload, ranges: Sequence[tuple[int, int]]) -> None:
    """Make one file of the shards, and delete them."""
    from safetensors import safe_open

    folder = Path(payload.folder)
    shards = here_all(folder / payload.shard(start, stop) for start, stop in ranges)
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(safe_open(path, "pt")) for path in shards]
        names = [("p", "carried"), ("logits", "features")]
        for file, wanted in zip((SPOKEN, RAW)[: 2 if payload.raw else 1], names, strict=False):
            stream_tensors(folder, file, {name: [handle.get_slice(name) for handle in handles] for name in wanted})
    forget(*shards)
