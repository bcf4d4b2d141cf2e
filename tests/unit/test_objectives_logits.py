"""Objectives on logits: against a few lines of plain torch, finite differences, and one process on the whole batch."""

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.distillation.concatenated import ClassMap, ConcatenatedKD, concatenated_kd_loss
from pipeline.distillation.dist import DIST, dist_loss, dist_parts, pearson
from pipeline.distillation.dkd import DKD, dkd_loss, dkd_parts
from pipeline.distillation.dropping import TeacherDropping, kept_teachers, teacher_dropping_loss, teacher_losses
from pipeline.distillation.gather import gather_rows
from pipeline.distillation.kd import KnowledgeDistillation, kd_loss, soften, softened_divergence, weighted_mean
from pipeline.distillation.step import About, Said, Step, TeacherAbout
from tests.ddp import run_ranks

CLASSES = ("ant", "bee", "cat", "dog")
TEACHERS = (("bee", "ant", "elk"), ("dog", "cat", "bee", "fox", "gnu"))
FEATURES = 6

ABOUT = About(
    classes=CLASSES,
    feature_dim=FEATURES,
    teachers=tuple(
        TeacherAbout(name=str(number), classes=names, cost=torch.rand(len(names), len(CLASSES)))
        for number, names in enumerate(TEACHERS)
    ),
)

OBJECTIVES = {
    "kd": (KnowledgeDistillation, {"temperature": 2.0}),
    "dkd": (DKD, {}),
    "dist": (DIST, {"beta": 0.5, "gamma": 2.0, "temperature": 1.5}),
    "concatenated-auxiliary": (ConcatenatedKD, {}),
    "concatenated-classes": (ConcatenatedKD, {"head": "classes"}),
    "dropping": (TeacherDropping, {"drop": 0.5, "temperature": 2.0}),
}


def built(name):
    cls, settings = OBJECTIVES[name]
    torch.manual_seed(5)
    return cls(ABOUT, **settings).double()


def case(batch=7, classes=4, seed=0, scale=1.0):
    """Logits with a gradient, distributions and weights, in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=g, dtype=torch.float64)
    target = torch.softmax(2 * torch.randn(batch, classes, generator=g, dtype=torch.float64), 1)
    return logits.requires_grad_(), target, torch.rand(batch, generator=g, dtype=torch.float64)


def said(batch, seed=1):
    """What two teachers say; an image may have shares in both, or in none."""
    g = torch.Generator().manual_seed(seed)
    target = torch.softmax(2 * torch.randn(2, batch, 4, generator=g, dtype=torch.float64), 2)
    shares = torch.rand(2, batch, generator=g, dtype=torch.float64)
    shares[:, 0], shares[0, 1], shares[1, 2] = 0, 0, 0
    logits = tuple(3 * torch.randn(batch, len(names), generator=g, dtype=torch.float64) for names in TEACHERS)
    p = tuple(each.softmax(1) for each in logits)
    return Said(shares=shares, p=p, target=target, logits=logits)


def step(labelled=3, batch=6, seed=2, with_said=True):
    g = torch.Generator().manual_seed(seed)
    n = labelled + batch
    labels = torch.full((n,), -1)
    labels[:labelled] = torch.arange(labelled) % 4
    return Step(
        logits=torch.randn(n, 4, generator=g, dtype=torch.float64).requires_grad_(),
        labels=labels,
        said=said(batch) if with_said else None,
        features=torch.randn(n, FEATURES, generator=g, dtype=torch.float64).requires_grad_(),
    )


def kl(p, log_q):
    """Σ p (log p − log q), for p without zeros."""
    return (p * (p.log() - log_q)).sum(1)


def gradients_agree(loss, logits):
    assert torch.autograd.gradcheck(loss, (logits,))


# --- knowledge distillation


def test_softening_a_softmax_is_the_softmax_at_the_temperature():
    z = 5 * case()[0].detach()
    for temperature in (0.5, 1.0, 4.0):
        torch.testing.assert_close(soften(z.softmax(1), temperature), torch.softmax(z / temperature, 1))


def test_softening_keeps_zeros_and_tiny_probabilities():
    p = torch.tensor([[0.0, 1.0, 0.0], [1e-30, 1.0, 1e-36]])
    softened = soften(p, 10.0)
    assert torch.equal(softened[0], p[0])
    expected = torch.tensor([1e-3, 1.0, 10**-3.6])
    torch.testing.assert_close(softened[1], expected / expected.sum())
    assert soften(p.half(), 2.0).dtype == torch.float32


def test_kd_is_the_scaled_kl_divergence_over_a_fixed_number_of_rows():
    logits, target, weights = case()
    p = target ** (1 / 3)
    each = 9 * kl(p / p.sum(1, keepdim=True), F.log_softmax(logits / 3, 1))
    torch.testing.assert_close(kd_loss(logits, target, 3.0), each.mean())
    torch.testing.assert_close(kd_loss(logits, target, 3.0, weights), (weights * each).sum() / 7)
    gradients_agree(lambda z: kd_loss(z, target, 3.0, weights), logits)


def test_kd_of_the_same_distribution_is_zero():
    logits = case()[0]
    assert kd_loss(logits, logits.softmax(1), 4.0).abs() < 1e-12


def test_bad_input_of_kd_is_named():
    logits, target, weights = case()
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got -1"):
        KnowledgeDistillation(ABOUT, temperature=-1)
    with pytest.raises(ValueError, match=r"one shape \(B, C\), got \(7, 4\) and \(6, 4\)"):
        kd_loss(logits, target[:6], 1.0)
    with pytest.raises(ValueError, match="must sum to 1"):
        kd_loss(logits, 2 * target, 1.0)
    with pytest.raises(ValueError, match=r"weights must have shape \(7,\)"):
        kd_loss(logits, target, 1.0, weights[:, None])
    with pytest.raises(ValueError, match="weights must not be negative, got -1"):
        kd_loss(logits, target, 1.0, weights * 0 - 1)
    with pytest.raises(ValueError, match="weights must be finite, got nan"):
        weighted_mean(logits[:, 0], weights * torch.nan)


# --- decoupled


def plain_dkd(logits, target, chosen, temperature):
    """One image after another, with boolean masks."""
    tckd, nckd = [], []
    for z, p, k in zip(logits, target, chosen, strict=True):
        q, p = torch.softmax(z / temperature, 0), p ** (1 / temperature)
        p, other = p / p.sum(), torch.arange(len(z)) != k
        pair_p, pair_q = torch.stack([p[k], 1 - p[k]]), torch.stack([q[k], 1 - q[k]])
        tckd.append((pair_p * (pair_p / pair_q).log()).sum())
        rest_p, rest_q = p[other] / p[other].sum(), q[other] / q[other].sum()
        nckd.append((rest_p * (rest_p / rest_q).log()).sum())
    return temperature**2 * torch.stack(tckd), temperature**2 * torch.stack(nckd)


def test_dkd_equals_a_loop_over_images_with_masks():
    logits, target, weights = case()
    labels = torch.tensor([-1, 0, 1, 2, 3, -1, 0])
    chosen = torch.where(labels >= 0, labels, target.argmax(1))
    assert (chosen != target.argmax(1)).any()
    for given, k, w in ((labels, chosen, weights), (None, target.argmax(1), torch.ones_like(weights))):
        tckd, nckd = plain_dkd(logits, target, k, 4.0)
        got = dkd_parts(logits, target, given, weights=w)
        torch.testing.assert_close(got[0], (w * tckd).sum() / 7)
        torch.testing.assert_close(got[1], (w * nckd).sum() / 7)
        expected = (w * (0.5 * tckd + 3 * nckd)).sum() / 7
        torch.testing.assert_close(dkd_loss(logits, target, given, alpha=0.5, beta=3, weights=w), expected)
    default = dkd_loss(logits, target)
    torch.testing.assert_close(default, (tckd + 8 * nckd).mean())
    gradients_agree(lambda z: dkd_loss(z, target, labels, weights=weights), logits)


def test_the_two_parts_of_dkd_make_up_the_kl_divergence():
    logits, target, _ = case(batch=1)
    tckd, nckd = dkd_parts(logits, target, temperature=3.0)
    rest = 1 - soften(target, 3.0).max()
    torch.testing.assert_close(tckd + rest * nckd, kd_loss(logits, target, 3.0))


def test_a_teacher_that_is_sure_leaves_the_other_classes_alone():
    logits = case(batch=2)[0]
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    tckd, nckd = dkd_parts(logits, target, temperature=2.0)
    plain = plain_dkd(logits[1:], target[1:], [0], 2.0)
    torch.testing.assert_close(nckd, plain[1][0] / 2)
    torch.testing.assert_close(tckd, (plain[0][0] - 4 * F.log_softmax(logits[0] / 2, 0)[1]) / 2)
    gradients_agree(lambda z: dkd_loss(z, target), logits)


def test_dkd_tells_tiny_probabilities_of_the_others_apart():
    # Sums of the others that round to 0 beside the target class hold their order all the same.
    z = torch.tensor([[60.0, 3.0, 1.0, -2.0]])
    same = torch.tensor([[0.0, 3.0, 1.0, -2.0]])
    _, nckd = dkd_parts(same, z.softmax(1), temperature=1.0)
    assert nckd < 1e-6
    _, nckd = dkd_parts(same.flip(1), z.softmax(1), torch.tensor([0]), temperature=1.0)
    assert nckd > 0.1


def test_bad_input_of_dkd_is_named():
    logits, target, _ = case()
    with pytest.raises(ValueError, match=r"labels must lie in \[-1, 4\)"):
        dkd_loss(logits, target, torch.full((7,), 4))
    with pytest.raises(ValueError, match=r"labels must have shape \(7,\)"):
        dkd_loss(logits, target, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 2 classes"):
        dkd_loss(logits[:, :1], torch.ones(7, 1))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        DKD(About(classes=("ant",)))
    with pytest.raises(ValueError, match="beta must be a finite number >= 0, got -2"):
        DKD(ABOUT, beta=-2)


def test_dkd_takes_the_label_of_a_taught_image_where_there_is_one():
    # The first of the taught rows gets a label that is not the teachers' choice.
    given = step()
    target, weights = given.said.mixed()
    labels = given.labels.clone()
    labels[4] = int(target[1].argmin())
    parts = built("dkd")(Step(logits=given.logits, labels=labels, said=given.said))
    torch.testing.assert_close(parts["loss"], dkd_loss(given.logits[3:], target, labels[3:], weights=weights))
    assert not torch.isclose(parts["loss"], dkd_loss(given.logits[3:], target, weights=weights))
    torch.testing.assert_close(parts["dkd"], parts["tckd"] + 8 * parts["nckd"])


# --- relations


def test_correlation_equals_numpys_and_weights_count_repetitions():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(pearson(x, y), expected, atol=1e-7, rtol=0)
    times = torch.tensor([1, 3, 2, 1, 0, 2])
    repeated = pearson(x.repeat_interleave(times, 1), y.repeat_interleave(times, 1))
    for scale in (1.0, 1e-3):
        torch.testing.assert_close(pearson(x, y, scale * times.double()), repeated, atol=1e-7, rtol=0)


def test_dist_is_one_minus_correlation_of_rows_and_of_columns():
    logits, target, weights = case()
    q, p = torch.softmax(logits / 2, 1), target.sqrt() / target.sqrt().sum(1, keepdim=True)
    inter = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(q, p, strict=True)])
    intra = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    got = dist_loss(logits, target, beta=0.5, gamma=3, temperature=2.0)
    torch.testing.assert_close(got, 4 * (0.5 * inter.mean() + 3 * intra.mean()), atol=1e-5, rtol=0)
    rows, columns = dist_parts(logits, target, temperature=2.0, weights=weights)
    torch.testing.assert_close(rows, 4 * (weights * inter).sum() / 7, atol=1e-5, rtol=0)
    covariance = [torch.cov(torch.stack([a, b]), aweights=weights, correction=0) for a, b in zip(q.T, p.T, strict=True)]
    rho = torch.stack([c[0, 1] / (c[0, 0] * c[1, 1]).sqrt() for c in covariance])
    torch.testing.assert_close(columns, 4 * weights.mean() * (1 - rho).mean(), atol=1e-5, rtol=0)
    gradients_agree(lambda z: dist_loss(z, target, temperature=2.0, weights=weights), logits)
    gradients_agree(lambda z: dist_loss(z, target), logits)


def test_dist_does_not_see_scale_but_kd_does():
    # A student whose distributions are the teacher's drawn halfway to uniform has all relations right.
    target = case()[1]
    logits = (0.5 * target + 0.125).log()
    assert dist_loss(logits, target).abs() < 1e-5 < kd_loss(logits, target, 1.0)


def test_images_without_weight_do_not_count_in_dist():
    logits, target, weights = case()
    weights[2] = 0
    changed = logits.detach().clone()
    changed[2] += 5 * torch.arange(4)
    torch.testing.assert_close(
        dist_loss(changed, target, weights=weights), dist_loss(logits, target, weights=weights).detach()
    )
    loss = dist_loss(logits, target, weights=weights * 0)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_constant_rows_and_columns_have_no_correlation():
    logits = torch.zeros(5, 4, requires_grad=True)
    loss = dist_loss(logits, torch.eye(4)[[0, 0, 0, 0, 0]])
    loss.backward()
    assert loss.item() == pytest.approx(2) and torch.isfinite(logits.grad).all()
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0"):
        DIST(ABOUT, gamma=float("nan"))
    with pytest.raises(ValueError, match="eps must be a finite number > 0"):
        pearson(logits, logits, eps=0)


def test_without_ranks_gathering_returns_the_rows():
    rows = torch.rand(3, 2)
    assert gather_rows(rows) is rows


# --- concatenated logits


def test_concatenated_kd_is_the_kl_divergence_to_all_logits_side_by_side():
    given = step()
    objective = built("concatenated-auxiliary")
    parts = objective(given)
    p = torch.softmax(torch.cat(given.said.logits, 1) / 4, 1)
    z = given.features[3:] @ objective.head.weight.T + objective.head.bias
    expected = 16 * kl(p, F.log_softmax(z / 4, 1)).mean()
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(concatenated_kd_loss(z, given.said.logits, 4.0), expected)
    assert objective.head.weight.shape == (8, FEATURES)
    parts["loss"].backward()
    assert (given.features.grad[3:] != 0).all() and not given.features.grad[:3].any() and not given.logits.grad.any()
    gradients_agree(lambda z: concatenated_kd_loss(z, given.said.logits, 4.0), z.detach().requires_grad_())


def test_teachers_classes_are_matched_by_name():
    given = step()
    parts = built("concatenated-classes")(given)
    first, second = (each.double() for each in given.said.logits)
    mean = ((first[:, 0].exp() + second[:, 2].exp()) / 2).log()
    mapped = torch.stack([first[:, 1], mean, second[:, 1], second[:, 0]], 1)
    torch.testing.assert_close(ClassMap(CLASSES, TEACHERS)(torch.cat([first, second], 1)), mapped)
    expected = 16 * kl(torch.softmax(mapped / 4, 1), F.log_softmax(given.logits[3:] / 4, 1)).mean()
    torch.testing.assert_close(parts["loss"], expected)


def test_bad_input_of_concatenated_kd_is_named():
    lacking = About(classes=("ant", "yak", "Bee"), teachers=ABOUT.teachers)
    with pytest.raises(ValueError, match="no teacher has the classes 'yak', 'Bee'"):
        ConcatenatedKD(lacking, head="classes")
    with pytest.raises(ValueError, match="feature dimension"):
        ConcatenatedKD(lacking)
    with pytest.raises(ValueError, match="at least one teacher"):
        ConcatenatedKD(About(classes=CLASSES, feature_dim=3))
    with pytest.raises(ValueError, match='head must be "auxiliary" or "classes", got \'own\''):
        ConcatenatedKD(ABOUT, head="own")
    given = step()
    without = Said(shares=given.said.shares, p=given.said.p, target=given.said.target)
    with pytest.raises(ValueError, match="no logits of the teachers"):
        built("concatenated-classes")(Step(given.logits, given.labels, without))
    swapped = Said(shares=given.said.shares, p=given.said.p, target=given.said.target, logits=given.said.logits[::-1])
    with pytest.raises(ValueError, match=r"widths \(3, 5\), got \(5, 3\)"):
        built("concatenated-classes")(Step(given.logits, given.labels, swapped))
    with pytest.raises(ValueError, match="no features of the student"):
        built("concatenated-auxiliary")(Step(given.logits, given.labels, given.said))
    with pytest.raises(ValueError, match="teacher_logits must be finite"):
        concatenated_kd_loss(torch.zeros(1, 2), [torch.tensor([[1.0, torch.inf]])], 1.0)


# --- teacher dropping


def test_the_teacher_with_the_highest_loss_stays_and_others_by_chance():
    losses = torch.tensor([[1.0, 5.0, 3.0], [2.0, 4.0, 3.0], [0.0, 6.0, 1.0]])
    draws = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.5, 0.0], [0.2, 0.0, 0.4]])
    expected = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]]).bool()
    assert torch.equal(kept_teachers(losses, draws, 0.5), expected)
    torch.testing.assert_close(
        teacher_dropping_loss(losses, expected), torch.tensor(((1 + 2) / 2 + (4 + 6) / 2 + 3) / 3)
    )
    assert kept_teachers(losses, draws, 0.0).all()
    assert torch.equal(kept_teachers(losses, draws, 1.0).sum(0), torch.ones(3, dtype=torch.long))


def test_teacher_dropping_draws_in_training_alone():
    given = step(batch=200)
    objective = built("dropping")
    losses = teacher_losses(given.logits[3:], given.said.target, 2.0)
    for number in range(2):
        torch.testing.assert_close(
            losses[number], 4 * kl(soften(given.said.target[number], 2.0), F.log_softmax(given.logits[3:] / 2, 1))
        )
    torch.manual_seed(3)
    parts = objective(given)
    torch.manual_seed(3)
    kept = torch.rand(2, 200) >= 0.5
    kept[losses.argmax(0), torch.arange(200)] = True
    expected = torch.stack([losses[kept[:, b], b].mean() for b in range(200)]).mean()
    torch.testing.assert_close(parts["loss"], expected)
    assert float(parts["kept_teachers"]) == pytest.approx(1.5, abs=0.15)
    evaluated = objective.eval()(given)
    torch.testing.assert_close(evaluated["loss"], losses.mean())
    assert evaluated["kept_teachers"] == 2
    gradients_agree(
        lambda z: teacher_dropping_loss(teacher_losses(z, given.said.target[:, :6], 2.0), kept[:, :6]),
        given.logits[3:9].detach().requires_grad_(),
    )


def test_bad_input_of_teacher_dropping_is_named():
    with pytest.raises(ValueError, match=r"drop must be in \[0, 1\], got 1.5"):
        TeacherDropping(ABOUT, drop=1.5)
    with pytest.raises(ValueError, match=r"\(B, C_s\) and \(T, B, C_s\) with T >= 1"):
        teacher_losses(torch.zeros(3, 4), torch.zeros(0, 3, 4), 1.0)
    with pytest.raises(ValueError, match="a teacher for every image"):
        teacher_dropping_loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))


# --- all of them


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_loss_without_teachers_but_a_gradient(name):
    given, objective = step(with_said=False), built(name)
    parts = objective(given)
    parts["loss"].backward()
    assert all(value.item() == 0 for value in parts.values())
    assert torch.equal(given.logits.grad, torch.zeros_like(given.logits))
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_are_detached_and_labelled_rows_get_no_gradient(name):
    given, objective = step(), built(name)
    parts = objective(given)
    assert parts["loss"].requires_grad and len(parts) > 1
    assert not any(value.requires_grad for key, value in parts.items() if key != "loss")
    parts["loss"].backward()
    seen = given.features if name == "concatenated-auxiliary" else given.logits
    assert not given.logits.grad[:3].any() and seen.grad[4:].any(1).all()
    more = {"said.logits", "features"} if "concat" in name else {"said.each"} if name == "dropping" else set()
    assert objective.needs == {"said"} | more


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_the_mix_and_its_weights_are_used(name):
    given, objective = step(), built(name)
    target, weights = given.said.mixed()
    settings = OBJECTIVES[name][1]
    plain = {"kd": kd_loss, "dkd": dkd_loss, "dist": dist_loss}[name]
    torch.testing.assert_close(objective(given)["loss"], plain(given.logits[3:], target, weights=weights, **settings))
    assert weights[0] == 0  # the image that nobody teaches moves nothing
    objective(given)["loss"].backward()
    assert not given.logits.grad[3].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_flows_to_the_teachers(name):
    given = step()
    tensors = [given.said.shares, given.said.target, *given.said.logits, *given.said.p]
    for tensor in tensors:
        tensor.requires_grad_()
    built(name)(given)["loss"].backward()
    assert all(tensor.grad is None for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_ten_thousand_are_finite(name, dtype):
    signs = torch.tensor([[1.0, -1, -1, -1], [-1, 1, -1, 1], [1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1]])
    logits = (1e4 * signs).to(dtype).requires_grad_()
    target = torch.stack([torch.eye(4)[[1, 0, 2, 3, 1]], torch.eye(4)[[0, 1, 2, 2, 3]]])
    spoken = tuple(1e4 * (-1.0) ** torch.arange(5 * len(names)).reshape(5, -1) for names in TEACHERS)
    given = Step(
        logits=logits,
        labels=torch.full((5,), -1),
        said=Said(torch.ones(2, 5), tuple(each.softmax(1) for each in spoken), target, spoken),
        features=1e4 * torch.sign(torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0))),
    )
    parts = built(name).float()(given)
    parts["loss"].backward()
    assert all(torch.isfinite(value) for value in parts.values()) and parts["loss"] > 0.1
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_that_teaches_no_image_costs_nothing(name):
    given = step()
    none = Said(
        given.said.shares[:, :0],
        tuple(p[:0] for p in given.said.p),
        given.said.target[:, :0],
        tuple(z[:0] for z in given.said.logits),
    )
    loss = built(name)(Step(given.logits, given.labels, none, given.features))["loss"]
    loss.backward()
    assert loss.item() == 0 and not given.logits.grad.any()


# --- two ranks


class Trained(nn.Module):
    """A student with an objective, as one module."""

    def __init__(self, objective):
        super().__init__()
        torch.manual_seed(11)
        self.features, self.classifier = nn.Linear(5, FEATURES).double(), nn.Linear(FEATURES, 4).double()
        self.objective = objective

    def forward(self, x, labels, spoken):
        features = torch.tanh(self.features(x))
        return self.objective(Step(self.classifier(features), labels, spoken, features))


def global_batch():
    g = torch.Generator().manual_seed(4)
    images = torch.randn(4 + 8, 5, generator=g, dtype=torch.float64)
    labels = torch.full((12,), -1)
    labels[:4] = torch.arange(4)
    return images, labels, said(8)


def rows_of(rank, world_size):
    """A rank's rows of the global batch: every `world_size`-th labelled and taught image."""
    images, labels, spoken = global_batch()
    rows = torch.cat([torch.arange(12)[:4][rank::world_size], torch.arange(12)[4:][rank::world_size]])
    taught = slice(rank, None, world_size)
    part = Said(
        spoken.shares[:, taught],
        tuple(p[taught] for p in spoken.p),
        spoken.target[:, taught],
        tuple(z[taught] for z in spoken.logits),
    )
    return images[rows], labels[rows], part


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def on_a_rank(rank, world_size):
    """For each objective, a rank's loss and the gradients that DDP leaves."""
    found = {}
    for name in OBJECTIVES:
        wrapped = DistributedDataParallel(Trained(built(name)))
        torch.manual_seed(100 + rank)
        parts = wrapped(*rows_of(rank, world_size))
        parts["loss"].backward()
        found[name] = {key: float(value.detach()) for key, value in parts.items()}, gradients(wrapped.module)
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    gathered = gather_rows(x)
    ((rank + 1) * gathered * torch.arange(4.0)).sum().backward()
    found["gather"] = gathered.detach(), x.grad
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_equal_one_process_on_the_global_batch(two_ranks, name):
    module = Trained(built(name))
    images, labels, spoken = global_batch()
    if name == "dropping":
        # Each rank draws for its own rows.
        draws = torch.empty(2, 8)
        for rank in range(2):
            torch.manual_seed(100 + rank)
            draws[:, rank::2] = torch.rand(2, 4)
        losses = teacher_losses(module.classifier(torch.tanh(module.features(images)))[4:], spoken.target, 2.0)
        kept = kept_teachers(losses, draws, 0.5)
        assert not kept.all()
        loss = teacher_dropping_loss(losses, kept)
    else:
        loss = module(images, labels, spoken)["loss"]
    loss.backward()
    assert float(loss.detach()) > 1e-3
    (first, first_gradients), (second, second_gradients) = (rank[name] for rank in two_ranks)
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(float(loss.detach()), abs=1e-8)
    assert first["loss"] > 0 and second["loss"] > 0
    if name == "dist":
        assert first["intra_class"] == pytest.approx(second["intra_class"], abs=1e-12)
    for key, gradient in gradients(module).items():
        torch.testing.assert_close(first_gradients[key], gradient, atol=1e-8, rtol=0)
        torch.testing.assert_close(second_gradients[key], gradient, atol=1e-8, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in first_gradients.values())


def test_gathering_sums_what_the_ranks_send_back(two_ranks):
    for rank in range(2):
        rows, gradient = two_ranks[rank]["gather"]
        assert torch.equal(rows, torch.tensor([1.0, 1, 2, 2]))
        assert torch.equal(gradient, (1 + 2) * torch.arange(4.0)[2 * rank :][:2])


def fails_on_one(rank, world_size):
    if rank == 1:
        raise RuntimeError("no luck")
    distributed.barrier()


def test_a_rank_that_fails_ends_the_others(tmp_path):
    with pytest.raises(RuntimeError, match=r"rank 1 failed:\n(.|\n)*no luck"):
        run_ranks(fails_on_one, 2, tmp_path)
    assert not torch.multiprocessing.active_children()


def test_the_row_wise_divergence_is_exact_at_extremes():
    logits = torch.tensor([[1e4, -1e4]])
    torch.testing.assert_close(softened_divergence(logits, torch.tensor([[0.0, 1.0]]), 2.0), torch.tensor([4e4]))
