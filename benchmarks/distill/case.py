"""One setting and seed of the benchmark: its images, what every teacher says of them, the chosen set."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.distill import teachers as built
from benchmarks.distill.world import Setting
from pipeline.amalgamation.ambiguity import assign
from pipeline.amalgamation.subtasks import SubTask
from pipeline.amalgamation.together import Together, fit_together, pseudo_labels, together_held_out
from pipeline.assessment.selection import select_set
from pipeline.distillation.step import Head
from pipeline.engine.arms import TAUGHT
from pipeline.engine.spec import RAW, SPOKEN
from pipeline.engine.teaching import Speaker, Teaching
from pipeline.models.sources import load_teacher
from pipeline.models.spec import TeacherSpec
from pipeline.models.student import load_student, saved_classes
from pipeline.models.teacher import Teacher
from pipeline.transport.bridge import Bridge, fit_bridge, given_bridge, pixel_features
from pipeline.transport.cost import transport_gain
from pipeline.transport.names import names_cost

MOST = 4  # teachers in a set, the product's default
LABELLED = ("train_labelled", "probe", "validation")


@dataclass(frozen=True)
class Reference:
    """A teacher of the zoo, or a component net in a folder, for a worker to load."""

    spec: TeacherSpec | None
    folder: str = ""
    name: str = ""

    def load(self) -> Teacher:
        """Load it."""
        if self.spec is not None:
            return load_teacher(self.spec, trusted_factories=built.TRUSTED)
        student = load_student(self.folder)
        classes, preprocessing = saved_classes(self.folder), student.preprocessing.spec
        return Teacher(student.net, name=self.name, classes=classes, preprocessing=preprocessing)


class Case:
    """One setting and seed: images, what every teacher says of them, the chosen set.

    Parameters
    ----------
    work : Path
    setting : Setting
    seed : int
    """

    def __init__(self, work: Path, setting: Setting, seed: int) -> None:
        self.work, self.setting, self.seed = work, setting, seed
        self.zoo, self.table = built.zoo(work), built.table(work, setting.name, seed)
        self.home = work / "cases" / f"{setting.name}-{seed}"
        self.taught = self.table.split(*TAUGHT)
        self._outputs: dict[str, built.Outputs] = {}
        self._bridges: dict[tuple[str, str], Bridge] = {}

    def outputs(self, name: str) -> built.Outputs:
        """Return what a teacher says."""
        if name not in self._outputs:
            self._outputs[name] = built.outputs(self.work, self.setting.name, self.seed, name)
        return self._outputs[name]

    def bridge(self, name: str, kind: str = "centres") -> Bridge:
        """Return a teacher's bridge to the task: from the labelled images, or from names where there are none."""
        if (name, kind) not in self._bridges:
            said, labelled = self.outputs(name), self.table.split("train_labelled")
            classes = self.table.classes
            if not self.setting.labels:
                made = given_bridge(names_cost(self.classes_of(name), classes))
            else:
                logits, features = said.of(labelled.ids)
                made = fit_bridge(
                    kind,  # type: ignore[arg-type]
                    logits=logits,
                    features=features,
                    labels=labelled.labels,
                    num_classes=len(classes),
                    classifier_weight=said.classifier_weight,
                )
            self._bridges[name, kind] = made
        return self._bridges[name, kind]

    def classes_of(self, name: str) -> tuple[str, ...]:
        """Return the names of a teacher's classes."""
        classes = self.zoo[name].classes
        return classes if isinstance(classes, tuple) else tuple(f"class {number}" for number in range(1000))

    def carried(self, name: str, split: str, kind: str = "centres") -> Tensor:
        """Return what a teacher says of a split, carried to the task's classes."""
        said, ids, bridge = self.outputs(name), self.table.split(split).ids, self.bridge(name, kind)
        logits, features = said.of_test(ids) if split == "test" else said.of(ids)
        return bridge.carry(bridge.distribution(logits, features))

    @cached_property
    def choice(self) -> tuple[list[str], str]:
        """The chosen set, by the product's rule, and the best single teacher; of all teachers."""
        return self.choose(self.setting.teachers)

    def choose(self, names: Sequence[str]) -> tuple[list[str], str]:
        """Choose among some teachers, by all labelled images, each held out in turn."""
        splits = [self.table.split(name) for name in LABELLED]
        labels, size = torch.cat([one.labels for one in splits]), len(self.table.classes)
        pixels = torch.cat([pixel_features(one.images()) for one in splits])
        features = {name: self.features(name, *LABELLED) for name in names}

        def together(members: Sequence[str]) -> Tensor:
            return together_held_out([features[name] for name in members], labels, size)

        found = select_set(
            {name: together([name]) for name in names},
            labels,
            together=together,
            reference=together_held_out([pixels], labels, size),
            gains={name: self.gain(name) for name in names},
            parameters={name: self.size(name) for name in names},
            max_teachers=MOST,
            seed=self.seed,
        )
        return list(found.chosen), found.best_single or names[0]

    def features(self, name: str, *splits: str) -> Tensor:
        """Return a teacher's penultimate features of some splits."""
        said, parts = self.outputs(name), []
        for split in splits:
            ids = self.table.split(split).ids
            parts.append((said.of_test(ids) if split == "test" else said.of(ids))[1].flatten(1).float())
        return torch.cat(parts)

    def together(self, names: Sequence[str]) -> Together:
        """Return the view of a set of teachers; without labels by those that the teachers give the taught images."""
        if self.setting.labels:
            labels, splits = self.table.split("train_labelled").labels, ("train_labelled",)
        else:
            said = [self.bridge(name).distribution(*self.outputs(name).of(self.taught.ids)) for name in names]
            carried = [self.bridge(name).carry(one) for name, one in zip(names, said, strict=True)]
            labels, splits = pseudo_labels(torch.stack(carried)), TAUGHT
        features = [self.features(name, *splits) for name in names]
        return fit_together(features, labels, len(self.table.classes))

    def gain(self, name: str, kind: str = "centres") -> float:
        """Return a teacher's transport gain on the probe."""
        probe, bridge = self.table.split("probe"), self.bridge(name, kind)
        p = bridge.distribution(*self.outputs(name).of(probe.ids))
        return max(float(transport_gain(p, probe.labels, bridge.M)), 0.0)

    def size(self, name: str) -> int:
        """Return the size of a teacher's weight file, which stands for its parameters."""
        return Path(str(self.zoo[name].path)).stat().st_size

    def speaker(self, name: str, kind: str) -> Speaker:
        """Write what a teacher says of the taught images as the loop reads it."""
        home = self.home / f"{name}-{kind}"
        if not (home / SPOKEN).exists():
            home.mkdir(parents=True, exist_ok=True)
            logits, features = self.outputs(name).of(self.taught.ids)
            p = self.bridge(name, kind).distribution(logits, features)
            save(home / RAW, {"logits": logits.half(), "features": features.half()})
            save(home / SPOKEN, {"p": p.half(), "carried": self.bridge(name, kind).carry(p).half()})
        return Speaker(name, self.classes_of(name), self.gain(name, kind) if self.setting.labels else 1.0, str(home))

    def teaching(self, row: str, names: Sequence[str], choice: str, kind: str, confidence: bool) -> str:
        """Share the taught images among teachers, or let them teach together, as the stage amalgamate does."""
        if choice == "together":
            return self.taught_together(row, names)
        speakers = [self.speaker(name, kind) for name in names]
        carried = torch.stack([load_file(Path(one.folder) / SPOKEN)["carried"].float() for one in speakers])
        carried /= carried.sum(-1, keepdim=True)
        found, shares = assign(carried), torch.zeros(len(names), len(self.taught))
        if choice == "least_ambiguous":
            shares[found.teacher, torch.arange(len(self.taught))] = 1
        else:
            gains = [one.gain for one in speakers]
            weights = torch.tensor(gains if choice == "gain" and max(gains) > 0 else [1.0] * len(names))
            shares += (weights / weights.sum())[:, None]
        if confidence:
            shares *= 1 - found.ambiguity
        folder = self.home / f"teaching-{row}"
        costs = [self.bridge(name, kind).M for name in names]
        Teaching.save(folder, ids=self.taught.ids, speakers=speakers, costs=costs, shares=shares)
        return str(folder)

    def taught_together(self, row: str, names: Sequence[str]) -> str:
        """Write what a set says together of the taught images."""
        view, folder = self.together(names), self.home / f"teaching-{row}"
        home = self.home / f"together-{row}"
        home.mkdir(parents=True, exist_ok=True)
        p = view.distribution([self.features(name, *TAUGHT) for name in names]).half()
        save(home / SPOKEN, {"p": p, "carried": p.clone()})
        speakers, ids = [Speaker("together", self.table.classes, 1.0, str(home))], self.taught.ids
        shares = 1 - assign(p.float()[None]).ambiguity
        Teaching.save(folder, ids=ids, speakers=speakers, costs=[view.bridge.M], shares=shares)
        return str(folder)

    @property
    def subtasks(self) -> list[SubTask]:
        """The sub-tasks, or the whole task as one."""
        return [SubTask(one.name, tuple(one.classes)) for one in self.setting.subtasks] or [
            SubTask("", self.table.classes)
        ]

    @property
    def heads(self) -> tuple[Head, ...]:
        """The student's heads; none for a single task."""
        heads, start = [], 0
        for one in self.setting.subtasks:
            heads.append(Head(one.name, slice(start, start + len(one.classes)), one.members(self.table.classes)))
            start += len(one.classes)
        return tuple(heads)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all: two processes may write the same one."""
    part = path.with_suffix(f".{multiprocessing.current_process().pid}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    part.replace(path)
