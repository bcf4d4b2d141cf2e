"""Stage distill: the student is trained by its faculty, data-parallel on the cluster."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.stages import training
from pipeline.stages.amalgamate import teaching_of
from pipeline.stages.artefacts import digest_of_file
from pipeline.stages.base import Outcome, Run


class Distill:
    """Table and what the faculty says → `model.safetensors`, `student.json`, history and predictions."""

    name = "distill"
    version = 1
    needs = ("ingest", "amalgamate")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings without resources, and the seed."""
        return {
            "distill": run.settings.distill.model_dump(mode="json", exclude={"resources"}),
            "seed": run.settings.seed,
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Train, or continue to train, one student."""
        arm = student_arm(run)
        training.train(run, [arm], "epochs")
        for path in Path(arm.folder).iterdir():
            if path.name != "done.json":
                shutil.copy2(path, folder / path.name)
        history, validation = training.history(arm), training.score(run, arm, "validation")
        run.tracker.artifact(folder / "history.json")
        from pipeline.models.student import load_student

        return Outcome(
            digest=digest_of_file(folder / "model.safetensors"),
            summary={
                "parameters": load_student(folder, trusted_factories=None).num_parameters,
                "epochs": len(history),
                "loss": history[-1]["loss"],
                "images_per_second": history[-1]["images_per_second"],
                "validation_accuracy": validation.accuracy,
                "taught": arm.teaching is not None,
            },
        )


def student_arm(run: Run, seed: int = 0) -> training.Arm:
    """Return the training of the student itself; further seeds of it serve the evaluation."""
    teaching, digest = teaching_of(run)
    name = "faculty" if teaching is not None else "no_teacher"
    return training.arm(run, name, run.settings.seed + seed, teaching, digest)
