"""Settings of the training loop, and what tells one training from another. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.data.mirror import here
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

    name: Literal["adamw", "sgd"] = Field("adamw", description="the optimiser")
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled for adamw")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only (Nesterov)")
    schedule: Literal["cosine", "one_cycle", "step", "constant"] = Field(
        "cosine", description="of the learning rate after its rise"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of all steps")
    milestones: tuple[float, ...] = Field((0.5, 0.75), description="fractions of all steps, for schedule: step")
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each of them, for schedule: step")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; null: no clipping")


class LoopSpec(StrictModel):
    """How long and in what batches a student trains.

    An epoch is one pass over the images that teachers teach on (labelled and unlabelled). Every step also draws
    `labelled_batch` labelled images for the cross-entropy, where the task has any. Batches are global: they are shared
    among the workers.
    """

    epochs: int = Field(20, ge=1, description="passes over the images that teachers teach on")
    batch_size: int = Field(128, ge=1, description="images taught by teachers in one step, over all workers")
    labelled_batch: int = Field(64, ge=1, description="labelled images in one step, over all workers")
    optim: OptimSpec = OptimSpec()
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the student's forward pass; fp16 scales the loss (losses are always computed in fp32)"
    )
    parts: int = Field(
        1,
        ge=1,
        description="parts that each worker cuts its share of a batch into; their gradients are summed, so that the "
        "memory of one part is enough. After running out of memory training goes on with twice as many",
    )
    compile: bool = Field(False, description="torch.compile the student; pays on a GPU and for long runs")
    compile_teachers: bool = Field(
        False,
        description="torch.compile the teachers that run live: some seconds each before the first step. On a CPU it "
        "gains a few per cent and needs a C++ compiler",
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="the student is the running average of its weights, with this decay; null: none"
    )
    mixup: float = Field(0.0, ge=0, description="parameter of the Beta distribution of the share in a mix; 0: none")
    cutmix: float = Field(0.0, ge=0, description="parameter of the Beta distribution of the swapped area; 0: none")
    prefetch: int | None = Field(
        None,
        ge=0,
        description="batches that a thread reads ahead; 0: each is read when it is needed; null: 2 for a GPU, else 0",
    )
    checkpoint_every: int = Field(1, ge=1, description="epochs between two checkpoints")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="steps between two checkpoints within an epoch, for long epochs; null: none within"
    )
    max_skipped: int = Field(
        3,
        ge=0,
        description="steps whose loss is not finite that may be left out: training goes back to the last checkpoint "
        "and passes over them; one more ends it, and the last checkpoint stands",
    )


# What a student is not told apart by: how it is fed, how much memory a step takes, when its state is kept, and how many
# of its steps might have been left out.
NOT_DECISIVE = (
    "parts",
    "compile",
    "compile_teachers",
    "prefetch",
    "checkpoint_every",
    "checkpoint_steps",
    "max_skipped",
)


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
        return here(Path(self.folder) / "done.json").exists()
