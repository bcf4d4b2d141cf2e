"""Settings of the training loop, and what tells one training from another. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.engine.objective_spec import FlowSpec, ObjectiveSpec
from pipeline.models.spec import StudentSpec
from pipeline.strict import StrictModel

# What a teacher says of the taught images, see `pipeline.engine.teaching.Speaker`.
SPOKEN, RAW = "spoken.safetensors", "raw.safetensors"


class OptimSpec(StrictModel):
    """The optimiser and its schedule.

    `lr` is the peak learning rate; it rises linearly over `warmup` (a fraction of all steps), then follows `schedule`:
    `cosine` falls to 0 along half a cosine, `one_cycle` falls linearly to 0, `step` is multiplied by `gamma` at each
    fraction in `milestones`, `constant` stays.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only (Nesterov)")
    schedule: Literal["cosine", "one_cycle", "step", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of all steps")
    milestones: tuple[float, ...] = Field((0.5, 0.75), description="fractions of all steps, for schedule: step")
    gamma: float = Field(0.1, gt=0, le=1)
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; null: no clipping")


class LoopSpec(StrictModel):
    """How long and in what batches a student trains.

    An epoch is one pass over the images that teachers teach on (labelled and unlabelled). Every step also draws
    `labelled_batch` labelled images for the cross-entropy, where the task has any. Batches are global: they are shared
    among the workers.
    """

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1, description="images taught by teachers in one step, over all workers")
    labelled_batch: int = Field(64, ge=1, description="labelled images in one step, over all workers")
    checkpoint_every: int = Field(1, ge=1, description="epochs between two checkpoints")
    optim: OptimSpec = OptimSpec()


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes
    ----------
    name : str
        Unique among the arms of a run.
    seed : int
        Of the initial weights, the batches and the augmentation.
    folder : str
        Where the student goes: `model.safetensors`, `student.json`, `predictions.safetensors`, `history.json`, and
        `done.json` last.
    teaching : str or None
        Folder of what the teachers say (see `Teaching`); None trains on the labels alone.
    objective : ObjectiveSpec or None
        Instead of that of the other arms.
    flow : FlowSpec or None
        Knowledge flow from the teachers.
    student : StudentSpec or None
        Instead of that of the other arms.
    start : object or None
        What the weights start from: its ``load()`` returns a `Teacher` whose weights are taken over where they fit.
    """

    name: str
    seed: int
    folder: str
    teaching: str | None
    objective: ObjectiveSpec | None = None
    flow: FlowSpec | None = None
    student: StudentSpec | None = None
    start: Any = None

    @property
    def done(self) -> bool:
        """Whether it has been trained to its end."""
        return (Path(self.folder) / "done.json").exists()
