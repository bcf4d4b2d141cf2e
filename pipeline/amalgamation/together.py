"""What a set of teachers says when it looks at an image together: one view of the task from all embeddings at once.

Each teacher's own view is a distribution, and distributions forget what the embeddings still hold: two specialists that
are both unsure of a class may tell it apart between them. Ours; compared with the least ambiguous teacher and with the
average in `benchmarks/distill`.

Shapes: T teachers, N labelled samples, B samples, D_t features of teacher t, C_s target classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.transport.bridge import Bridge, fit_bridge
from pipeline.transport.centres import held_out_distributions


@dataclass(frozen=True)
class Together:
    """A bridge over the concatenated embeddings of a set; made by `fit_together`.

    Attributes
    ----------
    origins : T tensors (D_t,)
        Mean of each embedding over the labelled samples.
    scales : T numbers
        Mean distance of the labelled samples to it, by which an embedding is divided: none of them is heard the more
        for the size of its numbers.
    bridge : Bridge
        Of kind ``"centres"``: its label space is the task's classes as the set sees them.
    """

    origins: tuple[Tensor, ...]
    scales: tuple[float, ...]
    bridge: Bridge

    def distribution(self, features: Sequence[Tensor]) -> Tensor:
        """Return p (B, C_s) from T tensors (B, D_t).

        Raises
        ------
        ValueError
            For shapes that are not those of the fit and values that are not finite.
        """
        if len(features) != len(self.origins):
            raise ValueError(f"features must be of {len(self.origins)} teachers, got {len(features)}")
        return self.bridge.distribution(None, _joined(features, self.origins, self.scales))


def fit_together(
    features: Sequence[Tensor], labels: Tensor, num_classes: int, *, temperature: float | None = None
) -> Together:
    """Fit the view of a set on labelled samples.

    x = [(f_1 − f̄_1) / s_1, …, (f_T − f̄_T) / s_T] with s_t = mean_n ‖f_t,n − f̄_t‖, and a ``"centres"`` bridge over x
    (`pipeline.transport.bridge.fit_bridge`), whose whitening and temperature have the best likelihood of held-out
    labels.

    Parameters
    ----------
    features : T tensors (N, D_t)
    labels : (N,) tensor
        Target classes, each with at least one sample.
    num_classes
        C_s.
    temperature
        τ; by default calibrated.

    Raises
    ------
    ValueError
        For no teacher, shapes that do not match, values that are not finite and a class without a sample.
    """
    origins, scales = _sizes(features)
    x = _joined(features, origins, scales)
    bridge = fit_bridge(
        "centres", logits=None, features=x, labels=labels, num_classes=num_classes, temperature=temperature
    )
    return Together(origins, scales, bridge)


def pseudo_labels(said: Tensor) -> Tensor:
    """Return the labels that teachers give images by their average, for a view of a task without labels.

    y_b = argmax_c p̄_bc with p̄ = 1/T Σ_t p_t. Teachers that know different classes each miss the others'; the centres
    that such labels give in all their embeddings tell these classes apart better than the average does. A class that no
    image gets has the image with the largest p̄ of it, so that no class is lost.

    Parameters
    ----------
    said : (T, N, C_s) tensor
        What each teacher says, carried to the task's classes.

    Raises
    ------
    ValueError
        For fewer images than classes, or another shape.
    """
    if said.ndim != 3 or said.shape[1] < said.shape[2]:
        raise ValueError(f"said must be (T, N, C_s) with at least C_s images, got {tuple(said.shape)}")
    mean = said.mean(0)
    labels = mean.argmax(1)
    counts = torch.bincount(labels, minlength=mean.shape[1])
    for missing in torch.nonzero(counts == 0)[:, 0].tolist():
        # Not from a class that has no other image.
        spare = counts[labels] > 1
        row = int(torch.where(spare, mean[:, missing], -1.0).argmax())
        counts[labels[row]] -= 1
        labels[row] = missing
        counts[missing] = 1
    return labels


def together_held_out(features: Sequence[Tensor], labels: Tensor, num_classes: int) -> Tensor:
    """Return what a set says of labelled samples that its view was not fitted on, (N, C_s).

    In five folds, see `pipeline.transport.centres.held_out`. A sample that is the only one of its class gets the
    frequencies of the classes.

    Parameters
    ----------
    features, labels, num_classes
        See `fit_together`.

    Raises
    ------
    ValueError
        See `fit_together`.
    """
    rows, told = held_out_distributions(_joined(features, *_sizes(features)), labels, num_classes)
    frequencies = torch.bincount(labels.long(), minlength=num_classes).to(told) / len(labels)
    p = frequencies.expand(len(labels), -1).clone()
    p[rows] = told
    return p


def _sizes(features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    if not features:
        raise ValueError("features must be of at least one teacher, got none")
    if any(one.ndim != 2 or len(one) != len(features[0]) for one in features):
        shapes = ", ".join(str(tuple(one.shape)) for one in features)
        raise ValueError(f"features must have shapes (N, D_t) with one N, got {shapes}")
    origins = tuple(one.float().mean(0) for one in features)
    scales = tuple(
        float((one.float() - origin).norm(dim=1).mean()) for one, origin in zip(features, origins, strict=True)
    )
    return origins, tuple(scale if scale > 0 else 1.0 for scale in scales)  # a teacher that sees nothing adds nothing


def _joined(features: Sequence[Tensor], origins: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    parts = [(one.float() - origin) / scale for one, origin, scale in zip(features, origins, scales, strict=True)]
    return torch.cat(parts, 1)
