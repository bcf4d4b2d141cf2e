"""The training loop: exact resume, sharing among ranks, controls."""

import math
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.distillation.step import Objective, Said
from pipeline.engine.checkpoint import CheckpointStore, load_state, save_state
from pipeline.engine.context import LocalContext
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.loop import fit
from pipeline.engine.optim import rate
from pipeline.engine.sampling import BatchSampler, epoch_order
from pipeline.engine.spec import LoopSpec, OptimSpec

CPU = torch.device("cpu")


class TinyImages:
    def __init__(self, n: int, classes: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % classes
        self._images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
        self.numbers = torch.arange(n) + 1000 * seed
        self._images[:, 0, 0] = (self.labels[:, None] * 80).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self._images[rows]


class TinyTargets:
    """One teacher, which says the label."""

    views = None

    def __init__(self, labels: torch.Tensor) -> None:
        self._labels = labels

    def batch(self, rows: torch.Tensor, views: torch.Tensor, wants=()) -> Said:
        target = nn.functional.one_hot(self._labels[rows], 3).float()[None]
        return Said(torch.ones(1, len(rows)), (target[0],), target)


class TinyStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(self.norm(images.flatten(1).float() / 255)))


class TinyObjective(Objective):
    """Cross-entropy on the labels, and on what the teachers say; with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, step):
        own = step.labels >= 0
        parts = {"cross_entropy": nn.functional.cross_entropy(step.logits[own], step.labels[own])}
        if step.said is not None:
            logits = self.scale * step.logits[step.taught]
            parts["taught"] = nn.functional.cross_entropy(logits, step.said.target[0].argmax(1))
        return {"loss": sum(parts.values()) + 0 * self.scale, **parts}


class Killed(Exception):
    pass


def lesson(taught: bool = True) -> Lesson:
    labelled, more = TinyImages(12), TinyImages(40, seed=1)
    return Lesson("tiny", labelled, more, TinyTargets(more.labels) if taught else None)


def train(folder: Path | None, *, kill_after: int | None = None, taught: bool = True, epochs: int = 6) -> tuple:
    def on_report(metrics: dict[str, float]) -> None:
        if kill_after is not None and metrics["epoch"] >= kill_after:
            raise Killed

    torch.manual_seed(7)
    student = TinyStudent()
    spec = LoopSpec(epochs=epochs, batch_size=16, labelled_batch=6, checkpoint_every=2, optim=OptimSpec(lr=0.02))
    store = CheckpointStore(str(folder), "run") if folder is not None else None
    with LocalContext(store, on_report, CPU) as context:
        history = fit(Learner(student, TinyObjective()), lesson(taught), spec, context, seed=3)
    return student.state_dict(), history


def test_what_killed_trainings_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, link, young, other = (
        tmp_path / f"faculty-{name}" for name in ("state-a", "state-b", "checkpoint-c", "model-d")
    )
    target = tmp_path / "kept"
    for folder in (old, young, other, target):
        folder.mkdir()
        (folder / "state.pt").write_bytes(b"weights")
    link.symlink_to(target)
    for path in (old, link, other, target):
        os.utime(path, (time.time() - 90_000,) * 2, follow_symlinks=False)
    train(None, epochs=1)
    assert sorted(tmp_path.iterdir()) == sorted([link, young, other, target])
    assert (target / "state.pt").exists()


@pytest.mark.parametrize("kill_after", [1, 2, 3, 5])
def test_interrupted_training_ends_with_the_same_weights(tmp_path: Path, kill_after: int) -> None:
    whole, history = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "cut", kill_after=kill_after)
    resumed, resumed_history = train(tmp_path / "cut")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert [m["loss"] for m in history] == [m["loss"] for m in resumed_history]


def test_resume_repeats_no_epoch_before_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, kill_after=4)
    seen: list[float] = []
    student = TinyStudent()
    spec = LoopSpec(epochs=6, batch_size=16, labelled_batch=6, checkpoint_every=2, optim=OptimSpec(lr=0.02))
    with LocalContext(CheckpointStore(str(tmp_path), "run"), lambda m: seen.append(m["epoch"]), CPU) as context:
        fit(Learner(student, TinyObjective()), lesson(), spec, context, seed=3)
    assert seen == [5, 6]


def test_the_loss_falls_and_every_part_is_reported() -> None:
    _, history = train(None, epochs=20)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert {"loss", "cross_entropy", "taught", "lr", "epoch", "images_per_second"} <= history[0].keys()


def test_no_teacher_trains_on_labels_alone_with_the_same_steps() -> None:
    _, history = train(None, taught=False)
    assert "taught" not in history[0]
    assert history[0]["loss"] == pytest.approx(history[0]["cross_entropy"])
    assert len(history) == 6


def test_no_label_is_needed_where_there_are_teachers() -> None:
    more = TinyImages(40, seed=1)
    spec = LoopSpec(epochs=2, batch_size=16, labelled_batch=6)
    unlabelled = Lesson("tiny", TinyImages(0), more, TinyTargets(more.labels))

    class Taught(TinyObjective):
        def forward(self, step):
            assert (step.labels == -1).all()
            parts = super().forward(step)
            return {"loss": parts["taught"], "taught": parts["taught"]}

    history = fit(Learner(TinyStudent(), Taught()), unlabelled, spec, LocalContext(device=CPU), seed=0)
    assert len(history) == 2
    with pytest.raises(ValueError, match="neither labelled images nor teachers"):
        nothing = Lesson("tiny", TinyImages(0), more, None)
        fit(Learner(TinyStudent(), Taught()), nothing, spec, LocalContext(device=CPU), seed=0)


def checkpoint(home: Path, index: int, **state: object) -> Path:
    source = home / "source"
    source.mkdir(parents=True, exist_ok=True)
    save_state(source, dict(state))
    store = CheckpointStore(str(home), "run")
    return Path(store.path(store.save(source, {}, index).name))


def test_a_checkpoint_of_another_lesson_is_not_used(tmp_path: Path) -> None:
    checkpoint(tmp_path, 0, name="other", epoch=5)
    _, history = train(tmp_path)
    assert [m["epoch"] for m in history] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, epoch, name="x", epoch=epoch) for epoch in (1, 2, 3)]
    state = paths[-1] / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1  # the size stays
    state.write_bytes(content)
    (paths[-2] / "state.pt").write_bytes(b"")
    store = CheckpointStore(str(tmp_path), "run")
    newest = store.newest()
    assert newest is not None
    with store.local(newest.name) as folder:
        assert load_state(folder)["epoch"] == 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_the_same_global_batches(world_size: int) -> None:
    alone = list(BatchSampler(10, 8, seed=5).batches(0, 6))
    ranks = [list(BatchSampler(10, 8, seed=5, rank=r, world_size=world_size).batches(0, 6)) for r in range(world_size)]
    for number, batch in enumerate(alone):
        for field in ("rows", "passes"):
            together = torch.stack([getattr(ranks[r][number], field) for r in range(world_size)], 1).flatten()
            assert torch.equal(together, getattr(batch, field))


def test_the_stream_visits_every_sample_equally_often_and_can_start_anywhere() -> None:
    batches = list(BatchSampler(10, 4, seed=1).batches(0, 5))
    rows, passes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.bincount(rows).tolist() == [2] * 10
    assert torch.equal(passes, torch.arange(20) // 10)
    later = list(BatchSampler(10, 4, seed=1).batches(3, 2))
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(batches[3:], later, strict=True))
    assert not torch.equal(epoch_order(10, seed=1, epoch=0), epoch_order(10, seed=1, epoch=1))


def test_a_batch_that_can_not_be_shared_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least world_size=4, got 3"):
        BatchSampler(10, 3, seed=0, world_size=4)
    shares = [next(BatchSampler(10, 3, seed=0, rank=rank, world_size=2).batches(0, 1)).rows for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 1]


def test_schedules() -> None:
    cosine = OptimSpec(schedule="cosine", warmup=0.1)
    values = [rate(step, 100, cosine) for step in range(100)]
    assert max(values) == pytest.approx(1.0)
    assert values[0] < 0.2
    assert values[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert values[-1] < 0.01
    step = OptimSpec(schedule="step", warmup=0, milestones=(0.5, 0.75), gamma=0.1)
    assert [rate(k, 100, step) for k in (0, 49, 50, 80)] == pytest.approx([1, 1, 0.1, 0.01])
    assert rate(99, 100, OptimSpec(schedule="one_cycle", warmup=0)) == pytest.approx(0.01)
    assert rate(99, 100, OptimSpec(schedule="constant", warmup=0)) == 1
