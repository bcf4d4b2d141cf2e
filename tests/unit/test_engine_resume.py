"""Interruptions, steps that are left out, parts of batches, averages and mixing: what a training must not depend on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.spec import AugmentSpec
from pipeline.data.views import augment
from pipeline.distillation.step import Objective, Said
from pipeline.engine.checkpoint import CheckpointStore
from pipeline.engine.context import LocalContext
from pipeline.engine.feeding import Feed, Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.loop import fit
from pipeline.engine.mixing import mixed
from pipeline.engine.optim import Average
from pipeline.engine.spec import LoopSpec, OptimSpec
from pipeline.errors import StageError

CPU = torch.device("cpu")
STEPS = 5  # of an epoch


class Pictures:
    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 3
        self.numbers = torch.randint(-(2**62), 2**62, (n,), generator=generator)
        self._images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
        self._images[:, 0, 0] = (self.labels[:, None] * 80).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self._images[rows]


class Spoken:
    def __init__(self, labels: torch.Tensor, views: int | None = None) -> None:
        self.views, self._labels = views, labels

    def batch(self, rows: torch.Tensor, views: torch.Tensor, wants=()) -> Said:
        target = nn.functional.one_hot(self._labels[rows], 3).float() * 0.9 + 0.1 / 3
        return Said(torch.ones(1, len(rows)), (target,), target[None])


class Student(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.hidden, self.linear, self.drop = nn.Linear(16, 8), nn.Linear(8, 3), nn.Dropout(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1).to(self.linear.weight.dtype) / 255
        return self.linear(self.drop(self.hidden(self.norm(pixels)).relu()))


class Both(Objective):
    """Cross-entropy with the labels, and with what the teachers say."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, step):
        own = step.labels >= 0
        parts = {"own": nn.functional.cross_entropy(step.logits[own], step.labels[own])}
        if step.said is not None:
            log_q = (self.scale * step.logits[step.taught]).log_softmax(1)
            parts["taught"] = -(step.said.target[0] * log_q).sum(1).mean()
        return {"loss": sum(parts.values()) + 0 * self.scale, **parts}


class Cut(Exception):
    """In place of a kill."""


def spec(**changes: Any) -> LoopSpec:
    fields = {"epochs": 4, "batch_size": 8, "labelled_batch": 4, "checkpoint_steps": 2, "optim": OptimSpec(lr=0.02)}
    return LoopSpec(**(fields | changes))


def train(
    loop: LoopSpec,
    folder: Path | None = None,
    *,
    hooked: Callable[[int], None] | None = None,
    objective: Objective | None = None,
    norm: bool = True,
    context: LocalContext | None = None,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Train a small student; `hooked` is called with the number of every forward pass."""
    torch.manual_seed(7)
    student, calls = Student(norm), [0]
    if hooked is not None:

        def before(module: nn.Module, inputs: Any) -> None:
            calls[0] += 1
            hooked(calls[0])

        student.register_forward_pre_hook(before)
    labelled, taught = Pictures(12, 0), Pictures(40, 1)
    lesson = Lesson("small", labelled, taught, Spoken(taught.labels))
    store = CheckpointStore(str(folder), "run") if folder is not None else None
    views = AugmentSpec(shift=1)
    with context or LocalContext(store, device=CPU) as where:
        history = fit(
            Learner(student, objective or Both()),
            lesson,
            loop,
            where,
            seed=3,
            augment=lambda images, keys: augment(images, views, keys),
        )
    return {name: value.clone() for name, value in student.state_dict().items()}, history


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def cut_at(number: int) -> Callable[[int], None]:
    def hooked(count: int) -> None:
        if count == number:
            raise Cut

    return hooked


CUTS = sorted(np.random.default_rng(0).choice(np.arange(1, 21), 10, replace=False).tolist())
EXTRAS = {"plain": {}, "all": {"ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "parts": 2, "prefetch": 2}}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, tuple]:
    return {name: train(spec(**extra)) for name, extra in EXTRAS.items()}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("number", CUTS)
def test_cut_off_anywhere_it_ends_with_the_same_weights(tmp_path, uninterrupted, number, extra) -> None:
    loop = spec(**EXTRAS[extra])
    passes = number * loop.parts
    with pytest.raises(Cut):
        train(loop, tmp_path, hooked=cut_at(passes))
    again: list[int] = []
    weights, history = train(loop, tmp_path, hooked=again.append)
    whole, whole_history = uninterrupted[extra]
    assert same(whole, weights)
    told = ("loss", "own", "taught", "lr", "epoch")
    assert [[one[key] for key in told] for one in history] == [[one[key] for key in told] for one in whole_history]
    # From the checkpoint on: within an epoch they lie two steps apart.
    assert passes - 1 + len(again) <= loop.parts * (4 * STEPS + 2)


def test_cut_off_twice(tmp_path, uninterrupted) -> None:
    for number in (9, 5):
        with pytest.raises(Cut):
            train(spec(), tmp_path, hooked=cut_at(number))
    assert same(uninterrupted["plain"][0], train(spec(), tmp_path)[0])


def test_reading_ahead_and_other_checkpoints_change_nothing(uninterrupted) -> None:
    loop = spec(prefetch=3, checkpoint_steps=None, checkpoint_every=3)
    assert same(uninterrupted["plain"][0], train(loop)[0])


class Sometimes(Both):
    """Not finite in some steps: in the loss, or in the gradient alone."""

    def __init__(self, steps: tuple[int, ...], where: str = "loss") -> None:
        super().__init__()
        self._steps, self._where, self.seen = steps, where, []

    def forward(self, step):
        parts, number = super().forward(step), round(step.progress * 4 * STEPS)
        self.seen.append(number)
        if number in self._steps:
            if self._where == "loss":
                parts["loss"] = parts["loss"] * math.nan
            else:  # the derivative of the root at 0 is infinite, and 0 times infinity is none
                parts["loss"] = parts["loss"] + (step.logits.sum() * 0).abs().sqrt()
        return parts


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("steps", [(0,), (7,), (9, 10), (3, 13, 19)])
def test_steps_that_are_not_finite_are_left_out(steps, where) -> None:
    objective = Sometimes(steps, where)
    weights, history = train(spec(), objective=objective)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert history[-1]["skipped"] == len(steps)
    assert all(math.isfinite(one["loss"]) for one in history)
    # As if these steps had never been: the pass that counted did all but them, once more from each checkpoint on.
    assert [number for number in objective.seen if number not in steps][-1] == max(set(range(20)) - set(steps))
    again, _ = train(spec(checkpoint_steps=None), objective=Sometimes(steps, where))
    assert same(weights, again)


def test_more_of_them_end_the_training(tmp_path) -> None:
    with pytest.raises(FloatingPointError, match=r"small was not finite in step 3 of epoch 2, after 2 .*max_skipped"):
        train(spec(max_skipped=2), tmp_path, objective=Sometimes((5, 6, 7)))
    assert CheckpointStore(str(tmp_path), "run").newest() is not None
    always = Sometimes(tuple(range(20)))
    with pytest.raises(FloatingPointError, match="step 1 of epoch 1, after 0"):
        train(spec(max_skipped=0), objective=always)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts) -> None:
    class Plain(Student):
        def __init__(self, norm: bool = True) -> None:
            super().__init__(norm)
            self.drop = nn.Identity()

    def trained(parts: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        student = Plain(norm=False).double()
        labelled, taught = Pictures(12, 0), Pictures(40, 1)
        learner = Learner(student, Both().double())
        sgd = OptimSpec(name="sgd", lr=0.1)
        lesson = Lesson("small", labelled, taught, Spoken(taught.labels))
        fit(learner, lesson, spec(parts=parts, optim=sgd, mixup=0.5), LocalContext(device=CPU), seed=3)
        return student.state_dict()

    whole, cut = trained(1), trained(parts)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-7)


def test_a_run_that_was_out_of_memory_takes_twice_the_parts() -> None:
    calls: list[int] = []
    train(spec(epochs=1), hooked=calls.append, context=LocalContext(device=CPU, memory_failures=1))
    assert len(calls) == 2 * STEPS


def test_the_average_is_the_recursion_and_ends_up_in_the_student() -> None:
    torch.manual_seed(7)
    student = Student()
    average = Average(student, 0.9)
    expected = {name: value.clone() for name, value in student.state_dict().items()}
    for k in range(30):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        student.norm.num_batches_tracked += 1
        average.update()
        decay = min(0.9, (1 + k) / (10 + k))
        for name, value in student.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            )
    for name, value in expected.items():
        torch.testing.assert_close(average.values[name], value)
    average.put()
    torch.testing.assert_close(student.state_dict()["linear.weight"], expected["linear.weight"])
    plain, averaged = train(spec())[0], train(spec(ema=0.95))[0]
    assert not same(plain, averaged)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_what_the_share_says(kind) -> None:
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 1, 8, 8).clone() * 20
    for step in range(20):
        found, mix = mixed(images, 4, mixup=kind == "mixup", cutmix=kind == "cutmix", seed=1, step=step, rank=0)
        assert mix is not None and 0 <= mix.share <= 1
        assert sorted(mix.partner[:4].tolist()) == [0, 1, 2, 3]
        assert sorted(mix.partner[4:].tolist()) == list(range(4, 12))
        # The mean of a mixed image of even colour is the mean of both, by their shares.
        whole = images.float().mean((1, 2, 3))
        expected = mix.share * whole + (1 - mix.share) * whole[mix.partner]
        torch.testing.assert_close(found.float().mean((1, 2, 3)), expected, rtol=1e-5, atol=1e-3)
        again, _ = mixed(images, 4, mixup=kind == "mixup", cutmix=kind == "cutmix", seed=1, step=step, rank=0)
        assert torch.equal(found, again)
    assert mixed(images, 4, mixup=0, cutmix=0, seed=1, step=0, rank=0)[1] is None


def test_targets_are_mixed_as_the_images_are() -> None:
    """The loss is the cross-entropy with the mixed target, of labels and of what the teachers say alike."""
    torch.manual_seed(7)
    student = Student(norm=False)
    student.drop = nn.Identity()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    student.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output.detach())))
    taught, labelled = Pictures(8, 1), Pictures(4, 0)
    lesson = Lesson("small", labelled, taught, Spoken(taught.labels))
    loop = spec(epochs=1, mixup=1.0, checkpoint_steps=None)
    [history] = fit(Learner(student, Both()), lesson, loop, LocalContext(device=CPU), seed=3)
    feed = Feed(lesson, loop, seed=3, rank=0, world_size=1, wants=())
    [batch] = feed.batches(0, 1)
    images, mix = mixed(batch.images, 4, mixup=1.0, cutmix=0.0, seed=3, step=0, rank=0)
    [(inputs, logits)] = seen
    assert mix is not None and torch.equal(inputs, images)
    target = torch.cat([nn.functional.one_hot(batch.labels[:4], 3).float(), batch.said.target[0]])
    target = mix.share * target + (1 - mix.share) * target[mix.partner]
    each = -(target * logits.log_softmax(1)).sum(1)
    assert history["own"] == pytest.approx(float(each[:4].mean()), rel=1e-5)
    assert history["taught"] == pytest.approx(float(each[4:].mean()), rel=1e-5)


@pytest.mark.parametrize("views", [None, 1, 3])
def test_taught_images_cycle_through_the_views_that_teachers_spoke_of(views) -> None:
    taught, labelled = Pictures(10, 1), Pictures(4, 0)
    asked: list[tuple[int, int]] = []

    class Asked(Spoken):
        def batch(self, rows, views, wants=()):
            asked.extend(zip(rows.tolist(), views.tolist(), strict=True))
            return super().batch(rows, views, wants)

    lesson = Lesson("small", labelled, taught, Asked(taught.labels, views))
    keys: dict[int, dict[tuple[int, int], int]] = {}
    for seed in (3, 4):
        asked.clear()
        feed = Feed(lesson, spec(batch_size=5), seed=seed, rank=0, world_size=1, wants=())
        found = torch.cat([batch.keys[batch.labelled :] for batch in feed.batches(0, 12)]).tolist()
        keys[seed] = dict(zip(asked, found, strict=True))
        numbers = sorted({view for _, view in asked})
        assert numbers == (list(range(1, 7)) if views is None else list(range(views)))
        assert all(sum(one[1] == view for one in asked) == 60 // len(numbers) for view in numbers)
        assert views is None or all(key == 0 for (_, view), key in keys[seed].items() if view == 0)
    # Kept views are those of all seeds; views that are seen once are each training's own.
    shared = [keys[3][one] == keys[4][one] for one in keys[3] if one[1] > 0]
    assert all(shared) if views else not any(shared)


def test_half_precision_trains_and_losses_stay_in_full_precision() -> None:
    class Checked(Both):
        def forward(self, step):
            assert step.logits.dtype == torch.float32
            return super().forward(step)

    seen: list[torch.dtype] = []
    torch.manual_seed(7)
    student = Student()
    student.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    taught, labelled = Pictures(40, 1), Pictures(12, 0)
    lesson = Lesson("small", labelled, taught, Spoken(taught.labels))
    history = fit(Learner(student, Checked()), lesson, spec(precision="bf16"), LocalContext(device=CPU), seed=3)
    assert set(seen) == {torch.bfloat16}
    assert history[-1]["loss"] < history[0]["loss"]


class Warned(LocalContext):
    """Is told after some steps that it has to leave."""

    def __init__(self, store: CheckpointStore, after: int) -> None:
        super().__init__(store, device=CPU)
        self.asked, self.after, self.kept = 0, after, []

    def leaving(self) -> bool:
        self.asked += 1
        return self.asked > self.after

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        if checkpoint is not None:
            self.kept.append(metrics)
        super().report(metrics, checkpoint)


@pytest.mark.parametrize("after", [0, 6, 11])
def test_a_notice_makes_a_checkpoint_at_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted, after
) -> None:
    monkeypatch.setattr("pipeline.engine.loop._NOTICE_S", 0.0)
    loop = spec(checkpoint_steps=None, checkpoint_every=4)
    context = Warned(CheckpointStore(str(tmp_path), "run"), after)
    weights, _ = train(loop, context=context)
    assert same(uninterrupted["plain"][0], weights)
    assert len(context.kept) == 2 and context.kept[-1]["epoch"] == 4
    # Within an epoch, or at its end; once.
    assert context.kept[0].get("step", context.kept[0].get("epoch", 0) * STEPS) == after + 1
    assert context.asked == after + 1


def test_a_checkpoint_that_finds_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, state: dict) -> None:
        (folder / "state.pt").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.engine.loop.save_state", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StageError, match=rf"{tmp_path}: no room for a checkpoint on its way .*No space left"):
        train(spec(), tmp_path / "run")
    assert not list(tmp_path.glob("faculty-state-*"))


def test_scaled_losses_leave_out_steps_that_overflow_and_resume_with_their_scale(tmp_path: Path) -> None:
    """fp16: the first scale is too large for these gradients, and is halved until they fit."""
    loop = spec(precision="fp16")
    whole, _ = train(loop)
    assert all(bool(torch.isfinite(value).all()) for value in whole.values())
    with pytest.raises(Cut):
        train(loop, tmp_path, hooked=cut_at(9))
    assert same(whole, train(loop, tmp_path)[0])
    assert not same(whole, train(spec())[0])
