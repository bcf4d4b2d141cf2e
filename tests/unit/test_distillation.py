"""Supervision, transport and the weighted whole against a few lines of plain torch."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.distillation.composite import Composite, Schedule
from pipeline.distillation.cross_entropy import CrossEntropy
from pipeline.distillation.step import About, Head, Objective, Said, Step, TeacherAbout
from pipeline.distillation.transport import TransportDistillation, transport_distillation
from pipeline.transport.sinkhorn import sinkhorn, transport_loss

CLASSES = ("a", "b", "c", "d")


def case(seed=0, batch=9, sizes=(3, 5)):
    """Logits, every teacher's distributions and shares (one teacher a sample, every third without), the costs."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, len(CLASSES), generator=g)
    p = tuple(torch.softmax(2 * torch.randn(batch, size, generator=g), 1) for size in sizes)
    teacher = torch.arange(batch) % (len(sizes) + 1) - 1
    shares = torch.stack([(teacher == number).float() for number in range(len(sizes))])
    return logits, p, shares, [torch.rand(size, len(CLASSES), generator=g) for size in sizes]


def about(costs=(), heads=()):
    teachers = tuple(TeacherAbout(f"t{number}", (), cost) for number, cost in enumerate(costs))
    return About(CLASSES, teachers=teachers, heads=heads)


def step(logits, p, shares, labels=None):
    target = torch.full((len(p), len(logits), logits.shape[1]), 1 / logits.shape[1])
    return Step(logits, torch.full((len(logits),), -1) if labels is None else labels, Said(shares, p, target))


def test_cross_entropy_is_the_mean_over_labelled_rows():
    logits, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, -1, 2, -1, 1])
    rows = y >= 0
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits[rows], y[rows], label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(about(), label_smoothing=smoothing)(Step(logits, y))["loss"], expected)


def test_cross_entropy_over_heads_is_the_mean_of_theirs():
    logits, y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, -1])
    heads = (Head("shape", slice(0, 2), (1, 0, -1)), Head("colour", slice(2, 5), (0, 1, 2)))
    found = CrossEntropy(about(heads=heads))(Step(logits, y))["loss"]
    shape = F.cross_entropy(logits[:2, :2], torch.tensor([1, 0]))  # class 2 has no shape, the last image no label
    colour = F.cross_entropy(logits[:3, 2:], torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found, (shape + colour) / 2)


def test_without_labels_the_cross_entropy_is_zero_and_can_be_differentiated():
    logits = torch.randn(4, 4, requires_grad=True)
    loss = CrossEntropy(about())(Step(logits, torch.full((4,), -1)))["loss"]
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"y must lie in \[-1, 4\)"):
        CrossEntropy(about())(Step(logits, torch.full((4,), 7)))


def test_transport_distillation_equals_a_loop_over_teachers_and_samples():
    logits, p, _, costs = case()
    shares = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    shares[0, 4] = 0
    found = transport_distillation(logits, p, shares, costs, 0.2, max_iter=2000, tol=1e-6)
    total = 0.0
    for number, M in enumerate(costs):
        for b in range(9):
            solved = sinkhorn(p[number][b : b + 1], logits[b : b + 1].softmax(1), M, 0.2, tol=1e-6)
            total += float(shares[number, b] * solved.objective)
    assert float(found) == pytest.approx(total / 9, abs=1e-5)


def test_gradient_reaches_taught_rows_alone():
    logits, p, shares, costs = case()
    logits.requires_grad_()
    TransportDistillation(about(costs))(step(logits, p, shares))["loss"].backward()
    moved = logits.grad.abs().sum(1) > 0
    assert torch.equal(moved, shares.sum(0) > 0)


def test_the_last_rows_are_the_taught_ones():
    logits, p, shares, costs = case()
    labelled = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    objective = TransportDistillation(about(costs))
    both = objective(
        Step(torch.cat([labelled, logits]), torch.zeros(12, dtype=torch.int64), step(logits, p, shares).said)
    )
    torch.testing.assert_close(both["loss"], objective(step(logits, p, shares))["loss"])


def test_one_teacher_is_the_plain_transport_loss():
    logits, p, _, costs = case(sizes=(5,))
    found = TransportDistillation(about(costs), reg=0.3)(step(logits, p, torch.ones(1, 9)))["loss"]
    torch.testing.assert_close(found, transport_loss(p[0], logits.softmax(1), costs[0], 0.3))


def test_a_batch_without_teachers_can_be_differentiated():
    logits, p, shares, costs = case()
    logits.requires_grad_()
    objective = TransportDistillation(about(costs))
    for given in (step(logits, p, 0 * shares), Step(logits, torch.full((9,), -1))):
        logits.grad = None
        loss = objective(given)["loss"]
        loss.backward()
        assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_student_learns_the_teachers_answer_by_transport_alone():
    M = 1 - torch.eye(4)
    p = (torch.eye(4)[torch.tensor([0, 1, 2, 2])] * 0.92 + 0.02,)
    z = torch.zeros(4, 4, requires_grad=True)
    objective = TransportDistillation(about([M]), reg=0.1)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (10 * objective(step(z, p, torch.ones(1, 4)))["loss"]).backward()
        optimizer.step()
    torch.testing.assert_close(z.detach().softmax(1), p[0] @ torch.softmax(-M / 0.1, 1), atol=1e-2, rtol=0)


def test_costs_follow_the_module_and_are_no_part_of_its_state():
    *_, costs = case()
    objective = TransportDistillation(about(costs)).double()
    assert all(buffer.dtype == torch.float64 for buffer in objective.buffers())
    assert objective.state_dict() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": torch.zeros(3, 9)}, "must have shapes"),
        ({"shares": torch.zeros(2, 8)}, "must have shapes"),
        ({"p": (torch.ones(9, 3), torch.ones(9, 5))}, "rows of p must sum to 1"),
        ({"p": (torch.full((9, 2), 0.5), torch.full((9, 2), 0.5))}, "p must have|M must have"),
    ],
)
def test_bad_batches_are_named(change, message):
    logits, p, shares, costs = case()
    arguments = {"p": p, "shares": shares} | change
    with pytest.raises(ValueError, match=message):
        transport_distillation(logits, arguments["p"], arguments["shares"], costs, 0.1)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"M must have shape \(3, 4\)"):
        TransportDistillation(about([torch.rand(2, 4), torch.rand(3, 5)]))
    for bad in ({"reg": 0.0}, {"tol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TransportDistillation(about([torch.rand(2, 4)]), **bad)
    for bad in ({"weight": -1.0}, {"rise": 2.0}, {"fade": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Schedule(**bad)


def test_shares_mix_what_the_teachers_say():
    target = torch.softmax(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), 2)
    shares = torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 0.0]])
    mixed, weight = Said(shares, (), target).mixed()
    torch.testing.assert_close(mixed[0], target[0, 0])
    torch.testing.assert_close(mixed[1], 0.25 * target[0, 1] + 0.75 * target[1, 1])
    torch.testing.assert_close(mixed[2], target[:, 2].mean(0))  # nobody teaches it: any distribution, weight 0
    assert weight.tolist() == [1, 1, 0]


class Constant(Objective):
    def __init__(self, value, name):
        super().__init__()
        self.value, self.name = value, name
        self.own = torch.nn.Parameter(torch.ones(()))

    def forward(self, step):
        loss = self.own * self.value
        return {"loss": loss, self.name: loss.detach()}


def test_the_whole_is_the_sum_of_the_parts_by_their_schedules():
    whole = Composite(
        {
            "rising": (Constant(2.0, "rising"), Schedule(3.0, rise=0.5)),
            "fading": (Constant(5.0, "fading"), Schedule(1.0, fade=0.6)),
        }
    )
    logits = torch.zeros(2, 4, requires_grad=True)
    for progress, rising, fading in ((0.0, 0.0, 1.0), (0.25, 0.5, 1.0), (0.6, 1.0, 1.0), (0.8, 1.0, 0.5)):
        found = whole(Step(logits, torch.tensor([-1, -1]), progress=progress))
        assert float(found["loss"].detach()) == pytest.approx(6 * rising + 5 * fading)
        assert (float(found["rising"]), float(found["fading"])) == (2, 5)  # what is reported has no weight


def test_a_part_without_weight_neither_breaks_nor_leaves_the_graph():
    broken = Constant(float("inf"), "broken")
    found = Composite({"broken": (broken, Schedule(1.0, rise=0.5))})(Step(torch.zeros(1, 4), torch.tensor([-1])))
    found["loss"].backward()
    assert float(found["loss"].detach()) == 0 and float(broken.own.grad) == 0
    with pytest.raises(ValueError, match="at least one objective"):
        Composite({})
