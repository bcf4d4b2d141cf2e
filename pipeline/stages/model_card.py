"""The model card of a student: what it is, where it comes from, its scores beside the controls, its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.stages.base import Run
from pipeline.stages.heads import student_classes
from pipeline.tracking.redact import redact

if TYPE_CHECKING:
    from pipeline.stages.gate import Decision

_NAMED = 50  # classes that are listed by name
_WEAKEST = 5
# As licences say it of themselves: CC-BY-NC-4.0, "non-commercial use", "for research only".
_NOT_FOR_TRADE = re.compile(r"(?i)non[- ]?commercial|(?<![a-z0-9])nc(?![a-z0-9])|(research|academic)[- ](use[- ])?only")
_TAUGHT_BY = {
    "together": "They taught every image together, by one view of the task from their joined embeddings.",
    "direct": "Each image was taught by the shares below.",
    "components": "They taught component nets, and these the student.",
    "none": "None of them taught this student.",
}


def model_card(run: Run, lineage: Mapping[str, Any], decision: Decision) -> str:
    """Return the card in Markdown: data, teachers, scores beside the controls, the gate, limits, licences."""
    evaluation = json.loads((run.folder("evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    sections = (
        _what(run),
        ("## Data", *_data(lineage["data"])),
        ("## Teachers", *_teachers(lineage)),
        ("## Test accuracy", *_scores(evaluation)),
        ("## Gate", *_gate(decision)),
        ("## Limits", *_limits(run, evaluation)),
        ("## Licences", *_licences(lineage)),
        ("## Lineage", *_origin(run, lineage)),
    )
    return redact("\n\n".join("\n".join(part for part in section) for section in sections) + "\n")


def licence_warnings(teachers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which teachers' licences are not stated, or exclude commercial use in their own words; a line each."""
    lines = []
    for name, teacher in teachers.items():
        licence = teacher["licence"].strip()
        if not licence:
            lines.append(f"{name}: no licence is stated; ask its owner before the student is used")
        elif _NOT_FOR_TRADE.search(licence):
            lines.append(f"{name}: {licence} excludes commercial use")
    return lines


def _what(run: Run) -> list[str]:
    classes, shape = student_classes(run), run.settings.task.image.shape
    named = ", ".join(map(_text, classes[:_NAMED])) + (" …" if len(classes) > _NAMED else "")
    subtasks = run.settings.task.subtasks
    heads = "" if subtasks is None else f" in {len(subtasks)} sub-tasks (`subtask/class`), softmax over each by itself"
    return [
        f"# {run.settings.registration.name}",
        "",
        f"Classifies images into {len(classes)} classes{heads}: {named}.",
        "",
        f"Input: raw images as uint8 (B, {', '.join(map(str, shape))}), any B; preprocessing is inside. Output: logits "
        f"(B, {len(classes)}) as float32, in the order of the classes above. Loads with MLflow and torch alone.",
    ]


def _data(data: Mapping[str, Any]) -> list[str]:
    sources = [f"- {name}: {one['type']}, `{one['location']}`" for name, one in data["sources"].items()]
    counts = [f"{split} {count}" for split, count in data["images"].items()]
    return ["", *sources, f"- images: {', '.join(counts)}", f"- fingerprint: `{data['fingerprint']}`"]


def _teachers(lineage: Mapping[str, Any]) -> list[str]:
    teachers = lineage["teachers"]
    if not teachers:
        return ["", "None: no set of teachers was better on the labelled images than the images alone."]
    rows = [
        (
            name,
            f"{one['source']['type']}: `{one['source']['location']}`",
            one["licence"] or "**not stated**",
            _score(one["scores"]),
            _share(one["share"]),
            f"`{one['weights_sha256']}`" if one["weights_sha256"] else "not known",
            _preprocessing(one["preprocessing"]),
        )
        for name, one in teachers.items()
    ]
    columns = ("teacher", "source", "licence", "score", "share of images", "sha256 of the weights", "preprocessing")
    told = _TAUGHT_BY[lineage["teaching"]]
    return [
        "",
        f"{told} Score: the assessment's, higher is better; it ranks teachers for this task and is no accuracy.",
        "",
        *_table(columns, rows),
    ]


def _score(scores: Mapping[str, float]) -> str:
    if "score" not in scores:
        return "-"
    text = f"{scores['score']:.3f}"
    if "score_low" in scores and "score_high" in scores:
        text += f" ({scores['score_low']:.3f} to {scores['score_high']:.3f})"
    return text


def _share(share: Any) -> str:
    if share is None:
        return "all, together"
    if isinstance(share, Mapping):
        return ", ".join(f"{name} {100 * part:.0f} %" for name, part in share.items()) or "none"
    return f"{100 * share:.0f} %"


def _preprocessing(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "its own, inside"
    size = "as stored" if spec["size"] is None else "x".join(map(str, _pair(spec["size"])))
    crop = f", middle {spec['crop']:g}" if spec["crop"] else ""
    mean, std = (", ".join(f"{value:g}" for value in spec[key]) for key in ("mean", "std"))
    channels = "grey" if spec["channels"] == 1 else "colour"
    return f"{size}, {channels}, {spec['interpolation']}{crop}, mean {mean}, std {std}"


def _pair(size: Any) -> tuple[Any, Any]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _scores(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation["arms"]:
        return ["", f"{evaluation['verdict']}."]
    rows = [
        (
            arm["title"],
            str(len(arm["accuracies"])),
            f"{100 * arm['mean']:.1f}" + (f" ± {100 * arm['std']:.1f}" if len(arm["accuracies"]) > 1 else ""),
            f"{arm['ece']:.3f}",
            _difference(arm),
        )
        for arm in evaluation["arms"]
    ]
    columns = ("the same student, taught by", "seeds", "accuracy, %", "ECE", "the student's lead, points")
    return ["", *_table(columns, rows), "", f"{evaluation['verdict']}."]


def _difference(arm: Mapping[str, Any]) -> str:
    if arm.get("difference") is None:
        return ""
    error = arm.get("difference_2se")
    return f"{100 * arm['difference']:+.1f}" + ("" if error is None else f" ± {100 * error:.1f} (2 SE over seeds)")


def _gate(decision: Decision) -> list[str]:
    lines = [f"- {hurdle.against}: {hurdle.outcome}; {_text(hurdle.why)}" for hurdle in decision.hurdles]
    test = f"- test fingerprint: `{decision.test_fingerprint}`" if decision.test_fingerprint else "- no test images"
    return ["", f"The gate: **{decision.gate}**. ± is twice the standard error over the test images.", "", *lines, test]


def _limits(run: Run, evaluation: Mapping[str, Any]) -> list[str]:
    lines = [
        "- Measured on the test split of the data above; images of another origin may give other results.",
        "- It knows no image that belongs to none of its classes, and always names one of them.",
        "- Which teachers taught, and which of their mistakes it inherits, was judged by accuracy alone: not by "
        "fairness, nor by robustness.",
    ]
    labelled = run.records["ingest"].summary.get("train_labelled", 0)
    lines.append(f"- {labelled} labelled training images.")
    if evaluation["arms"]:
        first = evaluation["arms"][0]["first"]
        weakest = sorted(first["per_class"].items(), key=lambda item: item[1])[:_WEAKEST]
        told = ", ".join(f"{_text(name)} {100 * value:.0f} %" for name, value in weakest)
        lines.append(f"- Weakest classes: {told}. Expected calibration error {first['ece']:.3f}.")
    return ["", *lines]


def _licences(lineage: Mapping[str, Any]) -> list[str]:
    lines = [f"- {name}: {_text(one['licence']) or 'not stated'}" for name, one in lineage["teachers"].items()]
    warnings = [f"- **Warning** {_text(line)}" for line in licence_warnings(lineage["teachers"])]
    return [
        "",
        "A student may count as derived from the weights of its teachers, and from the images. The licences of the "
        "teachers are given as the zoo states them; that of the images is not recorded.",
        "",
        *(lines or ["- no teacher"]),
        *warnings,
    ]


def _origin(run: Run, lineage: Mapping[str, Any]) -> list[str]:
    code, settings = lineage["code"], lineage["settings"]
    commit = code.get("commit")
    changed = ", with changes that were not committed" if code.get("changed") else ""
    packages = ", ".join(f"{name} {version}" for name, version in code["packages"].items())
    return [
        "",
        f"- run: {lineage['run']['name']}, `{lineage['run']['run_id']}`",
        f"- settings: sha256 `{settings['sha256']}`, seed {settings['seed']}",
        f"- losses: {', '.join(settings['objective']) or 'none'}; {settings['epochs']} epochs",
        f"- student: {run.settings.distill.student.name}, {run.records['distill'].summary['parameters']:,} parameters",
        f"- code: commit `{commit}`{changed}" if commit else "- code: no commit is known",
        f"- packages: {packages}",
        "- all of it: `faculty lineage`, or the model's metadata under `lineage`",
    ]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(columns)
    lines = [_row(heads), _row("---" for _ in heads)]
    return lines + [_row(row) for row in rows]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(value: str) -> str:
    """Return a name or a licence as it can stand in a table: in one line, its bars escaped."""
    return " ".join(str(value).split()).replace("|", "\\|")
