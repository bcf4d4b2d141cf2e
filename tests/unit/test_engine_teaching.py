"""What the teachers say: files, and the loss against plain torch and POT."""

from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional as F

from pipeline.engine.spec import ObjectiveSpec
from pipeline.engine.teaching import Teaching, TeachingObjective
from pipeline.errors import StageError

CPU = torch.device("cpu")
IDS = [f"{number:032x}" for number in range(6)]
TEACHER = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.fixture
def teaching(tmp_path: Path) -> Teaching:
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(6, 4)
    for row, who in enumerate(TEACHER):
        size = (4, 2)[int(who)]
        p[row, :size] = torch.rand(size, generator=generator).softmax(0)
    Teaching.save(
        tmp_path,
        ids=IDS,
        teachers=["wide", "narrow"],
        costs=[torch.rand(4, 3, generator=generator), torch.rand(2, 3, generator=generator)],
        teacher=TEACHER,
        p=p,
        target=torch.rand(6, 3, generator=generator).softmax(1),
        weight=torch.linspace(0.25, 1, 6),
    )
    return Teaching.open(tmp_path)


def test_rows_come_back_as_they_were_stored(teaching: Teaching) -> None:
    batch = teaching.batch(torch.tensor([4, 0]), CPU)
    assert batch.teacher.tolist() == [1, 0]
    torch.testing.assert_close(batch.weight, torch.tensor([0.85, 0.25]), atol=1e-3, rtol=0)
    assert batch.p[0, 2:].abs().sum() == 0
    assert teaching.shares() == {"wide": 3, "narrow": 3}
    assert len(teaching) == 6


def test_rows_of_another_table_are_refused(teaching: Teaching) -> None:
    teaching.check(IDS)
    for other in (IDS[::-1], IDS[:-1]):
        with pytest.raises(StageError, match="another image table"):
            teaching.check(other)


def test_the_digest_follows_the_content(teaching: Teaching, tmp_path: Path) -> None:
    batch = teaching.batch(torch.arange(6), CPU)
    parts = {"teacher": batch.teacher, "p": batch.p, "target": batch.target}
    about = {"ids": IDS, "teachers": teaching.teachers, "costs": teaching.costs}
    same = Teaching.save(tmp_path / "a", **about, **parts, weight=batch.weight)
    assert same == Teaching.save(tmp_path / "b", **about, **parts, weight=batch.weight)
    assert same != Teaching.save(tmp_path / "c", **about, **parts, weight=batch.weight.flip(0))


def test_the_transport_part_against_pot(teaching: Teaching) -> None:
    rows = torch.tensor([0, 1, 4, 5])
    batch = teaching.batch(rows, CPU)
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    reg = 0.2
    objective = TeachingObjective(
        ObjectiveSpec(reg=reg, transport=1, soft_targets=0, cross_entropy=0, confidence=True), teaching
    )
    found = objective(logits, torch.tensor([2, -1, -1, -1, -1]), batch, progress=0.5)
    expected = 0.0
    for row in range(4):
        cost = teaching.costs[int(batch.teacher[row])].double().numpy()
        p = batch.p[row, : len(cost)].double().numpy()
        q = logits[1 + row].double().softmax(0).numpy()
        plan = ot.sinkhorn(p / p.sum(), q, cost, reg, numItermax=20000, stopThr=1e-12)
        value = (plan * cost).sum() + reg * (plan * (np.log(plan) - 1)).sum()
        expected += float(batch.weight[row]) * value / 4
    # the training's solver stops at a marginal error of 1e-2
    assert float(found["transport"]) == pytest.approx(expected, abs=2e-3)
    assert float(found["loss"]) == pytest.approx(expected, abs=2e-3)


def test_the_soft_targets_and_the_labels_against_plain_torch(teaching: Teaching) -> None:
    batch = teaching.batch(torch.tensor([2, 3]), CPU)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    labels = torch.tensor([1, 0, -1, -1])
    spec = ObjectiveSpec(transport=0, soft_targets=3.0, cross_entropy=2.0, confidence=True)
    found = TeachingObjective(spec, teaching)(logits, labels, batch, progress=0)
    log_q = logits[2:].log_softmax(1)
    kl = (batch.target * (batch.target.log() - log_q)).sum(1)
    expected = 2 * F.cross_entropy(logits[:2], labels[:2]) + 3 * (batch.weight * kl).mean()
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()
    mine = logits.grad.clone()
    logits.grad = None
    expected.backward()
    torch.testing.assert_close(mine, logits.grad)


def test_the_teachers_share_rises_along_its_ramp(teaching: Teaching) -> None:
    batch = teaching.batch(torch.tensor([2, 3]), CPU)
    logits, labels = torch.zeros(3, 3), torch.tensor([1, -1, -1])
    objective = TeachingObjective(ObjectiveSpec(transport=0, soft_targets=1, cross_entropy=0, ramp=0.5), teaching)
    start, half, later, end = (
        float(objective(logits, labels, batch, progress=progress)["loss"]) for progress in (0, 0.25, 0.5, 0.9)
    )
    assert start == 0
    assert half == pytest.approx(later / 2)
    assert end == later > 0


def test_without_teachers_only_the_labels_count() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    found = TeachingObjective(ObjectiveSpec(), None)(logits, torch.tensor([0, 1, 2, 0]), None, progress=0)
    assert set(found) == {"loss", "cross_entropy"}
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])))
