"""The solver against POT, exact transport and finite differences."""

import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from pipeline.transport.sinkhorn import ConvergenceWarning, sinkhorn, transport_loss


def problem(seed=0, batch=6, teacher=5, target=4, sharpness=2.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    a = torch.softmax(sharpness * torch.randn(batch, teacher, generator=g, dtype=torch.float64), 1)
    b = torch.softmax(sharpness * torch.randn(batch, target, generator=g, dtype=torch.float64), 1)
    return a.to(dtype), b.to(dtype), torch.rand(teacher, target, generator=g, dtype=torch.float64).to(dtype)


def exact(a, b, M):
    """Costs of exact transport, sample by sample."""
    a, b, M = (x.double().numpy() for x in (a, b, M))
    costs = [float(ot.emd2(x / x.sum(), y / y.sum(), M)) for x, y in zip(a, b, strict=True)]
    return torch.tensor(costs, dtype=torch.float32)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.01, 0.001])
def test_marginals_and_cost_of_the_plan(reg):
    a, b, M = problem()
    result = sinkhorn(a, b, M, reg, max_iter=20_000)
    plan = result.plan()
    assert result.converged and float(result.marginal_error.max()) <= 1e-5
    torch.testing.assert_close(plan.sum(2), a, atol=2e-5, rtol=0)
    torch.testing.assert_close(plan.sum(1), b, atol=2e-5, rtol=0)
    torch.testing.assert_close((plan * M).sum((1, 2)), result.cost, atol=5e-5, rtol=0)
    entropic = (plan * M).sum((1, 2)) + reg * (plan * (plan.clamp_min(1e-38).log() - 1)).sum((1, 2))
    torch.testing.assert_close(result.objective, entropic, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
def test_cost_equals_pot(reg):
    a, b, M = problem(dtype=torch.float64)
    expected = [
        float(ot.sinkhorn2(x.numpy(), y.numpy(), M.numpy(), reg, numItermax=50_000, stopThr=1e-12))
        for x, y in zip(a, b, strict=True)
    ]
    result = sinkhorn(a, b, M, reg, max_iter=50_000, tol=1e-11)
    np.testing.assert_allclose(result.cost.numpy(), expected, atol=1e-9)


def test_small_reg_reaches_exact_transport_in_float32():
    a, b, M = problem(batch=4)
    result = sinkhorn(a, b, M, 1e-3, max_iter=20_000)
    torch.testing.assert_close(result.cost, exact(a, b, M), atol=5e-4, rtol=0)


def test_small_reg_in_the_log_domain_survives_a_full_range_of_costs():
    # Reduced by row and column minima this cost still spans 1: M / ε = 1000, beyond exp in any type.
    M = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5], [0.3, 1.0, 0.0]])
    a = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    b = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    result = sinkhorn(a, b, M, 1e-3, max_iter=20_000)
    assert result.converged
    torch.testing.assert_close(result.cost, exact(a, b, M), atol=1e-3, rtol=0)


def test_uniform_marginals_solve_the_assignment_problem():
    M = torch.rand(5, 5, generator=torch.Generator().manual_seed(3))
    rows, columns = linear_sum_assignment(M.numpy())
    uniform = torch.full((1, 5), 0.2)
    result = sinkhorn(uniform, uniform, M, 2e-3, max_iter=50_000)
    assert float(result.cost) == pytest.approx(float(M[rows, columns].mean()), abs=1e-3)
    assert result.plan()[0].argmax(1).tolist() == columns.tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7), st.sampled_from([0.02, 0.1, 1.0]))
def test_the_plan_has_the_marginals(seed, teacher, target, reg):
    a, b, M = problem(seed, teacher=teacher, target=target)
    plan = sinkhorn(a, b, M, reg, max_iter=20_000).plan()
    assert float(plan.min()) >= 0
    torch.testing.assert_close(plan.sum(2), a, atol=2e-5, rtol=0)
    torch.testing.assert_close(plan.sum(1), b, atol=2e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_identical_distributions_cost_nothing_under_a_zero_diagonal(seed, classes):
    a, _, M = problem(seed, teacher=classes, target=classes, dtype=torch.float64)
    M = 0.2 + (M + M.t()) / 2
    M.fill_diagonal_(0)
    results = [sinkhorn(a, a, M, reg, max_iter=20_000) for reg in (0.3, 0.1, 0.03, 0.015)]
    costs = torch.stack([result.cost for result in results])
    assert float(costs.diff(dim=0).max()) < 1e-5 and float(costs[-1].max()) < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3]))
def test_permuting_classes_permutes_the_plan(seed, reg):
    a, b, M = problem(seed)
    g = torch.Generator().manual_seed(seed + 1)
    i, j = torch.randperm(a.shape[1], generator=g), torch.randperm(b.shape[1], generator=g)
    plain = sinkhorn(a, b, M, reg)
    moved = sinkhorn(a[:, i], b[:, j], M[i][:, j], reg)
    torch.testing.assert_close(moved.cost, plain.cost, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.plan(), plain.plan()[:, i][:, :, j], atol=1e-4, rtol=0)
    f, g = plain.potentials
    torch.testing.assert_close(moved.potentials, (f[:, i], g[:, j]), atol=1e-3, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_larger_cost_never_has_a_smaller_objective(seed):
    a, b, M = problem(seed, dtype=torch.float64)
    more = M + torch.rand(M.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = (sinkhorn(a, b, cost, 0.1, max_iter=5000, tol=1e-9).objective for cost in (M, more))
    assert bool((high >= low - 1e-9).all())


def test_one_hot_target_forces_the_plan():
    a, _, M = problem()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    result = sinkhorn(a, torch.eye(4)[y], M, 0.05)
    torch.testing.assert_close(result.cost, (a * M.t()[y]).sum(1), atol=1e-5, rtol=0)


def test_swapping_the_sides_transposes():
    a, b, M = problem()
    one, other = sinkhorn(a, b, M, 0.1), sinkhorn(b, a, M.t(), 0.1)
    torch.testing.assert_close(one.cost, other.cost, atol=1e-4, rtol=0)


def test_a_batch_equals_its_rows():
    a, b, M = problem()
    together = sinkhorn(a, b, M, 0.1, tol=1e-7, max_iter=500, warn=False).cost
    alone = [sinkhorn(a[k : k + 1], b[k : k + 1], M, 0.1, tol=1e-7, max_iter=500, warn=False).cost for k in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("reg", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_reg_from_a_thousandth_of_the_cost_on_is_solved_in_every_type(dtype, reg, scale):
    a, b, M = (x.to(dtype) for x in problem(dtype=torch.float64))
    M = scale * M
    wide = [x.double() / x.double().sum(1, keepdim=True) for x in (a, b)]
    result = sinkhorn(a, b, M, reg * scale, max_iter=20_000, tol=1e-4)
    assert result.converged and result.cost.dtype == torch.promote_types(dtype, torch.float32)
    # The reference solves the same rounded input, in float64 throughout.
    expected = sinkhorn(*wide, M.double(), reg * scale, max_iter=20_000, tol=1e-4)
    torch.testing.assert_close(result.cost.double(), expected.cost, atol=2e-4 * scale, rtol=0)
    q = b.clone().requires_grad_()
    transport_loss(a, q, M, reg * scale).backward()
    assert q.grad.dtype == dtype and bool(torch.isfinite(q.grad).all())


@pytest.mark.parametrize(("teacher", "target"), [(1, 4), (5, 1), (1, 1)])
def test_one_class_on_a_side_leaves_one_plan(teacher, target):
    a, b, M = problem(teacher=teacher, target=target)
    result = sinkhorn(a, b, M, 0.05)
    torch.testing.assert_close(result.plan(), a[:, :, None] * b[:, None, :], atol=1e-6, rtol=0)
    torch.testing.assert_close(result.cost, (a @ M * b).sum(1), atol=1e-6, rtol=0)
    p, q = a.clone().requires_grad_(), b.clone().requires_grad_()
    transport_loss(p, q, M, 0.05).backward()
    assert bool(torch.isfinite(p.grad).all() and torch.isfinite(q.grad).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_solved_in_single(dtype):
    a, b, M = problem()
    result = sinkhorn(a.to(dtype), b.to(dtype), M.to(dtype), 0.1)
    assert result.cost.dtype == torch.float32 and result.converged
    torch.testing.assert_close(result.cost, sinkhorn(a, b, M, 0.1).cost, atol=2e-2, rtol=0)


def test_autocast_does_not_lower_the_precision():
    a, b, M = problem()
    plain = sinkhorn(a, b, M, 0.05).cost
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn(a, b, M, 0.05).cost
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("max_iter", [1, 30, 150])
def test_a_limit_that_comes_early_still_gives_a_solution_at_the_reg_asked_for(max_iter):
    # M / ε spans several hundred: larger values of ε come first, and must not take all the iterations.
    a, b, M = problem()
    result = sinkhorn(a, b, M, 0.002, max_iter=max_iter, warn=False)
    assert result.iterations <= max_iter
    plan = result.plan()
    torch.testing.assert_close(plan.sum(1), b, atol=1e-5, rtol=0)
    torch.testing.assert_close((plan.sum(2) - a).abs().sum(1), result.marginal_error, atol=2e-2, rtol=0.2)
    # The cost takes the marginals at their word, so that it is off by what they are.
    assert bool((((plan * M).sum((1, 2)) - result.cost).abs() <= result.marginal_error + 1e-5).all())


def test_no_convergence_warns_and_says_so():
    a, b, M = problem()
    with pytest.warns(ConvergenceWarning, match="raise max_iter") as caught:
        result = sinkhorn(a, b, M, 0.01, max_iter=2)
    assert not result.converged and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(a, b, M, 0.01, max_iter=2, warn=False)


def test_empty_batch():
    _, _, M = problem()
    result = sinkhorn(torch.zeros(0, 5), torch.zeros(0, 4), M, 0.1)
    assert result.cost.shape == (0,) and result.plan().shape == (0, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reg": 0.0}, "reg must be a finite number > 0, got 0.0"),
        ({"reg": float("nan")}, "reg must be"),
        ({"max_iter": 0}, "max_iter must be >= 1, got 0"),
        ({"a": torch.full((6, 5), 0.3)}, r"rows of {a} must sum to 1, got a sum of 1.5 in shape \(6, 5\)"),
        ({"a": torch.full((6, 5), float("nan"))}, "{a} must be finite, got nan"),
        ({"b": torch.tensor([[1.5, -0.5, 0, 0]] * 6)}, "{b} must not be negative, got -0.5"),
        ({"b": torch.full((5, 4), 0.25)}, r"{a} and {b} must have as many rows, got shapes \(6, 5\) and \(5, 4\)"),
        ({"b": torch.full((6, 3), 1 / 3)}, r"M must have shape \(5, 3\).*got shape \(5, 4\)"),
        ({"M": torch.full((5, 4), float("inf"))}, "M must be finite, got inf"),
        ({"M": torch.full((5, 4), float("nan"))}, "M must be finite, got nan"),
        ({"M": torch.tensor([[0.1, 0.2, 0.3, -0.25]] * 5)}, r"M must not be negative, got -0.25 in shape \(5, 4\)"),
        ({"M": torch.ones(5, 4, dtype=torch.int64)}, "M must be a floating-point tensor, got torch.int64"),
        ({"M": torch.ones(5)}, r"M must have shape \(C_t, C_s\), got shape \(5,\)"),
        ({"reg": -1.0}, "reg must be a finite number > 0, got -1.0"),
        ({"tol": 0.0}, "tol must be a finite number > 0, got 0.0"),
        ({"b": torch.full((6, 4), float("inf"))}, "{b} must be finite, got inf"),
        ({"b": torch.zeros(6, 0)}, "{b} must have at least 1 classes"),
        ({"a": torch.full((5,), 0.2)}, r"{a} must have shape \(B, C\)"),
        ({"a": torch.ones(6, 1, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_bad_input_is_named(change, message):
    a, b, M = problem()
    a, b, M, *rest = ({"a": a, "b": b, "M": M, "reg": 0.1, "max_iter": 10, "tol": 1e-3} | change).values()
    reg, max_iter, tol = rest
    with pytest.raises(ValueError, match=message.format(a="a", b="b")):
        sinkhorn(a, b, M, reg, max_iter=max_iter, tol=tol)
    with pytest.raises(ValueError, match=message.format(a="p", b="q")):
        transport_loss(a, b, M, reg, max_iter=max_iter, tol=tol)


@pytest.mark.parametrize("reg", [0.5, 0.05])
def test_gradients_of_the_loss_equal_finite_differences(reg):
    g = torch.Generator().manual_seed(0)
    M = torch.rand(4, 3, generator=g, dtype=torch.float64)
    zp = torch.randn(2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    zq = torch.randn(2, 3, generator=g, dtype=torch.float64, requires_grad=True)

    def loss(zp, zq):
        return transport_loss(zp.softmax(1), zq.softmax(1), M, reg, "sum", max_iter=20_000, tol=1e-13)

    # Independent of autograd's own checker, so that the step and the tolerance are in view.
    loss(zp, zq).backward()
    step = 1e-5
    for z, gradient in ((zp, zp.grad), (zq, zq.grad)):
        for index in np.ndindex(*z.shape):
            with torch.no_grad():
                kept = z[index].item()
                z[index] = kept + step
                up = loss(zp, zq).item()
                z[index] = kept - step
                down = loss(zp, zq).item()
                z[index] = kept
            assert gradient[index].item() == pytest.approx((up - down) / (2 * step), abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.1, 0.02]))
def test_gradients_along_the_simplex_equal_finite_differences(seed, reg):
    a, b, M = problem(seed, sharpness=0.7, dtype=torch.float64)
    p, q = a.clone().requires_grad_(), b.clone().requires_grad_()
    options = {"max_iter": 20_000, "tol": 1e-13}
    transport_loss(p, q, M, reg, "sum", **options).backward()
    g = torch.Generator().manual_seed(seed)
    for side, gradient in ((0, p.grad), (1, q.grad)):
        direction = torch.randn((a, b)[side].shape, generator=g, dtype=torch.float64)
        direction -= direction.mean(1, keepdim=True)
        step = 1e-3 * (a, b)[side].min() * direction / direction.abs().max()
        up, down = (
            transport_loss(*((x + sign * step if k == side else x) for k, x in enumerate((a, b))), M, reg, **options)
            for sign in (1, -1)
        )
        slope = float(len(a) * (up - down) / 2)
        # Problems that do not converge to the last digit leave 1e-8 of the slope's difference undetermined.
        assert float((gradient * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_gradient_is_centred_and_scaled_by_what_comes_from_above():
    a, b, M = problem()
    q = b.clone().requires_grad_()
    transport_loss(a, q, M, 0.1, "none").mul(torch.arange(6.0)).sum().backward()
    assert float(q.grad.sum(1).abs().max()) < 1e-5
    assert float(q.grad[0].abs().max()) == 0 and float(q.grad[3].abs().max()) > 0


def test_loss_is_least_at_the_carried_distribution():
    a, _, M = problem(dtype=torch.float64)
    reg = 0.2
    carried = a @ torch.softmax(-M / reg, 1)
    z = carried.log().requires_grad_()

    def loss(q):
        return transport_loss(a, q, M, reg, "sum", max_iter=5000, tol=1e-12)

    loss(z.softmax(1)).backward()
    least = loss(carried)
    assert float(z.grad.abs().max()) < 1e-8
    g = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        other = (carried.log() + size * torch.randn(6, 4, generator=g, dtype=torch.float64)).softmax(1)
        assert float(loss(other)) > float(least)
    # In closed form: each teacher class spreads by softmax(−M_i / ε), whose free energy is −ε log Σ_j exp(−M_ij / ε).
    expected = reg * ((a * a.log()).sum() - (a * torch.logsumexp(-M / reg, 1)).sum() - len(a))
    assert float(least) == pytest.approx(float(expected), abs=1e-8)


def test_reductions_agree_and_gradients_stay_finite_for_one_hot_students():
    a, b, M = problem()
    each = transport_loss(a, b, M, 0.1, "none")
    assert float(transport_loss(a, b, M, 0.1)) == pytest.approx(float(each.mean()))
    assert float(transport_loss(a, b, M, 0.1, "sum")) == pytest.approx(float(each.sum()), rel=1e-5)
    with pytest.raises(ValueError, match="reduction must be"):
        transport_loss(a, b, M, 0.1, "median")
    q = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1])].requires_grad_()
    transport_loss(a, q, M, 0.1).backward()
    assert bool(torch.isfinite(q.grad).all())
