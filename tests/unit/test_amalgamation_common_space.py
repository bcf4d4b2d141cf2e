"""Common spaces, and the two steps of knowledge amalgamation that are built on them."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.amalgamation.common_space import Adapters, CommonSpace, common_dim, same_positions
from pipeline.distillation.amalgamation import Component, Target
from pipeline.distillation.step import About, Head, Said, Seen, Step, TeacherAbout
from tests.ddp import run_ranks

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gradients_agree(function, x, entries=8, eps=1e-6):
    """Compare the gradient of a scalar function with central differences at some entries of x."""
    analytic = torch.autograd.grad(function(), x)[0].flatten()
    flat = x.detach().view(-1)
    for k in torch.linspace(0, len(flat) - 1, min(entries, len(flat))).long().tolist():
        before = float(flat[k])
        values = []
        for sign in (1, -1):
            flat[k] = before + sign * eps
            values.append(float(function().detach()))
        flat[k] = before
        assert float(analytic[k]) == pytest.approx((values[0] - values[1]) / (2 * eps), abs=1e-6, rel=1e-5)


# --- common space


def test_the_published_widths_follow_from_the_rule():
    widths = [64, 64, 128, 256, 512]
    assert [common_dim(width, width) for width in widths] == [32, 32, 64, 128, 256]
    assert common_dim(512, 40) == common_dim(40, 512) == 20
    assert common_dim(6, 100) == 8
    with pytest.raises(ValueError, match="channels must be >= 1, got 0 and 3"):
        common_dim(0, 3)


def test_a_common_space_is_two_convolutions_and_a_mean_square_of_each_image():
    torch.manual_seed(0)
    space = CommonSpace((20, 6, 6), (32, 6, 6)).double()
    net, source = normal(3, 20, 6, 6), normal(3, 32, 6, 6, seed=1)
    a, b = space.net.weight[:, :, 0, 0], space.source.weight[:, :, 0, 0]
    assert a.shape == (10, 20) and b.shape == (10, 32)
    assert len(list(space.parameters())) == 2
    difference = torch.einsum("oc,bchw->bohw", a, net) - torch.einsum("oc,bchw->bohw", b, source)
    found = space(net, source)
    torch.testing.assert_close(found, torch.stack([one.square().mean() for one in difference]))
    torch.testing.assert_close(found.mean(), F.mse_loss(space.net(net), space.source(source)))
    torch.testing.assert_close(b.norm(dim=1), torch.ones(10, dtype=DOUBLE))
    assert float(space.penalty().detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("net", "source", "parts"),
    [
        ((16, 8, 8), (24, 4, 4), (4, 4)),
        ((16, 4, 4), (24, 8, 8), (4, 4)),
        ((16, 3, 9), (24, 6, 5), (3, 5)),
    ],
)
def test_the_larger_map_is_resized_to_the_smaller(net, source, parts):
    space = CommonSpace(net, source).double()
    x, y = normal(2, *net), normal(2, *source, seed=1)
    small = [part.shape[2:] for part in same_positions(x, y)]
    assert small == [parts, parts]
    # Resizing and a 1×1 convolution commute.
    mine = F.interpolate(space.net(x), parts, mode="bilinear")
    theirs = F.interpolate(space.source(y), parts, mode="bilinear")
    torch.testing.assert_close(space(x, y), (mine - theirs).square().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("net", "source"),
    [((12,), (20,)), ((12, 4, 4), (20,)), ((12,), (20, 3, 3)), ((5, 12), (20, 3, 3)), ((5, 12), (7, 20))],
)
def test_vectors_and_tokens_take_a_linear_map(net, source):
    space = CommonSpace(net, source).double()
    x, y = normal(2, *net), normal(2, *source, seed=1)

    def level(x):
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x

    expected = (level(x) @ space.net.weight.T - level(y) @ space.source.weight.T).square().mean(1)
    assert space.net.weight.shape == (8, 12)
    torch.testing.assert_close(space(x, y), expected)


def test_without_a_source_side_raw_features_are_met():
    space = CommonSpace((20, 4, 4), (6, 4, 4), source_side=False).double()
    assert [tuple(p.shape) for p in space.parameters()] == [(6, 20, 1, 1)]
    net, source = normal(3, 20, 4, 4), normal(3, 6, 4, 4, seed=1)
    torch.testing.assert_close(space(net, source).mean(), F.mse_loss(F.conv2d(net, space.net.weight), source))
    assert float(space.penalty()) == 0


def test_half_precision_is_compared_in_single():
    torch.manual_seed(0)
    space, adapters = CommonSpace((12, 2, 2), (9, 2, 2)), Adapters()
    net, source = normal(3, 12, 2, 2), normal(3, 9, 2, 2, seed=1)
    halves = space(net.bfloat16(), source.half())
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, space(net.float(), source.float()), atol=2e-2, rtol=2e-2)
    far = torch.tensor([[300.0, -300.0]]).half()  # the square of 600 is beyond half precision
    assert adapters.logits(far, -far).tolist() == [360_000]


def test_the_penalty_is_on_the_rows_of_the_source_side():
    space = CommonSpace((20, 4, 4), (32, 4, 4)).double()
    with torch.no_grad():
        space.source.weight.copy_(normal(10, 32, 1, 1))
        space.net.weight.zero_()
    rows = space.source.weight.detach()[:, :, 0, 0]
    torch.testing.assert_close(space.penalty().detach(), ((rows.norm(dim=1) ** 2 - 1) ** 2).sum() / 10)
    gradients_agree(space.penalty, space.source.weight)


@pytest.mark.parametrize("source_side", [True, False])
def test_gradients_of_a_common_space_equal_finite_differences(source_side):
    torch.manual_seed(0)
    space = CommonSpace((6, 5, 5), (4, 3, 3), source_side=source_side).double()
    net, source = normal(2, 6, 5, 5).requires_grad_(), normal(2, 4, 3, 3, seed=1).requires_grad_()
    for x in (net, *space.parameters()):
        gradients_agree(lambda: (space(net, source) * torch.tensor([1.0, 3.0])).sum(), x)
    space(net, source).sum().backward()
    assert source.grad is None


def test_bad_features_are_named():
    with pytest.raises(ValueError, match=r"net features must have shape \(C, H, W\), \(L, D\) or \(D,\), got \(\)"):
        CommonSpace((), (3,))
    with pytest.raises(ValueError, match=r"source features must have .* got \(3, 0, 2\)"):
        CommonSpace((3,), (3, 0, 2))
    space = CommonSpace((8, 2, 2), (9,))
    with pytest.raises(
        ValueError, match=r"shapes \(B, C, H, W\) and \(B, D\) with one B, got \(3, 8, 2, 2\) and \(1, 9\)"
    ):
        space(torch.zeros(3, 8, 2, 2), torch.zeros(1, 9))
    with pytest.raises(ValueError, match=r"got \(3, 8\) and \(3, 9\)"):
        space(torch.zeros(3, 8), torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"logits must have one shape \(B, C\), got \(2, 3\) and \(2, 4\)"):
        Adapters().logits(torch.zeros(2, 3), torch.zeros(2, 4))


def trained_adapters(norm, steps=600):
    """Train the adapters of features that have nothing to do with each other; return the loss, norms and variance."""
    torch.manual_seed(0)
    space = CommonSpace((10,), (10,)).double()
    net, source = normal(400, 10), 0.7 * normal(400, 10, seed=1)
    optimiser = torch.optim.Adam(space.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = space(net, source).mean()
        (loss + norm * space.penalty()).backward()
        optimiser.step()
    # What a linear map of the net's features leaves unexplained of the source's.
    residual = source - net @ torch.linalg.lstsq(net, source).solution
    least = torch.linalg.eigvalsh(residual.T @ residual / len(net))[0]
    return float(loss.detach()), space.source.weight.detach().norm(dim=1) ** 2, float(least)


def test_without_the_norm_penalty_the_common_space_collapses():
    loss, norms, _ = trained_adapters(norm=0.0)
    assert loss < 1e-4
    assert norms.max() < 1e-3


def test_with_the_norm_penalty_it_does_not():
    loss, norms, least = trained_adapters(norm=1.0)
    # The best direction of the source keeps the norm that balances what is left unexplained of it.
    torch.testing.assert_close(norms, torch.full((8,), 1 - least / 2, dtype=DOUBLE), atol=2e-2, rtol=0)
    assert loss > 0.2
    assert norms.min() > 0.8


def test_the_scale_of_the_logits_is_learnt():
    adapters = Adapters().double()
    z = normal(50, 4)
    assert adapters.logit_scale.item() == 1
    torch.testing.assert_close(adapters.logits(z, 2.5 * z).detach(), (1.5 * z).square().mean(1))
    optimiser = torch.optim.Adam(adapters.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        adapters.logits(z, 2.5 * z).mean().backward()
        optimiser.step()
    assert adapters.logit_scale.item() == pytest.approx(2.5, abs=1e-2)


# --- objectives

SUBTASK = ("sandal", "boot", "sneaker", "clog")
NET = {"stem": (12, 6, 6), "stage": (16, 3, 3), "out": (24,)}
TEACHERS = (
    TeacherAbout("a", ("boot", "bag", "sandal"), torch.zeros(3, 4), tap_shapes={"low": (10, 8, 8), "high": (40,)}),
    TeacherAbout(
        "b", (*SUBTASK[::-1], "x/y"), torch.zeros(5, 4), tap_shapes={"1": (5, 6, 6), "2": (9, 4, 4), "3": (20,)}
    ),
    TeacherAbout("c", ("footwear/clog", "clog", "boot"), torch.zeros(3, 4), tap_shapes={"only": (7, 2, 2)}),
)
# For each teacher: its columns, the classes they are of, and which of its layers goes with each of the net.
KNOWN = (
    ([2, 0], [0, 1], [("stem", "low"), ("stage", "high"), ("out", "high")]),
    ([3, 2, 1, 0], [0, 1, 2, 3], [("stem", "1"), ("stage", "2"), ("out", "3")]),
    ([2, 0], [1, 3], [("stem", "only"), ("stage", "only"), ("out", "only")]),
)
ABOUT = About(tuple(f"footwear/{name}" for name in SUBTASK), tap_shapes=NET, teachers=TEACHERS)

HEADS = ("footwear/sandal", "footwear/boot", "tops/shirt", "tops/coat", "tops/vest")
COMPONENTS = (
    TeacherAbout("tops", ("tops/vest", "tops/shirt", "tops/coat"), torch.zeros(3, 5), tap_shapes=NET),
    TeacherAbout("feet", HEADS[:2], torch.zeros(2, 5), tap_shapes={"low": (10, 8, 8), "high": (40,)}),
)
PLACES = ([4, 2, 3], [0, 1])
LAYERS = ([(name, name) for name in NET], [("stem", "low"), ("stage", "high"), ("out", "high")])
TARGET_ABOUT = About(HEADS, tap_shapes=NET, teachers=COMPONENTS)


def seen(about, n, seed):
    taps = {name: normal(n, *shape, seed=seed + k) for k, (name, shape) in enumerate(about.tap_shapes.items())}
    return Seen((3 * normal(n, len(about.classes), seed=seed + 50)).requires_grad_(), normal(n, 3), taps)


def step_of(about, labelled=2, taught=7, shares=None):
    """A step with labelled images first; by default every taught image has one teacher."""
    n, teachers = labelled + taught, len(about.teachers)
    if shares is None:
        shares = F.one_hot(torch.arange(taught) % teachers, teachers).T.to(DOUBLE)
    target = normal(teachers, taught, len(about.classes), seed=9).softmax(2)
    return Step(
        logits=normal(n, len(about.classes), seed=1).requires_grad_(),
        labels=torch.full((n,), -1),
        said=Said(shares, tuple(target), target),
        taps={name: normal(n, *shape, seed=20 + k).requires_grad_() for k, (name, shape) in enumerate(NET.items())},
        live=tuple(seen(one, n, 100 * (k + 1)) for k, one in enumerate(about.teachers)),
    )


def built(cls, about, **settings):
    torch.manual_seed(3)
    objective = cls(about, **settings).double()
    with torch.no_grad():
        for k, adapters in enumerate(objective.adapters):
            adapters.logit_scale += 0.3 * (k + 1)
            for parameter in adapters.points.parameters():
                parameter += 0.1 * normal(*parameter.shape, seed=k)
    return objective


def plain(weight, x, y, weight_y=None):
    """Mean square of one image, in plain torch."""
    if x.ndim == 3 and y.ndim == 3:
        size = [min(pair) for pair in zip(x.shape[1:], y.shape[1:], strict=True)]
        x, y = (F.interpolate(one[None], size, mode="bilinear", align_corners=False)[0] for one in (x, y))
    else:
        x, y = (one.flatten(1).mean(1) if one.ndim == 3 else one for one in (x, y))
    x = torch.tensordot(weight.flatten(1), x, 1)
    y = y if weight_y is None else torch.tensordot(weight_y.flatten(1), y, 1)
    return ((x - y) ** 2).mean()


def component_reference(objective, given, taught=7, labelled=2):
    features = logits = soft = norm = torch.zeros((), dtype=DOUBLE)
    for t, (columns, places, layers) in enumerate(KNOWN):
        adapters = objective.adapters[t]
        for b in range(taught):
            share, row = given.said.shares[t, b], labelled + b
            for space, (mine, theirs) in zip(adapters.points, layers, strict=True):
                features = features + share / taught * plain(
                    space.net.weight, given.taps[mine][row], given.live[t].taps[theirs][row], space.source.weight
                )
            scaled = adapters.logit_scale * given.logits[row, places]
            logits = logits + share / taught * F.mse_loss(scaled, given.live[t].logits[row, columns].detach())
            log_q = given.logits[row].log_softmax(0)
            soft = soft + share / taught * (given.said.target[t, b] * (given.said.target[t, b].log() - log_q)).sum()
        for space in adapters.points:
            norm = norm + ((space.source.weight.flatten(1) ** 2).sum(1) - 1).square().mean()
    return features, logits, norm, soft


def some_shares():
    """Images of one teacher, of several, and of none."""
    shares = normal(3, 7, seed=4).abs()
    shares[0, :4] = shares[1, 2:5] = shares[:, 6] = 0
    return shares


@pytest.mark.parametrize("shares", [None, some_shares()])
def test_a_component_learns_what_plain_torch_says(shares):
    given = step_of(ABOUT, shares=shares)
    objective = built(Component, ABOUT)
    parts = objective(given)
    features, logits, norm, soft = component_reference(objective, given)
    torch.testing.assert_close(parts["component.features"], features.detach())
    torch.testing.assert_close(parts["component.logits"], logits.detach())
    torch.testing.assert_close(parts["component.norm"], norm.detach())
    torch.testing.assert_close(parts["loss"], features + logits + norm)
    torch.testing.assert_close(parts["component"], parts["loss"].detach())
    assert set(parts) == {"loss", "component", "component.features", "component.logits", "component.norm"}
    assert not parts["component.norm"].requires_grad and float(norm.detach()) > 0

    weighted = built(Component, ABOUT, features=0.5, logits=2.0, norm=3.0, soft=4.0)
    parts = weighted(given)
    torch.testing.assert_close(parts["component.soft"], soft.detach())
    torch.testing.assert_close(parts["loss"], 0.5 * features + 2 * logits + 3 * norm + 4 * soft)


def test_a_target_learns_what_plain_torch_says():
    given = step_of(TARGET_ABOUT)
    objective = built(Target, TARGET_ABOUT)
    parts = objective(given)
    features = logits = torch.zeros((), dtype=DOUBLE)
    for i, (places, layers) in enumerate(zip(PLACES, LAYERS, strict=True)):
        adapters = objective.adapters[i]
        for row in range(2, 9):
            for space, (mine, theirs) in zip(adapters.points, layers, strict=True):
                features = (
                    features + plain(space.net.weight, given.taps[mine][row], given.live[i].taps[theirs][row]) / 7
                )
            scaled = adapters.logit_scale * given.logits[row, places]
            logits = logits + F.mse_loss(scaled, given.live[i].logits[row].detach()) / 7
    torch.testing.assert_close(parts["target.features"], features.detach())
    torch.testing.assert_close(parts["target.logits"], logits.detach())
    torch.testing.assert_close(parts["loss"], features + logits)
    torch.testing.assert_close(parts["target"], parts["loss"].detach())
    assert set(parts) == {"loss", "target", "target.features", "target.logits"}
    assert not any("source" in name for name, _ in objective.named_parameters())
    torch.testing.assert_close(
        built(Target, TARGET_ABOUT, features=0.5, logits=2.0)(given)["loss"], 0.5 * features + 2 * logits
    )
    # Every component teaches every image, whatever its shares.
    alone = dataclasses.replace(given, said=dataclasses.replace(given.said, shares=torch.zeros(2, 7)))
    torch.testing.assert_close(objective(alone)["loss"], parts["loss"])


BOTH = [(Component, ABOUT, {"soft": 0.5}), (Target, TARGET_ABOUT, {})]


@pytest.mark.parametrize(("cls", "about", "settings"), BOTH)
def test_gradients_equal_finite_differences_and_none_reaches_the_teachers(cls, about, settings):
    given = step_of(about)
    objective = built(cls, about, **settings)
    for x in (given.logits, *given.taps.values(), *objective.parameters()):
        gradients_agree(lambda: objective(given)["loss"], x, entries=4)
    for one in given.live:
        for tap in one.taps.values():
            tap.requires_grad_()
    objective(given)["loss"].backward()
    for one in given.live:
        assert one.logits.grad is None and all(tap.grad is None for tap in one.taps.values())
    assert not given.logits.grad[:2].any() and given.logits.grad[2:].any(1).all()
    assert all(not tap.grad[:2].any() and tap.grad[2:].any() for tap in given.taps.values())


def test_a_teacher_without_an_image_keeps_its_parameters_in_the_graph():
    shares = torch.zeros(3, 7, dtype=DOUBLE)
    shares[1] = 1
    given = step_of(ABOUT, shares=shares)
    objective = built(Component, ABOUT, norm=0.0)
    objective(given)["loss"].backward()
    for t in (0, 2):
        assert all(p.grad is not None and not p.grad.any() for p in objective.adapters[t].parameters())
    assert all(p.grad.any() for p in objective.adapters[1].parameters())
    # The norm counts once, not once an image or teacher at work.
    assert built(Component, ABOUT)(given)["component.norm"] == built(Component, ABOUT)(step_of(ABOUT))["component.norm"]


@pytest.mark.parametrize(("cls", "about", "settings"), BOTH)
def test_when_nobody_is_taught_the_loss_is_zero_with_a_graph(cls, about, settings):
    objective = built(cls, about, **settings)
    given = dataclasses.replace(step_of(about), said=None, live=None)
    parts = objective(given)
    assert all(float(value.detach()) == 0 for value in parts.values())
    assert set(parts) == set(objective(step_of(about)))
    parts["loss"].backward()
    reached = (*objective.parameters(), given.logits, *given.taps.values())
    assert all(p.grad is not None and not p.grad.any() for p in reached)


def test_without_the_penalty_a_component_loses_what_it_is_to_learn():
    vectors = {"out": (10,)}
    teacher = TeacherAbout("a", SUBTASK, torch.zeros(4, 4), tap_shapes=vectors)
    about = About(SUBTASK, tap_shapes=vectors, teachers=(teacher,))
    given = Step(
        logits=normal(200, 4),
        labels=torch.full((200,), -1),
        said=Said(torch.ones(1, 200), (torch.full((200, 4), 0.25),), torch.full((1, 200, 4), 0.25)),
        taps={"out": normal(200, 10)},
        live=(Seen(normal(200, 4, seed=2), normal(200, 3), {"out": 0.7 * normal(200, 10, seed=1)}),),
    )
    found = {}
    for norm in (0.0, 1.0):
        torch.manual_seed(0)
        objective = Component(about, norm=norm, logits=0.0).double()
        optimiser = torch.optim.Adam(objective.parameters(), lr=0.02)
        for _ in range(400):
            optimiser.zero_grad()
            parts = objective(given)
            parts["loss"].backward()
            optimiser.step()
        norms = objective.adapters[0].points[0].source.weight.detach().norm(dim=1)
        found[norm] = float(parts["component.features"]), norms
    assert found[0.0][0] < 1e-4 and found[0.0][1].max() < 0.03
    assert found[1.0][0] > 0.2 and found[1.0][1].min() > 0.8


def test_without_a_weight_there_are_no_adapters_and_no_layers_needed():
    bare = dataclasses.replace(ABOUT, tap_shapes={})
    objective = built(Component, bare, features=0.0)
    assert [tuple(p.shape) for p in objective.parameters()] == [(1,)] * 3
    parts = objective(step_of(ABOUT))
    assert float(parts["component.features"]) == float(parts["component.norm"]) == 0
    torch.testing.assert_close(
        parts["loss"], built(Component, ABOUT)(step_of(ABOUT))["component.logits"], check_dtype=False
    )
    parts["loss"].backward()
    assert all(p.grad.any() for p in objective.parameters())
    silent = built(Component, ABOUT, logits=0.0)
    parts = silent(step_of(ABOUT))
    assert float(parts["component.logits"]) == 0
    parts["loss"].backward()
    assert all(adapters.logit_scale.grad is not None for adapters in silent.adapters)


def test_the_subtask_is_named_by_its_classes_or_by_a_single_head():
    def columns(about):
        objective = Component(about)
        return [objective.get_buffer(f"columns_{t}").tolist() for t in range(3)]

    expected = [known[0] for known in KNOWN]
    assert columns(ABOUT) == expected
    plain_names = dataclasses.replace(ABOUT, classes=SUBTASK)
    assert columns(plain_names)[2] == [2, 1]
    head = Head("footwear", slice(0, 4), (0, 1, 2, 3))
    assert columns(dataclasses.replace(plain_names, heads=(head,))) == expected


def test_bad_settings_and_teachers_are_named():
    stranger = TeacherAbout("far", ("boots", "sandals", "boot"), torch.zeros(3, 4), tap_shapes=NET)
    far = dataclasses.replace(ABOUT, teachers=(TEACHERS[0], stranger))
    with pytest.raises(ValueError, match=r"teacher 'far' knows fewer than two classes of sub-task 'footwear'.*sandals"):
        Component(far)
    with pytest.raises(ValueError, match="at least one teacher"):
        Component(dataclasses.replace(ABOUT, teachers=()))
    for name in ("features", "logits", "norm", "soft"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0, got -1"):
            Component(ABOUT, **{name: -1})
    with pytest.raises(ValueError, match="the student has no layers to compare"):
        Component(dataclasses.replace(ABOUT, tap_shapes={}))
    blind = dataclasses.replace(COMPONENTS[0], tap_shapes={})
    with pytest.raises(ValueError, match="teacher 'tops' has no layers to compare"):
        Target(dataclasses.replace(TARGET_ABOUT, teachers=(blind,)))
    with pytest.raises(
        ValueError, match="component 'tops' has the class 'tops/vest', which the target does not; nearest"
    ):
        Target(dataclasses.replace(TARGET_ABOUT, classes=HEADS[:4]))
    given = step_of(ABOUT)
    with pytest.raises(ValueError, match="live must show what the 3 teachers see, got nothing"):
        Component(ABOUT).double()(dataclasses.replace(given, live=None))
    with pytest.raises(ValueError, match=r"shares must have 3 rows, got shape \(2, 7\)"):
        Component(ABOUT).double()(
            dataclasses.replace(given, said=dataclasses.replace(given.said, shares=torch.ones(2, 7)))
        )


# --- two ranks


class Trained(nn.Module):
    """A student of images that shows its layers, and what it is trained on."""

    def __init__(self, objective):
        super().__init__()
        torch.manual_seed(11)
        self.layers = nn.ModuleDict({name: nn.Conv2d(2, shape[0], 1) for name, shape in NET.items()}).double()
        self.classifier = nn.Linear(24, len(objective.about.classes)).double()
        self.objective = objective

    def forward(self, images, said, live):
        taps = {
            name: F.adaptive_avg_pool2d(torch.tanh(self.layers[name](images)), NET[name][1:]) for name in list(NET)[:2]
        }
        taps["out"] = torch.tanh(self.layers["out"](images)).mean((2, 3))
        logits = self.classifier(taps["out"])
        return self.objective(Step(logits, torch.full((len(images),), -1), said, taps=taps, live=live))


def learner(cls, about, settings):
    objective = built(cls, about, **settings)
    objective.about = about
    return Trained(objective)


def batch_of(about, rows):
    """Some of 10 images, of which two are labelled, and what the teachers say and show of them; teacher 0 has one."""
    teachers = len(about.teachers)
    shares = F.one_hot(torch.arange(8) % (teachers - 1) + 1, teachers).T.to(DOUBLE)
    shares[:, 0] = 0
    shares[0, 0] = 1
    whole = step_of(about, labelled=2, taught=8, shares=shares)
    taught = rows[rows >= 2] - 2
    said = Said(shares[:, taught], tuple(p[taught] for p in whole.said.p), whole.said.target[:, taught])
    live = tuple(
        Seen(one.logits.detach()[rows], one.features[rows], {name: tap[rows] for name, tap in one.taps.items()})
        for one in whole.live
    )
    return normal(10, 2, 6, 6, seed=77)[rows], said, live


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def on_a_rank(rank, world_size):
    found = {}
    for cls, about, settings in BOTH:
        wrapped = DistributedDataParallel(learner(cls, about, settings))
        parts = wrapped(*batch_of(about, torch.arange(10)[rank::world_size]))
        parts["loss"].backward()
        found[cls.__name__] = float(parts["loss"].detach()), gradients(wrapped.module)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("cls", "about", "settings"), BOTH)
def test_two_ranks_equal_one_process_on_the_whole_batch(two_ranks, cls, about, settings):
    module = learner(cls, about, settings)
    loss = module(*batch_of(about, torch.arange(10)))["loss"]
    loss.backward()
    ranks = [rank[cls.__name__] for rank in two_ranks]
    assert sum(value for value, _ in ranks) / 2 == pytest.approx(float(loss.detach()), abs=1e-8)
    assert abs(ranks[0][0] - ranks[1][0]) > 1e-3
    for key, gradient in gradients(module).items():
        for _, found in ranks:
            torch.testing.assert_close(found[key], gradient, atol=1e-8, rtol=0)
        assert gradient.any(), key
