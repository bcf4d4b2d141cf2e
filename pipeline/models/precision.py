"""Half precision where it is safe: tried on a first batch against single precision."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import TeacherError
from pipeline.models.teacher import Teacher, predict

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TRIED = 32  # images
# Largest differences from single precision that are let pass: of a probability, and of the direction of the features.
_PROBABILITY, _DIRECTION = 0.05, 1e-3


def choose_autocast(teacher: Teacher, images: Tensor, precision: Precision = "auto") -> torch.dtype | None:
    """Return the type in which a teacher may compute; None for single precision.

    ``auto`` is bfloat16 on a GPU that computes in it and single precision elsewhere (a CPU gains nothing by it without
    special instructions). Half precision of either kind is taken only if on 32 of `images` no probability moves by more
    than 0.05, no feature vector turns by more than cos = 0.999, and nothing overflows.

    Parameters
    ----------
    teacher : Teacher
    images : (B, C, H, W) tensor
        A first batch.
    precision
    """
    if precision == "auto":
        on_gpu = teacher.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if on_gpu else "fp32"
    dtype = _TYPES.get(precision)
    if dtype is None:
        return None
    images = images[:_TRIED]
    exact = predict(teacher, [images])
    try:
        rough = predict(teacher, [images], autocast=dtype)
    except (TeacherError, RuntimeError):  # overflow, or an operator that this type does not have
        return None
    moved = (exact.logits.softmax(1) - rough.logits.softmax(1)).abs().max()
    turned = 1 - F.cosine_similarity(exact.features, rough.features, dim=1, eps=1e-12).min()
    return dtype if float(moved) <= _PROBABILITY and float(turned) <= _DIRECTION else None
