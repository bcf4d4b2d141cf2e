"""What a teacher's outputs say of the task: its label space, the cost from there to the target's classes, the carry.

A teacher never learnt the target's classes. A bridge, fitted on a few labelled images, gives three things:
``distribution``, p over the teacher's label space (B, L); ``M``, the ground cost (L, C_s) from that space to the
target's classes; and ``carry``, which takes p to the target's classes (B, C_s), so that teachers compare.

Shapes: B samples, N fitted samples, L classes of the teacher's label space, C_t classes of its head, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.transport import _checks
from pipeline.transport.centres import centre_cost, held_out, whitening
from pipeline.transport.ground_cost import class_centres, conditional_probabilities, prototype_cost

BridgeKind = Literal["prototype", "conditional", "centres", "given"]
_FITTED = ("prototype", "conditional", "centres")


@dataclass(frozen=True)
class Bridge:
    """A teacher's label space and its way to the target's classes; made by `fit_bridge`.

    Attributes
    ----------
    kind
        ``"prototype"``, ``"conditional"`` or ``"given"``: the label space is that of the teacher's head, L = C_t.
        ``"centres"``: it is the teacher's view of the task, relations to class centres in its embedding, L = C_s.
    temperature
        τ of the softmax that gives p.
    M : (L, C_s) tensor in [0, 1]
        Ground cost.
    plan : (L, C_s) tensor
        Row-stochastic: what each class of the label space says of the target's classes.
    projection : (D, R) tensor
        Whitens the features (``"centres"``; empty otherwise).
    origin : (R,) tensor
        Subtracted from the whitened features (``"centres"``; empty otherwise).
    centres : (C_s, R) tensor
        Unit vectors (``"centres"``; empty otherwise).
    """

    kind: BridgeKind
    temperature: float
    M: Tensor
    plan: Tensor
    projection: Tensor
    origin: Tensor
    centres: Tensor

    def distribution(self, logits: Tensor | None, features: Tensor) -> Tensor:
        """Return p over the teacher's label space.

        Parameters
        ----------
        logits : (B, C_t) tensor
            Not needed by ``"centres"``.
        features : (B, D) tensor

        Returns
        -------
        (B, L) tensor

        Raises
        ------
        ValueError
            For shapes that are not those of the fit and values that are not finite.
        """
        if self.kind != "centres":
            return _softmax(logits, self.M.shape[0], self.temperature)
        if features.ndim != 2 or features.shape[1] != self.projection.shape[0]:
            raise ValueError(
                f"features must have shape (B, {self.projection.shape[0]}), got shape {tuple(features.shape)}"
            )
        embedded = _checks.finite("features", features).to(self.projection) @ self.projection
        relation = F.normalize(embedded - self.origin, dim=1) @ self.centres.t()
        return torch.softmax(relation / self.temperature, dim=1)

    def carry(self, p: Tensor) -> Tensor:
        """Return the distribution over the target's classes that p : (B, L) tensor stands for, a (B, C_s) tensor."""
        if p.ndim != 2 or p.shape[1] != self.plan.shape[0]:
            raise ValueError(f"p must have shape (B, {self.plan.shape[0]}), got shape {tuple(p.shape)}")
        return p @ self.plan.to(p)

    def state(self) -> dict[str, Tensor]:
        """Return the bridge as plain tensors, for `torch.save` or safetensors; `from_state` reads it back."""
        return {
            "kind": torch.tensor(get_args(BridgeKind).index(self.kind)),
            "temperature": torch.tensor(self.temperature, dtype=torch.float64),
            **{name: getattr(self, name).contiguous() for name in ("M", "plan", "projection", "origin", "centres")},
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Bridge:
        """Return the bridge that `state` was taken from."""
        return cls(
            kind=get_args(BridgeKind)[int(state["kind"])],
            temperature=float(state["temperature"]),
            M=state["M"],
            plan=state["plan"],
            projection=state["projection"],
            origin=state["origin"],
            centres=state["centres"],
        )


def fit_bridge(
    kind: BridgeKind,
    *,
    logits: Tensor | None,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    classifier_weight: Tensor | None = None,
    temperature: float | None = None,
    smoothing: float = 1.0,
    reg: float = 0.05,
    ridge: float | None = None,
) -> Bridge:
    """Fit a bridge on labelled images.

    - ``"prototype"``: p = softmax(z / τ); M from `prototype_cost`; plan = softmax_j(−M_ij / ε) [1]_.
    - ``"conditional"``: p = softmax(z / τ); plan = P̂(j | i) and M = 1 − P̂(j | i), smoothed.
    - ``"centres"``: p_j = softmax_j(cos(h − h̄, c_j − h̄) / τ) with h the whitened features, c_j the centre of target
      class j among them and h̄ the mean of the centres; M_jk = (1 − cos(c_j − h̄, c_k − h̄)) / 2 off the diagonal and 0 on
      it; the plan is the identity. It uses what the teacher sees rather than what it would call it.

    The features are whitened (`whitening`): a specialist's embedding spends most of its variance on its own few
    classes, and without that the others stay in a corner. λ and τ, where they are not given, are those with the
    best likelihood of held-out labels (`held_out`), so that a teacher which tells the target's classes apart badly is
    also unsure of them: only then do ambiguities compare between teachers. The three kinds are ours.

    Parameters
    ----------
    kind
    logits : (N, C_t) tensor
        Not needed by ``"centres"``.
    features : (N, D) tensor
    labels : (N,) tensor
        Target classes, each with at least one sample.
    num_classes
        C_s.
    classifier_weight : (C_t, D) tensor
        Needed by ``"prototype"``.
    temperature
        τ; by default 1 for the head's label space and calibrated for ``"centres"``.
    smoothing
        Of ``"conditional"``, in samples.
    reg
        ε of the plan of ``"prototype"``.
    ridge
        λ of the whitening of ``"centres"``, see `whitening`; by default chosen with τ.

    Raises
    ------
    ValueError
        For an unknown kind, a missing classifier weight, shapes that do not match and a class without a sample.

    References
    ----------
    .. [1] The best unrestricted answer to the transport loss; see `pipeline.transport.sinkhorn.transport_loss`.
    """
    if kind not in _FITTED:
        raise ValueError(f"kind must be one of {', '.join(_FITTED)}, got {kind!r}")
    tau = None if temperature is None else _checks.positive("temperature", temperature)
    if kind == "centres":
        return _fit_centres(features, labels, num_classes, tau, ridge)
    tau = 1.0 if tau is None else tau
    p = _softmax(logits, None, tau)
    if kind == "conditional":
        plan = conditional_probabilities(p, labels, num_classes, smoothing=smoothing)
        M = (1 - plan).clamp(0, 1)  # as `conditional_cost`
    elif classifier_weight is None:
        raise ValueError("classifier_weight must be given for the prototype bridge, got None")
    else:
        M = prototype_cost(classifier_weight, features, labels, num_classes)
        plan = torch.softmax(-M / _checks.positive("reg", reg), dim=1)
    # One empty tensor each: safetensors refuses two names of the same memory.
    return Bridge(kind, tau, M, plan, features.new_zeros(0), features.new_zeros(0), features.new_zeros(0))


def given_bridge(M: Tensor, *, temperature: float | None = None, reg: float = 0.05) -> Bridge:
    """Return a bridge over a ground cost that took no labels, from `names_cost` or `reference_cost`.

    p = softmax(z / τ) over the teacher's classes; plan = softmax_j(−M_ij / ε), the best unrestricted answer to the
    transport loss: a class that is related to none of the target's says nothing of them.

    Parameters
    ----------
    M : (C_t, C_s) tensor in [0, 1]
    temperature
        τ, by default 1.
    reg
        ε, in the unit of M.

    Raises
    ------
    ValueError
        For a cost that is negative or not finite, and for τ or ε ≤ 0.
    """
    M = _checks.ground_cost(M)
    tau = 1.0 if temperature is None else _checks.positive("temperature", temperature)
    plan = torch.softmax(-M / _checks.positive("reg", reg), dim=1)
    return Bridge("given", tau, M, plan, M.new_zeros(0), M.new_zeros(0), M.new_zeros(0))


def pixel_features(images: Tensor, *, grid: int = 14) -> Tensor:
    """Return images averaged to a small grid and flattened: an embedding that took no teacher.

    A ``"centres"`` bridge over it is what a teacher has to improve on to be of use.

    Parameters
    ----------
    images : (B, C, H, W) tensor
        uint8, or float in 0..255.
    grid
        Side of the grid; smaller images keep their size.

    Returns
    -------
    (B, D) tensor in [0, 1]
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got shape {tuple(images.shape)}")
    size = min(grid, images.shape[2]), min(grid, images.shape[3])
    return F.adaptive_avg_pool2d(images.float() / 255, size).flatten(1)


def _fit_centres(
    features: Tensor, labels: Tensor, num_classes: int, temperature: float | None, ridge: float | None
) -> Bridge:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    class_centres(features, labels, num_classes)  # checks features and labels
    if temperature is None or ridge is None:
        found = held_out(features, labels, num_classes, ridge=ridge)
        ridge, temperature = found.ridge, found.temperature if temperature is None else temperature
    projection = whitening(features, ridge)
    centres = class_centres(features @ projection, labels, num_classes)
    origin = centres.mean(0)
    directions = F.normalize(centres - origin, dim=1)
    M = centre_cost(directions)
    plan = torch.eye(num_classes, dtype=M.dtype, device=M.device)
    return Bridge("centres", temperature, M, plan, projection, origin, directions)


def _softmax(logits: Tensor | None, classes: int | None, temperature: float) -> Tensor:
    if logits is None:
        raise ValueError("logits must be given for a bridge from the teacher's head, got None")
    if logits.ndim != 2 or logits.shape[1] == 0 or (classes is not None and logits.shape[1] != classes):
        raise ValueError(f"logits must have shape (B, {classes or 'C_t'}), got shape {tuple(logits.shape)}")
    logits = _checks.finite("logits", logits)
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
