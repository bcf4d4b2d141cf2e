"""All settings of a run, as strict models. The embedded defaults are the default recipe.

They are read from files in `pipeline.settings_files`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.cache.spec import CacheSpec
from pipeline.cluster.spec import ClusterSpec
from pipeline.data.spec import AugmentSpec, ImageSpec, SourceSpec, SplitSpec
from pipeline.engine.objective_spec import ComponentPart, FlowSpec, ObjectiveSpec
from pipeline.engine.spec import LoopSpec
from pipeline.models.spec import StudentSpec
from pipeline.models.zoo_spec import ZooSettings
from pipeline.places import is_remote, local_place, tidy
from pipeline.strict import StrictModel
from pipeline.sweep_spec import SweepSpec
from pipeline.tracking.spec import RegisterSpec, TrackingSpec


class TaskSettings(StrictModel):
    """The target task: where its images come from and how they are split."""

    source: SourceSpec
    test_source: SourceSpec | None = Field(None, description="a source of its own for the test split")
    image: ImageSpec
    splits: SplitSpec = SplitSpec()
    subtasks: dict[str, dict[str, tuple[str, ...]]] | None = Field(
        None,
        description="several tasks on the same images, each with a head of its own: name of the sub-task to its "
        "classes, each with the classes of the source that belong to it; null: the source's classes are the task",
    )

    @model_validator(mode="after")
    def _subtasks_possible(self) -> TaskSettings:
        for name, classes in (self.subtasks or {}).items():
            if "/" in name or not name:
                raise ValueError(f"subtasks: {name!r} is no name of a sub-task; it must not be empty nor hold a slash")
            if len(classes) < 2:
                raise ValueError(f"subtasks.{name}: needs at least two classes")
            members = [member for names in classes.values() for member in names]
            twice = sorted({member for member in members if members.count(member) > 1})
            if twice:
                raise ValueError(f"subtasks.{name}: {twice[0]!r} belongs to two of its classes; keep one")
        if self.subtasks is not None and not self.subtasks:
            raise ValueError("subtasks: is empty; name at least one, or leave it out")
        return self

    @model_validator(mode="after")
    def _splits_possible(self) -> TaskSettings:
        problem = self.splits.problem(test_source=self.test_source is not None)
        if problem:
            raise ValueError(f"splits: {problem}")
        return self


class TrialResources(StrictModel):
    """What one teacher's forward passes take of the cluster. Not part of a stage's key."""

    cpus: float = Field(1.0, gt=0, description="processors of a teacher")
    gpus: float = Field(0.0, ge=0, description="may be a fraction")
    max_concurrent: int | None = Field(None, ge=1, description="null: as many as the cluster's live resources hold")
    max_failures: int = Field(1, ge=0, description="restarts after a lost process")


class BridgeSettings(StrictModel):
    """How a teacher's label space is related to the task's, see `pipeline.transport.bridge`."""

    kind: Literal["prototype", "conditional", "centres"] = Field(
        "centres",
        description="prototype, conditional: by the teacher's classes; centres: by the task's, in its features",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="of the softmax over the label space; null: 1 for a teacher's classes, fitted for centres",
    )


class NamesSettings(StrictModel):
    """How names of classes are compared, see `pipeline.transport.names`."""

    path: str | None = Field(None, description="word vectors (GloVe's text format); null: by their spelling alone")


class ClassLevelSettings(StrictModel):
    """The search's lowest rung: label spaces are compared, and no teacher is run."""

    cost: Literal["names", "reference"] = Field(
        "names",
        description="between names of classes, or between centres that teacher cards carry (`faculty zoo cards`)",
    )
    keep: float = Field(0.5, gt=0, le=1, description="share of the zoo that stays; teachers without a card stay, too")


class SearchSettings(StrictModel):
    """Which teachers see how much of the task, see `pipeline.assessment.halving`."""

    rungs: tuple[float, ...] = Field((0.15, 1.0), description="shares of the labelled images, rising to 1")
    eta: float = Field(10.0, ge=1, description="a rung passes one in eta on")
    least: int = Field(16, ge=1, description="teachers that see all images at least; a zoo no larger is not thinned")
    class_level: ClassLevelSettings | None = Field(None, description="null: every teacher is run")

    @model_validator(mode="after")
    def _rising(self) -> SearchSettings:
        shares = self.rungs
        if not shares or shares[-1] != 1 or min(shares) <= 0 or list(shares) != sorted(set(shares)):
            raise ValueError(f"`rungs` must rise from above 0 to 1, got {list(shares)}")
        return self


Score = Literal["knn", "leep", "nce", "logme", "h_score", "gbc", "otce", "source_accuracy", "num_parameters"]


class AssessSettings(StrictModel):
    """How teachers are scored."""

    bridge: BridgeSettings = BridgeSettings()
    search: SearchSettings = SearchSettings()
    names: NamesSettings = NamesSettings()
    reference: str | None = Field(
        None, description="a teacher of the zoo whose features `class_level.cost: reference` compares; null: pixels"
    )
    scores: tuple[Score, ...] = Field(
        ("knn", "leep"), description="scores of the literature to report beside the transport scores"
    )
    own: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="scores of your own to report beside them: `package.module:function` to its settings",
    )
    neighbours: int = Field(5, ge=1, description="k of the k-NN score")
    unlabelled: int = Field(512, ge=2, description="images to look at where the task has no labels")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of the forward passes; auto: bf16 on a GPU that has it; half precision only where a first batch "
        "says that it is safe",
    )
    batch_size: int = Field(256, ge=1, description="images a forward pass of a teacher")
    resources: TrialResources = TrialResources()


class SelectSettings(StrictModel):
    """How the winning set is chosen from the assessed teachers."""

    teachers: Literal["all"] | tuple[str, ...] | None = Field(
        None, description="these teachers, or all that could be assessed, without a test; null: those that help most"
    )
    by: Literal["together", "least_ambiguous"] = Field(
        "together",
        description="what a set says, in the test of whom to add: one view from the joined embeddings, on all labelled "
        "images, held out in folds; or its least ambiguous member, on the validation images",
    )
    consider: int = Field(
        32, ge=1, description="with together, the most teachers that are tried in sets: the best alone"
    )
    max_teachers: int = Field(4, ge=1, description="the largest set")
    max_params: int | None = Field(None, ge=1, description="parameters of the whole set; null: no limit")
    min_gain: float = Field(
        0.01, ge=0, le=1, description="what a teacher must add to the set's score on labelled images"
    )
    confidence: float = Field(
        0.9, ge=0, lt=1, description="share of bootstrap resamples in which it adds that, and the set beats no teacher"
    )


class ComponentSettings(StrictModel):
    """Nets between the teachers and the student, one a sub-task (AKA's first step)."""

    student: StudentSpec | None = Field(None, description="the component nets; null: as the student")
    loop: LoopSpec | None = Field(None, description="their training; null: as the student's")
    objective: ComponentPart = ComponentPart()


class AmalgamateSettings(StrictModel):
    """How the chosen teachers share the images.

    `direct`: they teach the student. `components`: those that share a sub-task teach a component net of that sub-task,
    by the names of their classes, and the component nets teach the student; needs no labels.
    """

    mode: Literal["direct", "components"] = Field(
        "direct", description="components: nets of the sub-tasks stand between"
    )
    choice: Literal["together", "least_ambiguous", "gain", "average", "random"] | None = Field(
        None,
        description="who teaches an image: all, by one view of the task from their joined embeddings (ours); the "
        "teacher that is surest of it; all, by their transport gain; all alike; one drawn by lot; null: together, or "
        "least_ambiguous where the loss needs each teacher, or labels carry them over by another bridge than centres",
    )
    by_gain: bool = Field(
        False, description="with least_ambiguous, a teacher's certainty counts as much as its transport gain"
    )
    confidence: bool = Field(True, description="an image counts as much as its teacher is sure of it")
    components: ComponentSettings = ComponentSettings()
    batch_size: int = Field(256, ge=1, description="images a forward pass of a teacher")
    resources: TrialResources = TrialResources()


Workers = Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class TrainResources(StrictModel):
    """What a training run takes of the cluster. Not part of a stage's key."""

    num_workers: Workers = Field(
        1,
        description="data-parallel workers; 0 trains in this process, without Ray; [min, max] takes as many as the "
        "cluster has room for and goes on with fewer or more when nodes go or come",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="processors of a worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker; may be a fraction")
    max_failures: int = Field(2, ge=0, description="restarts from the last checkpoint after a lost worker")

    @field_validator("num_workers")
    @classmethod
    def _rising(cls, workers: Workers) -> Workers:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"[min, max] must rise, got {list(workers)}")
        return workers

    @property
    def counts(self) -> range:
        """How many workers there may be."""
        least, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers,) * 2
        return range(least, most + 1)


class DistillSettings(StrictModel):
    """How the student is trained."""

    student: StudentSpec = StudentSpec(name="small_cnn")
    loop: LoopSpec = LoopSpec()
    start_from: str | None = Field(
        None,
        description="a teacher whose architecture and weights the student starts from, or best_single; null: fresh",
    )
    objective: ObjectiveSpec = ObjectiveSpec()
    flow: FlowSpec | None = Field(None, description="knowledge flow; null: none")
    guard: float | None = Field(
        1.0,
        ge=0,
        description="the student trained without teachers is taken instead when it is better on the probe and "
        "validation images by more than this many standard errors; null: never",
    )
    augment: AugmentSpec = AugmentSpec()
    resources: TrainResources = TrainResources()


class EvaluateSettings(StrictModel):
    """What the student is compared with."""

    seeds: int = Field(1, ge=1, description="trainings of every arm, the student's included")
    controls: tuple[
        Literal["no_teacher", "best_single", "random_set", "average", "concatenated", "finetune", "ensemble"], ...
    ] = Field(("no_teacher",), description="what the student stands beside, each on the same test images")


class Settings(StrictModel):
    """Everything that decides what a run does."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the run's name")
    run_dir: str = Field(
        "", description="where artefacts lie: a path, or the URI of a store (s3://bucket/folder); default: runs/<name>"
    )
    seed: int = Field(0, ge=0, description="of the splits, the weights, the batches and the augmentation")
    task: TaskSettings
    zoo: ZooSettings
    assess: AssessSettings = AssessSettings()
    select: SelectSettings = SelectSettings()
    amalgamate: AmalgamateSettings = AmalgamateSettings()
    distill: DistillSettings = DistillSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    registration: RegisterSpec = Field(RegisterSpec(), alias="register")
    tracking: TrackingSpec = TrackingSpec()
    cluster: ClusterSpec = ClusterSpec()
    cache: CacheSpec = CacheSpec()
    sweep: SweepSpec | None = Field(None, description="what `faculty sweep` varies; no stage depends on it")

    @model_validator(mode="before")
    @classmethod
    def _default_run_dir(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("run_dir") and isinstance(data.get("name"), str):
            return {**data, "run_dir": f"runs/{data['name']}"}
        return data

    @field_validator("run_dir")
    @classmethod
    def _place(cls, run_dir: str) -> str:
        return tidy(run_dir)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        loops = {"distill.loop": self.distill.loop, "amalgamate.components.loop": self.amalgamate.components.loop}
        for section, loop in loops.items():
            counts = self.distill.resources.counts
            workers = max(counts[-1], 1)
            for field in ("batch_size", "labelled_batch"):
                # With a number of workers that changes shares differ by an image now and then; that can't be helped.
                size = workers if loop is None else getattr(loop, field)
                if size < workers or (len(counts) == 1 and size % workers):
                    raise ValueError(
                        f"{section}.{field}={size} can't be shared among distill.resources.num_workers={workers}; "
                        "make it a multiple"
                    )
        self._consistent_objective()
        return self

    def _consistent_objective(self) -> None:
        """Refuse losses that have no meaning for the way the teachers are put together."""
        on = {name for name, _ in self.distill.objective.parts()}
        components = self.amalgamate.mode == "components"
        if "component" in on:
            raise ValueError("distill.objective.component: belongs to amalgamate.components.objective; set it to null")
        if "target" in on and not components:
            raise ValueError("distill.objective.target: needs component nets; set amalgamate.mode=components")
        if self.task.subtasks is not None:
            if not components:
                raise ValueError(
                    "task.subtasks: needs one net a sub-task to learn from; set amalgamate.mode=components"
                )
            odd = sorted(on - {"cross_entropy", "target"})
            if odd:
                raise ValueError(
                    f"distill.objective.{odd[0]}: has no meaning for a student with several heads; set it to null"
                )
        if components and self.distill.flow is not None:
            raise ValueError("distill.flow: features flow from teachers, not from component nets; set it to null")

    @property
    def zoo_file(self) -> str:
        """The zoo: that of the settings, or what the registry answered when the run began, in the run folder."""
        folder = local_place(self.run_dir) if is_remote(self.run_dir) else self.run_dir
        return self.zoo.path or os.path.join(folder, "registered.parquet")

    def dump(self) -> dict[str, Any]:
        """Return the resolved settings as plain values."""
        return self.model_dump(mode="json", by_alias=True)
