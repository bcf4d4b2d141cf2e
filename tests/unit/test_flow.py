from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.distillation.flow import (
    Flow,
    FlowStudent,
    Source,
    default_sources,
    transform,
)
from pipeline.distillation.previous import Previous, previous_output_kl
from pipeline.models import nets
from pipeline.models.capture import captured
from pipeline.models.recalibrate import assert_independent
from pipeline.models.stages import stages_of
from tests.ddp import run_ranks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TinyStudent(nn.Module):
    """Two convolutions, of which the second has a ReLU that works in place after it."""

    def __init__(self, dim: int = 4, norm: bool = True) -> None:
        super().__init__()
        self.low = nn.Conv2d(1, dim, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.high = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.relu(self.high(self.norm(self.low(x)))).mean(dim=(2, 3)))


class TinyTeacher(nn.Module):
    """Shows a map of its own size and a vector."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Conv2d(1, dim, 3, stride=3), nn.BatchNorm2d(dim))
        self.vector = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        low = self.map(x)
        return {"map": low, "vector": self.vector(low.mean(dim=(2, 3)))}


LAYERS = {"low": (4, 6, 6), "high": (4, 3, 3)}
SOURCES = {
    "low": [Source(0, "map", (6, 2, 2)), Source(1, "map", (5, 2, 2))],
    "high": [Source(1, "vector", (5,))],
}


def tiny(**settings: float) -> tuple[FlowStudent, list[TinyTeacher]]:
    student = FlowStudent(TinyStudent(), Flow(LAYERS, SOURCES, **settings), root="")
    return student, [TinyTeacher(6).eval(), TinyTeacher(5).eval()]


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, 6, 6)


# Q


def test_a_map_is_convolved_and_resized() -> None:
    q, x = transform((5, 4, 4), (3, 8, 6)), torch.randn(2, 5, 4, 4)
    weight, bias = q.map.weight[:, :, 0, 0], q.map.bias
    assert weight.shape == (3, 5)
    with torch.no_grad():
        bias.normal_()
    mapped = torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]
    torch.testing.assert_close(q(x), F.interpolate(mapped, size=(8, 6), mode="bilinear", align_corners=False))
    down, big = transform((5, 8, 8), (3, 2, 2)), torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(
        down(big), F.interpolate(down.map(big), size=(2, 2), mode="bilinear", align_corners=False)
    )
    same = transform((5, 4, 4), (3, 4, 4))
    torch.testing.assert_close(same(x), same.map(x))


def test_vectors_maps_and_sequences_meet() -> None:
    vector, maps, tokens = torch.randn(2, 5), torch.randn(2, 5, 4, 3), torch.randn(2, 7, 5)
    to_vector = transform((5,), (3,))
    torch.testing.assert_close(to_vector(vector), vector @ to_vector.map.weight.T)
    pooled = transform((5, 4, 3), (3,))
    torch.testing.assert_close(pooled(maps), maps.mean(dim=(2, 3)) @ pooled.map.weight.T)
    spread = transform((5,), (3, 2, 4))
    flat = vector @ spread.map.weight.T
    torch.testing.assert_close(spread(vector), flat[:, :, None, None].repeat(1, 1, 2, 4))
    one = transform((5, 4, 3), (3, 1, 1))
    torch.testing.assert_close(one(maps)[:, :, 0, 0], maps.mean(dim=(2, 3)) @ one.map.weight.T)
    of_tokens = transform((7, 5), (3,))
    torch.testing.assert_close(of_tokens(tokens), tokens.mean(dim=1) @ of_tokens.map.weight.T)
    each = transform((7, 5), (7, 3))
    torch.testing.assert_close(each(tokens), tokens @ each.map.weight.T)
    to_tokens = transform((5,), (7, 3))
    torch.testing.assert_close(to_tokens(vector), (vector @ to_tokens.map.weight.T)[:, None].repeat(1, 7, 1))


@pytest.mark.parametrize("shapes", [((200, 4, 4), (300, 4, 4)), ((200,), (300,))])
def test_what_flows_in_starts_with_the_mean_square_of_its_source(shapes: tuple[tuple[int, ...], ...]) -> None:
    x = 1 + torch.randn(20, *shapes[0]).abs()
    assert transform(*shapes)(x).square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.1)


@pytest.mark.parametrize("shape", [(), (2, 3, 4, 5), (0,), (3, 0, 2)])
def test_shapes_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="source must be"):
        transform(shape, (3,))
    with pytest.raises(ValueError, match="target must be"):
        transform((3,), shape)


# The mix


def test_the_mix_of_several_teachers_in_plain_torch() -> None:
    flow = Flow(LAYERS, SOURCES)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_()
    own = {"low": torch.randn(2, 4, 6, 6), "high": torch.randn(2, 4, 3, 3)}
    taps = [
        {"map": torch.randn(2, 6, 2, 2)},
        {"map": torch.randn(2, 5, 2, 2), "vector": torch.randn(2, 5)},
    ]
    p = flow.w[0].softmax(0)
    first, second = flow.Q[0]
    expected = (
        p[0] * own["low"]
        + p[1] * F.interpolate(first.map(taps[0]["map"]), size=(6, 6), mode="bilinear", align_corners=False)
        + p[2] * F.interpolate(second.map(taps[1]["map"]), size=(6, 6), mode="bilinear", align_corners=False)
    )
    torch.testing.assert_close(flow.mix("low", own["low"], taps), expected)
    p = flow.w[1].softmax(0)
    expected = p[0] * own["high"] + p[1] * flow.Q[1][0].map(taps[1]["vector"])[:, :, None, None]
    torch.testing.assert_close(flow.mix("high", own["high"], taps), expected)
    assert flow.mix("high", own["high"].bfloat16(), taps).dtype == torch.bfloat16


def test_the_layers_of_the_student_are_replaced_by_their_mix() -> None:
    model, teachers = tiny()
    x = images()
    taps = [teacher(x) for teacher in teachers]
    student, flow = model.student.eval(), model.flow
    low = flow.mix("low", student.low(x), taps)
    high = flow.mix("high", student.high(student.norm(low)), taps)
    expected = student.classifier(high.relu().mean(dim=(2, 3)))
    torch.testing.assert_close(model(x, taps), expected)
    assert not torch.allclose(model(x, taps), student(x))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_student_starts_with_its_share(share: float) -> None:
    weights = Flow(LAYERS, SOURCES, student_share=share).weights()
    torch.testing.assert_close(weights["low"].detach(), torch.tensor([share, (1 - share) / 2, (1 - share) / 2]))
    torch.testing.assert_close(weights["high"].detach(), torch.tensor([share, 1 - share]))


def test_a_layer_without_a_source_has_no_part() -> None:
    flow = Flow(LAYERS, {"low": [], "high": SOURCES["high"]})
    assert list(flow.layers) == list(flow.weights()) == list(flow.sources) == ["high"]
    assert flow.sources["high"] == tuple(SOURCES["high"])


def test_a_hook_of_another_sees_the_mix() -> None:
    model, teachers = tiny()
    x = images()
    taps = [teacher(x) for teacher in teachers]
    model.eval()
    expected = model.flow.mix("low", model.student.low(x), taps)
    with captured(model.student, features="classifier", taps={"low": "low", "high": "high"}) as seen:
        logits = model(x, taps)
    torch.testing.assert_close(seen["tap", "low"], expected)
    torch.testing.assert_close(seen["tap", "high"].relu().mean(dim=(2, 3)), seen["features", ""])
    torch.testing.assert_close(model.student.classifier(seen["features", ""]), logits)


def test_the_weights_gradient_by_finite_differences() -> None:
    model, teachers = tiny()
    model.double().eval()
    x = images(3).double()
    taps = [{name: tap.detach() for name, tap in teacher.double()(x).items()} for teacher in teachers]
    targets = torch.tensor([0, 1, 2])

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x, taps), targets) + 0.1 * model.flow.dependency()

    loss().backward()
    eps = 1e-6
    for parameter in (*model.flow.w, model.flow.Q[0][1].map.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4
        flat = parameter.data.view(-1)
        for place in range(min(len(flat), 6)):
            values = []
            for sign in (1, -1):
                flat[place] += sign * eps
                values.append(loss().item())
                flat[place] -= sign * eps
            numeric = (values[0] - values[1]) / (2 * eps)
            assert parameter.grad.view(-1)[place].item() == pytest.approx(numeric, abs=1e-8)


def test_the_built_in_nets_under_a_flow() -> None:
    torch.manual_seed(1)
    student, teachers = nets.resnet8(3, width=4), [nets.small_vgg(5, width=4), nets.mlp(2, width=6)]
    x = torch.randn(2, 1, 28, 28)
    for before in (False, True):
        layers = stages_of(student, x, before_activation=before)
        shapes = [stages_of(teacher, x, before_activation=before) for teacher in teachers]
        flow = Flow(layers, default_sources(layers, shapes))
        model = FlowStudent(student, flow, root="")
        taps = []
        for teacher, named in zip(teachers, shapes, strict=True):
            with torch.no_grad(), captured(teacher, features=None, taps={name: name for name in named}) as seen:
                teacher(x)
            taps.append({name: seen["tap", name] for name in named})
        model(x, taps).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with flow.alone():
            assert torch.equal(model.eval()(x), student.eval()(x))
        student.train()
    assert_independent(student, set(student.state_dict()), teachers)


# Dependency


def test_dependency_is_the_sum_of_minus_log_of_the_student_share() -> None:
    flow = Flow(LAYERS, SOURCES, student_share=0.2)
    assert flow.dependency().item() == pytest.approx(-2 * math.log(0.2), rel=1e-6)
    flow.dependency().backward()
    for w in flow.w:
        assert w.grad is not None
        assert w.grad[0] < 0 < w.grad[1:].min()  # a step down the gradient raises the student's share


def test_dependency_stays_finite_when_a_share_vanishes() -> None:
    flow = Flow(LAYERS, SOURCES)
    with torch.no_grad():
        flow.w[0][0] = -500.0
    value = flow.dependency()
    value.backward()
    assert value.item() == pytest.approx(500 + math.log(2) * 2, rel=1e-3)
    assert all(torch.isfinite(w.grad).all() for w in flow.w)


def test_dependency_alone_makes_the_student_independent() -> None:
    flow = Flow(LAYERS, SOURCES, student_share=0.1)
    optimiser = torch.optim.Adam(flow.w.parameters(), lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        flow.dependency().backward()
        optimiser.step()
    assert min(p[0].item() for p in flow.weights().values()) > 0.99


# Teachers


def test_teachers_neither_learn_nor_move() -> None:
    model, teachers = tiny()
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    optimiser = torch.optim.SGD([*model.parameters(), *(p for t in teachers for p in t.parameters())], lr=0.1)
    start = copy.deepcopy(model.state_dict())
    for _ in range(3):
        x = images()
        logits = model(x, [teacher(x) for teacher in teachers])  # with a graph, which ends at the mix
        optimiser.zero_grad()
        (F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])) + model.flow.dependency()).backward()
        optimiser.step()
    for teacher, state in zip(teachers, before, strict=True):
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert all(not torch.equal(value, start[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("train", [True, False])
def test_independent_is_the_bare_student_bit_for_bit(train: bool) -> None:
    model, teachers = tiny()
    bare = copy.deepcopy(model.student).train(train)
    model.train(train)
    x = images()
    expected = bare(x)
    expected.square().sum().backward()
    with model.flow.alone():
        found = model(x, [teacher(x) for teacher in teachers])
        assert model.flow.mix("low", x, []) is x
    found.square().sum().backward()
    assert torch.equal(found, expected)
    for (name, mine), theirs in zip(model.student.named_parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    assert all(torch.equal(a, b) for a, b in zip(model.student.buffers(), bare.buffers(), strict=True))
    assert not model.flow.independent
    assert_independent(model.student, set(bare.state_dict()), teachers)


def test_a_failure_leaves_no_hook() -> None:
    model, teachers = tiny()
    x = images()
    good = [teacher(x) for teacher in teachers]
    for taps, message in (
        (good[:1], "taps must hold those of teacher 1, got taps of 1 teachers"),
        ([good[0], {"map": good[1]["map"]}], "teacher 1 must show tap 'vector', got map"),
        ([{"map": good[0]["map"][:2]}, good[1]], "must be of 4 images as the student is, got 2"),
        ([{"map": good[0]["map"][:, :5]}, good[1]], r"features must have shape \(B, 6, 2, 2\), got \(4, 5, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, taps)
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="layer 'low' must have shape"):
        model(torch.randn(4, 1, 9, 9), good)


def test_wrong_wiring_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer 'lower' for sources to flow into; layers: low, high"):
        Flow(LAYERS, {"lower": SOURCES["low"]})
    with pytest.raises(ValueError, match="at least one layer of a teacher, got none"):
        Flow(LAYERS, {"low": []})
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"student_share must be in \(0, 1\)"):
            Flow(LAYERS, SOURCES, student_share=share)
    flow = Flow({"hihg": (4, 3, 3)}, {"hihg": SOURCES["high"]})
    with pytest.raises(ValueError, match="no layer 'hihg' in the student; nearest: high"):
        FlowStudent(TinyStudent(), flow, root="")


def test_a_layer_must_run_once() -> None:
    class Twice(TinyStudent):
        times = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = self.low(x)
            for _ in range(self.times):
                low = self.norm(low)
            return self.classifier(low.mean(dim=(2, 3)))

    x = images()
    net, source = Twice(), {"norm": [Source(0, "map", (6, 2, 2))]}
    model = FlowStudent(net, Flow({"norm": (4, 6, 6)}, source), root="")
    for net.times in (0, 2):
        with pytest.raises(ValueError, match=f"'norm' must run once in a forward pass, ran {net.times} times"):
            model(x, [TinyTeacher(6)(x)])


# Wiring


def names(prefix: str, count: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{place}": (place + 1,) for place in range(count)}


def test_low_feeds_low_and_high_feeds_high() -> None:
    found = default_sources(names("s", 3), [names("t", 3), names("u", 5), {}, names("v", 2)])
    assert found == {
        "s0": [Source(0, "t0", (1,)), Source(1, "u0", (1,)), Source(3, "v0", (1,))],
        "s1": [Source(0, "t1", (2,)), Source(1, "u2", (3,)), Source(3, "v1", (2,))],
        "s2": [Source(0, "t2", (3,)), Source(1, "u4", (5,)), Source(3, "v1", (2,))],
    }


@pytest.mark.parametrize("student", range(1, 14))
@pytest.mark.parametrize("teacher", range(1, 9))
def test_a_teachers_layer_feeds_one_or_two(student: int, teacher: int) -> None:
    found = default_sources(names("s", student), [names("t", teacher)])
    assert list(found) == list(names("s", student))
    assert all(len(sources) <= 1 for sources in found.values())
    taps = [int(sources[0].tap[1:]) for sources in found.values() if sources]
    assert taps == sorted(taps)  # low feeds low
    assert taps[-1] == teacher - 1
    assert found[f"s{student - 1}"]  # high feeds high
    counts = [taps.count(place) for place in range(teacher)]
    assert max(counts) <= 2
    if 2 <= teacher <= student:
        assert min(counts) >= 1
        assert found["s0"][0].tap == "t0"


# The previous output


def test_the_divergence_in_plain_torch() -> None:
    before, now = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    value = previous_output_kl(before, now)
    p, q = before.softmax(1), now.softmax(1)
    torch.testing.assert_close(value, (p * (p / q).log()).sum(1).mean())
    value.backward()
    assert before.grad is None
    torch.testing.assert_close(now.grad, ((q - p) / 5).detach())
    assert previous_output_kl(now, now).item() == 0
    with pytest.raises(ValueError, match=r"one shape \(B, C\), got \(5, 4\) and \(4, 4\)"):
        previous_output_kl(before, now[:4])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def shift(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("train", [True, False])
def test_nothing_diverges_when_nothing_changed(train: bool) -> None:
    model, teachers = tiny()
    model.train(train)
    previous = Previous(model, every=5)
    x = images()
    taps = [teacher(x) for teacher in teachers]
    now = model(x, taps)
    assert previous_output_kl(previous.logits(x, taps), now).item() == 0
    shift(model)
    assert torch.equal(previous.logits(x, taps), now)
    assert previous_output_kl(previous.logits(x, taps), model(x, taps)).item() > 0


@pytest.mark.parametrize("every", [1, 3])
def test_what_it_knows_is_k_to_2k_minus_1_steps_old(every: int) -> None:
    net = nn.Linear(3, 2)
    previous = Previous(net, every)
    x = torch.randn(4, 3)
    history = [net(x).detach()]
    for done in range(1, 5 * every):
        shift(net)
        history.append(net(x).detach())
        previous.step()
        ages = [done - place for place, logits in enumerate(history) if torch.equal(logits, previous.logits(x))]
        assert len(ages) == 1
        if done >= every:
            assert every <= ages[0] <= 2 * every - 1
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        Previous(net, 0)


def test_statistics_of_batchnorm_do_not_move() -> None:
    net = Noisy().train()
    net(torch.randn(6, 3))
    previous = Previous(net, every=1)
    shift(net)
    live, kept = copy.deepcopy(net.state_dict()), copy.deepcopy(previous.state_dict())
    random = torch.get_rng_state()
    logits = previous.logits(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), random)  # dropout is off
    assert not logits.requires_grad
    assert all(torch.equal(value, live[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in previous.state_dict().items())
    assert all(module.training for module in net.modules())


def test_training_goes_on_exactly_from_a_state_dict() -> None:
    def run(net: Noisy, previous: Previous, steps: range) -> list[torch.Tensor]:
        seen = []
        for step in steps:
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
            net.zero_grad()
            (net(x).square().mean() + previous_output_kl(previous.logits(x), net(x))).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
            previous.step()
            seen.append(previous.logits(x))
        return seen

    def made(seed: int) -> tuple[Noisy, Previous]:
        torch.manual_seed(seed)
        net = Noisy().train()
        net.net[2].p = 0.0
        return net, Previous(net, every=3)

    straight = run(*made(0), range(11))
    net, previous = made(0)
    run(net, previous, range(4))
    saved = copy.deepcopy({"net": net.state_dict(), "previous": previous.state_dict()})
    assert all(isinstance(value, torch.Tensor) for value in saved["previous"].values())
    net, previous = made(1)
    net.load_state_dict(saved["net"])
    previous.load_state_dict(saved["previous"])
    resumed = run(net, previous, range(4, 11))
    assert all(torch.equal(a, b) for a, b in zip(straight[4:], resumed, strict=True))


def test_the_previous_module_is_no_part() -> None:
    previous = Previous(Noisy(), every=2)
    assert not list(previous.parameters())
    assert len(list(previous.modules())) == 1


# Data-parallel training


def flowing() -> tuple[FlowStudent, list[TinyTeacher]]:
    torch.manual_seed(3)
    model = FlowStudent(TinyStudent(norm=False), Flow(LAYERS, SOURCES), root="").double()
    teachers = [TinyTeacher(6).double().eval(), TinyTeacher(5).double().eval()]
    return model, teachers


class Wrapped(nn.Module):
    """All parts of the loss in one forward pass, as data-parallel training needs it."""

    def __init__(self, model: FlowStudent) -> None:
        super().__init__()
        self.model, self.previous = model, Previous(model, every=2)

    def forward(self, x: torch.Tensor, y: torch.Tensor, taps: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        logits = self.model(x, taps)
        jump = previous_output_kl(self.previous.logits(x, taps), logits)
        return F.cross_entropy(logits, y) + 0.3 * self.model.flow.dependency() + 0.5 * jump


def trained(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    model, teachers = flowing()
    wrapped: nn.Module = Wrapped(model)
    whole = DistributedDataParallel(wrapped) if world_size > 1 else wrapped
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64)[rank::world_size]
        y = torch.randint(3, (8,), generator=generator)[rank::world_size]
        with torch.no_grad():
            taps = [teacher(x) for teacher in teachers]
        optimiser.zero_grad()
        whole(x, y, taps).backward()
        optimiser.step()
        wrapped.previous.step()
    return {name: value.detach().clone() for name, value in wrapped.state_dict().items()}


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    alone, start = trained(0, 1), flowing()[0].state_dict()
    ranks = run_ranks(trained, 2, tmp_path)
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=0, atol=1e-8, msg=name)
    assert all(not torch.equal(alone[f"model.{name}"], value) for name, value in start.items())
