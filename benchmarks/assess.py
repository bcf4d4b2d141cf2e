"""What assessing a zoo costs beside the teachers' forward passes, and what a search saves: `make bench-assess`.

    python -m benchmarks.assess [FOLDER]

Three measurements: the stage's wall time against bare forward passes of the same teachers; a search among 200 teachers
against assessing them all; and the opening of a catalogue of 100,000.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.results import ROOT, goal, write
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.config import Settings
from pipeline.data.table import ImageTable
from pipeline.models import nets
from pipeline.models.catalogue import write_catalogue
from pipeline.models.sources import load_teacher
from pipeline.models.teacher import predict
from pipeline.models.zoo import Zoo, load_zoo
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages import assess as stage
from pipeline.stages.run import run_pipeline
from pipeline.transport.bridge import fit_bridge

TEACHERS, SLOTS, REPEATS = 32, 2, 3
COPIES = 20  # of each of the demo's ten teachers
PROBE = {"train_labelled": 20, "probe": 60, "validation": 10}  # images a class
CATALOGUE = 100_000
SIDE, CLASSES = 32, 10
COLUMNS = {"what": "", "value": "measured", "unit": "unit"}


# --- overhead ---------------------------------------------------------------------------------------------------------


def make_world(folder: Path) -> Path:
    """Write 32 ResNets of three depths, a task of random images, and settings; return the settings."""
    (folder / "teachers").mkdir(parents=True)
    entries = []
    for number in range(TEACHERS):
        name = ("resnet8", "resnet14", "resnet20")[number % 3]
        torch.manual_seed(number)
        path = folder / "teachers" / f"t{number:02d}.safetensors"
        net = getattr(nets, name)(CLASSES, in_channels=3, width=24)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
        entries.append(
            {
                "name": f"t{number:02d}",
                "source": {
                    "type": "safetensors",
                    "path": f"teachers/{path.name}",
                    "factory": f"{nets.__name__}:{name}",
                    "kwargs": {"width": 24},
                },
                "classes": [f"class {k}" for k in range(CLASSES)],
                "preprocessing": {"size": SIDE, "channels": 3, "mean": [0.5], "std": [0.25]},
            }
        )
    (folder / "zoo.yaml").write_text(yaml.safe_dump({"teachers": entries}), encoding="utf-8")
    random = np.random.default_rng(0)
    labels = np.arange(60 * CLASSES) % CLASSES
    images = random.integers(0, 256, (len(labels), SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "task.npz", images=images, labels=labels, classes=[f"class {k}" for k in range(CLASSES)])
    settings = {
        "name": "bench-assess",
        "task": {
            "source": {"type": "numpy", "path": "task.npz"},
            "image": {"size": SIDE, "channels": 3},
            "splits": {"train_labelled": 20, "probe": 20, "validation": 10, "test": 5, "train_unlabelled": 0},
        },
        "zoo": {"path": "zoo.yaml"},
        "tracking": {"enabled": False},
        "register": {"enabled": False},
        "assess": {"search": {"least": TEACHERS}},
        "cluster": {"num_cpus": SLOTS},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "run.yaml"


def time_stage(settings: Settings) -> dict[str, float]:
    """Run the stage; return the seconds until each process has surely delivered a teacher, and those for the rest."""
    moments: list[float] = []
    keep = stage._track  # called as soon as a teacher's row has arrived

    def track(run: Any, row: dict[str, Any]) -> None:
        moments.append(time.perf_counter())
        keep(run, row)

    stage._track = track
    began = time.perf_counter()
    try:
        run_pipeline(settings, until="assess", display=Display())
    finally:
        stage._track = keep
    first = 2 * SLOTS - 1  # one process may be a teacher ahead of the other
    return {"start": moments[0] - began, "work": moments[-1] - moments[first], "teachers": len(moments) - first - 1}


def bare(zoo: str, table: str, names: list[str], barrier: Any, answers: Any) -> None:
    """Load teachers, wait for the other process, and time their forward passes alone; in a process of its own."""
    torch.set_num_threads(1)
    teachers = [load_teacher(load_zoo(zoo)[name]) for name in names]
    split = ImageTable.open(table).split("train_labelled", "probe", "validation")
    predict(teachers[0], [split.images(torch.arange(256))])
    barrier.wait(timeout=120)
    began = time.perf_counter()
    for teacher in teachers:
        predict(teacher, split.batches(256))
    answers.put(time.perf_counter() - began)


def time_bare(zoo: Path, table: Path) -> float:
    """Return the wall time of the forward passes of all teachers, shared out among as many processes."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(SLOTS), context.Queue()
    names = list(load_zoo(zoo).names)
    processes = [
        context.Process(target=bare, args=(str(zoo), str(table), names[part::SLOTS], barrier, answers))
        for part in range(SLOTS)
    ]
    for process in processes:
        process.start()
    seconds = max(answers.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return seconds


def overhead(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Time the stage and the bare passes in turn."""
    file = make_world(folder / "overhead")
    ratios, starts, rates = [], [], []
    for repeat in range(REPEATS):
        run_dir = folder / "overhead" / f"run{repeat}"
        settings = load_settings([file], [f"run_dir={run_dir}", f"cache.path={run_dir / 'outputs'}"])
        run_pipeline(settings, until="ingest", display=Display())
        timed = time_stage(settings)
        table = next(run_dir.glob("ingest/*/images.arrow")).parent
        alone = time_bare(folder / "overhead" / "zoo.yaml", table) * timed["teachers"] / TEACHERS
        ratios.append(timed["work"] / alone)
        starts.append(timed["start"])
        rates.append(timed["teachers"] / timed["work"])
        print(f"overhead: {timed['work']:.1f} s against {alone:.1f} s, start {timed['start']:.1f} s", flush=True)
    ratio = statistics.median(ratios)
    return [
        {
            "what": f"assess, warm, over bare forward passes ({TEACHERS} teachers, 500 images)",
            "value": ratio,
            "unit": "",
        },
        {"what": "teachers a second, 2 processes", "value": statistics.median(rates), "unit": "1/s"},
        {"what": "start-up: Tune, imports, first teacher", "value": statistics.median(starts), "unit": "s"},
    ], ratio


# --- search -----------------------------------------------------------------------------------------------------------


def make_copies(folder: Path) -> Path:
    """Write a zoo of the demo's teachers and copies of them, ever more disturbed; return its file."""
    demo = ROOT / "conf" / "demo"
    entries = yaml.safe_load((demo / "zoo.yaml").read_text(encoding="utf-8"))["teachers"]
    (folder / "teachers").mkdir(parents=True)
    written = []
    for entry in entries:
        weights = load_file(demo / entry["source"]["path"])
        for copy in range(COPIES):
            generator = torch.Generator().manual_seed(copy)
            size = 0.03 * copy

            def disturbed(value: torch.Tensor, size: float = size, g: torch.Generator = generator) -> torch.Tensor:
                if not value.is_floating_point() or value.ndim < 2:
                    return value
                return value + size * value.std() * torch.randn(value.shape, generator=g)

            path = folder / "teachers" / f"{entry['name']}_{copy:02d}.safetensors"
            save_file({key: disturbed(value).contiguous() for key, value in weights.items()}, path)
            source = entry["source"] | {"path": f"teachers/{path.name}"}
            written.append({**entry, "name": path.stem, "source": source, "notes": ""})
            written[-1].pop("sha256")
    (folder / "zoo.yaml").write_text(yaml.safe_dump({"teachers": written}), encoding="utf-8")
    return folder / "zoo.yaml"


def truth_of(zoo: Zoo, table: ImageTable) -> dict[str, float]:
    """Return how many test images each teacher's view gets right, fitted on the labelled training images."""
    fitted, test = table.split("train_labelled"), table.split("test")
    found = {}
    for name, spec in zoo.items():
        teacher = load_teacher(spec)
        near, far = (predict(teacher, split.batches(500)) for split in (fitted, test))
        bridge = fit_bridge(
            "centres", logits=None, features=near.features, labels=fitted.labels, num_classes=len(table.classes)
        )
        p = bridge.distribution(None, far.features)
        found[name] = float((p.argmax(1) == test.labels).double().mean())
    return found


def search(folder: Path) -> tuple[list[dict[str, Any]], float, float]:
    """Search among 200 teachers, and assess them all; compare what is found, and the images that it took."""
    zoo = make_copies(folder / "search")
    rows: dict[str, list[dict[str, Any]]] = {}
    seconds: dict[str, float] = {}
    picked: dict[str, str] = {}
    common = [f"zoo.path={zoo}", "tracking.enabled=false", "register.enabled=false"]
    common += [f"task.splits.{split}={count}" for split, count in PROBE.items()]
    for name, least in (("search", 16), ("all", 10_000)):
        run_dir = folder / "search" / name
        settings = load_settings(
            [ROOT / "conf" / "demo" / "run.yaml"],
            [*common, f"run_dir={run_dir}", f"cache.path={run_dir / 'outputs'}", f"assess.search.least={least}"],
        )
        run_pipeline(settings, until="ingest", display=Display())
        began = time.perf_counter()
        run_pipeline(settings, until="assess", display=Display())
        seconds[name] = time.perf_counter() - began
        run_pipeline(settings, until="select", display=Display())
        choice = json.loads(next(run_dir.glob("select/*/faculty.json")).read_text(encoding="utf-8"))
        picked[name] = choice["best_single"]
        rows[name] = pq.read_table(next(run_dir.glob("assess/*/assessment.parquet"))).to_pylist()
    table = ImageTable.open(str(next((folder / "search" / "all").glob("ingest/*/images.arrow")).parent))
    truth = truth_of(load_zoo(zoo), table)
    share = sum(row["images"] for row in rows["search"]) / sum(row["images"] for row in rows["all"])
    best = max(truth.values())
    short = {name: 100 * (best - truth[teacher]) for name, teacher in picked.items()}
    first = {name: 100 * (best - truth[rows[name][0]["teacher"]]) for name in rows}
    print(f"search: {picked['search']}, all: {picked['all']}, best {best:.4f}", flush=True)
    return (
        [
            {"what": "search among 200: share of the forward passes", "value": 100 * share, "unit": "%"},
            {
                "what": "search: chosen teacher's accuracy, short of the best of 200",
                "value": short["search"],
                "unit": "points",
            },
            {"what": "all 200 assessed: the same", "value": short["all"], "unit": "points"},
            {"what": "search: the same of the teacher with the best score", "value": first["search"], "unit": "points"},
            {"what": "all 200 assessed: the same", "value": first["all"], "unit": "points"},
            {"what": "search: wall time", "value": seconds["search"], "unit": "s"},
            {"what": "all 200 assessed: wall time", "value": seconds["all"], "unit": "s"},
        ],
        share,
        short["search"],
    )


# --- catalogue --------------------------------------------------------------------------------------------------------


def catalogue(folder: Path) -> tuple[dict[str, Any], float]:
    """Time the opening of a catalogue of 100,000 teachers, in this process and to the first spec."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = load_zoo(ROOT / "conf" / "demo" / "zoo.yaml")["digits"]
    path = folder / "zoo.parquet"
    write_catalogue(Zoo([spec.model_copy(update={"name": f"teacher-{n:06d}"}) for n in range(CATALOGUE)]), path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        zoo = load_zoo(path)
        assert zoo[f"teacher-{CATALOGUE // 2:06d}"].classes
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    return {"what": f"catalogue of {CATALOGUE:,} teachers: open, and read one", "value": seconds, "unit": "s"}, seconds


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="faculty-bench-"))
    opened, seconds = catalogue(folder / "catalogue")
    with session(ClusterSpec(num_cpus=SLOTS)):
        rows, ratio = overhead(folder)
        found, share, points = search(folder)
    goals = [
        goal("assess, warm, over bare forward passes", ratio, 1.3, "", at_most=True),
        goal("search among 200: share of the forward passes", share, 0.25, "", at_most=True),
        goal("search among 200: accuracy short of the best", points, 1.0, "points", at_most=True),
        goal("opening a catalogue of 100,000", seconds, 1.0, "s", at_most=True),
    ]
    note = (
        f"{SLOTS} processes of one thread each; median of {REPEATS}, stage and bare passes in turn. Overhead: "
        "ResNet-8, -14 and -20 of width 24 on 500 random images of 32x32; from the fourth teacher that was delivered "
        "on, when both processes are warm, against the forward passes of as many preloaded teachers in two other "
        "processes; it includes loading, all scores of the default settings and writing. Search: the demo's ten "
        "teachers and 19 copies of each with ever more noise in their weights, 900 labelled images, default settings. "
        "Chosen: the best single teacher of the stage select, by the labelled images held out in folds. Accuracy: the "
        "teacher's view, "
        "fitted on 200 of the images, on 2,000 test images."
    )
    write("assess", [*rows, *found, opened], goals, COLUMNS, note)
    print(json.dumps(goals, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
