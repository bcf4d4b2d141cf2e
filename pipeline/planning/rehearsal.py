"""What starting takes, tried: a local Ray, its first workers and an export in a process of their own; pictures.

These are the run's own calls, on nothing: no teacher is loaded, no image is read, and all that is written goes with a
temporary folder. ``python -m pipeline.planning.rehearsal`` reads what to try from its standard input and prints a line
of JSON for each part that is over, so that whoever grows impatient keeps what has been measured.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.cluster.spec import ClusterSpec
from pipeline.models.spec import StudentSpec

# What a worker imports before it begins: the trial of a teacher, a training.
_WORKER = (
    "pipeline.cluster.trainable",
    "pipeline.cluster.worker",
    "pipeline.stages.probe",
    "pipeline.engine.arms",
    "pipeline.assessment.probe",
    "pipeline.models.sources",
)
# What Tune and Train import in the driver, and once more in the process that stands for it.
_DRIVERS = {"tune": ("pipeline.cluster.trainable",), "train": ("pipeline.cluster.controller",)}
_MOST = 40  # rows or columns of a picture, as in `pipeline.report.plots`
_STATUS = Path("/proc/self/status")


def starts(
    spec: ClusterSpec,
    beside: int,
    student: StudentSpec | None,
    classes: int,
    shape: tuple[int, int, int],
    limit: float,
) -> dict[str, float]:
    """Start a local Ray and its first workers in another process, and export a student there.

    Parameters
    ----------
    spec : ClusterSpec
    beside : int
        Workers that begin together.
    student : StudentSpec, optional
        None: nothing is exported.
    classes : int
        That it tells apart.
    shape : (int, int, int)
        Of an image.
    limit : float
        Seconds, at most.

    Returns
    -------
    dict
        As far as it came: ``driver``, until Ray was imported; ``session``, until it had started; ``tasks``, until
        workers had imported what they need, ``imports`` of it for that; ``resident``, the bytes that a worker then had;
        ``process``, until a process that Ray had not begun beforehand answered; ``tune`` and ``train``, until these
        were imported; ``register``, until the student was exported and compared with itself.
    """
    asked = {"cluster": spec.model_dump(mode="json"), "beside": beside, "classes": classes, "shape": shape}
    asked["student"] = None if student is None else student.model_dump(mode="json")
    command = [sys.executable, "-m", "pipeline.planning.rehearsal"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(entry for entry in sys.path if entry))
    try:
        said = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            env=environment,
        ).stdout
    except subprocess.TimeoutExpired as error:
        cut: str | bytes = error.stdout or ""
        said = cut.decode(errors="replace") if isinstance(cut, bytes) else cut
    found: dict[str, float] = {}
    for line in said.splitlines():
        if line.startswith("{") and line.endswith("}"):
            found |= json.loads(line)
    return found


def main() -> None:
    """Try Ray, then the export, and tell what came of it."""
    asked = json.load(sys.stdin)
    began = time.perf_counter()
    from pipeline.cluster.session import session

    _tell(driver=time.perf_counter() - began)
    began = time.perf_counter()
    with session(ClusterSpec(**asked["cluster"])):
        _tell(session=time.perf_counter() - began)
        _workers(asked["beside"])
    if asked["student"] is not None:
        _tell(register=export(StudentSpec(**asked["student"]), asked["classes"], tuple(asked["shape"])))


def _workers(beside: int) -> None:
    from pipeline.cluster.processes import answered
    from pipeline.cluster.tasks import map_tasks

    began = time.perf_counter()
    answers = map_tasks(a_worker, list(range(beside)))
    seconds = time.perf_counter() - began
    known = [value for value, error in answers if value is not None]
    if not known:
        return
    imports, resident = (max(values) for values in zip(*known, strict=True))
    _tell(tasks=seconds, imports=imports, resident=resident)
    # Processes that are idle are taken first: the one beyond them has to be begun.
    _tell(process=_seconds(lambda: answered(beside + 1)))
    for name, modules in _DRIVERS.items():
        _tell(**{name: _seconds(functools.partial(_load, modules))})


def _tell(**found: float) -> None:
    print(json.dumps(found), flush=True)


def a_worker(number: int) -> tuple[float, int]:
    """Import what workers import; return the seconds, and the bytes in memory then, 0 where nothing says it."""
    seconds = _seconds(lambda: _load(_WORKER))
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return seconds, 0
    return seconds, next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def _load(modules: tuple[str, ...]) -> None:
    for name in modules:
        importlib.import_module(name)


def pictures(classes: int, own: int, teachers: int) -> dict[str, float]:
    """Draw the plan of a teacher of `own` classes, and a list of teachers.

    Returns
    -------
    dict
        ``first``, what the first picture takes longer than the next; ``matrix``, ``panel``.
    """
    import numpy as np

    from pipeline.report.plots import plot_plan, plot_scores

    names, sources = ([f"class {number}" for number in range(min(many, _MOST))] for many in (classes, own))
    mass = np.random.default_rng(0).random((len(sources), len(names)))
    rows = [
        {"teacher": f"teacher {number}", "score": number / 10, "score_low": number / 10 - 1, "score_high": number}
        for number in range(min(teachers, _MOST))
    ]
    with tempfile.TemporaryDirectory(prefix="faculty-plan-") as folder:

        def matrix() -> None:
            plot_plan(mass, sources, names, Path(folder) / "plan.png", title="from a teacher's classes to the task's")

        first, again = _seconds(matrix), _seconds(matrix)
        panel = _seconds(lambda: plot_scores(rows, Path(folder) / "scores.png"))
    return {"first": max(first - again, 0.0), "matrix": again, "panel": panel}


def export(spec: StudentSpec, classes: int, shape: tuple[int, int, int]) -> float:
    """Return the seconds to export a student as it is registered, and to compare the two."""
    import numpy as np

    from pipeline.models.student import build_student
    from pipeline.tracking.export import check_export, export_student, logits_of
    from pipeline.tracking.quiet import load

    load()  # which a run has done before
    names = [f"class {number}" for number in range(classes)]
    student = build_student(spec, classes, shape).eval()
    example = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="faculty-plan-") as folder:
        path = Path(folder) / "model"

        def once() -> None:
            expected = logits_of(student, example, names)
            export_student(student, path, image_shape=shape, num_classes=classes, metadata={})
            check_export(path, student, example, expected)

        return _seconds(once)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def known(found: Mapping[str, float]) -> bool:
    """Return whether former runs have told all that is tried here."""
    return {"session", "trials", "tasks", "group", "resident"} <= found.keys()


if __name__ == "__main__":
    main()
