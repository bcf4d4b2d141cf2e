"""Entropic optimal transport for batches of distributions that share one ground cost.

Shapes: B samples, C_t teacher classes, C_s target classes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.transport import _checks

# exp(-M / reg) loses its smallest entries beyond these ranges of M / reg; both leave room for the scalings, which
# span the same range once more in either direction (float32 overflows at exp(88), float64 at exp(709)).
_RANGE_SINGLE = 30.0
_RANGE_DOUBLE = 300.0
# Elements of the largest intermediate of the log-domain fallback.
_CHUNK = 1 << 22
_CHECK_EVERY = 5


class ConvergenceWarning(UserWarning):
    """Sinkhorn stopped at its iteration limit, before the marginals were met to the tolerance."""


@dataclass(frozen=True)
class TransportResult:
    """The solution of a batch of entropic transport problems.

    Attributes
    ----------
    cost : (B,) tensor
        ⟨P, M⟩, without the entropy term.
    objective : (B,) tensor
        S_ε = ⟨P, M⟩ + ε Σ P (log P − 1), by its dual ⟨f, a⟩ + ⟨g, b⟩ − ε.
    f : (B, C_t) tensor
        Dual potential of a, in the precision it was solved in.
    g : (B, C_s) tensor
        Dual potential of b, likewise.
    marginal_error : (B,) tensor
        ‖P 1 − a‖₁; the other marginal is met exactly.
    iterations : int
    converged : bool
    """

    cost: Tensor
    objective: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: int
    converged: bool
    M: Tensor
    reg: float

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        """The dual potentials (f, g), each unique up to a constant that is added to one and taken from the other."""
        return self.f, self.g

    def plan(self) -> Tensor:
        """Return P, a (B, C_t, C_s) tensor: the only place where one of that size is built."""
        exponent = (self.f[:, :, None] + self.g[:, None, :] - self.M) / self.reg
        return exponent.exp().to(self.cost.dtype)


def sinkhorn(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float,
    *,
    max_iter: int = 2000,
    tol: float = 1e-5,
    warn: bool = True,
) -> TransportResult:
    """Solve min ⟨P, M⟩ + ε Σ P (log P − 1) over P ≥ 0 with P 1 = a and Pᵀ 1 = b, for each row of a and b.

    All rows share M, so that an iteration is two matrix products (B × C_t)(C_t × C_s) [1]_. M is first reduced by its
    row and column minima, which changes the potentials and not the plan. While the reduced M / ε spans less than 30
    the scalings are iterated in float32, below 300 in float64; beyond that the potentials are iterated in the log
    domain, a slice of the batch at a time. A small ε is approached by halving a larger one (ε-scaling), which takes at
    most half of the iterations.

    Parameters
    ----------
    a : (B, C_t) tensor
        Rows on the simplex, zeros allowed.
    b : (B, C_s) tensor
        Rows on the simplex, zeros allowed.
    M : (C_t, C_s) tensor
        Ground cost, not negative.
    reg
        ε, in the unit of M.
    max_iter
        Limit on the iterations of all values of ε together.
    tol
        Stop when every row's marginal error is below this.
    warn
        Whether to issue a `ConvergenceWarning` when the limit comes first.

    Raises
    ------
    ValueError
        For values that are non-finite, negative or not normalised, shapes that do not match, and reg ≤ 0.

    References
    ----------
    .. [1] M. Cuturi, "Sinkhorn Distances", NeurIPS 2013. Reduction, choice of precision and fallback are ours.
    """
    M = _check(("a", "b"), a, b, M, reg, max_iter, tol)
    return _solve(a.detach(), b.detach(), M, float(reg), max_iter=max_iter, tol=tol, warn=warn)


def _check(names: tuple[str, str], a: Tensor, b: Tensor, M: Tensor, reg: float, max_iter: int, tol: float) -> Tensor:
    """Return M detached, or raise `ValueError` for what no solver should be given."""
    _checks.positive("reg", reg)
    _checks.positive("tol", tol)
    if max_iter < 1:
        raise ValueError(f"max_iter must be >= 1, got {max_iter}")
    _checks.distributions(names[0], a)
    _checks.distributions(names[1], b)
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have as many rows, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return _checks.ground_cost(M, (a.shape[1], b.shape[1]))


def _solve(
    a: Tensor, b: Tensor, M: Tensor, reg: float, *, max_iter: int, tol: float, warn: bool, cost: bool = True
) -> TransportResult:
    # `cost` says whether the cost is asked for: it takes one more product, and is NaN without.
    # An autocast region would run the products in bfloat16, whose 8 bits no marginal survives.
    with torch.no_grad(), torch.autocast(device_type=a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        M = M.to(dtype)
        rows = M.amin(1)
        reduced = M - rows[:, None]
        columns = reduced.amin(0)
        reduced.sub_(columns)
        span = float(reduced.max()) / reg
        work = torch.float64 if span > _RANGE_SINGLE else dtype
        a_, b_, reduced = _normalised(a.to(work)), _normalised(b.to(work)), reduced.to(work)
        log_a, log_b = _log(a_), _log(b_)

        def iterate(step_reg: float, g: Tensor, limit: int, tol: float, cost: bool) -> _Iterated:
            log_domain = span * reg / step_reg > (_RANGE_SINGLE if work == torch.float32 else _RANGE_DOUBLE)
            method = _iterate_logs if log_domain else _iterate_scalings
            return method(a_, b_, log_a, log_b, reduced, step_reg, g, limit, tol, cost)

        g = torch.zeros_like(b_)
        iterations = 0
        larger = _larger_regs(reg, span)
        # Half of the iterations at least are kept for ε itself.
        limit = min(20, max_iter // (2 * len(larger))) if larger else 0
        for step_reg in larger if limit else ():
            _, g, _, _, used = iterate(step_reg, g, limit, max(tol, 1e-2), False)
            iterations += used
        f, g, error, expected, used = iterate(reg, g, max_iter - iterations, tol, cost)
        iterations += used
        converged = bool((error <= tol).all().item())
        f, g = f + rows.to(work), g + columns.to(work)
        objective = (f * a_).sum(1) + (g * b_).sum(1) - reg
        # Column j carries mass b_j at the mean cost `expected`; both reductions are added back.
        linear = torch.full_like(objective, math.nan)
        if expected is not None:
            linear = (b_ * (expected + columns)).sum(1) + (a_ * rows).sum(1)
    if warn and not converged and len(error):
        warnings.warn(
            f"sinkhorn stopped after {iterations} iterations with a marginal error of {float(error.max()):.1e} "
            f"(tol {tol:.1e}); raise max_iter, or reg ({reg:g})",
            ConvergenceWarning,
            stacklevel=3,
        )
    return TransportResult(
        cost=linear.to(dtype),
        objective=objective.to(dtype),
        f=f,
        g=g,
        marginal_error=error.to(dtype),
        iterations=iterations,
        converged=converged,
        M=M,
        reg=reg,
    )


def _larger_regs(reg: float, span: float) -> list[float]:
    """Return the values of ε to pass through on the way to `reg`: halvings, none when M / ε spans little."""
    halvings = max(0, math.ceil(math.log2(max(span, 1e-9) / _RANGE_SINGLE)))
    return [reg * 2.0**k for k in range(halvings, 0, -1)]


def _normalised(p: Tensor) -> Tensor:
    # Rounding of the input would otherwise be a floor under the marginal error, as sum(a) != sum(b).
    return p / p.sum(1, keepdim=True)


def _log(p: Tensor) -> Tensor:
    # The floor keeps potentials of classes without mass finite: they are gradients in `transport_loss`.
    return p.clamp_min(torch.finfo(torch.float32).tiny).log()


# f, g, the marginal error, each target class's mean cost (where it is asked for), and the iterations used.
_Iterated = tuple[Tensor, Tensor, Tensor, Tensor | None, int]


def _iterate_scalings(
    a: Tensor,
    b: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    M: Tensor,
    reg: float,
    g: Tensor,
    limit: int,
    tol: float,
    cost: bool,
) -> _Iterated:
    """Iterate u = a / (K v), v = b / (Kᵀ u) with K = exp(−M / ε)."""
    # Everything the size of a batch or of M is allocated once: at the sizes of a large label space, fresh memory
    # takes as long as the arithmetic in it.
    K = torch.mul(M, -1 / reg).exp_()
    v = torch.sub(g, g.amax(1, keepdim=True)).div_(reg).exp_()
    Kv, u, uK = v @ K.t(), torch.empty_like(a), torch.empty_like(b)
    error = a.new_zeros(a.shape[0])
    used = 0
    for used in range(1, limit + 1):
        torch.div(a, Kv, out=u)
        torch.mm(u, K, out=uK)
        torch.div(b, uK, out=v)
        torch.mm(v, K.t(), out=Kv)
        if used % _CHECK_EVERY == 0 or used == limit:
            error = u.mul_(Kv).sub_(a).abs_().sum(1)
            if bool((error <= tol).all().item()):
                break
    torch.div(a, Kv, out=u)
    torch.mm(u, K, out=uK)
    expected = (u @ K.mul_(M)).div_(uK) if cost else None
    return Kv.log_().neg_().add_(log_a).mul_(reg), uK.log_().neg_().add_(log_b).mul_(reg), error, expected, used


def _iterate_logs(
    a: Tensor,
    b: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    M: Tensor,
    reg: float,
    g: Tensor,
    limit: int,
    tol: float,
    cost: bool,
) -> _Iterated:
    """Iterate the potentials themselves by log-sum-exp, slices of the batch at a time."""
    size = max(1, _CHUNK // M.numel())
    error = a.new_zeros(a.shape[0])
    f = torch.zeros_like(a)
    g = g.clone()
    expected = torch.zeros_like(b) if cost else None
    used = 0
    for start in range(0, a.shape[0], size):
        part = slice(start, start + size)
        g_part = g[part]
        row = torch.logsumexp((g_part[:, None, :] - M) / reg, dim=2)
        for iteration in range(1, limit + 1):
            f_part = reg * (log_a[part] - row)
            g_part = reg * (log_b[part] - torch.logsumexp((f_part[:, :, None] - M) / reg, dim=1))
            row = torch.logsumexp((g_part[:, None, :] - M) / reg, dim=2)
            if iteration % _CHECK_EVERY == 0 or iteration == limit:
                error[part] = (torch.exp(f_part / reg + row) - a[part]).abs().sum(1)
                if bool((error[part] <= tol).all().item()):
                    break
        used = max(used, iteration)
        f_part = reg * (log_a[part] - row)
        inner = (f_part[:, :, None] - M) / reg
        total = torch.logsumexp(inner, dim=1)
        f[part], g[part] = f_part, reg * (log_b[part] - total)
        if expected is not None:
            expected[part] = (torch.exp(inner - total[:, None, :]) * M).sum(1)
    return f, g, error, expected, used


class _TransportLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, q, M, reg, max_iter, tol, warn):
        result = _solve(p.detach(), q.detach(), M, reg, max_iter=max_iter, tol=tol, warn=warn, cost=False)
        # Adding a constant to f and taking it from g changes nothing: only differences along the simplex count.
        ctx.save_for_backward(result.f - result.f.mean(1, keepdim=True), result.g - result.g.mean(1, keepdim=True))
        ctx.dtypes = p.dtype, q.dtype
        return result.objective

    @staticmethod
    def backward(ctx, grad):
        f, g = ctx.saved_tensors
        p_dtype, q_dtype = ctx.dtypes
        grad_p = (grad[:, None] * f).to(p_dtype) if ctx.needs_input_grad[0] else None
        grad_q = (grad[:, None] * g).to(q_dtype) if ctx.needs_input_grad[1] else None
        return grad_p, grad_q, None, None, None, None, None


def transport_loss(
    p: Tensor,
    q: Tensor,
    M: Tensor,
    reg: float,
    reduction: str = "mean",
    *,
    max_iter: int = 100,
    tol: float = 1e-2,
    warn: bool = False,
) -> Tensor:
    """Return S_ε(p, q; M) of each row, differentiable in p and q.

    S_ε(p, q; M) = min ⟨P, M⟩ + ε Σ P (log P − 1) over plans P with marginals p and q. By the envelope theorem its
    gradients on the simplex are the dual potentials f and g, centred to mean zero; no iteration is kept for the
    backward pass. Unrestricted q is best at q_j = Σ_i p_i softmax_j(−M_ij / ε): the teacher's distribution carried
    to the target's classes by the cost.

    Parameters
    ----------
    p : (B, C_t) tensor
        The teacher's distributions over its label space.
    q : (B, C_s) tensor
        The student's distributions over the target's classes.
    M : (C_t, C_s) tensor
        Ground cost, not negative, a constant.
    reg
        ε, in the unit of M.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
    max_iter, tol, warn
        As for `sinkhorn`; the defaults suit a gradient step.

    Raises
    ------
    ValueError
        As for `sinkhorn`, and for an unknown reduction.

    Notes
    -----
    The objective is that of SCTD (Lu et al., arXiv 2204.11526); the solver is ours.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    M = _check(("p", "q"), p, q, M, reg, max_iter, tol)
    loss = _TransportLoss.apply(p, q, M, float(reg), max_iter, tol, warn)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()
