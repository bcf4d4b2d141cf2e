"""B-Tuning: the student predicts what Bayesian linear models on its teachers' features predict.

Shapes: A labelled images, B taught images, T teachers, D features, C classes of the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.distillation.kd import no_loss, weighted_mean
from pipeline.distillation.pairing import each_squared_error
from pipeline.distillation.relations import labelled_of
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks

# Singular values below this share of the largest are what rounding makes of zero.
_RANK = 1e-10
# Labels that the features meet exactly have no largest β. LogME's authors add this to the residual sum of squares.
_RESIDUAL = 1e-5
# The best α / β is looked for on a grid of this many points, within 10^±8 times the mean eigenvalue, and again around
# the best point: to 1e-4 in the logarithm after the last round.
_GRID, _DECADES, _ROUNDS = 33, 8.0, 4


@dataclass(frozen=True)
class LinearPosterior:
    """A Bayesian linear model of 0/1 labels, at the maximum of its evidence.

    Attributes
    ----------
    mean : (D,) tensor
        Of the features.
    weight : (D, C) tensor
        m, the mean of the posterior of the weights.
    base : (C,) tensor
        Frequency of every class.
    ratio : (C,) tensor
        α / β of every class: the weight decay that m stands for.
    evidence : float
        Largest log evidence, per sample, averaged over the classes that have one; nats.
    """

    mean: Tensor
    weight: Tensor
    base: Tensor
    ratio: Tensor
    evidence: float

    def predict(self, features: Tensor) -> Tensor:
        """Return base + (f − mean) m (B, C) of features (B, D)."""
        return self.base + (features - self.mean) @ self.weight


def linear_posterior(features: Tensor, y: Tensor, num_classes: int) -> LinearPosterior:
    """Fit a Bayesian linear model to the 0/1 labels of each class at the maximum of its evidence (LogME [1]_).

    y_c = F w + e, w ~ N(0, I / α), e ~ N(0, I / β); α and β maximise log p(y_c | F, α, β), and the posterior's mean is
    m_c = (Fᵀ F + (α / β) I)⁻¹ Fᵀ y_c.

    Here features and labels are centred, which is an intercept with a flat prior: N − 1 degrees of freedom are left,
    and the frequencies of the classes are added to a prediction. Published are neither centring nor a bias, so that m
    pays for the mean of features and labels; a class without an image is predicted 0 either way. For given t = α / β
    the best β has a closed form; t is searched for on a grid, as the published fixed point may end far from the
    maximum. Both are ours.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Classes in [0, num_classes).
    num_classes
        C.

    Returns
    -------
    LinearPosterior
        In double precision.

    Raises
    ------
    ValueError
        For shapes that do not match, features that are not finite, labels outside the classes, and fewer than two
        classes in y.

    References
    ----------
    .. [1] You et al., "LogME: practical assessment of pre-trained models for transfer learning", ICML 2021
       (arXiv 2102.11005).
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features must have shape (N, D) with N, D >= 1, got shape {tuple(features.shape)}")
    f = _checks.finite("features", features.detach()).double()
    y = _checks.labels("y", y.to(f.device), len(f), num_classes)
    targets = torch.nn.functional.one_hot(y, num_classes).double()
    present = targets.sum(0) > 0
    if int(present.sum()) < 2:
        raise ValueError(f"y must hold at least 2 classes, got {int(present.sum())}")
    mean, base, size = f.mean(0), targets.mean(0), len(f) - 1
    targets = targets - base
    left, singular, right = torch.linalg.svd(f - mean, full_matrices=False)
    # Centring leaves rounding where all images have the same features, which is small beside the mean.
    kept = singular > _RANK * max(float(singular[0]), float(f.norm()))
    left, singular, right = left[:, kept], singular[kept], right[kept]
    values, x = singular.square(), left.t() @ targets
    energy = x.square()
    outside = (targets.square().sum(0) - energy.sum(0)).clamp_min(0) + _RESIDUAL * max(1 - len(values) / size, 0)
    ratio, evidence = _maximum(values, energy, outside, size)
    weight = right.t() @ (singular[:, None] / (values[:, None] + ratio) * x)
    return LinearPosterior(mean, weight, base, ratio, float(evidence[present].mean()))


def _maximum(values: Tensor, energy: Tensor, outside: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the best t = α / β and the evidence there, (C,) tensors.

    `values` (K,) are the squared singular values, `energy` (K, C) what labels have along each, `outside` (C,) the rest.
    """
    unit = float(values.mean()) if len(values) else 1.0
    middle, width = torch.zeros_like(outside), _DECADES
    best, found = torch.full_like(outside, -torch.inf), middle
    for _ in range(_ROUNDS):
        for offset in torch.linspace(-width, width, _GRID).tolist():
            t = unit * 10 ** (middle + offset)
            left = t / (values[:, None] + t)  # share of each coordinate that stays in the residual
            variance = ((left * energy).sum(0) + outside) / size  # 1 / β, at its best
            evidence = 0.5 * left.log().sum(0) / size - 0.5 * (2 * math.pi * math.e * variance).log()
            found = torch.where(evidence > best, middle + offset, found)
            best = torch.maximum(evidence, best)
        middle, width = found, width * 2 / (_GRID - 1)
    return unit * 10**found, best


def b_tuning_loss(predicted: Tensor, predictions: Sequence[Tensor], mix: Tensor) -> Tensor:
    """Return MSE(predicted, Σ_t π_t predictions_t), a mean over images and classes.

    Parameters
    ----------
    predicted : (B, C) tensor
        From the student's features.
    predictions : T tensors (B, C)
        The teachers' linear predictions. No gradient flows to them.
    mix : (T,) tensor
        π, a distribution over the teachers.

    Raises
    ------
    ValueError
        For shapes that do not match, and weights that are no distribution.
    """
    if not predictions or mix.shape != (len(predictions),):
        raise ValueError(
            f"mix must have one weight a teacher, got shape {tuple(mix.shape)} for {len(predictions)} teachers"
        )
    _checks.distributions("mix", mix[None])
    target = predictions[0].detach() * mix[0]
    for weight, prediction in zip(mix[1:], predictions[1:], strict=True):
        target = target + weight * prediction.detach()
    return weighted_mean(each_squared_error(predicted, target), None)


class BTuning(Objective):
    """B-Tuning [1]_: squared distance to the predictions of all teachers, mixed by their evidence.

    loss = MSE(A f_s, Σ_t π_t f_t m_t), π = softmax(evidence_t / τ): f_t m_t is the posterior-mean linear prediction of
    the 0/1 labels from teacher t's features (`linear_posterior`, fitted once on the labelled images). Part:
    ``b_tuning``. The published weight of this loss is 100, and the τ of the authors' code 0.1.

    Published, A is the posterior mean of the pre-trained student's own features, fixed. Here the student starts from
    nothing, and A is a linear layer that is trained with it and dropped afterwards (ours); so are the intercept, see
    `linear_posterior`, and a mean over the taught images instead of the labelled ones. All teachers speak of every
    image: the shares have no part in it.

    Parameters
    ----------
    about : About
        The student's width, its teachers' features of the labelled images, and the labels.
    temperature
        τ > 0, in nats per sample.

    Raises
    ------
    ValueError
        Without teachers, the student's width, labelled features of a teacher or two classes among the labels, and for
        τ ≤ 0.

    References
    ----------
    .. [1] You et al., "Ranking and tuning pre-trained models: a new paradigm for exploiting model hubs",
       JMLR 23(209), 2022 (arXiv 2110.10545).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "said.features", "labelled", "features"})

    def __init__(self, about: About, *, temperature: float = 1.0) -> None:
        super().__init__()
        temperature = _checks.positive("temperature", temperature)
        if not about.teachers:
            raise ValueError("b_tuning needs at least one teacher, got none")
        if about.feature_dim is None:
            raise ValueError("b_tuning needs the student's penultimate features, and it has none")
        # The labels are classes of the images, which several heads divide among themselves.
        classes = len(about.heads[0].members) if about.heads else len(about.classes)
        evidences = []
        for number, teacher in enumerate(about.teachers):
            features, labels = labelled_of(teacher)
            try:
                fit = linear_posterior(features, labels, classes)
            except ValueError as error:
                raise ValueError(f"b_tuning of teacher {teacher.name!r}: {error}") from None
            kind = torch.promote_types(features.dtype, torch.float32)
            for name, value in (("mean", fit.mean), ("weight", fit.weight), ("base", fit.base)):
                self.register_buffer(f"{name}_{number}", value.to(kind), persistent=False)
            evidences.append(fit.evidence)
        mix = torch.softmax(torch.tensor(evidences, dtype=torch.float64) / temperature, dim=0)
        self.register_buffer("mix", mix.to(kind), persistent=False)
        self.map = nn.Linear(about.feature_dim, classes)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "b_tuning"}``; 0 when nobody is taught."""
        if step.said is None:
            return no_loss(step, "b_tuning", objective=self)
        assert step.said.features is not None
        assert step.features is not None
        predictions = []
        for number, features in enumerate(step.said.features):
            mean, weight, base = (self.get_buffer(f"{name}_{number}") for name in ("mean", "weight", "base"))
            predictions.append(base + (features.detach().to(mean) - mean) @ weight)
        predicted = self.map(step.features[step.taught].to(self.map.weight.dtype))
        loss = no_loss(step)["loss"] + b_tuning_loss(predicted, predictions, self.get_buffer("mix"))
        return {"loss": loss, "b_tuning": loss.detach()}
