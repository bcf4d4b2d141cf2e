"""The shared reference network in which the class centres of all teachers, and of the task, are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.models.sources import load_teacher
from pipeline.models.spec import TeacherSpec
from pipeline.models.zoo import teacher_fingerprint

Embedding = Callable[[Tensor], Tensor]

_PIXELS = "pixels"
_GRID = 14


def reference_id(spec: TeacherSpec | None) -> str:
    """Return what a reference is called: centres are comparable only where it is the same. Nothing is loaded.

    Raises
    ------
    TeacherError
        When the teacher's weight file can't be read.
    """
    return _PIXELS if spec is None else f"{spec.name}-{teacher_fingerprint(spec)[:12]}"


def reference_embedding(spec: TeacherSpec | None, **load_kwargs: Any) -> tuple[Embedding, str]:
    """Return a shared embedding of images, and its id.

    Parameters
    ----------
    spec : TeacherSpec or None
        A teacher, whose penultimate features are taken; None: the pixels themselves, in three channels, averaged over
        a 14 x 14 grid, minus 1/2. [ours]
    **load_kwargs
        For `load_teacher`.

    Returns
    -------
    embed : callable
        Maps images (B, 1 or 3, H, W), uint8 or float in 0..255, of any size to features (B, D_ref) on the CPU.
    reference : str
        See `reference_id`.

    Raises
    ------
    TeacherError
        When the teacher can't be loaded.
    """
    if spec is None:
        return _pixels, _PIXELS
    name, teacher = reference_id(spec), load_teacher(spec, **load_kwargs)

    def embed(images: Tensor) -> Tensor:
        with torch.inference_mode():
            features = teacher(images.to(teacher.device)).features.cpu()
        return features.clone()  # an ordinary tensor, which may take part in a graph

    return embed, name


def _pixels(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1 or 3, H, W), got {tuple(images.shape)}")
    pooled = adaptive_avg_pool2d(images.float() / 255, _GRID)
    return pooled.expand(-1, 3, -1, -1).flatten(1) - 0.5
