"""Objectives against a few lines of plain torch."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.distillation.objectives import CrossEntropy, SoftTargets, TransportDistillation, ramped
from pipeline.transport.sinkhorn import sinkhorn, transport_loss


def case(seed=0, batch=9, classes=4, sizes=(3, 5)):
    """Logits, each sample's teacher (−1 for none), its padded distribution, and the teachers' costs."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=g)
    teacher = torch.arange(batch) % (len(sizes) + 1) - 1
    p = torch.zeros(batch, max(sizes))
    for b, number in enumerate(teacher.tolist()):
        if number >= 0:
            p[b, : sizes[number]] = torch.softmax(2 * torch.randn(sizes[number], generator=g), 0)
    return logits, teacher, p, [torch.rand(size, classes, generator=g) for size in sizes]


def test_cross_entropy_is_the_mean_over_labelled_rows():
    logits, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, -1, 2, -1, 1])
    rows = y >= 0
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits[rows], y[rows], label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(label_smoothing=smoothing)(logits, y)["loss"], expected)


def test_without_labels_the_cross_entropy_is_zero_and_can_be_differentiated():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = CrossEntropy()(logits, torch.full((4,), -1))["loss"]
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"y must lie in \[-1, 3\)"):
        CrossEntropy()(logits, torch.full((4,), 7))


def test_transport_distillation_equals_a_loop_over_samples():
    logits, teacher, p, costs = case()
    weights = torch.rand(9, generator=torch.Generator().manual_seed(1))
    objective = TransportDistillation(costs, reg=0.2, weight=3.0, max_iter=2000, tol=1e-6)
    parts = objective(logits, teacher, p, weights=weights)
    total = 0.0
    for b, number in enumerate(teacher.tolist()):
        if number >= 0:
            M = costs[number]
            solved = sinkhorn(p[b : b + 1, : len(M)], logits[b : b + 1].softmax(1), M, 0.2, tol=1e-6)
            total += float(weights[b] * solved.objective)
    assert float(parts["transport"]) == pytest.approx(total / 9, abs=1e-5)
    assert float(parts["loss"]) == pytest.approx(3 * total / 9, abs=3e-5)


def test_gradient_reaches_taught_rows_alone():
    logits, teacher, p, costs = case()
    logits.requires_grad_()
    TransportDistillation(costs)(logits, teacher, p)["loss"].backward()
    moved = logits.grad.abs().sum(1) > 0
    assert torch.equal(moved, teacher >= 0)


def test_one_teacher_is_the_plain_transport_loss():
    logits, _, p, costs = case(sizes=(5,))
    p = torch.softmax(p + torch.arange(5.0), 1)
    found = TransportDistillation(costs, reg=0.3, weight=1.0)(logits, torch.zeros(9, dtype=torch.int64), p)["loss"]
    expected = transport_loss(p, logits.softmax(1), costs[0], 0.3)
    torch.testing.assert_close(found, expected)


def test_a_batch_without_teachers_can_be_differentiated():
    logits, _, p, costs = case()
    logits.requires_grad_()
    loss = TransportDistillation(costs)(logits, torch.full((9,), -1), p)["loss"]
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_ramp_scales_the_loss_and_not_the_report():
    logits, teacher, p, costs = case()
    objective = TransportDistillation(costs, ramp=0.5)
    full, half = (objective(logits, teacher, p, progress=progress) for progress in (0.5, 0.25))
    torch.testing.assert_close(half["loss"], full["loss"] / 2)
    assert torch.equal(half["transport"], full["transport"])
    assert [ramped(x, 0.5) for x in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert ramped(0.0, 0.0) == 1.0


def test_a_student_learns_the_teachers_answer_by_transport_alone():
    M = 1 - torch.eye(3)
    p = torch.eye(3)[torch.tensor([0, 1, 2, 2])] * 0.94 + 0.02
    z = torch.zeros(4, 3, requires_grad=True)
    objective = TransportDistillation([M], reg=0.1)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        objective(z, torch.zeros(4, dtype=torch.int64), p)["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(z.detach().softmax(1), p @ torch.softmax(-M / 0.1, 1), atol=1e-2, rtol=0)


def test_costs_travel_with_the_module():
    *_, costs = case()
    objective = TransportDistillation(costs).double()
    assert {name for name, _ in objective.named_buffers()} == {"cost_0", "cost_1"}
    assert all(buffer.dtype == torch.float64 for buffer in objective.buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.full((9,), 2)}, r"teacher must lie in \[-1, 2\)"),
        ({"teacher": torch.zeros(8, dtype=torch.int64)}, "must have shapes"),
        ({"weights": torch.ones(8)}, r"weights must have shape \(9,\)"),
        ({"p": torch.ones(9, 5)}, "rows of p must sum to 1"),
        ({"p": torch.full((9, 2), 0.5)}, "p must have|M must have"),
    ],
)
def test_bad_batches_are_named(change, message):
    logits, teacher, p, costs = case()
    arguments = {"teacher": teacher, "p": p} | change
    with pytest.raises(ValueError, match=message):
        TransportDistillation(costs)(logits, **arguments)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="costs must hold"):
        TransportDistillation([])
    with pytest.raises(ValueError, match=r"M must have shape \(3, 4\)"):
        TransportDistillation([torch.rand(2, 4), torch.rand(3, 5)])
    for bad in ({"reg": 0.0}, {"weight": -1.0}, {"ramp": 2.0}, {"tol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TransportDistillation([torch.rand(2, 4)], **bad)


def test_soft_targets_equal_a_divergence():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 4, generator=g), torch.softmax(torch.randn(6, 4, generator=g), 1)
    log_q = torch.log_softmax(logits / 2, 1)
    expected = 4 * (target * (target.log() - log_q)).sum(1)
    parts = SoftTargets(weight=0.5, temperature=2.0)(logits, target)
    torch.testing.assert_close(parts["soft_targets"], expected.mean())
    torch.testing.assert_close(parts["loss"], 0.5 * expected.mean())
    weights = torch.tensor([1.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(SoftTargets(temperature=2.0)(logits, target, weights=weights)["loss"], expected[0] / 6)
    torch.testing.assert_close(SoftTargets()(target.log(), target)["loss"], torch.tensor(0.0), atol=1e-6, rtol=0)
