"""A run that is too large for a desk, on paper: 10,000 teachers, 1.28 million images, 64 GPUs.

    python -m benchmarks.scale [--teachers N] [--nodes N] [--dry]

Writes benchmarks/results/scale.json and the table in docs/scale.md. Minutes on one processor: the architectures of the
zoo are measured on paper, and trials are scheduled one by one. No figure here was measured on such a cluster.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from benchmarks.results import RESULTS, ROOT, environment
from pipeline.models.spec import PreprocessingSpec, TeacherSpec
from pipeline.planning.scale import Job, Model, Site, Stage, simulate
from pipeline.planning.teachers import size_teachers

GB = 1e9
TEACHERS, SEED = 10_000, 0
# Published image classifiers of torchvision, drawn with equal chances.
ARCHITECTURES = (
    "alexnet", "convnext_base", "convnext_tiny", "densenet121", "densenet201", "efficientnet_b0", "efficientnet_b3",
    "efficientnet_v2_s", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_y_400mf",
    "regnet_y_8gf", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "shufflenet_v2_x1_0", "swin_t", "swin_b", "vgg16", "vit_b_16", "vit_l_16", "wide_resnet50_2",
)  # fmt: skip
CLASSES = (10, 100, 1000)  # of a teacher, with equal chances
STUDENT = "resnet18"

# name, value, unit, where it is from
ASSUMED: tuple[tuple[str, float, str, str], ...] = (
    ("nodes", 8, "", "assumed"),
    ("gpus", 8, "a node", "assumed"),
    ("cpus", 128, "a node", "assumed"),
    ("memory", 1000 * GB, "bytes a node", "assumed"),
    ("gpu_memory", 80 * GB, "bytes", "NVIDIA A100 80 GB, data sheet"),
    ("object_store", 200 * GB, "bytes a node", "Ray's documentation: 30 % of memory, at most 200 GB by default"),
    ("gpu_flops", 47e12, "operations/s", "assumed: 15 % of the A100's 312e12 in bf16 (data sheet), eager PyTorch"),
    ("cpu_flops", 20e9, "operations/s a processor", "assumed: linear algebra, partly in double precision"),
    ("driver_cpus", 8, "processors", "assumed: what LAPACK's decompositions get out of a node"),
    ("storage", 20 * GB, "bytes/s, all nodes", "assumed: a parallel file system"),
    ("link", 2 * GB, "bytes/s a process", "assumed"),
    ("network", 25 * GB, "bytes/s a node", "assumed: 200 Gbit/s"),
    ("gpu_link", 300 * GB, "bytes/s", "assumed: half of NVLink 3's 600 GB/s (data sheet)"),
    ("latency", 2e-5, "s", "assumed"),
    ("rate", 8.6, "trials/s", "benchmarks/results/assess.json: 200 teachers in 31.4 s with 8.1 s of start-up"),
    ("decode", 130, "images/s a processor", "assumed: Pillow, JPEG of 500x375, scaled to 224x224"),
)  # fmt: skip
TASK: tuple[tuple[str, float, str, str], ...] = (
    ("images", 1.28e6, "", "ImageNet-1k's training images (Russakovsky et al. 2015)"),
    ("source_bytes", 110e3, "bytes", "ImageNet-1k: about 140 GB in all"),
    ("classes", 1000, "", "as ImageNet-1k"),
    ("row_bytes", 3 * 224 * 224, "bytes", "raw pixels of 224x224x3"),
)


def paper(architectures: tuple[str, ...], classes: int = 1000) -> dict[str, Model]:
    """Return operations, bytes and widths of torchvision's architectures, measured on the meta device."""
    picture = PreprocessingSpec(size=224, channels=3, mean=(0.5,), std=(0.5,))
    specs = [
        TeacherSpec.model_validate(
            {
                "name": name,
                "source": {"type": "torchvision", "model": name, "weights": "DEFAULT"},
                "preprocessing": picture,
            }
        )
        for name in architectures
    ]
    found = {}
    for one in size_teachers(specs, (3, 224, 224), trusted=()):
        if one.net is None or one.net.flops is None:
            raise RuntimeError(f"{one.name}: {one.problem}")
        found[one.name] = Model(one.net.flops, one.net.weight_bytes, classes, one.net.features or classes)
    return found


def zoo_of(known: dict[str, Model], teachers: int, seed: int = SEED) -> list[Model]:
    """Draw a zoo."""
    draw = random.Random(seed)
    names = sorted(known)
    return [replace(known[draw.choice(names)], classes=draw.choice(CLASSES)) for _ in range(teachers)]


def site_of() -> Site:
    whole = ("nodes", "gpus", "cpus")
    return Site(**{name: int(value) if name in whole else value for name, value, _, _ in ASSUMED})  # type: ignore[arg-type]


def job_of(student: Model) -> Job:
    values: dict[str, Any] = {name: value for name, value, _, _ in TASK}
    values |= {"classes": int(values["classes"]), "row_bytes": int(values["row_bytes"])}
    return Job(**values, labelled=(10, 10, 10), student_flops=student.flops, student_bytes=student.weight_bytes)


def variations(zoo: list[Model], job: Job, site: Site) -> Iterator[tuple[str, list[Stage]]]:
    """Yield what happens when one thing is another."""
    yield "as described", simulate(zoo, job, site)
    yield "GPUs half as fast", simulate(zoo, job, replace(site, gpu_flops=site.gpu_flops / 2))
    yield "GPUs twice as fast", simulate(zoo, job, replace(site, gpu_flops=site.gpu_flops * 2))
    yield "8 GPUs (one node)", simulate(zoo, job, replace(site, nodes=1))
    yield "256 GPUs (32 nodes)", simulate(zoo, job, replace(site, nodes=32))
    yield "1,000 teachers", simulate(zoo[::10], job, site)
    yield "100,000 teachers", simulate(zoo * 10, job, site)
    yield "no search: all see all images", simulate(zoo, replace(job, rungs=(1.0,)), site)
    yield "100 labels a class instead of 30", simulate(zoo, replace(job, labelled=(40, 30, 30)), site)
    yield "100 classes", simulate(zoo, replace(job, classes=100, labelled=(100, 100, 100)), site)
    yield "storage of 2 GB/s", simulate(zoo, job, replace(site, storage=2 * GB, link=1 * GB))
    yield "16 teachers chosen", simulate(zoo, replace(job, faculty=16), site)


def row(title: str, stages: list[Stage]) -> dict[str, Any]:
    hours = {stage.name: stage.seconds / 3600 for stage in stages}
    breaks = [f"{one.name}: {text}" for one in stages for text in one.breaks]
    return {"what": title, **hours, "all": sum(hours.values()), "breaks": breaks}


def tables(stages: list[Stage], rows: list[dict[str, Any]], site: Site) -> dict[str, str]:
    """Return the tables of docs/scale.md by the name of their marks."""
    cost = ["| stage | time | GPU-hours | GPUs busy | what bounds it | bytes |", "|---|---|---|---|---|---|"]
    for one in stages:
        told = ", ".join(f"{name} {_size(name, value)}" for name, value in one.bytes.items())
        cells = [one.name, _time(one.seconds), f"{one.seconds / 3600 * site.all_gpus:,.0f}"]
        cost.append(f"| {' | '.join(cells)} | {100 * one.gpu_share:.0f} % | {one.bound} | {told} |")
    total = sum(one.seconds for one in stages)
    cost.append(f"| all | {_time(total)} | {total / 3600 * site.all_gpus:,.0f} | | | |")
    names = [one.name for one in stages]
    vary = [f"| | {' | '.join(names)} | all |", f"|---|{'---|' * (len(names) + 1)}"]
    for found in rows:
        cells = [_time(3600 * found[name]) for name in (*names, "all")]
        vary.append(f"| {found['what']} | {' | '.join(cells)} |")
    parts = ["| stage | part | time |", "|---|---|---|"]
    for one in stages:
        parts += [f"| {one.name} | {name} | {_time(value)} |" for name, value in one.parts.items()]
    given = ["| what | value | unit | from |", "|---|---|---|---|"]
    given += [f"| `{name}` | {value:,.6g} | {unit} | {origin} |" for name, value, unit, origin in (*ASSUMED, *TASK)]
    broken = [f"- **{one.name}**: {text}" for one in stages for text in one.breaks] or ["- nothing"]
    shown = {"cost": cost, "vary": vary, "parts": parts, "given": given, "breaks": broken}
    return {name: "\n".join(lines) for name, lines in shown.items()}


def _size(name: str, value: float) -> str:
    return f"{value:,.0f}" if "a second" in name else f"{value / GB:,.0f} GB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def publish(found: dict[str, Any], shown: dict[str, str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path = ROOT / "docs" / "scale.md"
    text = path.read_text(encoding="utf-8")
    for name, table in shown.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n\n{table}\n\n{end}{tail}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=int, default=TEACHERS)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--dry", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args()
    known = paper(ARCHITECTURES)
    site = site_of() if arguments.nodes is None else replace(site_of(), nodes=arguments.nodes)
    zoo, job = zoo_of(known, arguments.teachers), job_of(known[STUDENT])
    outcomes = list(variations(zoo, job, site))
    stages = outcomes[0][1]
    rows = [row(title, one) for title, one in outcomes]
    shown = tables(stages, rows, site)
    if arguments.dry:
        print("\n\n".join(shown.values()))
        return
    found = {
        "environment": environment(),
        "assumptions": [dict(zip(("name", "value", "unit", "from"), one, strict=True)) for one in (*ASSUMED, *TASK)],
        "architectures": {name: asdict(model) for name, model in known.items()},
        "job": asdict(job),
        "site": asdict(site),
        "stages": [asdict(stage) for stage in stages],
        "rows": rows,
        "goals": [],
    }
    publish(found, shown)


if __name__ == "__main__":
    main()
