"""What the evaluation keeps for the report beside its numbers: its trainings, and who gets which test image right."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.data.mirror import here
from pipeline.stages.artefacts import write_json
from pipeline.stages.base import Run

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.engine.spec import Arm

_TRAININGS, _CREDITS = "trainings.json", "credits.safetensors"


class Tried(Protocol):
    """A contender of the evaluation, see `pipeline.stages.evaluate.Contender`."""

    @property
    def name(self) -> str:
        """Unique among them."""
        ...

    @property
    def title(self) -> str:
        """As people read it."""
        ...

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Its trainings, one a seed."""
        ...

    @property
    def logits(self) -> Any:
        """What it says of the test images where no training was needed."""
        ...


@dataclass(frozen=True)
class Training:
    """One training of the evaluation.

    Attributes
    ----------
    contender, title : str
        Whose it is.
    seed : int
    folder : Path
        Where its history and its predictions lie.
    """

    contender: str
    title: str
    seed: int
    folder: Path


def keep_trainings(run: Run, folder: Path, contenders: Iterable[Tried]) -> None:
    """Keep where the contenders' trainings lie, and c_i of each on the N test images (`pipeline.stages.gate.credit`).

    `credits.safetensors` holds a tensor (S, N) a contender, S its seeds: differences in pairs need no other.
    """
    import torch

    from pipeline.stages import training
    from pipeline.stages.gate import credit
    from pipeline.stages.heads import heads_of
    from pipeline.stages.teachers import save_tensors, table_of

    labels, heads = table_of(run).split("test").labels, heads_of(run)
    rows, credits = [], {}
    for one in contenders:
        said = [training.predictions(arm)["test"] for arm in one.arms] if one.logits is None else [one.logits]
        found = torch.stack([credit(logits, labels, heads) for logits in said])
        credits[one.name] = found.float() if heads else found.to(torch.uint8)
        rows += [
            {"contender": one.name, "title": one.title, "seed": arm.seed, "folder": os.path.relpath(arm.folder, folder)}
            for arm in one.arms
        ]
    save_tensors(folder, _CREDITS, credits)
    write_json(folder / _TRAININGS, rows)


def kept_trainings(folder: Path) -> list[Training]:
    """Return the trainings of an evaluation, in its order; none where an older version did not keep them."""
    try:
        rows = json.loads((folder / _TRAININGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [
        Training(one["contender"], one["title"], one["seed"], here(Path(os.path.normpath(folder / one["folder"]))))
        for one in rows
    ]


def kept_credits(folder: Path) -> dict[str, Tensor]:
    """Return by contender what each test image adds to its accuracy, (N,), in the mean over its seeds; {} without."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / _CREDITS)
    except (OSError, SafetensorError):
        return {}
    return {name: value.double().mean(0) for name, value in found.items()}
