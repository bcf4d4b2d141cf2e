"""What a trained student is worth: accuracy, per-class accuracy, calibration, confusion."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from pipeline.distillation.step import Head
from pipeline.models.gathering import Rows


@dataclass(frozen=True)
class Evaluation:
    """Scores of one student on one split.

    Attributes
    ----------
    accuracy : float
        Fraction of samples whose most probable class is the label.
    per_class : tuple of float
        The same for each class; NaN for a class without a sample.
    ece : float
        Expected calibration error, see `calibration_error`.
    nll : float
        Mean negative log-likelihood, in nats.
    confusion : (C, C) int64 tensor
        Row: label, column: prediction.
    samples : int
    """

    accuracy: float
    per_class: tuple[float, ...]
    ece: float
    nll: float
    confusion: torch.Tensor
    samples: int

    def as_dict(self, classes: tuple[str, ...]) -> dict[str, object]:
        """Return plain numbers for a JSON file."""
        return {
            "accuracy": self.accuracy,
            "ece": self.ece,
            "nll": self.nll,
            "samples": self.samples,
            "per_class": {name: value for name, value in zip(classes, self.per_class, strict=True) if value == value},
            "confusion": self.confusion.tolist(),
        }


@dataclass(frozen=True)
class HeadsEvaluation:
    """Scores of a student with several heads: one `Evaluation` a sub-task, over the images that belong to it.

    Attributes
    ----------
    heads : dict of str to Evaluation
        By name of the sub-task.
    """

    heads: dict[str, Evaluation]

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the sub-tasks."""
        return statistics.fmean(found.accuracy for found in self.heads.values())

    @property
    def ece(self) -> float:
        """Mean expected calibration error of the sub-tasks."""
        return statistics.fmean(found.ece for found in self.heads.values())

    def as_dict(self, classes: tuple[str, ...]) -> dict[str, object]:
        """Return plain numbers for a JSON file; `classes` are ``subtask/class``, all heads one after the other."""
        per_class: dict[str, float] = {}
        confusion: dict[str, object] = {}
        for name, found in self.heads.items():
            own = tuple(label for label in classes if label.startswith(f"{name}/"))
            per_class |= {key: value for key, value in zip(own, found.per_class, strict=True) if value == value}
            confusion[name] = found.confusion.tolist()
        return {
            "accuracy": self.accuracy,
            "accuracies": {name: found.accuracy for name, found in self.heads.items()},
            "ece": self.ece,
            "nll": statistics.fmean(found.nll for found in self.heads.values()),
            "samples": max(found.samples for found in self.heads.values()),
            "per_class": per_class,
            "confusion": confusion,
        }


@torch.inference_mode()
def predict(
    model: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Return the logits (N, C) of a model in eval mode over batches of images, on the CPU."""
    was_training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        model.eval()
    try:
        rows = Rows()
        for images in batches:
            rows.add(model(images.to(device)).float())
        return rows.all()
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(was_training)


def evaluate(logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Score logits against labels.

    Parameters
    ----------
    logits : (N, C) tensor
    labels : (N,) int64 tensor
        In [0, C).

    Raises
    ------
    ValueError
        If there is no sample, shapes differ, a logit is not finite or a label is out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite")
    classes = logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    correct, total = confusion.diagonal().double(), confusion.sum(1).double()
    return Evaluation(
        accuracy=float(correct.sum() / total.sum()),
        per_class=tuple((correct / total).tolist()),  # 0/0 is NaN: no sample of that class
        ece=calibration_error(logits.softmax(1), labels),
        nll=float(torch.nn.functional.cross_entropy(logits, labels)),
        confusion=confusion,
        samples=len(labels),
    )


def evaluate_heads(logits: torch.Tensor, labels: torch.Tensor, heads: Sequence[Head]) -> HeadsEvaluation:
    """Score a student with several heads; `labels` (N,) are classes of the images, from which each head has its own.

    Raises
    ------
    ValueError
        As for `evaluate`; also when no image belongs to a sub-task.
    """
    found = {}
    for head in heads:
        own = torch.tensor([*head.members, -1])[labels]
        rows = torch.nonzero(own >= 0)[:, 0]
        found[head.name] = evaluate(logits[rows][:, head.place], own[rows])
    return HeadsEvaluation(found)


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error with equal-width bins.

    ECE = Σ_b n_b/N · |accuracy_b − confidence_b|, where bin b holds the samples whose highest probability lies in
    ((b−1)/bins, b/bins].

    Parameters
    ----------
    probabilities : (N, C) tensor
    labels : (N,) int64 tensor

    References
    ----------
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence, predicted = probabilities.double().max(1)
    hit = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    zeros = torch.zeros(bins, dtype=torch.double)
    gap = zeros.index_add(0, index, hit - confidence)
    return float(gap.abs().sum() / len(labels))
