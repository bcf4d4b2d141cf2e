"""Supervision: the cross-entropy of images that have a label."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distillation.step import About, Objective, Step


def labelled_cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the rows that have a label; 0, with a gradient of 0, when none has.

    Parameters
    ----------
    logits : (B, C_s) tensor
    y : (B,) tensor
        Target classes, −1 for none.

    Raises
    ------
    ValueError
        For shapes that do not match and labels that are neither −1 nor a class.
    """
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and y must have shapes (B, C) and (B,), got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
    # On a GPU a look at the values would wait for all that it has been given to do.
    if y.numel() and y.device.type == "cpu" and (int(y.min()) < -1 or int(y.max()) >= logits.shape[1]):
        raise ValueError(f"y must lie in [-1, {logits.shape[1]}), got values in [{int(y.min())}, {int(y.max())}]")
    # A sum over a count of at least one: the mean over no rows would be NaN, and a constant 0 would leave ranks of a
    # data-parallel run without a backward pass.
    total = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    return total / (y >= 0).sum().clamp_min(1)


class CrossEntropy(Objective):
    """Cross-entropy of the labelled images; over several heads their mean.

    Parameters
    ----------
    about : About
        With `heads`, the labels are classes of the images, and each head has classes of its own made from them.
    label_smoothing
        In [0, 1).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, about: About, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self._places = [head.place for head in about.heads]
        for number, head in enumerate(about.heads):
            # A last entry of -1 answers for images without a label, whose class is -1.
            members = torch.tensor([*head.members, -1], dtype=torch.int64)
            self.register_buffer(f"members_{number}", members, persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "cross_entropy"}``."""
        if not self._places:
            loss = labelled_cross_entropy(step.logits, step.labels, label_smoothing=self.label_smoothing)
        else:
            losses = [
                labelled_cross_entropy(
                    step.logits[:, place],
                    self.get_buffer(f"members_{number}")[step.labels],
                    label_smoothing=self.label_smoothing,
                )
                for number, place in enumerate(self._places)
            ]
            loss = torch.stack(losses).mean()
        return {"loss": loss, "cross_entropy": loss.detach()}
