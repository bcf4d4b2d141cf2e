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
from pipeline.transport.ground_cost import (
    class_centres,
    conditional_probabilities,
    cosine_cost,
    prototype_cost,
)

BridgeKind = Literal["prototype", "conditional", "centres"]


# Values of τ that the centres bridge chooses from: cosines lie in [−1, 1], beyond 2 every relation is flat.
_TEMPERATURES = torch.logspace(-1.5, 0.3, 37)


@dataclass(frozen=True)
class Bridge:
    """A teacher's label space and its way to the target's classes; made by `fit_bridge`.

    Attributes
    ----------
    kind
        ``"prototype"`` or ``"conditional"``: the label space is that of the teacher's head, L = C_t.
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
    shrinkage: float = 0.5,
) -> Bridge:
    """Fit a bridge on labelled images.

    - ``"prototype"``: p = softmax(z / τ); M from `prototype_cost`; plan = softmax_j(−M_ij / ε) [1]_.
    - ``"conditional"``: p = softmax(z / τ); plan = P̂(j | i) and M = 1 − P̂(j | i), smoothed.
    - ``"centres"``: p_j = softmax_j(cos(h − h̄, c_j − h̄) / τ) with h the whitened features, c_j the centre of target
      class j among them and h̄ the mean of the centres; M_jk = (1 − cos(c_j − h̄, c_k − h̄)) / 2 off the diagonal and 0 on
      it; the plan is the identity. It uses what the teacher sees rather than what it would call it.

    Whitening is by Σ^(−1/2) with Σ = (1 − s) Cov(f) + s (tr Cov(f) / D) I: a specialist's embedding spends most of its
    variance on its own few classes, and without it the others stay in a corner. τ, where it is not given, is the one
    with the best leave-one-out likelihood of the labels, so that a teacher which tells the target's classes apart
    badly is also unsure of them: only then do ambiguities compare between teachers. The three kinds are ours.

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
    shrinkage
        s of ``"centres"``, in (0, 1]; 1 leaves the features as they are.

    Raises
    ------
    ValueError
        For an unknown kind, a missing classifier weight, shapes that do not match and a class without a sample.

    References
    ----------
    .. [1] The best unrestricted answer to the transport loss; see `pipeline.transport.sinkhorn.transport_loss`.
    """
    if kind not in get_args(BridgeKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(BridgeKind))}, got {kind!r}")
    tau = None if temperature is None else _checks.positive("temperature", temperature)
    if kind == "centres":
        return _fit_centres(features, labels, num_classes, tau, shrinkage)
    tau = 1.0 if tau is None else tau
    p = _softmax(logits, None, tau)
    if kind == "conditional":
        plan = conditional_probabilities(p, labels, num_classes, smoothing=smoothing)
        M = 1 - plan
    elif classifier_weight is None:
        raise ValueError("classifier_weight must be given for the prototype bridge, got None")
    else:
        M = prototype_cost(classifier_weight, features, labels, num_classes)
        plan = torch.softmax(-M / _checks.positive("reg", reg), dim=1)
    # One empty tensor each: safetensors refuses two names of the same memory.
    return Bridge(kind, tau, M, plan, features.new_zeros(0), features.new_zeros(0), features.new_zeros(0))


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
    features: Tensor, labels: Tensor, num_classes: int, temperature: float | None, shrinkage: float
) -> Bridge:
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    class_centres(features, labels, num_classes)  # checks features and labels
    projection = _whitening(features, shrinkage)
    embedded = features @ projection
    centres = class_centres(embedded, labels, num_classes)
    if temperature is None:
        temperature = _calibrate(embedded, labels.long(), centres)
    origin = centres.mean(0)
    directions = F.normalize(centres - origin, dim=1)
    M = cosine_cost(directions, directions).fill_diagonal_(0)
    plan = torch.eye(num_classes, dtype=M.dtype, device=M.device)
    return Bridge("centres", temperature, M, plan, projection, origin, directions)


def _whitening(features: Tensor, shrinkage: float) -> Tensor:
    """Return Σ^(−1/2), a (D, D) tensor, of the shrunk covariance; the identity for features that do not vary."""
    width = features.shape[1]
    centred = (features - features.mean(0)).double()
    covariance = centred.t() @ centred / len(features)
    scale = float(covariance.diagonal().mean())
    identity = torch.eye(width, dtype=torch.float64, device=features.device)
    if scale <= 0:
        return identity.to(features)
    # Scaled to a mean variance of one first: features of any magnitude keep the eigenvalues well within range.
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance / scale + shrinkage * identity)
    return (vectors @ torch.diag(values.clamp_min(shrinkage).rsqrt()) @ vectors.t() / scale**0.5).to(features)


def _calibrate(embedded: Tensor, labels: Tensor, centres: Tensor) -> float:
    """Return the τ whose softmax of leave-one-out relations gives the labels their highest likelihood."""
    counts = torch.bincount(labels, minlength=len(centres)).to(embedded)
    rows = torch.arange(len(labels), device=embedded.device)
    usable = counts[labels] > 1  # a class's only sample has no centre but itself
    if not bool(usable.any()):
        return 0.1
    rows, own, x = rows[usable], labels[usable], embedded[usable]
    moved = (counts[own, None] * centres[own] - x) / (counts[own, None] - 1)  # the own centre without the sample
    shift = (moved - centres[own]) / len(centres)
    origin = centres.mean(0) + shift
    relations = torch.stack([F.cosine_similarity(x - origin, centre - origin, dim=1) for centre in centres], dim=1)
    own_relation = F.cosine_similarity(x - origin, moved - origin, dim=1)
    relations = relations.scatter(1, own[:, None], own_relation[:, None])
    losses = torch.stack([F.cross_entropy(relations / float(tau), own) for tau in _TEMPERATURES])
    return float(_TEMPERATURES[int(losses.argmin())])


def _softmax(logits: Tensor | None, classes: int | None, temperature: float) -> Tensor:
    if logits is None:
        raise ValueError("logits must be given for a bridge from the teacher's head, got None")
    if logits.ndim != 2 or logits.shape[1] == 0 or (classes is not None and logits.shape[1] != classes):
        raise ValueError(f"logits must have shape (B, {classes or 'C_t'}), got shape {tuple(logits.shape)}")
    logits = _checks.finite("logits", logits)
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
