"""The rows of the benchmark: each trains one student for one setting and seed, on its own, and keeps what came out.

    python -m benchmarks.distill run --work DIR      after `build`

Two hours on two cores; finished rows are kept in ``WORK/rows.jsonl``, so that a call that was cut off goes on. They are
known by setting, seed and name: after a change of a recipe, take its rows out of there. All rows of a setting and seed
share the images, the labels, the student's net, the loop, the augmentation and the chosen set; they differ in what the
student is taught.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.distill import teachers as built
from benchmarks.distill.world import SETTINGS, Setting
from pipeline.amalgamation.ambiguity import assign
from pipeline.amalgamation.subtasks import SubTask, assign_subtask, group, subtask_distribution
from pipeline.amalgamation.together import Together, fit_together, together_held_out
from pipeline.assessment.selection import select_set
from pipeline.data.spec import AugmentSpec
from pipeline.distillation.step import Head
from pipeline.engine.arms import TAUGHT, WITH_TEACHERS, ArmsPayload, train_arms
from pipeline.engine.context import LocalContext
from pipeline.engine.evaluation import evaluate, evaluate_heads
from pipeline.engine.objective_spec import FlowSpec, ObjectiveSpec, objective_of
from pipeline.engine.spec import RAW, SPOKEN, Arm, LoopSpec, OptimSpec
from pipeline.engine.teaching import Speaker, Teaching
from pipeline.models.sources import load_teacher
from pipeline.models.spec import StudentSpec, TeacherSpec
from pipeline.models.student import load_student, saved_classes, student_like
from pipeline.models.teacher import Teacher, predict
from pipeline.transport.bridge import Bridge, fit_bridge, given_bridge, pixel_features
from pipeline.transport.cost import transport_gain
from pipeline.transport.names import names_cost

LOOP = LoopSpec(epochs=20, batch_size=128, labelled_batch=64, optim=OptimSpec(name="adamw", lr=4e-3, weight_decay=0.05))
STUDENT = StudentSpec(name="small_cnn", kwargs={"width": 24})
AUGMENT = {"fashion": (1, True), "mnist": (1, False), "optical": (1, False), "cifar": (2, True)}  # shift, flip
MOST = 4  # teachers in a set, the product's default
LABELS = {"cross_entropy": {}}
FLOW = FlowSpec(kl=0.1)  # the recipe

# What is taught, from whom, and by which loss. `set` is the chosen set.
LABELLED_ROWS: dict[str, dict[str, Any]] = {
    "faculty": {"objective": ObjectiveSpec()},
    "sctd": {"choice": "gain", "bridge": "prototype", "objective": objective_of(**LABELS, transport={"weight": 1})},
    "aka": {"components": True},
    "knowledge_flow": {"choice": "average", "flow": FLOW, "objective": objective_of(**LABELS)},
    "no_teacher": {},
    "finetune": {"start": True},
    "random_set": {"teachers": "random", "objective": ObjectiveSpec()},
    "best_single": {"teachers": "best", "objective": ObjectiveSpec()},
    "all_teachers": {"teachers": "all", "objective": ObjectiveSpec()},
    "least_ambiguous": {"choice": "least_ambiguous", "objective": ObjectiveSpec()},
    "average": {"choice": "average", "objective": ObjectiveSpec()},
    "concatenated": {"choice": "average", "objective": objective_of(**LABELS, concatenated={})},
    "kd": {"choice": "average", "objective": objective_of(**LABELS, kd={"temperature": 4})},
    "dkd": {"choice": "average", "objective": objective_of(**LABELS, dkd={"rise": 0.1})},
    "dist": {"choice": "average", "objective": objective_of(**LABELS, dist={"beta": 2, "gamma": 2})},
    "hints": {"choice": "average", "objective": objective_of(**LABELS, hints={})},
    "attention": {"choice": "average", "objective": objective_of(**LABELS, attention={})},
    "common_features": {"choice": "average", "objective": objective_of(**LABELS, common_features={})},
    "b_tuning": {"choice": "average", "objective": objective_of(**LABELS, b_tuning={})},
    "dropping": {"choice": "average", "objective": objective_of(**LABELS, dropping={})},
    "relations": {"choice": "average", "objective": objective_of(**LABELS, relations={})},
    "irrelevant": {"teachers": "irrelevant", "objective": ObjectiveSpec()},
}
UNLABELLED_ROWS: dict[str, dict[str, Any]] = {
    "aka": {"components": True},
    "direct": {"choice": "least_ambiguous", "objective": objective_of(transport={}, kd={})},
    "concatenated": {"choice": "average", "objective": objective_of(concatenated={"head": "classes"})},
    "average": {"choice": "average", "objective": objective_of(kd={})},
}
SUBTASK_ROWS: dict[str, dict[str, Any]] = {
    "aka": {"components": True},
    "concatenated": {"concatenated_heads": True},
}
NO_STUDENT = ("average_ensemble", "least_ambiguous_ensemble", "best_teacher")
LABELLED = ("train_labelled", "probe", "validation")


def rows_of(setting: Setting) -> list[str]:
    """Return the names of a setting's rows."""
    if setting.subtasks:
        return [*SUBTASK_ROWS, *NO_STUDENT]
    if setting.labels:
        return [*LABELLED_ROWS, *NO_STUDENT, "together"]
    return [*UNLABELLED_ROWS, *NO_STUDENT]


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
        """Return the view of a set of teachers."""
        labelled = self.table.split("train_labelled")
        features = [self.features(name, "train_labelled") for name in names]
        return fit_together(features, labelled.labels, len(self.table.classes))

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
            _save(home / RAW, {"logits": logits.half(), "features": features.half()})
            _save(home / SPOKEN, {"p": p.half(), "carried": self.bridge(name, kind).carry(p).half()})
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
        _save(home / SPOKEN, {"p": p, "carried": p.clone()})
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


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    part = path.with_suffix(f".{multiprocessing.current_process().pid}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    part.replace(path)


def run_row(job: tuple[str, str, int, str]) -> dict[str, Any]:
    """Train one student, or ask the teachers alone; return its accuracy on the test images."""
    work, setting, seed, row = Path(job[0]), SETTINGS[job[1]], job[2], job[3]
    torch.set_num_threads(1)
    started = time.perf_counter()
    case = Case(work, setting, seed)
    found = _no_student(case, row) if row in (*NO_STUDENT, "together") else _student(case, row)
    about = {"setting": setting.name, "seed": seed, "row": row}
    return about | found | {"seconds": round(time.perf_counter() - started, 1)}


def _student(case: Case, row: str) -> dict[str, Any]:
    setting = case.setting
    recipes = SUBTASK_ROWS if setting.subtasks else LABELLED_ROWS if setting.labels else UNLABELLED_ROWS
    recipe = recipes[row]
    folder = case.home / f"student-{row}"
    shutil.rmtree(folder, ignore_errors=True)
    if recipe.get("components"):
        return _judged(case, _amalgamated(case, row, folder))
    if recipe.get("concatenated_heads"):
        return _judged(case, _concatenated_heads(case, row, folder))
    names, about = _teachers(case, recipe)
    if recipe.get("start"):
        name = next(
            (name for name in [case.choice[1], *case.choice[0], *setting.teachers] if _can_start(case, name)), None
        )
        if name is None:
            return {"accuracy": None, "why": "no teacher whose net can be built with other classes"}
        arm = Arm(
            row, case.seed, str(folder), None, student=student_like(case.zoo[name]), start=Reference(case.zoo[name])
        )
        about = {"teachers": [name]}
    elif not names:
        arm = Arm(row, case.seed, str(folder), None)
    else:
        objective, flow = recipe["objective"], recipe.get("flow")
        if _is_live(objective, flow):  # photographs at 96 pixels in every step would take hours on two cores
            names = [name for name in names if not name.startswith("imagenet")] or names
            about = {"teachers": names}
        kind = recipe.get("bridge", "centres")
        # As published, a method counts all images alike; the default and what it is taken apart into do not.
        confidence = objective == ObjectiveSpec()
        teaching = case.teaching(row, names, recipe.get("choice", "together"), kind, confidence)
        arm = Arm(row, case.seed, str(folder), teaching, objective=objective, flow=flow)
    _train(case, arm, {name: Reference(case.zoo[name]) for name in names})
    return _judged(case, folder) | about


def _teachers(case: Case, recipe: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    which, setting = recipe.get("teachers", "set"), case.setting
    if not recipe.get("objective"):
        return [], {}
    if not setting.labels:
        return list(setting.teachers), {}
    chosen, best = case.choice
    if which == "random":
        names = random.Random(case.seed).sample(sorted(setting.teachers), len(chosen))
    elif which == "irrelevant":
        chosen, _ = case.choose(setting.irrelevant)
        # What the choice refuses is forced on the student here: the guard alone is left to save it.
        return list(setting.irrelevant), {"chosen": chosen, "teachers": list(setting.irrelevant)}
    else:
        names = {"set": chosen, "best": [best], "all": list(setting.teachers)}[which]
    return names, {"teachers": names}


def _is_live(objective: ObjectiveSpec, flow: FlowSpec | None) -> bool:
    from pipeline.engine.objectives import wants

    return flow is not None or "live" in wants(objective)


def _can_start(case: Case, name: str) -> bool:
    return getattr(case.zoo[name].source, "factory", "").startswith("pipeline.models.")


def _train(case: Case, arm: Arm, live: dict[str, Reference], **changes: Any) -> None:
    shift, flip = AUGMENT[case.setting.source]
    fields: dict[str, Any] = {
        "student": STUDENT,
        "loop": LOOP,
        "objective": arm.objective or ObjectiveSpec(),
        "heads": case.heads,
        "classes": tuple(name for one in case.subtasks for name in one.qualified),
    }
    payload = ArmsPayload(
        arms=(arm,),
        table=str(case.table.path),
        augment=AugmentSpec(shift=shift, flip=flip),
        teachers=live,
        **(fields | changes),
    )
    train_arms(LocalContext(device=torch.device("cpu")), payload)


def _amalgamated(case: Case, row: str, folder: Path) -> Path:
    """Train the component nets and the target net (AKA): by the names of the teachers' classes, or as they are carried.

    Teachers of a task with labels know other classes than it has: what they say of it is carried there. All teachers
    that were chosen take part, or all of the setting where nothing is chosen from.
    """
    setting, ids = case.setting, case.taught.ids
    names = case.choice[0] if setting.labels else list(setting.teachers)
    if any(name.startswith("imagenet") for name in names):  # see `_student`
        names = [name for name in names if not name.startswith("imagenet")] or names
    known = [case.classes_of(name) for name in names]
    components: dict[str, Path] = {}
    for subtask in case.subtasks:
        size = len(subtask.classes)
        if setting.labels:
            speakers = [case.speaker(name, "centres") for name in names]
            carried = torch.stack([load_file(Path(one.folder) / SPOKEN)["carried"].float() for one in speakers])
            teacher = assign(carried / carried.sum(-1, keepdim=True)).teacher
        else:
            sources = group(case.subtasks, known)[subtask.name]
            logits = [case.outputs(names[source.teacher]).of(ids)[0] for source in sources]
            teacher = assign_subtask(logits, sources, size).teacher
            speakers = []
            for source, said in zip(sources, logits, strict=True):
                home = case.home / f"{names[source.teacher]}-subtask-{subtask.name}"
                home.mkdir(parents=True, exist_ok=True)
                p = subtask_distribution(said, source, size).half()
                _save(home / SPOKEN, {"p": p, "carried": p.clone()})
                speakers.append(Speaker(names[source.teacher], known[source.teacher], 1.0, str(home)))
        shares = torch.nn.functional.one_hot(teacher, len(speakers)).t().float()
        teaching = case.home / f"teaching-{row}-{subtask.name}"
        Teaching.save(teaching, ids=ids, speakers=speakers, costs=[1 - torch.eye(size)] * len(speakers), shares=shares)
        name = f"component-{subtask.name}"
        components[name] = folder / name
        objective = objective_of(component={"soft": 1, "view": "carried" if setting.labels else "classes"})
        arm = Arm(name, case.seed, str(components[name]), str(teaching), objective=objective)
        live = {one.name: Reference(case.zoo[one.name]) for one in speakers}
        _train(case, arm, live, classes=subtask.qualified, heads=())
    classes = tuple(name for one in case.subtasks for name in one.qualified)
    speakers, costs, live = [], [], {}
    for subtask, (name, home) in zip(case.subtasks, components.items(), strict=True):
        live[name] = Reference(None, str(home), name)
        p = predict(live[name].load(), case.taught.batches(256)).logits.softmax(1)
        places = torch.tensor([classes.index(one) for one in subtask.qualified])
        _save(home / SPOKEN, {"p": p, "carried": p.new_zeros(len(p), len(classes)).index_copy(1, places, p)})
        speakers.append(Speaker(name, subtask.qualified, 1.0, str(home)))
        costs.append(1 - torch.nn.functional.one_hot(places, len(classes)).float())
    teaching = case.home / f"teaching-{row}"
    shares = torch.full((len(speakers), len(ids)), 1 / len(speakers))
    Teaching.save(teaching, ids=ids, speakers=speakers, costs=costs, shares=shares)
    target = folder / "target"
    _train(case, Arm(row, case.seed, str(target), str(teaching), objective=objective_of(target={})), live)
    return target


def _concatenated_heads(case: Case, row: str, folder: Path) -> Path:
    """Distil the average of each sub-task's sources into its head: concatenated logits for a student with heads."""
    names, ids = list(case.setting.teachers), case.taught.ids
    known = [case.classes_of(name) for name in names]
    groups = group(case.subtasks, known)
    parts = []
    for subtask in case.subtasks:
        sources = groups[subtask.name]
        said = [
            subtask_distribution(case.outputs(names[source.teacher]).of(ids)[0], source, len(subtask.classes))
            for source in sources
        ]
        parts.append(torch.stack(said).mean(0))
    classes = tuple(name for one in case.subtasks for name in one.qualified)
    home = case.home / "heads-average"
    home.mkdir(parents=True, exist_ok=True)
    p = torch.cat(parts, 1) / len(parts)
    _save(home / SPOKEN, {"p": p, "carried": p.clone()})
    teaching = case.home / f"teaching-{row}"
    Teaching.save(
        teaching,
        ids=ids,
        speakers=[Speaker("average", classes, 1.0, str(home))],
        costs=[1 - torch.eye(len(classes))],
        shares=torch.ones(1, len(ids)),
    )
    _train(case, Arm(row, case.seed, str(folder), str(teaching), objective=objective_of(kd={})), {})
    return folder


def _judged(case: Case, folder: Path) -> dict[str, Any]:
    predictions = load_file(folder / "predictions.safetensors")
    found: dict[str, Any] = {"accuracy": _accuracy(case, predictions["test"])}
    if f"test{WITH_TEACHERS}" in predictions:
        found["accuracy_with_teachers"] = _accuracy(case, predictions[f"test{WITH_TEACHERS}"])
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        own = [value for key, value in history[-1].items() if key.startswith("flow.") and key.endswith(".student")]
        found["student_weight"] = min(own)
    if case.setting.labels:  # what the guard judges by
        hits = [(predictions[name].argmax(1) == case.table.split(name).labels) for name in ("probe", "validation")]
        found["hits"] = torch.cat(hits).int().tolist()
    return found


def _accuracy(case: Case, logits: Tensor) -> float:
    labels = case.table.split("test").labels
    return evaluate_heads(logits, labels, case.heads).accuracy if case.heads else evaluate(logits, labels).accuracy


def _no_student(case: Case, row: str) -> dict[str, Any]:
    """Ask the teachers themselves: the best, their average, all together, or for each image the least ambiguous."""
    if case.setting.subtasks:
        return _no_student_of_heads(case, row)
    names = case.choice[0] if case.setting.labels else list(case.setting.teachers)
    if not names:
        return {"accuracy": None, "why": "no teacher was chosen"}
    if row == "best_teacher":
        names = [case.choice[1]] if case.setting.labels else names
        accuracies = [_accuracy(case, case.carried(name, "test").clamp_min(1e-12).log()) for name in names]
        return {"accuracy": max(accuracies)}
    if row == "together":
        p = case.together(names).distribution([case.features(name, "test") for name in names])
        return {"accuracy": _accuracy(case, p.clamp_min(1e-12).log())}
    carried = torch.stack([case.carried(name, "test") for name in names])
    p = carried.mean(0) if row == "average_ensemble" else assign(carried).target
    return {"accuracy": _accuracy(case, p.clamp_min(1e-12).log())}


def _no_student_of_heads(case: Case, row: str) -> dict[str, Any]:
    names, ids = list(case.setting.teachers), case.table.split("test").ids
    groups = group(case.subtasks, [case.classes_of(name) for name in names])
    parts = []
    labels = case.table.split("test").labels
    for subtask, head in zip(case.subtasks, case.heads, strict=True):
        size = len(subtask.classes)
        logits = [case.outputs(names[source.teacher]).of_test(ids)[0] for source in groups[subtask.name]]
        said = [
            subtask_distribution(one, source, size) for one, source in zip(logits, groups[subtask.name], strict=True)
        ]
        if row == "best_teacher":  # of each sub-task the best source, as its test accuracy says
            own = torch.tensor(head.members)[labels]
            said = [max(said, key=lambda p: float((p.argmax(1) == own).double().mean()))]
        p = (
            assign_subtask(logits, groups[subtask.name], size).target
            if row == "least_ambiguous_ensemble"
            else torch.stack(said).mean(0)
        )
        parts.append(p)
    return {"accuracy": _accuracy(case, torch.cat(parts, 1).clamp_min(1e-12).log())}


def journal(work: Path) -> list[dict[str, Any]]:
    """Return the finished rows."""
    path = work / "rows.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _guarded(job: tuple[str, str, int, str]) -> dict[str, Any]:
    try:
        return run_row(job)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"setting": job[1], "seed": job[2], "row": job[3], "error": f"{type(error).__name__}: {error}"}


def main(arguments: list[str]) -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description="Trains the distillation benchmark's students.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="*", default=None, metavar="SETTING")
    parser.add_argument("--rows", nargs="*", default=None, metavar="ROW")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    work: Path = options.work.absolute()
    done = {(one["setting"], one["seed"], one["row"]) for one in journal(work)}
    jobs = [
        (str(work), setting.name, seed, row)
        for seed in (0, 1, 2)
        for setting in SETTINGS.values()
        if options.only is None or setting.name in options.only
        for row in rows_of(setting)
        if (options.rows is None or row in options.rows) and (setting.name, seed, row) not in done
    ]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.processes, built.start, (str(work / "raw"),)) as pool:
        for number, found in enumerate(pool.imap_unordered(_guarded, jobs), start=1):
            place = f"{number} of {len(jobs)}: {found['setting']}-{found['seed']} {found['row']}"
            if "error" in found:
                print(f"{place}: {found['error']}", flush=True)
                continue
            with (work / "rows.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(found) + "\n")
            accuracy = "none" if found["accuracy"] is None else f"{100 * found['accuracy']:.1f} %"
            print(f"{place}: {accuracy}, {time.perf_counter() - began:.0f} s", flush=True)
