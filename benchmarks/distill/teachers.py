"""Trains the teachers, builds the image tables of all settings, and lets the teachers look at them.

    python -m benchmarks.ranking fetch --work DIR
    python -m benchmarks.distill build --work DIR

About 40 minutes on two cores that had other work too; what is done is kept in `--work`, so that a call that was cut
off goes on. `zoo`, `table` and `outputs` read what is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.distill.world import CLASSES, IMAGENET, OPTICAL, SETTINGS, TEACHERS, Setting, read
from benchmarks.ranking.world import TeacherRecipe
from pipeline.data.table import ImageTable
from pipeline.models.zoo import Zoo, load_zoo

# What a zoo of this benchmark may take its nets from.
TRUSTED = ("pipeline.models.", "benchmarks.ranking.")
TRAIN, TEST = ("train_labelled", "train_unlabelled", "probe", "validation"), ("test",)
_HELD_OUT = 200  # images a class that a teacher's accuracy is measured on


# ------------------------------------------------------------------------------------------------- what is there


def zoo(work: str | Path) -> Zoo:
    """Return all teachers."""
    return load_zoo(Path(work) / "zoo.yaml")


def table(work: str | Path, setting: str, seed: int) -> ImageTable:
    """Open a setting's image table."""
    return ImageTable.open(_table(Path(work), setting, seed))


def outputs(work: str | Path, setting: str, seed: int, teacher: str) -> Outputs:
    """Read what a teacher says of a setting's images."""
    return Outputs(_outputs(Path(work), setting, seed, teacher))


class Outputs:
    """What a teacher says of a setting's images, looked up by id.

    Parameters
    ----------
    path : Path
        A safetensors file that holds ``PART.ids`` (N, 16) uint8, ``PART.logits`` (N, C_t) float32 and ``PART.features``
        (N, D) float16 for the parts ``train`` (all splits but test) and ``test``, and ``classifier_weight`` (C_t, D).

    Attributes
    ----------
    classifier_weight : (C_t, D) tensor, or None
    """

    def __init__(self, path: Path) -> None:
        self._tensors = load_file(path)
        self._rows = {
            part: {bytes(row).hex(): number for number, row in enumerate(self._tensors[f"{part}.ids"].numpy())}
            for part in ("train", "test")
        }
        self.classifier_weight: Tensor | None = self._tensors.get("classifier_weight")

    def of(self, ids: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Return logits (N, C_t) and features (N, D) of images outside the test split, in float32."""
        return self._look_up("train", ids)

    def of_test(self, ids: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Return logits and features of test images: for teachers that answer themselves, never for a training."""
        return self._look_up("test", ids)

    def _look_up(self, part: str, ids: Iterable[str]) -> tuple[Tensor, Tensor]:
        rows = [self._rows[part][name] for name in ids]
        return self._tensors[f"{part}.logits"][rows], self._tensors[f"{part}.features"][rows].float()


def _table(work: Path, setting: str, seed: int) -> Path:
    return work / "tables" / f"{setting}-{seed}"


def _outputs(work: Path, setting: str, seed: int, teacher: str) -> Path:
    return work / "outputs" / f"{setting}-{seed}-{teacher}.safetensors"


# ------------------------------------------------------------------------------------------------- the teachers
# `benchmarks.ranking.build` brings Ray, which those who only read do not need: it is imported where it is called.


@dataclass(frozen=True)
class TeacherJob:
    """One teacher to train."""

    recipe: TeacherRecipe
    seed: int
    work: str


def train(job: TeacherJob) -> str:
    """Train one teacher and measure it; return a line that says how it did."""
    recipe, work = job.recipe, Path(job.work)
    raw, folder, start = work / "raw", work / "teachers", time.perf_counter()
    if recipe.source == OPTICAL:
        _train_optical(recipe, raw, folder, job.seed)
    else:
        from benchmarks.ranking.build import train_teacher

        train_teacher((recipe, str(raw), str(folder), job.seed))
    about = {"accuracy": _held_out(recipe, raw, folder), "seconds": round(time.perf_counter() - start, 1)}
    (folder / f"{recipe.name}.json").write_text(json.dumps(about), encoding="utf-8")
    return f"{recipe.name}: held-out accuracy {about['accuracy']:.3f}, {about['seconds']:.0f} s"


def _train_optical(recipe: TeacherRecipe, raw: Path, folder: Path, seed: int) -> None:
    """Train a teacher on scikit-learn's digits, as the demo trains its own."""
    from conf.demo.build import Recipe, task_of
    from conf.demo.build import train as train_demo

    fields = vars(_like_mnist(recipe))
    demo = Recipe(**fields)
    images, labels = read(raw, OPTICAL, "train")
    net = train_demo(demo, *task_of(demo, images[:, 0], labels, CLASSES[OPTICAL]), seed)
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, folder / f"{recipe.name}.safetensors")


def _like_mnist(recipe: TeacherRecipe) -> TeacherRecipe:
    """Return a recipe whose enlarged digits are taken for MNIST's: not flipped, and normalised with their figures."""
    return replace(recipe, source="mnist") if recipe.source == OPTICAL else recipe


def _entry(recipe: TeacherRecipe, folder: Path, accuracy: float) -> dict[str, Any]:
    from benchmarks.ranking.build import zoo_entry

    return zoo_entry(_like_mnist(recipe), folder, accuracy)


def _held_out(recipe: TeacherRecipe, raw: Path, folder: Path) -> float:
    """Return a teacher's accuracy on images that nobody trained on; over several sub-tasks, their mean.

    All images of the source's classes that the teacher knows count, each once for every sub-task.
    """
    from pipeline.models.sources import load_teacher
    from pipeline.models.spec import TeacherSpec
    from pipeline.models.teacher import predict

    images, labels = read(raw, recipe.source, "reserved")
    names = CLASSES[recipe.source]
    known = sorted({names.index(member) for members in recipe.classes.values() for member in members})
    rows = np.concatenate([np.flatnonzero(labels == number)[:_HELD_OUT] for number in known])
    teacher = load_teacher(TeacherSpec.model_validate(_entry(recipe, folder, 0.0)), trusted_factories=TRUSTED)
    logits = predict(teacher, torch.from_numpy(images[rows]).split(128)).logits
    accuracies = []
    for subtask in {name.partition("/")[0] if "/" in name else "" for name in recipe.classes}:
        columns = [i for i, name in enumerate(recipe.classes) if name.startswith(f"{subtask}/") or not subtask]
        members = [list(recipe.classes.values())[column] for column in columns]
        wanted = [next(i for i, m in enumerate(members) if names[label] in m) for label in labels[rows]]
        accuracies.append((logits[:, columns].argmax(1) == torch.tensor(wanted)).double().mean().item())
    return sum(accuracies) / len(accuracies)


def write_zoo(work: Path) -> None:
    """Write the zoo file of the trained teachers."""
    from benchmarks.ranking.build import imagenet_entry

    folder = work / "teachers"
    entries = [
        _entry(recipe, folder, json.loads((folder / f"{recipe.name}.json").read_text(encoding="utf-8"))["accuracy"])
        for recipe in TEACHERS
    ]
    entries += [imagenet_entry(name, work / "raw") for name in IMAGENET]
    (work / "zoo.yaml").write_text(yaml.safe_dump({"teachers": entries}, sort_keys=False), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the tasks


def build_tables(work: Path, setting: Setting) -> None:
    """Write a setting's image tables that are missing."""
    from pipeline.data.ingest import build_table
    from pipeline.data.spec import ImageSpec, NumpySource

    missing = [seed for seed in setting.seeds if not (_table(work, setting.name, seed) / "images.arrow").exists()]
    if not missing:
        return
    images, labels = read(work / "raw", setting.source, "test")
    archive = work / f"{setting.source}.npz"
    if not archive.exists():
        np.savez(archive, images=images.transpose(0, 2, 3, 1).squeeze(), labels=labels)
    for seed in missing:
        build_table(
            NumpySource(path=str(archive), classes=list(setting.classes)),
            ImageSpec(size=images.shape[-1], channels=images.shape[1]),
            setting.splits,
            seed,
            _table(work, setting.name, seed),
        )


@dataclass(frozen=True)
class OutputsJob:
    """One teacher over one setting's images."""

    setting: str
    seeds: tuple[int, ...]
    teacher: str
    work: str


def run_teacher(job: OutputsJob) -> str:
    """Run a teacher over the images of a setting, and store what it says, see `Outputs`."""
    from pipeline.models.sources import load_teacher
    from pipeline.models.teacher import predict

    work, start = Path(job.work), time.perf_counter()
    teacher = load_teacher(zoo(work)[job.teacher], trusted_factories=TRUSTED)
    for seed in job.seeds:
        images = table(work, job.setting, seed)
        tensors: dict[str, Tensor] = {}
        for part, splits in (("train", TRAIN), ("test", TEST)):
            split = images.split(*splits)
            said = predict(teacher, split.batches(128))
            tensors[f"{part}.ids"] = torch.tensor([list(bytes.fromhex(name)) for name in split.ids], dtype=torch.uint8)
            tensors[f"{part}.logits"] = said.logits
            tensors[f"{part}.features"] = said.features.half()
        if teacher.classifier_weight is not None:
            tensors["classifier_weight"] = teacher.classifier_weight.contiguous()
        target = _outputs(work, job.setting, seed, job.teacher)
        save_file(tensors, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
    return f"{job.setting}, {job.teacher}: {time.perf_counter() - start:.0f} s"


# ------------------------------------------------------------------------------------------------- the build


def start(raw: str) -> None:
    """Make a process ready: one thread, and the code of the nets from PyPI within reach."""
    from benchmarks.ranking.build import reach_code

    torch.set_num_threads(1)
    reach_code(Path(raw))


def _each(work: Path, processes: int, function: Callable[[Any], str], jobs: Sequence[Any]) -> None:
    """Do all jobs, in several processes, in order."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(jobs)), start, (str(work / "raw"),)) as pool:
        for number, line in enumerate(pool.imap_unordered(function, jobs), start=1):
            print(f"{function.__name__} {number} of {len(jobs)}: {line}", flush=True)


def main(arguments: list[str]) -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description="Builds the distillation benchmark's teachers and tasks.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    work: Path = options.work.absolute()
    for folder in ("teachers", "outputs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    training = [
        TeacherJob(recipe, seed, str(work))
        for seed, recipe in enumerate(TEACHERS)
        if not (work / "teachers" / f"{recipe.name}.json").exists()
    ]
    _each(work, options.processes, train, training)
    write_zoo(work)
    for setting in SETTINGS.values():
        build_tables(work, setting)
    missing = {
        (setting.name, teacher): tuple(
            seed for seed in setting.seeds if not _outputs(work, setting.name, seed, teacher).exists()
        )
        for setting in SETTINGS.values()
        for teacher in setting.teachers
    }
    running = [OutputsJob(name, seeds, teacher, str(work)) for (name, teacher), seeds in missing.items() if seeds]
    _each(work, options.processes, run_teacher, running)
    print(f"{len(TEACHERS) + len(IMAGENET)} teachers, {len(SETTINGS)} settings, {time.perf_counter() - began:.0f} s")
