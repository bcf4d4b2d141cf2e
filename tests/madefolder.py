"""Run folders made in a second: every artefact that the report reads, without a teacher or a training.

What the artefacts say is drawn at random; their files are written by the very functions that the stages use.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from pipeline.engine.arms import TAUGHT
from pipeline.engine.evaluation import evaluate
from pipeline.models.student import build_student, save_student
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages.amalgamate import histograms, write_assignments
from pipeline.stages.artefacts import Record, RunFolder, write_json, write_settings
from pipeline.stages.assess import schema
from pipeline.stages.base import Run
from pipeline.stages.evaluate import difference
from pipeline.stages.ingest import Ingest
from pipeline.stages.report_folder import kept_run
from pipeline.stages.report_kept import keep_trainings
from pipeline.stages.teachers import outputs_folder, save_tensors, table_of
from pipeline.stages.together import TOGETHER

ORDER = ("ingest", "assess", "select", "amalgamate", "distill", "evaluate", "register")
NEEDS = {
    "ingest": (),
    "assess": ORDER[:1],
    "select": ORDER[:2],
    "amalgamate": ORDER[:3],
    "distill": ("ingest", "select", "amalgamate"),
    "evaluate": ORDER[:5],
    "register": ORDER[:6],
}
EPOCHS = 6
SIDE = 8


class Made:
    """A run folder under construction; `root` is the folder, `config` a settings file for it."""

    def __init__(
        self, folder: Path, classes: Sequence[str], teachers: Sequence[str], *, name: str, per_class: int, seed: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.random = np.random.default_rng(seed)
        self.classes, self.teachers, self.root = tuple(classes), tuple(teachers), folder / "run"
        images = self.random.integers(0, 256, (len(classes) * per_class * 5, SIDE, SIDE), dtype=np.uint8)
        labels = np.arange(len(images)) % len(classes)
        np.savez(folder / "data.npz", images=images, labels=labels, classes=np.array(classes))
        settings = {
            "name": name,
            "run_dir": str(self.root),
            "task": {
                "source": {"type": "numpy", "path": "data.npz"},
                "image": {"size": SIDE, "channels": 1},
                "splits": {name: per_class for name in ("train_labelled", "probe", "validation", "test")},
            },
            "zoo": {"path": "zoo.yaml"},
            "evaluate": {"seeds": 2, "controls": ["no_teacher", "best_single"]},
            "distill": {"student": {"name": "mlp", "kwargs": {"width": 8}}},
            "tracking": {"uri": "http://someone:hidden-word@mlflow.example:5000"},
        }
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        loaded = load_settings([self.config])
        files = RunFolder(self.root)
        files.prepare()
        write_settings(files.root / "settings.yaml", loaded.dump())
        self.run = Run(settings=loaded, files=files, display=Display(), zoo=types.SimpleNamespace())  # type: ignore[arg-type]

    def stage(self, name: str) -> Path:
        """Return the folder of a stage's result."""
        path = self.root / name / f"{name}key"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str, summary: dict[str, Any], *, digest: str = "") -> None:
        """Mark a stage finished."""
        place = ORDER.index(name)
        needed = {f"{need}.digest": self.run.records[need].digest for need in NEEDS[name]}
        record = Record(
            stage=name,
            key=f"{name}key",
            digest=digest or f"{name}-digest",
            inputs=needed,
            summary=summary,
            seconds=1.5 + place,
            finished=1_800_000_000.0 + place,
        )
        self.run.files.finish(record)
        self.run.records[name] = record

    def ingest(self) -> None:
        """Make the image table."""
        outcome = Ingest().run(self.run, self.stage("ingest"))
        self.finish("ingest", outcome.summary, digest=outcome.digest)

    def assess(self, said: int) -> None:
        """Write a row a teacher, and what the first few said of the labelled images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = []
        for place, name in enumerate(self.teachers):
            score = 1.0 - place / len(self.teachers)
            rows.append(
                dict.fromkeys(schema(self.run).names)
                | {"teacher": name, "fingerprint": f"fingerprint of {name}", "classes": 3, "parameters": 1000 + place}
                | {"rung": 1, "images": 40, "score": score, "score_low": score - 0.1, "score_high": score + 0.1}
                | {"transport_cost": 0.5 * place / len(self.teachers), "knn": float(self.random.random())}
                | {"bridge_gain": score / 2, "transport_gain": float(self.random.random()), "precision": "fp32"}
                | {"forward_seconds": 0.25, "seconds": 1.0, "peak_mb": 512.0 + place % 3}
            )
        if len(rows) > 2:
            rows[-1] |= {"error": "its file is damaged", "score": None, "score_low": None, "score_high": None}
        pq.write_table(pa.Table.from_pylist(rows, schema=schema(self.run)), self.stage("assess") / "assessment.parquet")
        self.finish("assess", {"teachers": len(rows), "failed": len(rows) > 2, "dropped": 0, "labels": True})
        kept, table = kept_run(self.root), table_of(self.run)
        images = len(table.split("train_labelled")) + len(table.split("probe"))
        own = max(3, len(self.classes) if len(self.classes) > 100 else 3)
        for name in self.teachers[:said]:
            logits = torch.from_numpy(3 * self.random.standard_normal((images, own))).float()
            about = {"classes": "\n".join(f"{name} says {k}" for k in range(own)), "seconds": "1.0"}
            tensors = {"rows": torch.arange(images), "logits": logits, "features": logits[:, :2].clone()}
            save_tensors(outputs_folder(kept, name), "outputs.safetensors", tensors, about)

    def select(self, chosen: Sequence[str]) -> None:
        """Write who was chosen."""
        known = dict(zip(self.classes, self.random.random(len(self.classes)).tolist(), strict=True))
        verdicts = {name: {"reason": "", "score": 0.5, "gain": 0.1, "confidence": 0.95} for name in self.teachers}
        choice = {
            "chosen": list(chosen),
            "best_single": self.teachers[0],
            "verdict": f"{len(chosen)} teachers, made up" if chosen else "no set of teachers is better",
            "score": 0.7,
            "score_interval": [0.65, 0.75],
            "advantage_interval": [0.05, 0.15],
            "reference_score": 0.6,
            "confidence": 0.99,
            "reasons": {name: f"{'' if name in chosen else 'not '}chosen, made up" for name in self.teachers},
            "verdicts": verdicts,
            "coverage": known,
            "shares": {name: 1 / len(chosen) for name in chosen},
        }
        write_json(self.stage("select") / "faculty.json", choice)
        self.finish("select", {"chosen": list(chosen), "score": 0.7})

    def amalgamate(self, chosen: Sequence[str]) -> None:
        """Write who teaches which image."""
        if not chosen:
            self.finish("amalgamate", {"shares": {}}, digest="none")
            return
        split = table_of(self.run).split(*TAUGHT)
        names = [*chosen, TOGETHER]
        ambiguity = torch.from_numpy(self.random.random((len(names), len(split)))).float()
        teacher = torch.full((len(split),), len(chosen))
        folder = self.stage("amalgamate")
        write_assignments(folder, split.ids, {"": (names, teacher, ambiguity)})
        found = histograms(names, ambiguity, teacher, split.labels.clamp_min(0), self.classes)
        write_json(folder / "histograms.json", found)
        self.finish("amalgamate", {"shares": {TOGETHER: len(split)}})

    def distill(self, *, taught: bool) -> torch.Tensor:
        """Write a student, its history and what it says of the test images; return the latter."""
        folder, split = self.stage("distill"), table_of(self.run).split("test")
        torch.manual_seed(0)
        student = build_student(self.run.settings.distill.student, len(self.classes), split.image_shape)
        save_student(student, folder, classes=self.classes)
        logits = self.logits(4.0)
        save_file({"test": logits}, folder / "predictions.safetensors")
        self.history(folder)
        summary = {"parameters": student.num_parameters, "epochs": EPOCHS, "loss": 0.5, "images_per_second": 900.0}
        guard = {"kept": "taught", "advantage": 0.1, "standard_error": 0.02, "images": 40}
        self.finish("distill", summary | {"taught": taught, "validation_accuracy": 0.75, "guard": guard})
        return logits

    def logits(self, strength: float) -> torch.Tensor:
        """Return logits of the test images that are right more often the larger `strength` is."""
        labels = table_of(self.run).split("test").labels
        noise = torch.from_numpy(self.random.standard_normal((len(labels), len(self.classes)))).float()
        return 1.6 * noise + strength * torch.nn.functional.one_hot(labels, len(self.classes))

    def history(self, folder: Path) -> None:
        """Write the losses of some epochs."""
        rows = [
            {"loss": 3 / epoch, "cross_entropy": 2 / epoch, "kd": 1 / epoch, "epoch": epoch, "lr": 0.01 / epoch}
            | {"seconds": 1.0, "images_per_second": 900.0}
            for epoch in range(1, EPOCHS + 1)
        ]
        (folder / "history.json").write_text(json.dumps(rows), encoding="utf-8")

    def evaluate(self, logits: torch.Tensor, *, taught: bool) -> dict[str, Any]:
        """Write the comparison of three contenders with two trainings each."""
        labels = table_of(self.run).split("test").labels
        strengths = {"student": 4.0, "no_teacher": 2.5, "best_single": 3.2} if taught else {"student": 4.0}
        titles = {"student": "the faculty", "no_teacher": "no teacher", "best_single": "the best single teacher"}
        if not taught:
            titles["student"] = "no teacher (the student)"
        rows: list[dict[str, Any]] = []
        contenders = []
        for name, strength in strengths.items():
            arms, scores = [], []
            for seed in range(2):
                folder = self.root / "students" / f"{name}-seed{seed}-made"
                folder.mkdir(parents=True)
                said = logits if name == "student" and not seed else self.logits(strength)
                save_file({"test": said}, folder / "predictions.safetensors")
                self.history(folder)
                arms.append(types.SimpleNamespace(name=folder.name, seed=seed, folder=str(folder)))
                scores.append(evaluate(said, labels))
            accuracies = [one.accuracy for one in scores]
            rows.append(
                {
                    "name": name,
                    "title": titles[name],
                    "accuracies": accuracies,
                    "mean": float(np.mean(accuracies)),
                    "std": float(np.std(accuracies, ddof=1)),
                    "ece": float(np.mean([one.ece for one in scores])),
                    "first": scores[0].as_dict(self.classes),
                }
            )
            contenders.append(types.SimpleNamespace(name=name, title=titles[name], arms=tuple(arms), logits=None))
        for row in rows[1:]:
            row |= difference(rows[0]["accuracies"], row["accuracies"])
        verdict = "student made up" if taught else "do not transfer: no teacher was chosen"
        found = {"arms": rows, "verdict": verdict, "classes": list(self.classes)}
        folder = self.stage("evaluate")
        write_json(folder / "evaluation.json", found)
        keep_trainings(self.run, folder, contenders)  # type: ignore[arg-type]
        self.finish("evaluate", {"verdict": verdict})
        return found

    def register(self) -> None:
        """Write a version that has beaten a champion."""
        hurdle = {"against": "champion", "outcome": "passed", "why": "made up", "ours": 0.8, "theirs": 0.75}
        hurdle |= {"difference": 0.05, "standard_error": 0.01, "images": 20, "version": "7", "same_test": True}
        told = {"name": "made", "version": "8", "alias": "challenger", "uri": "models:/made@challenger"}
        told |= {"gate": "passed", "why": "made up", "promoted": False, "warnings": []}
        lineage = {
            "run": {"name": "made", "run_id": "abc"},
            "data": {},
            "teachers": {},
            "code": {},
            "teaching": "together",
        }
        write_json(
            self.stage("register") / "registered.json", told | {"decision": {"hurdles": [hurdle]}, "lineage": lineage}
        )
        self.finish("register", {key: told[key] for key in ("name", "version", "alias", "uri", "gate", "why")})


def make_run(
    folder: Path,
    *,
    classes: Sequence[str] = ("bar", "post", "block", "slash"),
    teachers: Sequence[str] = ("mixed", "flat", "solid", "odd"),
    chosen: Sequence[str] | None = None,
    until: str = "register",
    name: str = "made",
    per_class: int = 10,
    seed: int = 0,
) -> Made:
    """Make a run folder up to a stage; the first two teachers are chosen unless told otherwise."""
    made = Made(folder, classes, teachers, name=name, per_class=per_class, seed=seed)
    names = list(teachers[:2]) if chosen is None else list(chosen)
    logits = torch.empty(0)
    for stage in ORDER[: 1 + ORDER.index(until)]:
        if stage == "ingest":
            made.ingest()
        elif stage == "assess":
            made.assess(said=8)
        elif stage == "select":
            made.select(names)
        elif stage == "amalgamate":
            made.amalgamate(names)
        elif stage == "distill":
            logits = made.distill(taught=bool(names))
        elif stage == "evaluate":
            made.evaluate(logits, taught=bool(names))
        else:
            made.register()
    return made
