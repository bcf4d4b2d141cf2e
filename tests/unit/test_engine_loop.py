"""The training loop: exact resume, sharing among ranks, controls."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.engine.checkpoint import load_state, newest_folder, replace_folder, save_state
from pipeline.engine.context import LocalContext
from pipeline.engine.loop import Lesson, fit, rate
from pipeline.engine.sampling import BatchSampler, epoch_order
from pipeline.engine.spec import LoopSpec, OptimSpec

CPU = torch.device("cpu")


class TinyImages:
    def __init__(self, n: int, classes: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % classes
        self._images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
        self._images[:, 0, 0] = (self.labels[:, None] * 80).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self._images[rows]


class TinyTargets:
    """Teachers that say the label."""

    def __init__(self, labels: torch.Tensor) -> None:
        self._labels = labels

    def batch(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        return self._labels[rows].to(device)


class TinyStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(self.norm(images.flatten(1).float() / 255)))


class TinyObjective(nn.Module):
    """Cross-entropy on the labels, and on what the teachers say."""

    def forward(self, logits, labels, targets, *, progress):
        own = labels >= 0
        parts = {"cross_entropy": nn.functional.cross_entropy(logits[own], labels[own])}
        if targets is not None:
            parts["taught"] = nn.functional.cross_entropy(logits[~own], targets)
        return {"loss": sum(parts.values()), **parts}


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
    context = LocalContext(folder, on_report, CPU)
    history = fit(student, TinyObjective(), lesson(taught), spec, context, seed=3)
    return student.state_dict(), history


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
    fit(
        student, TinyObjective(), lesson(), spec, LocalContext(tmp_path, lambda m: seen.append(m["epoch"]), CPU), seed=3
    )
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


def test_a_checkpoint_of_another_lesson_is_not_used(tmp_path: Path) -> None:
    save_dir = tmp_path / "source"
    save_dir.mkdir()
    save_state(save_dir, {"name": "other", "epoch": 5})
    replace_folder(save_dir, tmp_path / "home")
    _, history = train(tmp_path / "home")
    assert [m["epoch"] for m in history] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    class Broken(TinyObjective):
        def forward(self, logits, labels, targets, *, progress):
            parts = super().forward(logits, labels, targets, progress=progress)
            return {"loss": parts["loss"] * float("nan")}

    spec = LoopSpec(epochs=2, batch_size=16, labelled_batch=6)
    with pytest.raises(FloatingPointError, match="loss of tiny became nan in epoch 1"):
        fit(TinyStudent(), Broken(), lesson(), spec, LocalContext(device=CPU), seed=0)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        source = tmp_path / f"s{epoch}"
        source.mkdir()
        save_state(source, {"name": "x", "epoch": epoch})
        replace_folder(source, tmp_path / "home")
    kept = sorted(path.name for path in (tmp_path / "home").iterdir())
    assert kept == ["checkpoint_000001", "checkpoint_000002"]
    state = tmp_path / "home" / "checkpoint_000002" / "state.pt"
    state.write_bytes(state.read_bytes()[:-7])
    assert load_state(state.parent) is None
    newest = newest_folder(tmp_path / "home")
    assert newest is not None
    restored = load_state(newest)
    assert restored is not None
    assert restored["epoch"] == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_the_same_global_batches(world_size: int) -> None:
    alone = list(BatchSampler(10, 8, seed=5).batches(0, 6))
    ranks = [list(BatchSampler(10, 8, seed=5, rank=r, world_size=world_size).batches(0, 6)) for r in range(world_size)]
    for number, batch in enumerate(alone):
        together = torch.stack([ranks[r][number] for r in range(world_size)], 1).flatten()
        assert torch.equal(together, batch)


def test_the_stream_visits_every_sample_equally_often_and_can_start_anywhere() -> None:
    batches = list(BatchSampler(10, 4, seed=1).batches(0, 5))
    assert torch.bincount(torch.cat(batches)).tolist() == [2] * 10
    later = list(BatchSampler(10, 4, seed=1).batches(3, 2))
    assert all(torch.equal(a, b) for a, b in zip(batches[3:], later, strict=True))
    assert not torch.equal(epoch_order(10, seed=1, epoch=0), epoch_order(10, seed=1, epoch=1))


def test_a_batch_that_can_not_be_shared_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple of world_size=2, got 3"):
        BatchSampler(10, 3, seed=0, world_size=2)


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
