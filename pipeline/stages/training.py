"""Trainings on the cluster: which arms there are, where each one's result lies, and the call that trains them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.spec import Arm
from pipeline.stages.artefacts import digest_of
from pipeline.stages.base import Run
from pipeline.stages.ingest import table_path

if TYPE_CHECKING:
    import torch

    from pipeline.engine.evaluation import Evaluation


def arm(run: Run, name: str, seed: int, teaching: Path | None, digest: str) -> Arm:
    """Describe one training; its folder is keyed by all that its result depends on.

    Parameters
    ----------
    run : Run
    name : str
        What kind of training it is: ``faculty``, ``no_teacher``, ``best_single``.
    seed : int
    teaching : Path or None
        Where the teachers' say lies.
    digest : str
        Hash of what they say; "" without teachers.
    """
    settings = run.settings.distill
    folder = run.part(
        "students",
        f"{name}-seed{seed}",
        {
            "table": run.records["ingest"].digest,
            "teaching": digest,
            "distill": settings.model_dump(mode="json", exclude={"resources"}),
            "seed": seed,
            "version": 1,
        },
    )
    return Arm(folder.name, seed, str(folder), str(teaching) if teaching is not None else None)


def train(run: Run, arms: Sequence[Arm], title: str) -> None:
    """Train those arms that are not done, in one worker group; a group that was cut off continues where it was."""
    missing = [item for item in arms if not item.done]
    if not missing:
        return
    from pipeline.cluster.train import fit
    from pipeline.engine.arms import ArmsPayload, train_arms

    settings = run.settings.distill
    workers = settings.resources
    payload = ArmsPayload(
        arms=tuple(missing),
        table=str(table_path(run)),
        student=settings.student,
        loop=settings.loop,
        objective=settings.objective,
        augment=settings.augment,
    )
    titles = [item.name.rpartition("-")[0] for item in missing]  # without the key
    seen = {"done": 0}
    if workers.num_workers:
        run.open_cluster()
    with run.display.bar(title, len(missing) * settings.loop.epochs) as advance:
        if run.display.console.is_terminal and workers.num_workers:
            advance(0, f"starting {workers.num_workers} workers")

        def on_report(metrics: dict[str, Any]) -> None:
            number, epoch = int(metrics["arm"]), int(metrics["epoch"])
            done = number * settings.loop.epochs + epoch
            # After a restart some epochs are reported again: the bar only moves forward.
            advance(max(done - seen["done"], 0), f"{titles[number]}, loss {metrics['loss']:.3f}")
            seen["done"] = max(seen["done"], done)
            numbers = {key: value for key, value in metrics.items() if key not in ("arm", "epoch")}
            prefix = "" if len(missing) == 1 else f"{titles[number]}/"
            run.tracker.metrics({f"{prefix}{key}": value for key, value in numbers.items()}, step=epoch)

        fit(
            train_arms,
            payload,
            num_workers=workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker={"CPU": workers.cpus_per_worker}
            | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {}),
            max_failures=workers.max_failures,
            storage=str(run.files.root / "ray"),
            name=f"{title}-{digest_of([item.name for item in arms])[:12]}",
            on_report=on_report,
            verbose=run.verbose,
        )


def predictions(item: Arm) -> dict[str, torch.Tensor]:
    """Return the logits of a trained arm on the validation and test splits."""
    from safetensors.torch import load_file

    return load_file(Path(item.folder) / "predictions.safetensors")


def history(item: Arm) -> list[dict[str, float]]:
    """Return the metrics of every epoch of a trained arm."""
    return json.loads((Path(item.folder) / "history.json").read_text(encoding="utf-8"))


def score(run: Run, item: Arm, split: str) -> Evaluation:
    """Evaluate a trained arm on a split."""
    from pipeline.data.table import ImageTable
    from pipeline.engine.evaluation import evaluate

    labels = ImageTable.open(str(table_path(run))).split(split).labels
    return evaluate(predictions(item)[split], labels)
