"""All that the benchmark calls of the product: its loop, its teachers cached and live, the filling of the cache."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.training.world import CLASSES, LABELLED, LR, MEAN, STD, TAUGHT, WEIGHT_DECAY, Run, Task, World
from pipeline.cache.store import OutputStore, compact, output_key
from pipeline.cache.topk import compress_logits
from pipeline.data.spec import AugmentSpec
from pipeline.data.table import ImageTable
from pipeline.data.views import augment
from pipeline.distillation.kd import soften, softened_divergence
from pipeline.distillation.step import About, Objective, Step, TeacherAbout
from pipeline.engine.arms import LABELLED as LABELLED_SPLITS
from pipeline.engine.arms import TAUGHT as TAUGHT_SPLITS
from pipeline.engine.context import LocalContext, WorkerContext
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.live import Live
from pipeline.engine.loop import fit
from pipeline.engine.objective_spec import ObjectiveSpec, labels_alone, objective_of
from pipeline.engine.objectives import build_objective, wants
from pipeline.engine.spec import SPOKEN, LoopSpec, OptimSpec
from pipeline.engine.teaching import Speaker, Teaching
from pipeline.models.spec import PreprocessingSpec, StudentSpec
from pipeline.models.student import Student, build_student
from pipeline.models.teacher import Teacher, TeacherOutput, predict
from pipeline.transport.ground_cost import cosine_cost

TEMPERATURE = 4.0
BLOCK, ROWS = 256, 4096  # images of a forward pass, and of one shard of the cache
TOP = 10  # classes kept of many
WIDE = 1000  # classes of the teachers whose outputs' place in memory is measured
VIEWS = 4  # of each image, where the student cycles through as many as its teachers have seen
NAMES = tuple(f"class {number}" for number in range(CLASSES))

_KD = objective_of(cross_entropy={}, kd={"temperature": TEMPERATURE})
# How teachers teach, by the name of it: the objective, and whether they speak as one.
RECIPES: dict[str, tuple[ObjectiveSpec, bool]] = {
    "average": (_KD, False),
    "views": (_KD, False),
    "wide": (_KD, False),
    "each": (objective_of(cross_entropy={}, transport={}), False),
    "default": (ObjectiveSpec(), True),
    "live": (objective_of(cross_entropy={}, own={f"{__name__}:LiveKD": {}}), False),
}


class LiveKD(Objective):
    """Knowledge distillation to the mean of teachers that look at every image of the step: what the peer does.

    loss = mean_n T² KL(softmax(z̄_n / T) ‖ softmax(z_n / T)), z̄ in the mean of the teachers' distributions.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "live"})

    def __init__(self, about: About) -> None:
        super().__init__()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss"}``."""
        assert step.live is not None
        target = torch.stack([seen.logits.softmax(1) for seen in step.live]).mean(0)
        return {"loss": softened_divergence(step.logits, soften(target, TEMPERATURE), TEMPERATURE).mean()}


@dataclass(frozen=True)
class Reference:
    """A teacher that a worker loads."""

    world: World
    number: int
    device: str = "cpu"

    def load(self) -> Teacher:
        """Build it."""
        preprocessing = PreprocessingSpec(channels=self.world.shape[0], mean=(MEAN,), std=(STD,))
        net = self.world.teacher_net(self.number)
        return Teacher(net, name=f"t{self.number}", classes=NAMES, preprocessing=preprocessing).to(self.device)


@dataclass(frozen=True)
class Views:
    """The augmentation of the loop."""

    spec: AugmentSpec

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return views of uint8 images (n, C, H, W), as their keys say."""
        return augment(images, self.spec, keys)


class Ours:
    """Trains through `pipeline.engine.loop.fit`, on the image table of a task.

    Parameters
    ----------
    task : Task
        Its table is written already.
    device : torch.device
        Where this process computes, without a context.
    context : WorkerContext, optional
        Where the training runs; None: this process alone.
    batches : (int, int)
        Labelled and taught images of a step, over all workers.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        context: WorkerContext | None = None,
        batches: tuple[int, int] = (LABELLED, TAUGHT),
    ) -> None:
        self.task, self.device, self.batches = task, device, batches
        self.context = context
        self.table = ImageTable.open(task.table)
        self.labelled, self.taught = self.table.split(*LABELLED_SPLITS), self.table.split(*TAUGHT_SPLITS)
        self.unlabelled = self.table.split("train_unlabelled")
        self.views = Views(AugmentSpec(shift=task.world.shift, flip=True))

    def alone(self) -> Run:
        """Return the training without teachers: every image has its label."""
        learner = self._learner(labels_alone(ObjectiveSpec()), None)
        size = sum(self.batches)
        return lambda: self._fit(learner, Lesson("alone", self.taught, self.taught, None), size, size)

    def cached(self, recipe: str, teachers: int) -> Run:
        """Return the training by teachers that have spoken before; see `RECIPES`."""
        teaching = Teaching.open(self.teaching(recipe, teachers))
        learner = self._learner(RECIPES[recipe][0], teaching)
        lesson = Lesson(recipe, self.labelled, self.unlabelled, teaching)
        return lambda: self._fit(learner, lesson, *self.batches)

    def live(self, teachers: int, *, compiled: bool = False) -> Run:
        """Return the training by teachers that look at every view; its first call compiles them, where asked to."""
        teaching = Teaching.open(self.teaching("live", teachers))
        learner = self._learner(RECIPES["live"][0], teaching)
        loaded = [Reference(self.task.world, number, str(self.device)).load() for number in range(teachers)]
        lesson = Lesson("live", self.labelled, self.unlabelled, teaching, Live(loaded, compiled=compiled).fold())
        return lambda: self._fit(learner, lesson, *self.batches)

    def _fit(self, learner: Learner, lesson: Lesson, labelled: int, taught: int) -> None:
        optim = OptimSpec(name="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
        spec = LoopSpec(epochs=1, batch_size=taught, labelled_batch=labelled, optim=optim)
        context = self.context or LocalContext(device=self.device)
        fit(learner, lesson, spec, context, seed=0, augment=self.views)

    def _learner(self, objective: ObjectiveSpec, teaching: Teaching | None) -> Learner:
        student, teachers = self._student(), []
        if teaching is not None:
            pairs = zip(teaching.speakers, teaching.costs, strict=True)
            teachers = [TeacherAbout(one.name, one.classes, cost, one.gain) for one, cost in pairs]
        about = About(NAMES, student.feature_dim, {}, tuple(teachers))
        return Learner(student, build_objective(objective, lambda layers: about), wants=wants(objective))

    def _student(self) -> Student:
        world = self.task.world
        student = build_student(StudentSpec(name=world.student), CLASSES, world.shape)
        student.net.load_state_dict(world.student_net().state_dict())
        return student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def teaching(self, recipe: str, teachers: int) -> Path:
        """Write what so many teachers say of the taught images: made up, as its content takes no part in the speed."""
        folder = self.task.folder / f"teaching-{recipe}-{teachers}"
        if folder.exists():
            return folder
        generator, as_one = torch.Generator().manual_seed(0), RECIPES[recipe][1]
        count, views = len(self.unlabelled), VIEWS if recipe == "views" else None
        own = WIDE if recipe == "wide" else CLASSES
        names = ["together"] if as_one else [f"t{number}" for number in range(teachers)]
        speakers, costs = [], []
        for name in names:
            home = self.task.folder / f"spoken-{name}-{views or 1}-{own}"
            home.mkdir(exist_ok=True)
            if not (home / SPOKEN).exists():  # several recipes share it, and some may have it mapped
                carried = torch.softmax(3 * torch.randn((views or 1) * count, CLASSES, generator=generator), 1).half()
                p = torch.rand(count, own, generator=generator).half() if own != CLASSES else carried.clone()
                save_file({"p": p, "carried": carried}, home / SPOKEN)
            speakers.append(Speaker(name, tuple(f"class {number}" for number in range(own)), 1.0, str(home)))
            centres = torch.randn(own, 16, generator=generator)
            costs.append(cosine_cost(centres, centres[:CLASSES]))
        shares = torch.rand(1, count, generator=generator) if as_one else torch.full((teachers, count), 1 / teachers)
        Teaching.save(folder, ids=self.unlabelled.ids, speakers=speakers, costs=costs, shares=shares, views=views)
        return folder


class Cache:
    """What the cache of teacher outputs costs.

    Parameters
    ----------
    task : Task
        Its table is written already.
    device : torch.device
    number : int
        Of the teacher.
    """

    def __init__(self, task: Task, device: torch.device, number: int = 0) -> None:
        self.split = ImageTable.open(task.table).split(*TAUGHT_SPLITS)
        self.rows = min(ROWS, len(self.split))
        self.teacher = Reference(task.world, number, str(device)).load().fold()
        self.root = task.folder / "cache"

    def fill(self) -> Run:
        """Return the filling: the images are read, the teacher looks at them, what it says is stored."""

        def run() -> None:
            said = self._said()
            self._store({"logits": compact(said.logits, "fp16"), "features": compact(said.features, "fp16")})

        return run

    def sizes(self) -> dict[str, float]:
        """Return bytes an image and teacher on disk, by what is kept."""
        said, many = self._said(), torch.randn(self.rows, 1000, generator=torch.Generator().manual_seed(0))
        logits, features = compact(said.logits, "fp16"), compact(said.features, "fp16")
        few = {name: compact(value, "fp16") for name, value in compress_logits(many, TOP).items()}
        kept = {
            f"logits of {CLASSES} classes": {"logits": logits},
            f"logits of {CLASSES} classes, {features.shape[1]} features": {"logits": logits, "features": features},
            "logits of 1,000 classes": {"logits": compact(many, "fp16")},
            f"the {TOP} largest logits of 1,000 classes": few,
        }
        return {name: self._store(tensors) / self.rows for name, tensors in kept.items()}

    def _said(self) -> TeacherOutput:
        starts = range(0, self.rows, BLOCK)
        return predict(self.teacher, (self.split.images(slice(n, min(n + BLOCK, self.rows))) for n in starts))

    def _store(self, tensors: Mapping[str, Tensor]) -> int:
        """Store outputs in an empty store; return its bytes."""
        shutil.rmtree(self.root, ignore_errors=True)
        store = OutputStore(self.root)
        key = output_key(teacher="benchmark", view="clean", taps=(), autocast="none", precision="fp16", top_k=None)
        store.entry(key).put(self.split.raw_ids[: self.rows], tensors)
        return store.size()
