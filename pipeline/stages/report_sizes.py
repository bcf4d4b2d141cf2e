"""How large and how fast the student is beside its teachers: parameters, operations, images a second."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.mirror import share
from pipeline.stages.amalgamate import chosen
from pipeline.stages.artefacts import write_json
from pipeline.stages.assess import rows_of
from pipeline.stages.base import Run
from pipeline.stages.teachers import table_of

if TYPE_CHECKING:
    from torch import nn

    from pipeline.models.spec import TeacherSpec
    from pipeline.models.student import Student

_SPEED, _FLOPS = "speed.json", "flops.json"
_BATCH = 64
_SECONDS = 0.3  # that the student's speed is measured for, at least five passes
_COUNTED = 16  # teachers whose operations are counted
_COUNTED_ON = 2  # images


def sizes(run: Run) -> dict[str, Any]:
    """Return the sizes of the student, where there is one, and of the chosen teachers, where there are any.

    Returns
    -------
    dict
        ``student``: parameters, bytes, flops, images_per_second, how; or None. ``teachers``: rows with teacher,
        classes, parameters, flops, images_per_second. ``set``: the sums of the parameters and operations, and the
        images a second of all one after the other; None where one of them is not known.
    """
    teachers = _teachers(run) if "select" in run.records else []
    rates = [one["images_per_second"] for one in teachers]
    return {
        "student": _student(run) if "distill" in run.records else None,
        "teachers": teachers,
        "set": {
            "parameters": _sum([one["parameters"] for one in teachers]),
            "flops": _sum([one["flops"] for one in teachers]),
            "images_per_second": 1 / sum(1 / rate for rate in rates) if rates and all(rates) else None,
        },
    }


def _sum(values: list[Any]) -> Any:
    return sum(values) if values and all(value is not None for value in values) else None


def _teachers(run: Run) -> list[dict[str, Any]]:
    rows = {row["teacher"]: row for row in rows_of(run)}
    names = [name for name in chosen(run)["chosen"] if name in rows]
    flops = _flops(run, names[:_COUNTED])
    found = []
    for name in names:
        row = rows[name]
        seconds = row["forward_seconds"]  # 0 where all was read from the cache
        found.append(
            {
                "teacher": name,
                "classes": row["classes"],
                "parameters": row["parameters"],
                "flops": flops.get(name),
                "images_per_second": row["images"] / seconds if seconds and row["images"] else None,
            }
        )
    return found


def _flops(run: Run, names: list[str]) -> dict[str, float]:
    """Return the operations of the teachers' forward passes: as counted on paper now, else as they were before.

    Their nets are built without weights from the zoo, which may have gone when a report is written again.
    """
    path = run.folder("select") / _FLOPS
    known = _read(path)
    missing = [name for name in names if name not in known and name in run.zoo]
    if missing:
        shape, trusted = table_of(run).image_shape, run.settings.zoo.trusted_factories
        _keep(path, known := known | {name: _on_paper(run.zoo[name], shape, trusted) for name in missing})
    return {name: value for name, value in known.items() if value}


def _on_paper(spec: TeacherSpec, image_shape: tuple[int, int, int], trusted: tuple[str, ...]) -> float | None:
    from pipeline.planning.teachers import skeleton

    own = spec.preprocessing
    shape = image_shape if own is None else (own.channels, *own.side(image_shape))
    with contextlib.suppress(Exception):  # a net that can't be built, or run, without its weights
        return operations(skeleton(spec, trusted), shape)
    return None


def _student(run: Run) -> dict[str, Any]:
    """Return the student's size and speed; measured once, and kept beside it."""
    folder = run.folder("distill")
    known = _read(folder / _SPEED)
    if "images_per_second" not in known:
        known = _measured(run, folder)
        _keep(folder / _SPEED, known)
    size = (folder / "model.safetensors").stat().st_size
    return known | {"bytes": size, "name": run.settings.distill.student.name}


def _measured(run: Run, folder: Path) -> dict[str, Any]:
    import torch

    from pipeline.models.student import load_student

    student = load_student(folder, trusted_factories=None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = max(1, int(run.settings.assess.resources.cpus))  # as many as each teacher had
    with _threads(threads):
        rate, batch = _rate(student, device)
    where = "one GPU" if device == "cuda" else f"{threads} processor thread{'s' if threads > 1 else ''}"
    flops = None
    with contextlib.suppress(Exception):  # a net that does not take a batch of zeros
        flops = operations(student.cpu(), student.image_shape)
    return {
        "parameters": student.num_parameters,
        "flops": flops,
        "images_per_second": rate,
        "how": f"the fastest of several passes on {where}, batches of {batch}, when the report was first written",
    }


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on so many threads: more than there is room for on a busy machine wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(student: Student, device: str) -> tuple[float, int]:
    import torch

    net = student.to(device).eval()
    images = torch.zeros(_BATCH, *student.image_shape, dtype=torch.uint8, device=device)
    took: list[float] = []
    with torch.inference_mode():
        net(images)  # the first pass prepares what later ones find
        while len(took) < 5 or (sum(took) < _SECONDS and len(took) < 200):
            began = time.perf_counter()
            net(images)
            if device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
    return _BATCH / min(took), _BATCH  # whatever else computes here slows a pass down, and never speeds one up


def operations(net: nn.Module, shape: tuple[int, int, int]) -> float:
    """Return the operations of a forward pass over one image (C, H, W), as `pipeline.planning.nets.NetSize` has them.

    Without the modules' own shares, so that torch's compiler need not be loaded, which takes seconds.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    total = 0

    class Counting(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # nothing is compiled here: no need to load the compiler in order to be left alone by it

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total
            result = function(*args, **(kwargs or {}))
            count = flop_registry.get(function._overloadpacket)
            if count is not None:
                total += count(*args, **(kwargs or {}), out_val=result)
            return result

    first = next((value for value in net.parameters() if value.is_floating_point()), torch.empty(0))
    modes = [(module, module.training) for module in net.modules()]
    images = torch.zeros(_COUNTED_ON, *shape, dtype=first.dtype, device=first.device)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), Counting():
            net(images)
    finally:
        for module, mode in modes:
            module.training = mode
    return total / _COUNTED_ON


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _keep(path: Path, data: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a folder that may only be read: it is found out again the next time
        if os.access(path.parent, os.W_OK):
            write_json(path, data)
            share(path)
