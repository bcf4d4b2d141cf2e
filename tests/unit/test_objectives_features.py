"""Objectives on features: against a few lines of plain torch, finite differences, and one process on all rows."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.distillation.attention import AttentionTransfer, attention_loss, attention_map
from pipeline.distillation.b_tuning import BTuning, b_tuning_loss, linear_posterior
from pipeline.distillation.common_features import CommonFeatures, common_feature_loss, mmd
from pipeline.distillation.hints import Hints, hint_loss
from pipeline.distillation.pairing import Adapter, is_map, pair_layers
from pipeline.distillation.relations import ClassCentreRelations, relation_distribution, relation_loss
from pipeline.distillation.step import About, Head, Objective, Said, Seen, Step, TeacherAbout
from tests.ddp import run_ranks

CLASSES = ("ant", "bee", "cat", "dog")
LABELLED, TAUGHT = 4, 8
# Widths of the penultimate features, and layers from low to high.
STUDENT = 6, {"stem.low": (4, 8, 8), "mid": (5, 4, 4), "top": (6,)}
TEACHERS = {
    "wide": (9, {"a": (3, 6, 6), "b": (7, 8, 5), "c": (9,)}),
    "small": (5, {"x": (2, 4, 4), "y": (3, 2, 2)}),
}
OBJECTIVES = {
    "hints": (Hints, {}),
    "hints-last": (Hints, {"layers": "last"}),
    "attention": (AttentionTransfer, {}),
    "relations": (ClassCentreRelations, {}),
    "b_tuning": (BTuning, {"temperature": 0.1}),
    "common_features": (CommonFeatures, {"dim": 3}),
}


def part_of(name):
    return name.partition("-")[0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_about(count=24):
    labels = torch.arange(count) % len(CLASSES)
    centres = 2 * normal(len(CLASSES), 16, seed=40)
    teachers = []
    for number, (name, (width, taps)) in enumerate(TEACHERS.items()):
        features = centres[labels, :width] + normal(count, width, seed=41 + number) + 3
        teachers.append(
            TeacherAbout(
                name=name,
                classes=("one", "two"),
                cost=torch.rand(2, len(CLASSES)),
                feature_dim=width,
                tap_shapes=taps,
                labelled_features=features,
                labels=labels,
            )
        )
    return About(classes=CLASSES, feature_dim=STUDENT[0], tap_shapes=STUDENT[1], teachers=tuple(teachers))


ABOUT = make_about()


def built(name, about=ABOUT):
    cls, settings = OBJECTIVES[name]
    torch.manual_seed(5)
    return cls(about, **settings).double()


class Net(nn.Module):
    """A student that shows its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.low, self.mid = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, 2, padding=1)
        self.top, self.head = nn.Linear(5, 6), nn.Linear(6, len(CLASSES))
        self.double()

    def forward(self, images):
        low = self.low(images)
        mid = self.mid(low.tanh())
        top = self.top(mid.tanh().mean((2, 3)))
        return self.head(top.tanh()), top.tanh(), {"stem.low": low, "mid": mid, "top": top}


class Trained(nn.Module):
    """A student and its objective, as data-parallel training wraps them."""

    def __init__(self, objective):
        super().__init__()
        self.net, self.objective = Net(), objective

    def forward(self, images, labels, said, live):
        logits, features, taps = self.net(images)
        return self.objective(Step(logits, labels, said, features=features, taps=taps, live=live))


def world(labelled=LABELLED, taught=TAUGHT, seed=0):
    """Images, labels, and what two teachers say and show; shares in both teachers, in one and in none."""
    n = labelled + taught
    images = normal(n, 3, 8, 8, seed=seed)
    labels = torch.cat([torch.arange(labelled) % len(CLASSES), torch.full((taught,), -1)])
    shares = normal(2, taught, seed=seed + 1).abs()
    shares[:, 0], shares[0, 1], shares[1, 2] = 0, 0, 0
    live, features = [], []
    for number, (width, taps) in enumerate(TEACHERS.values()):
        shown = {name: normal(n, *shape, seed=seed + 10 * number + k) for k, (name, shape) in enumerate(taps.items())}
        live.append(Seen(normal(n, 2, seed=seed + 7), normal(n, width, seed=seed + 8), shown))
        features.append(normal(taught, width, seed=seed + 20 + number) + 3)
    target = torch.full((2, taught, len(CLASSES)), 1 / len(CLASSES), dtype=torch.float64)
    p = (torch.full((taught, 2), 0.5, dtype=torch.float64),) * 2
    return images, labels, Said(shares, p, target, features=tuple(features)), tuple(live)


def step_of(net, images, labels, said, live):
    logits, features, taps = net(images)
    return Step(logits, labels, said, features=features, taps=taps, live=live)


def a_step(**changes):
    return dataclasses.replace(step_of(Net(), *world()), **changes)


# --- pairs and shapes


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("abc", "xyz", "xyz"),
        ("ab", "wxyz", "wz"),
        ("abcd", "yz", "yyzz"),
        ("abc", "yz", "yzz"),
        ("abc", "vwxyz", "vxz"),
        ("a", "xyz", "z"),
        ("abc", "z", "zzz"),
    ],
)
def test_layers_meet_at_the_same_relative_depth(student, teacher, expected):
    assert pair_layers(student, teacher) == list(zip(student, expected, strict=True))


@pytest.mark.parametrize("own", range(1, 9))
@pytest.mark.parametrize("others", range(1, 9))
def test_pairs_rise_from_first_to_last(own, others):
    pairs = pair_layers([f"s{i}" for i in range(own)], [f"t{i}" for i in range(others)])
    depths = [int(theirs[1:]) for _, theirs in pairs]
    assert [mine for mine, _ in pairs] == [f"s{i}" for i in range(own)]
    assert depths == sorted(depths) and depths[-1] == others - 1
    assert own == 1 or depths[0] == 0
    assert len(set(depths)) == min(own, others)


@pytest.mark.parametrize(("student", "teacher", "who"), [([], ["a"], "student"), (["a"], [], "teacher")])
def test_pairs_need_layers_on_both_sides(student, teacher, who):
    with pytest.raises(ValueError, match=f"{who} must have at least one layer, got none"):
        pair_layers(student, teacher)
    with pytest.raises(ValueError, match="student must not name a layer twice"):
        pair_layers(["a", "a"], ["b"])


def test_a_map_has_more_than_one_position():
    assert is_map((3, 2, 1)) and not is_map((3, 1, 1)) and not is_map((3,))


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (16, 10), (1, 1)])
def test_convolution_and_resize_commute_in_an_adapter(size):
    adapter = Adapter((4, 8, 8), (3, *size)).double()
    x = normal(2, 4, 8, 8)
    resized = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(adapter(x), torch.einsum("oc,bchw->bohw", adapter.map.weight[:, :, 0, 0], resized))
    assert adapter.map.bias is None


def test_adapters_between_maps_and_vectors():
    x, v = normal(2, 4, 3, 5), normal(2, 4)
    to_vector, vectors, to_map = (
        Adapter(a, b).double() for a, b in [((4, 3, 5), (6,)), ((4,), (6,)), ((4,), (6, 2, 3))]
    )
    torch.testing.assert_close(to_vector(x), x.mean((2, 3)) @ to_vector.map.weight.t() + to_vector.map.bias)
    torch.testing.assert_close(vectors(v), v @ vectors.map.weight.t() + vectors.map.bias)
    mapped = to_map(v)
    assert mapped.shape == (2, 6, 2, 3)
    for h in range(2):
        for w in range(3):
            torch.testing.assert_close(mapped[:, :, h, w], v @ to_map.map.weight.t() + to_map.map.bias)


def test_an_adapter_takes_half_precision_features():
    assert Adapter((4,), (6,))(normal(2, 4).bfloat16()).dtype == torch.float32


def test_an_adapter_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"teacher must have shape \(C, H, W\) or \(D,\) .* got \(3, 4\)"):
        Adapter((4,), (3, 4))
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\), got \(2, 5\)"):
        Adapter((4,), (3,))(torch.zeros(2, 5))


# --- the losses, each in a few other lines


def test_hint_loss_is_a_weighted_mean_of_squared_differences():
    mapped, hint, weights = normal(5, 2, 3, 4), normal(5, 2, 3, 4, seed=1), normal(5, seed=2).abs()
    expected = sum(weights[b] * F.mse_loss(mapped[b], hint[b]) for b in range(5)) / 5
    torch.testing.assert_close(hint_loss(mapped, hint, weights), expected)
    torch.testing.assert_close(hint_loss(mapped, hint), F.mse_loss(mapped, hint))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_hints_of_two_teachers(layers):
    objective = Hints(ABOUT, layers=layers).double()
    pairs = [
        [("stem.low", "a"), ("mid", "b"), ("top", "c")],
        [("stem.low", "x"), ("mid", "y"), ("top", "y")],
    ]
    if layers == "last":
        pairs = [[("mid", "b")], [("mid", "y")]]
    step = a_step()
    adapters = iter(objective.adapters)
    expected = 0
    for t in range(2):
        for own, other in pairs[t]:
            difference = next(adapters)(step.taps[own])[LABELLED:] - step.live[t].taps[other][LABELLED:]
            each = difference.square().flatten(1).mean(1)
            expected = expected + (step.said.shares[t] * each).mean() / len(pairs[t])
    assert next(adapters, None) is None
    found = objective(step)
    torch.testing.assert_close(found["loss"], expected)
    assert not found["hints"].requires_grad and found["hints"] == found["loss"]


def test_the_last_hint_of_vectors_alone_is_the_highest():
    vectors = dataclasses.replace(ABOUT, tap_shapes={"low": (3,), "high": (4,)})
    assert Hints(vectors, layers="last").pairs == [[("high", "c")], [("high", "y")]]


def test_attention_is_where_features_are_large():
    features = torch.zeros(1, 2, 2, 2)
    features[0, :, 1, 0] = torch.tensor([3.0, -1.0])
    torch.testing.assert_close(attention_map(features), torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]))
    torch.testing.assert_close(attention_map(features, 1.0), torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]))


@pytest.mark.parametrize("power", [2.0, 1.0, 3.5])
def test_attention_loss_of_maps_of_one_size(power):
    s, t, weights = normal(5, 3, 4, 6), normal(5, 7, 4, 6, seed=1), normal(5, seed=2).abs()

    def at(x):
        return F.normalize(x.abs().pow(power).mean(1).flatten(1))

    expected = (weights[:, None] * (at(s) - at(t)).pow(2)).mean()
    torch.testing.assert_close(attention_loss(s, t, power=power, weights=weights), expected)
    torch.testing.assert_close(attention_loss(s, 3 * s[:, [2, 0, 1]], power=power), torch.zeros(()).double())


def test_attention_of_the_larger_map_is_averaged_down():
    s, t = normal(5, 3, 8, 2), normal(5, 7, 4, 6, seed=1)
    # 8 to 4 rows of the student, 6 to 2 columns of the teacher
    mine = s.square().mean(1).reshape(5, 4, 2, 2).mean(2).flatten(1)
    theirs = t.square().mean(1).reshape(5, 4, 2, 3).mean(3).flatten(1)
    expected = (mine / mine.norm(dim=1, keepdim=True) - theirs / theirs.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(attention_loss(s, t), expected)


def test_attention_is_summed_over_pairs_of_maps():
    objective, step = built("attention"), a_step()
    assert objective.pairs == [[("stem.low", "a"), ("mid", "b")], [("stem.low", "x"), ("mid", "y")]]
    expected = 0
    for t, pairs in enumerate(objective.pairs):
        for own, other in pairs:
            expected = expected + attention_loss(
                step.taps[own][LABELLED:], step.live[t].taps[other][LABELLED:], weights=step.said.shares[t]
            )
    torch.testing.assert_close(objective(step)["loss"], expected)


def test_attention_leaves_out_a_teacher_without_maps():
    wide, small = ABOUT.teachers
    flat = dataclasses.replace(small, tap_shapes={"v": (4,), "one": (4, 1, 1)})
    mixed = AttentionTransfer(dataclasses.replace(ABOUT, teachers=(wide, flat)))
    assert mixed.pairs == [[("stem.low", "a"), ("mid", "b")], []]
    found = mixed(a_step())["loss"]
    assert found > 0
    with pytest.raises(ValueError, match="attention needs layers of shape"):
        AttentionTransfer(dataclasses.replace(ABOUT, teachers=(flat,)))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_attention_of_nothing_has_a_finite_gradient(power):
    s = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss(s, torch.rand(2, 3, 4, 4), power=power).backward()
    assert torch.isfinite(s.grad).all()


def test_relations_are_cosines_between_what_is_centred():
    f, mean, centres = normal(5, 7), normal(7, seed=1), normal(4, 7, seed=2)
    relation = relation_distribution(f, mean, centres, 0.3)
    cosines = torch.stack([F.cosine_similarity(f - mean, (centre - mean)[None]) for centre in centres], 1)
    torch.testing.assert_close(relation, (cosines / 0.3).softmax(1))
    torch.testing.assert_close(relation_distribution(mean[None], mean, centres, 0.3), torch.full((1, 4), 0.25).double())


def test_relation_loss_and_its_module():
    objective, step = built("relations"), a_step()
    log_q, expected = step.logits[LABELLED:].log_softmax(1), 0
    for t, teacher in enumerate(ABOUT.teachers):
        f, y = teacher.labelled_features, teacher.labels
        centres = torch.stack([f[y == c].mean(0) for c in range(4)])
        p = relation_distribution(step.said.features[t], f.mean(0), centres, 0.1)
        expected = expected + (step.said.shares[t] * (p * (p.clamp_min(1e-300).log() - log_q)).sum(1)).mean()
    found = objective(step)
    torch.testing.assert_close(found["loss"], expected)
    assert not found["relations"].requires_grad


def test_relations_need_an_image_of_every_class():
    wide = dataclasses.replace(ABOUT.teachers[0], labels=torch.arange(24) % 3)
    with pytest.raises(ValueError, match=r"classes \[3\] have none"):
        ClassCentreRelations(dataclasses.replace(ABOUT, teachers=(wide,)))


def test_relations_are_of_one_task():
    heads = (Head("h", slice(0, 2), (0, 1)), Head("g", slice(2, 4), (0, 1)))
    with pytest.raises(ValueError, match="relations need a single task, got 2 heads"):
        ClassCentreRelations(dataclasses.replace(ABOUT, heads=heads))


def largest_evidence(f, y, start):
    """Largest log density, per degree of freedom, of centred labels under the linear model, over log α and log β."""
    # Orthonormal coordinates of what is left when the mean is taken out.
    basis = torch.linalg.svd(torch.ones(len(f), 1, dtype=torch.float64))[0][:, 1:]
    f, y = basis.t() @ f, basis.t() @ y
    logs = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        covariance = torch.eye(len(f), dtype=torch.float64) / logs[1].exp() + f @ f.t() / logs[0].exp()
        value = -MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y) / len(f)
        value.backward()
        return value

    optimiser.step(loss)
    return -float(loss().detach())


@pytest.mark.parametrize(("count", "width"), [(24, 5), (12, 30)])
def test_the_posterior_is_that_of_the_largest_evidence(count, width):
    y = torch.arange(count) % 3
    f = normal(3, width, seed=4)[y] + 1.5 * normal(count, width) + 50
    fit = linear_posterior(f, y, 3)
    targets, centred = F.one_hot(y, 3).double(), f - f.mean(0)
    best = []
    for c in range(3):
        # The posterior's mean is a ridge regression: least squares with rows of √t I below.
        ridge = fit.ratio[c].sqrt() * torch.eye(width, dtype=torch.float64)
        wanted = torch.cat([targets[:, c] - targets[:, c].mean(), torch.zeros(width, dtype=torch.float64)])
        m = torch.linalg.lstsq(torch.cat([centred, ridge]), wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(fit.weight[:, c], m, atol=1e-9, rtol=1e-6)
        alpha = float(width / m.square().sum())
        best.append(largest_evidence(f, targets[:, c], [math.log(alpha), math.log(alpha / float(fit.ratio[c]))]))
    assert fit.evidence == pytest.approx(sum(best) / 3, abs=1e-4)
    torch.testing.assert_close(fit.predict(f), targets.mean(0) + centred @ fit.weight)


def test_the_posterior_does_not_mind_shift_and_scale():
    y = torch.arange(20) % 3
    f = normal(3, 6, seed=4)[y] + normal(20, 6)
    first, second = linear_posterior(f, y, 4), linear_posterior(1e3 * f - 7e3, y, 4)
    torch.testing.assert_close(first.predict(f), second.predict(1e3 * f - 7e3), atol=1e-6, rtol=1e-6)
    assert first.evidence == pytest.approx(second.evidence, abs=1e-8)
    assert (first.weight[:, 3] == 0).all() and first.base[3] == 0


def test_the_posterior_of_features_that_see_nothing_is_the_frequency_of_classes():
    y = torch.tensor([0, 0, 1, 0])
    fit = linear_posterior(torch.full((4, 3), 0.1), y, 2)
    torch.testing.assert_close(fit.predict(normal(2, 3)), torch.tensor([[0.75, 0.25]] * 2).double())
    seeing = linear_posterior(F.one_hot(y, 2) + 0.01 * normal(4, 2), y, 2)
    assert math.isfinite(fit.evidence) and seeing.evidence > fit.evidence


def test_the_posterior_of_labels_met_exactly_is_finite():
    y = torch.arange(12) % 2
    fit = linear_posterior(F.one_hot(y, 2).double(), y, 2)
    assert math.isfinite(fit.evidence)
    torch.testing.assert_close(fit.predict(torch.eye(2).double()), torch.eye(2).double(), atol=1e-3, rtol=0)


def test_the_posterior_refuses_what_it_can_not_fit():
    with pytest.raises(ValueError, match="y must hold at least 2 classes, got 1"):
        linear_posterior(normal(4, 2), torch.zeros(4, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="features must be finite"):
        linear_posterior(torch.full((4, 2), torch.nan), torch.arange(4), 4)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\)"):
        linear_posterior(normal(4, 2), torch.arange(4), 3)


def test_b_tuning_mixes_all_teachers_by_evidence():
    objective, step = built("b_tuning"), a_step()
    fits = [linear_posterior(teacher.labelled_features, teacher.labels, 4) for teacher in ABOUT.teachers]
    mix = torch.softmax(torch.tensor([fit.evidence for fit in fits]).double() / 0.1, 0)
    assert 0.01 < mix[0] < 0.99
    target = sum(mix[t] * fits[t].predict(step.said.features[t]) for t in range(2))
    mine = step.features[LABELLED:] @ objective.map.weight.t() + objective.map.bias
    torch.testing.assert_close(objective(step)["loss"], F.mse_loss(mine, target))
    same = dataclasses.replace(step.said, shares=step.said.shares * 0)
    torch.testing.assert_close(objective(dataclasses.replace(step, said=same))["loss"], F.mse_loss(mine, target))


def test_b_tuning_predicts_the_classes_of_the_images_that_heads_share():
    heads = (Head("h", slice(0, 2), (0, 1, -1, -1, -1)), Head("g", slice(2, 4), (-1, -1, 0, 1, 1)))
    assert BTuning(dataclasses.replace(ABOUT, heads=heads)).map.out_features == 5


def test_mmd_is_that_of_its_double_sum():
    x, y, sigmas = normal(4, 3), normal(5, 3, seed=1), (0.5, 2.0)

    def kernel(a, b):
        return sum(math.exp(-float((a - b).square().sum()) / (2 * s * s)) for s in sigmas)

    expected = sum(
        factor * sum(kernel(a, b) for a in one for b in other) / (len(one) * len(other))
        for one, other, factor in ((x, x, 1), (y, y, 1), (x, y, -2))
    )
    assert float(mmd(x, y, sigmas)) == pytest.approx(expected, abs=1e-12)
    assert float(mmd(x, x, sigmas)) == pytest.approx(0, abs=1e-12)
    assert float(mmd(x.float() + 100, x.float() + 100)) == pytest.approx(0, abs=1e-5)


def test_common_features_meet_in_one_space():
    objective, step = built("common_features"), a_step()
    student = objective.extractor(objective.align_student(step.features[LABELLED:]))
    expected = 0
    for t in range(2):
        common = objective.extractor(objective.align_teachers[t](step.said.features[t]))
        units = [h / h.norm(dim=1, keepdim=True).clamp_min(1e-12) for h in (student, common)]
        expected = expected + mmd(*units) + F.mse_loss(objective.decoders[t](common), step.said.features[t])
    found = objective(step)
    torch.testing.assert_close(found["loss"], expected)
    assert not found["common_features"].requires_grad and student.shape == (TAUGHT, 3)


def test_training_brings_student_and_teachers_together():
    objective, step = built("common_features"), a_step()
    features, logits = step.features.detach().requires_grad_(), step.logits.detach()
    optimiser = torch.optim.Adam([features, *objective.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = objective(dataclasses.replace(step, features=features, logits=logits))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# --- gradients


def test_gradients_are_those_of_finite_differences():
    w = normal(4, seed=9).abs()
    relations = [normal(4, 3, seed=t).softmax(1) for t in range(2)]
    student, teacher = normal(4, 3, 4, 6).requires_grad_(), normal(4, 2, 5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda s: attention_loss(s, teacher, weights=w), student)
    assert torch.autograd.gradcheck(lambda s: attention_loss(s, teacher, power=1.5), student)
    assert torch.autograd.gradcheck(lambda s: hint_loss(s, normal(4, 3, 4, 6, seed=2), w), student)
    logits = normal(4, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: relation_loss(z, relations, torch.stack([w, w.flip(0)])), logits)
    mix = torch.tensor([0.3, 0.7]).double()
    assert torch.autograd.gradcheck(lambda z: b_tuning_loss(z, relations, mix), logits)
    common = [normal(4, 3, seed=k).requires_grad_() for k in (6, 7)]
    # Wide kernels: of narrow ones finite differences see nothing.
    assert torch.autograd.gradcheck(
        lambda s, t: common_feature_loss(s, [t], [2 * t], [relations[0]], reconstruction=0.5, sigmas=(0.5, 2.0)),
        common,
    )


@pytest.mark.parametrize(
    "shapes", [((3, 4, 6), (2, 5, 3)), ((3, 4, 6), (2, 8, 6)), ((3, 4, 6), (5,)), ((3,), (2, 2, 2))]
)
def test_gradients_of_adapters(shapes):
    adapter = Adapter(*shapes).double()
    assert torch.autograd.gradcheck(adapter, normal(2, *shapes[0]).requires_grad_())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_teachers_get_no_gradient(name):
    images, labels, said, live = world()
    tensors = [said.shares, *said.p, said.target, *said.features]
    tensors += [one for seen in live for one in (seen.logits, seen.features, *seen.taps.values())]
    for tensor in tensors:
        tensor.requires_grad_()
    Trained(built(name))(images, labels, said, live)["loss"].backward()
    assert all(tensor.grad is None for tensor in tensors)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("absent", ["first", "second", "both", "nobody is taught"])
def test_every_parameter_has_a_gradient_in_every_step(name, absent):
    images, labels, said, live = world()
    for number, who in enumerate(("first", "second")):
        if absent in (who, "both"):
            said.shares[number] = 0
    trained = Trained(built(name))
    found = trained(images, labels, None if absent == "nobody is taught" else said, live)
    found["loss"].backward()
    for parameter in trained.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    assert set(found) == {"loss", part_of(name)}
    assert found[part_of(name)] == found["loss"] and not found[part_of(name)].requires_grad
    if absent == "nobody is taught":
        assert found["loss"] == 0 and all((parameter.grad == 0).all() for parameter in trained.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_labelled_rows_have_no_part_in_it(name):
    images, labels, said, live = world()
    trained = Trained(built(name))
    before = trained(images, labels, said, live)["loss"]
    images[:LABELLED] += 1
    for seen in live:
        for tap in seen.taps.values():
            tap[:LABELLED] += 1
    torch.testing.assert_close(trained(images, labels, said, live)["loss"], before)
    assert before > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_outputs_are_taken_in_single(name):
    cls, settings = OBJECTIVES[name]
    objective = cls(make_about(), **settings).float()
    step = a_step()
    said = dataclasses.replace(step.said, features=tuple(one.half() for one in step.said.features))
    half = {key: tap.bfloat16() for key, tap in step.taps.items()}
    step = dataclasses.replace(
        step, said=said, taps=half, logits=step.logits.bfloat16(), features=step.features.bfloat16()
    )
    found = objective(step)["loss"]
    assert torch.isfinite(found) and found.dtype in (torch.float32, torch.float64)
    found.backward()


def test_objectives_name_what_they_need():
    for cls, _ in OBJECTIVES.values():
        assert issubclass(cls, Objective)
    assert Hints.needs == AttentionTransfer.needs == {"said", "live", "taps"}
    assert ClassCentreRelations.needs == {"said", "said.features", "labelled"}
    assert BTuning.needs == {"said", "said.features", "labelled", "features"}
    assert CommonFeatures.needs == {"said", "said.features", "features"}


# --- what is refused


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Hints, {"layers": "first"}, "layers must be 'last' or 'all', got 'first'"),
        (AttentionTransfer, {"power": 0}, "power must be a finite number > 0, got 0"),
        (ClassCentreRelations, {"temperature": -1}, "temperature must be a finite number > 0, got -1"),
        (BTuning, {"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        (CommonFeatures, {"dim": 0}, "dim must be >= 1, got 0"),
        (CommonFeatures, {"reconstruction": -1}, "reconstruction must be >= 0, got -1"),
        (CommonFeatures, {"sigmas": ()}, "sigmas must hold at least one width, got none"),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(ABOUT, **settings)


@pytest.mark.parametrize(
    ("cls", "about", "message"),
    [
        (Hints, {"tap_shapes": {}}, "hints of teacher 'wide': student must have at least one layer, got none"),
        (Hints, {"tap_shapes": {"tokens": (7, 5)}}, "hints of teacher 'wide': student must have shape"),
        (BTuning, {"teachers": ()}, "b_tuning needs at least one teacher, got none"),
        (BTuning, {"feature_dim": None}, "b_tuning needs the student's penultimate features"),
        (CommonFeatures, {"teachers": ()}, "common_features needs at least one teacher, got none"),
        (CommonFeatures, {"feature_dim": None}, "and the student has none"),
    ],
)
def test_what_is_not_known_is_missed_at_construction(cls, about, message):
    with pytest.raises(ValueError, match=message):
        cls(dataclasses.replace(ABOUT, **about))


@pytest.mark.parametrize("cls", [ClassCentreRelations, BTuning])
def test_labelled_features_are_missed_at_construction(cls):
    wide = dataclasses.replace(ABOUT.teachers[0], labelled_features=None)
    with pytest.raises(ValueError, match="teacher 'wide' has no features of labelled images"):
        cls(dataclasses.replace(ABOUT, teachers=(wide,)))


def test_shapes_that_do_not_match_are_refused():
    a, b, w = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 5), torch.ones(2)
    with pytest.raises(ValueError, match=r"both must have one shape \(B, ...\)"):
        hint_loss(a, b)
    with pytest.raises(ValueError, match=r"weights must have shape \(2,\)"):
        hint_loss(a, a, torch.ones(3))
    with pytest.raises(ValueError, match="weights must not be negative, got -1"):
        attention_loss(a, b, weights=-w)
    with pytest.raises(ValueError, match=r"features must have shape \(B, C, H, W\)"):
        attention_map(a[0])
    with pytest.raises(ValueError, match="must have as many rows, got 2 and 1"):
        attention_loss(a, b[:1])
    with pytest.raises(ValueError, match=r"features, mean and centres must have shapes"):
        relation_distribution(torch.rand(2, 3), torch.rand(4), torch.rand(5, 3), 0.1)
    with pytest.raises(ValueError, match=r"logits and shares must have shapes \(B, C\) and \(1, B\)"):
        relation_loss(torch.rand(2, 3), [torch.rand(2, 3).softmax(1)], torch.ones(2))
    with pytest.raises(ValueError, match="mix must have one weight a teacher"):
        b_tuning_loss(torch.rand(2, 3), [torch.rand(2, 3)], torch.ones(2))
    with pytest.raises(ValueError, match="rows of mix must sum to 1"):
        b_tuning_loss(torch.rand(2, 3), [torch.rand(2, 3)], torch.full((1,), 2.0))
    with pytest.raises(ValueError, match=r"x and y must have shapes \(N, d\) and \(M, d\)"):
        mmd(torch.rand(2, 3), torch.rand(0, 3))
    with pytest.raises(ValueError, match="teachers, rebuilt and features must be as many, got 1, 0 and 1"):
        common_feature_loss(torch.rand(2, 3), [torch.rand(2, 3)], [], [torch.rand(2, 3)])


# --- two ranks, one process

SPREAD = ("hints", "hints-last", "attention", "relations", "b_tuning")


def of_rank(rank, images, labels, said, live):
    """Every other image of the labelled and of the taught ones."""
    rows = torch.cat([torch.arange(rank, LABELLED, 2), torch.arange(LABELLED + rank, LABELLED + TAUGHT, 2)])
    mine = dataclasses.replace(
        said,
        shares=said.shares[:, rank::2],
        p=tuple(one[rank::2] for one in said.p),
        target=said.target[:, rank::2],
        features=tuple(one[rank::2] for one in said.features),
    )
    shown = tuple(
        Seen(seen.logits[rows], seen.features[rows], {name: tap[rows] for name, tap in seen.taps.items()})
        for seen in live
    )
    return images[rows], labels[rows], mine, shown


def global_world():
    images, labels, said, live = world(seed=50)
    said.shares[0, 1::2] = 0  # the first teacher teaches no image of the second rank
    return images, labels, said, live


def on_a_rank(rank, _):
    found = {}
    for name in SPREAD:
        # As the training wraps it: a parameter without a gradient would be an error in the next step.
        module = DistributedDataParallel(Trained(built(name)), find_unused_parameters=False)
        for _ in range(2):
            module.zero_grad()
            loss = module(*of_rank(rank, *global_world()))["loss"]
            loss.backward()
        gradients = {key: parameter.grad for key, parameter in module.module.named_parameters()}
        found[name] = float(loss.detach()), gradients
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SPREAD)
def test_two_ranks_equal_one_process_on_the_global_batch(two_ranks, name):
    module = Trained(built(name))
    loss = module(*global_world())["loss"]
    loss.backward()
    (first, gradients), (second, others) = (rank[name] for rank in two_ranks)
    assert (first + second) / 2 == pytest.approx(float(loss.detach()), abs=1e-8)
    assert first > 0 and second > 0 and first != pytest.approx(second, abs=1e-6)
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, atol=1e-8, rtol=0)
        torch.testing.assert_close(others[key], parameter.grad, atol=1e-8, rtol=0)
