"""The product's own score: what a teacher knows of a task by three accounts: its view, its classes, its features.

Shapes: N samples, D features, C_t teacher classes, C_s target classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.assessment.linear import linear_gain
from pipeline.assessment.scores import leep_terms
from pipeline.transport import _checks
from pipeline.transport.centres import held_out

# Weights of the account by the teacher's classes and of that by its features; see `transfer_score`.
CLASSES, FEATURES = 0.5, 2.0


def transfer_score(logits: Tensor, features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return log r_b(y_b) + ½ log l_b(y_b) + 2 g_b for each sample; the mean is the score. Higher is better. Ours.

    - r_b is what the teacher's view of the task says of sample b: its distribution over the label space of the target's
      class centres, carried to the target's classes at no cost, by a view that was fitted without b (`held_out`). It is
      what a student would be taught, and so the main account.
    - l_b is what the teacher's own classes say of it, carried by the conditional plan P̂(j | i): the term of LEEP.
    - g_b is the share of the label that a linear map of its features explains, b left out (`linear_gain`).

    The first two are logarithms of probabilities [nat], the third is at most 1. The weights are round numbers near the
    best on the three calibration tasks of `benchmarks/ranking`, which share no image with the tasks that the score is
    judged on there. A mean over samples of one probe: scores of teachers on the same probe compare, those on different
    tasks do not.

    Parameters
    ----------
    logits : (N, C_t) tensor
    features : (N, D) tensor
    y : (N,) tensor
        Target classes, each with at least one sample.
    num_classes
        C_s ≥ 2.

    Returns
    -------
    (N,) float64 tensor
        A sample that is the only one of its class counts at the frequency of its class in the first account.

    Raises
    ------
    ValueError
        For shapes that do not match, values that are not finite, a class without a sample and a single class.
    """
    if logits.ndim != 2 or len(logits) != len(features) or not logits.shape[1]:
        raise ValueError(f"logits must have shape ({len(features)}, C_t), got shape {tuple(logits.shape)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    _checks.finite("logits", logits)
    gain = linear_gain(features, y, num_classes)
    view = held_out(features, y, num_classes)
    told = (torch.bincount(y.long(), minlength=num_classes).double() / len(y)).log()[y.long()]
    right = view.p.gather(1, view.y[:, None])[:, 0].double()
    told[view.rows] = right.clamp_min(torch.finfo(torch.float32).tiny).log()
    return told + CLASSES * leep_terms(logits.double().softmax(1), y) + FEATURES * gain
