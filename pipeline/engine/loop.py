"""The training loop: labelled and taught images, one objective, checkpoints from which it resumes exactly."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from pipeline.engine.checkpoint import clear_forgotten, load_state, new_folder, save_state
from pipeline.engine.context import WorkerContext
from pipeline.engine.feeding import Batch, Feed, Images, Lesson
from pipeline.engine.learner import Learner, Other
from pipeline.engine.mixing import mixed
from pipeline.engine.optim import Average, build_optimiser, set_rate
from pipeline.engine.sampling import seed_of
from pipeline.engine.spec import LoopSpec
from pipeline.errors import StageError

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_NOTICE = 20  # steps between two looks of several workers at whether one of them has to leave
_NOTICE_S = 1.0  # the same for one alone
_FINE = torch.iinfo(torch.int64).max


class Augment(Protocol):
    """A batched augmentation on uint8 images."""

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return views (n, C, H, W) of images (n, C, H, W), decided by their keys (n,) alone."""
        ...


def fit(
    learner: Learner,
    lesson: Lesson,
    spec: LoopSpec,
    context: WorkerContext,
    *,
    seed: int,
    augment: Augment | None = None,
    report_with: dict[str, float] | None = None,
) -> list[dict[str, float]]:
    """Train a student in place; return the metrics of every epoch.

    Each step takes `spec.labelled_batch` labelled and `spec.batch_size` taught images, runs the student on both at
    once, and minimises the learner's ``"loss"`` (see `Learner`).

    Batches, views, mixing, dropout and the learning rate are pure functions of the seed and the step, and a checkpoint
    holds all else: interrupted anywhere, training ends with the weights of an uninterrupted run on the same number of
    ranks, bit for bit on a CPU. On another number of ranks the global batches are the same, in the same order.

    The loop waits for the device at checkpoints and ends of epochs alone (an objective may do so in a step). Whether a
    loss was not finite is seen there: training then goes back to the last one, finds the step that was the cause and
    passes over it.

    Parameters
    ----------
    learner : Learner
        The student and what it is trained on; adapters and heads of the objective are trained with it.
    lesson, spec, context, seed, augment
        What is learnt, how, where and from which random numbers.
    report_with : dict, optional
        Added to every report, to tell several lessons of one worker group apart.

    Raises
    ------
    ValueError
        If a batch has fewer images than there are ranks, there are neither labels nor teachers, or the student is to
        be compiled while the objective looks into its layers.
    FloatingPointError
        If the loss of more than `spec.max_skipped` steps was not finite; the last checkpoint stands.
    """
    for name, size in (("batch_size", spec.batch_size), ("labelled_batch", spec.labelled_batch)):
        if size < context.world_size:
            raise ValueError(f"{name} must be at least the {context.world_size} workers, got {size}")
    if not len(lesson.labelled) and lesson.targets is None:
        raise ValueError(f"{lesson.name} has neither labelled images nor teachers; there is nothing to learn from")
    if spec.compile and (learner.taps or learner.flow is not None or "features" in learner.wants):
        raise ValueError("compile: the objective looks into the student's layers; set distill.loop.compile=false")
    return _Training(learner, lesson, spec, context, seed, augment, report_with or {}).run()


@dataclass
class _Progress:
    """How far a training is: what a checkpoint holds besides weights."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    counted: int = 0
    skipped: list[int] = field(default_factory=list)


class _Training:
    def __init__(
        self,
        learner: Learner,
        lesson: Lesson,
        spec: LoopSpec,
        context: WorkerContext,
        seed: int,
        augment: Augment | None,
        report_with: dict[str, float],
    ) -> None:
        self.learner, self.lesson, self.spec, self.context = learner, lesson, spec, context
        self.seed, self.augment, self.report_with = seed, augment, report_with
        cuda = context.device.type == "cuda"
        self.feed = Feed(
            lesson,
            spec,
            seed=seed,
            rank=context.rank,
            world_size=context.world_size,
            wants=learner.wants,
            ahead=(2 if cuda else 0) if spec.prefetch is None else spec.prefetch,
            pin=cuda,
        )
        self.total = self.feed.steps * spec.epochs
        learner.autocast = _PRECISIONS[spec.precision]
        if spec.compile:
            learner.student.compile()
        self.model = context.prepare(learner)
        self.parameters = list(learner.parameters())
        self.optimiser = build_optimiser(self.parameters, spec.optim, undecayed=learner.undecayed())
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=spec.precision == "fp16")
        self.average = None if spec.ema is None else Average(learner.student, spec.ema)
        self.parts = spec.parts * 2**context.memory_failures
        self.progress = _Progress()
        self._told, self._asked = False, time.monotonic()

    def run(self) -> list[dict[str, float]]:
        clear_forgotten()
        with self.context.restore() as folder:
            state = load_state(folder) if folder is not None else None
        if state is not None and state["name"] == self.lesson.name:
            self._load(state)
        back = self._state()
        while self.progress.step < self.total:
            stop = self._next_stop()
            bad = self._advance(stop)
            if bad is not None:
                self._load(back)
                culprit = self._advance(stop, careful=True)
                self._load(back)
                self._skip(bad if culprit is None else culprit)
                back["progress"]["skipped"] = list(self.progress.skipped)
                continue
            back = self._end_of_segment()
        if self.average is not None:
            self.average.put()
        return self.progress.history

    def _next_stop(self) -> int:
        """Return the step before which the next checkpoint may be due, or the epoch ends."""
        steps, every = self.feed.steps, self.spec.checkpoint_steps
        done = self.progress.step % steps
        inner = steps if every is None else min((done // every + 1) * every, steps)
        return self.progress.step - done + inner

    def _advance(self, stop: int, *, careful: bool = False) -> int | None:
        """Do the steps before `stop`; return the first one that a loss or weight was not finite after, or None.

        With `careful` return the one that is to blame, in front of which training has then stopped.
        """
        context, progress = self.context, self.progress
        started = time.perf_counter()
        bad = torch.full((), _FINE, device=context.device)
        self.model.train()
        with contextlib.closing(self.feed.batches(progress.step, stop, progress.skipped)) as batches:
            for batch in batches:
                told = self._gradients(batch.to(context.device))
                if careful and self._broken(told["loss"]):
                    return batch.step
                self._update(batch.step)
                bad = torch.minimum(bad, torch.where(torch.isfinite(told["loss"]), _FINE, batch.step))
                for name, value in told.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
                progress.counted += 1
                progress.step = batch.step + 1
                if progress.step < stop and self._leaving(progress.step):
                    stop = progress.step
                    break
        progress.step = stop
        progress.seconds += time.perf_counter() - started
        with torch.no_grad():  # a gradient that is not finite shows in the weights before it shows in a loss
            finite = torch.isfinite(nn.utils.get_total_norm(self.parameters))
        bad = torch.minimum(bad, torch.where(finite, _FINE, stop - 1))
        if context.world_size > 1:
            distributed.all_reduce(bad, distributed.ReduceOp.MIN)
        first = int(bad)
        return None if first == _FINE else first

    def _leaving(self, step: int | None = None) -> bool:
        """Tell, once, that the worker has to leave: a checkpoint is due. All ranks ask in the same steps."""
        if self._told:
            return False
        if step is not None and self.context.world_size > 1 and step % _NOTICE:
            return False
        if step is not None and self.context.world_size == 1 and time.monotonic() - self._asked < _NOTICE_S:
            return False
        self._asked, self._told = time.monotonic(), self.context.leaving()
        return self._told

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Run the student over one batch, part by part; return the parts of the loss."""
        spec, step, learner = self.spec, batch.step, self.learner
        images, labels, said = batch.images, batch.labels, batch.said
        if self.augment is not None:
            images = self.augment(images, batch.keys)
        images, mix = mixed(
            images,
            batch.labelled,
            mixup=spec.mixup,
            cutmix=spec.cutmix,
            seed=self.seed,
            step=step,
            rank=self.context.rank,
        )
        other = None
        if mix is not None:
            others = said.take(mix.partner[batch.labelled :] - batch.labelled) if said is not None else None
            other = Other(mix.share, labels[mix.partner], others)
        # So that dropout does not depend on what was drawn before: nothing but the step decides.
        _seed(seed_of(self.seed, 3, step, self.context.rank), self.context.device)
        looks = learner.begin(step / self.total)
        self.optimiser.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        pieces = list(_pieces(batch.labelled, len(images) - batch.labelled, self.parts))
        for number, (rows, taught) in enumerate(pieces, start=1):
            whole = len(pieces) == 1
            seen = images if whole else images[rows]
            live = self.lesson.live(seen) if looks and self.lesson.live is not None else None
            with self._unshared() if number < len(pieces) else contextlib.nullcontext():
                told = self.model(
                    seen,
                    labels if whole else labels[rows],
                    said if whole or said is None else said.take(taught),
                    live,
                    step / self.total,
                    other if whole or other is None else other.take(rows, taught),
                )
                self.scaler.scale(told["loss"] / len(pieces)).backward()
            for name, value in told.items():
                value = value.detach() / len(pieces)
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _unshared(self) -> contextlib.AbstractContextManager[None]:
        """Sum gradients on this rank alone: they are shared with those of the last part."""
        return getattr(self.model, "no_sync", contextlib.nullcontext)()

    def _update(self, step: int) -> None:
        set_rate(self.optimiser, self.spec.optim, step, self.total)
        if self.spec.optim.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.parameters, self.spec.optim.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.learner.after_step()
        if self.average is not None:
            self.average.update()

    def _broken(self, loss: Tensor) -> bool:
        """Tell whether a step must not be done; the same on all ranks."""
        broken = ~torch.isfinite(loss)
        if not self.scaler.is_enabled():  # which leaves steps out by itself, until the loss fits into half precision
            gradients = [one.grad for one in self.parameters if one.grad is not None]
            broken = broken | ~torch.isfinite(nn.utils.get_total_norm(gradients))
        flag = broken.to(torch.int32)
        if self.context.world_size > 1:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def _skip(self, step: int) -> None:
        skipped = self.progress.skipped
        if len(skipped) >= self.spec.max_skipped:
            raise FloatingPointError(
                f"the loss of {self.lesson.name} was not finite in step {step % self.feed.steps + 1} of epoch "
                f"{step // self.feed.steps + 1}, after {len(skipped)} such steps were left out; lower "
                "distill.loop.optim.lr, set distill.loop.optim.clip_norm, or raise distill.loop.max_skipped"
            )
        skipped.append(step)

    def _end_of_segment(self) -> dict[str, Any]:
        """Report what there is to report; return the state to which training goes back from what comes next."""
        progress, spec = self.progress, self.spec
        epoch, within = divmod(progress.step, self.feed.steps)
        if within:
            state = self._state()
            self._report({"step": progress.step}, state)
            return state
        count = max(progress.counted, 1)
        metrics = {"loss": math.nan} | {name: float(value) / count for name, value in progress.sums.items()}
        images = spec.labelled_batch * bool(len(self.lesson.labelled))
        images += spec.batch_size * (self.lesson.targets is not None)
        metrics |= {
            "epoch": epoch,
            "lr": float(self.optimiser.param_groups[0]["lr"]),
            "seconds": progress.seconds,
            "images_per_second": progress.counted * images / progress.seconds if progress.seconds else 0.0,
        }
        if progress.skipped:
            metrics["skipped"] = len(progress.skipped)
        progress.history.append(metrics)
        progress.sums, progress.seconds, progress.counted = {}, 0.0, 0
        state = self._state()
        keep = epoch % spec.checkpoint_every == 0 or epoch == spec.epochs or self._leaving()
        self._report(metrics, state if keep else None)
        return state

    def _report(self, metrics: dict[str, float], state: dict[str, Any] | None) -> None:
        reported = metrics | self.report_with
        if state is None or self.context.rank:
            self.context.report(reported)
            return
        folder = new_folder()  # the context takes it over
        try:
            save_state(folder, state)
        except (OSError, RuntimeError) as error:  # torch's writer says the latter of a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise StageError(f"{folder.parent}: no room for a checkpoint on its way ({error}); free some") from error
        self.context.report(reported, folder)

    def _state(self) -> dict[str, Any]:
        """Return a copy of all that the rest of the training depends on."""
        state = {
            "name": self.lesson.name,
            "learner": self.learner.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": vars(self.progress),
        }
        return _copied(state)

    def _load(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(_copied(state["optimiser"]))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        self.progress = _Progress(**_copied(state["progress"]))
        device = self.context.device
        self.progress.sums = {name: value.to(device) for name, value in self.progress.sums.items()}


def _seed(seed: int, device: torch.device) -> None:
    """Seed what is drawn from in a step.

    `torch.manual_seed` would format a stack trace for each kind of device that was never used: a millisecond a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _pieces(labelled: int, taught: int, parts: int) -> Iterator[tuple[Tensor, slice]]:
    """Cut a batch into equal parts, so that the mean of their means is the mean of the batch.

    As many as wanted, or the next number that divides both kinds of images; at most their greatest common divisor.

    Yields
    ------
    rows : (m,) int64 tensor
        Of the batch.
    taught : slice
        Of its taught images.
    """
    most = math.gcd(labelled, taught)
    count = next(number for number in range(min(parts, most), most + 1) if most % number == 0) if most else 1
    for part in range(count):
        own = slice(part * labelled // count, (part + 1) * labelled // count)
        theirs = slice(part * taught // count, (part + 1) * taught // count)
        rows = [torch.arange(own.start, own.stop), labelled + torch.arange(theirs.start, theirs.stop)]
        yield torch.cat(rows), theirs


def _copied(value: Any) -> Any:
    """Copy nested dicts and lists of tensors and numbers to main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value


def batches_of(images: Images, batch_size: int) -> Iterator[Tensor]:
    """Yield all images in order."""
    for start in range(0, len(images), batch_size):
        yield images.images(torch.arange(start, min(start + batch_size, len(images))))
