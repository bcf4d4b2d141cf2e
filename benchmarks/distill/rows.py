"""The rows of the benchmark: each trains one student for one setting and seed, on its own, and keeps what came out.

    python -m benchmarks.distill run --work DIR      after `build`

An estimated two hours on two cores; finished rows are kept in ``WORK/rows.jsonl``, so that a call that was cut off goes
on. They are known by setting, seed and name: after a change of a recipe, take its rows out of there. All rows of a
setting and seed share the images, the labels, the student's net, the loop, the augmentation and the chosen set; they
differ in what the student is taught.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.distill import teachers as built
from benchmarks.distill.case import Case, Reference, save
from benchmarks.distill.world import SETTINGS, Setting
from pipeline.amalgamation.ambiguity import assign
from pipeline.amalgamation.subtasks import assign_subtask, group, subtask_distribution
from pipeline.data.spec import AugmentSpec
from pipeline.engine.arms import WITH_TEACHERS, ArmsPayload, train_arms
from pipeline.engine.context import LocalContext
from pipeline.engine.evaluation import evaluate, evaluate_heads
from pipeline.engine.objective_spec import FlowSpec, ObjectiveSpec, objective_of
from pipeline.engine.spec import SPOKEN, Arm, LoopSpec, OptimSpec
from pipeline.engine.teaching import Speaker, Teaching
from pipeline.models.spec import StudentSpec
from pipeline.models.student import student_like
from pipeline.models.teacher import predict

LOOP = LoopSpec(epochs=20, batch_size=128, labelled_batch=64, optim=OptimSpec(name="adamw", lr=4e-3, weight_decay=0.05))
STUDENT = StudentSpec(name="small_cnn", kwargs={"width": 24})
AUGMENT = {"fashion": (1, True), "mnist": (1, False), "optical": (1, False), "cifar": (2, True)}  # shift, flip
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
UNLABELLED = objective_of(transport={}, kd={})
UNLABELLED_ROWS: dict[str, dict[str, Any]] = {
    "faculty": {"objective": UNLABELLED},
    "aka": {"components": True},
    "direct": {"choice": "least_ambiguous", "objective": UNLABELLED},
    "concatenated": {"choice": "average", "objective": objective_of(concatenated={"head": "classes"})},
    "average": {"choice": "average", "objective": objective_of(kd={})},
}
SUBTASK_ROWS: dict[str, dict[str, Any]] = {
    "aka": {"components": True},
    "concatenated": {"concatenated_heads": True},
}
# Their teachers run in every step: two tasks with small images are what the two hours have room for.
INNER_ROWS = ("aka", "hints", "attention", "common_features", "b_tuning", "relations")
INNER_SETTINGS = ("fashion10", "mnist_to_digits")
NO_STUDENT = ("average_ensemble", "least_ambiguous_ensemble", "best_teacher")


def rows_of(setting: Setting) -> list[str]:
    """Return the names of a setting's rows."""
    if setting.subtasks:
        return [*SUBTASK_ROWS, *NO_STUDENT]
    if setting.labels:
        rows = [row for row in LABELLED_ROWS if row not in INNER_ROWS or setting.name in INNER_SETTINGS]
        return [*rows, *NO_STUDENT, "together"]
    return [*UNLABELLED_ROWS, *NO_STUDENT, "together"]


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
        confidence = objective in (ObjectiveSpec(), UNLABELLED)
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
        "loop": LOOP.model_copy(update={"epochs": case.setting.epochs}),
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
        if not setting.subtasks:
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
                save(home / SPOKEN, {"p": p, "carried": p.clone()})
                speakers.append(Speaker(names[source.teacher], known[source.teacher], 1.0, str(home)))
        shares = torch.nn.functional.one_hot(teacher, len(speakers)).t().float()
        teaching = case.home / f"teaching-{row}-{subtask.name}"
        Teaching.save(teaching, ids=ids, speakers=speakers, costs=[1 - torch.eye(size)] * len(speakers), shares=shares)
        name = f"component-{subtask.name}"
        components[name] = folder / name
        objective = objective_of(component={"soft": 1, "view": "classes" if setting.subtasks else "carried"})
        arm = Arm(name, case.seed, str(components[name]), str(teaching), objective=objective)
        live = {one.name: Reference(case.zoo[one.name]) for one in speakers}
        _train(case, arm, live, classes=subtask.qualified, heads=())
    classes = tuple(name for one in case.subtasks for name in one.qualified)
    speakers, costs, live = [], [], {}
    for subtask, (name, home) in zip(case.subtasks, components.items(), strict=True):
        live[name] = Reference(None, str(home), name)
        p = predict(live[name].load(), case.taught.batches(256)).logits.softmax(1)
        places = torch.tensor([classes.index(one) for one in subtask.qualified])
        save(home / SPOKEN, {"p": p, "carried": p.new_zeros(len(p), len(classes)).index_copy(1, places, p)})
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
    save(home / SPOKEN, {"p": p, "carried": p.clone()})
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
