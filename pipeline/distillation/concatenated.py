"""Knowledge distillation to the concatenated logits of all teachers: the baseline of knowledge amalgamation.

Shapes: B taught images, T teachers, C_t classes of teacher t, C_s classes of the task, D_s features of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.distillation.kd import no_loss, softened_divergence, weighted_mean
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks


def concatenated_kd_loss(logits: Tensor, teacher_logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Return mean_b T² KL(softmax([z_1b, …, z_Tb] / T) ‖ softmax(z_b / T)).

    Parameters
    ----------
    logits : (B, Σ_t C_t) tensor
        z, the student's.
    teacher_logits : T tensors (B, C_t)
        z_t. No gradient flows to them.
    temperature
        T > 0.

    Raises
    ------
    ValueError
        Without teachers, for shapes that do not match, logits of teachers that are not finite, and T ≤ 0.
    """
    return _divergence(logits, joined(teacher_logits), temperature)


def joined(teacher_logits: Sequence[Tensor]) -> Tensor:
    """Return the logits of all teachers side by side, (B, Σ_t C_t), without a gradient.

    Raises
    ------
    ValueError
        Without teachers, for tensors that are not (B, C_t) with one B, and logits that are not finite.
    """
    if not teacher_logits:
        raise ValueError("teacher_logits must hold one tensor a teacher, got none")
    shapes = [tuple(each.shape) for each in teacher_logits]
    if any(len(shape) != 2 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"teacher_logits must have shapes (B, C_t) with one B, got {shapes}")
    return _checks.finite("teacher_logits", torch.cat([each.detach() for each in teacher_logits], dim=1))


class ClassMap(nn.Module):
    """From the concatenated logits of the teachers to the task's classes, by name.

    A task's class k gets logsumexp_{i ∈ I_k} z_i − log |I_k|, with I_k the teachers' classes of exactly this name: the
    logarithm of their mean, so that a class that many know has no advantage. This is ours.

    Parameters
    ----------
    classes : sequence of str
        The task's, C_s names.
    teacher_classes : sequence of sequences of str
        Every teacher's, C_t names.

    Raises
    ------
    ValueError
        Naming the task's classes that no teacher has.
    """

    columns: Tensor
    counts: Tensor

    def __init__(self, classes: Sequence[str], teacher_classes: Sequence[Sequence[str]]) -> None:
        super().__init__()
        found: dict[str, list[int]] = {name: [] for name in classes}
        every = [name for names in teacher_classes for name in names]
        for column, name in enumerate(every):
            if name in found:
                found[name].append(column)
        missing = [name for name in classes if not found[name]]
        if missing:
            raise ValueError(f"no teacher has the classes {', '.join(repr(name) for name in missing)}")
        self.width = len(every)
        most = max((len(columns) for columns in found.values()), default=0)
        padded = [found[name] + [-1] * (most - len(found[name])) for name in classes]
        # Not part of a checkpoint: they follow from the names.
        self.register_buffer("columns", torch.tensor(padded, dtype=torch.int64), persistent=False)
        self.register_buffer("counts", torch.tensor([len(found[name]) for name in classes]), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Return (B, C_s) logits for (B, Σ_t C_t) ones; `ValueError` for another width."""
        if logits.ndim != 2 or logits.shape[1] != self.width:
            raise ValueError(f"logits must have shape (B, {self.width}), got shape {tuple(logits.shape)}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        picked = logits[:, self.columns.clamp_min(0)].masked_fill(self.columns < 0, -torch.inf)
        return picked.logsumexp(2) - self.counts.to(logits.dtype).log()


def _divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    temperature = _checks.positive("temperature", temperature)
    wide = teacher_logits.to(torch.promote_types(teacher_logits.dtype, torch.float32))
    return weighted_mean(softened_divergence(logits, torch.softmax(wide / temperature, dim=1), temperature), None)


class ConcatenatedKD(Objective):
    """Knowledge distillation to the concatenated logits of all teachers.

    loss = mean_b T² KL(softmax([z_1b, …, z_Tb] / T) ‖ softmax(z_b / T)), the baseline that amalgamation is measured
    against [1]_. Every teacher counts for every image; shares are not used. Part: ``concatenated_kd``.

    Parameters
    ----------
    about : About
    temperature
        T > 0.
    head
        What z is. ``"auxiliary"``: a linear layer from the student's features to Σ_t C_t logits, trained with the
        student and dropped afterwards; the student's own classifier learns nothing here. ``"classes"``: the student's
        own logits, against those of the teachers as `ClassMap` brings them to the task's classes. Both are our
        reading of the baseline for a student whose classes are not the teachers'.

    Raises
    ------
    ValueError
        Without teachers, for T ≤ 0 and another head; with ``"auxiliary"`` when the student's feature dimension is not
        known, with ``"classes"`` naming the classes that no teacher has.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "said.logits", "features"})

    def __init__(
        self, about: About, *, temperature: float = 4.0, head: Literal["auxiliary", "classes"] = "auxiliary"
    ) -> None:
        super().__init__()
        self.temperature = _checks.positive("temperature", temperature)
        if not about.teachers:
            raise ValueError("distillation to concatenated logits needs at least one teacher, got none")
        self.widths = tuple(len(teacher.classes) for teacher in about.teachers)
        self.head: nn.Linear | None = None
        self.class_map: ClassMap | None = None
        if head == "auxiliary":
            if about.feature_dim is None:
                raise ValueError('head "auxiliary" needs the feature dimension of the student, which is not known')
            self.head = nn.Linear(about.feature_dim, sum(self.widths))
        elif head == "classes":
            self.class_map = ClassMap(about.classes, [teacher.classes for teacher in about.teachers])
        else:
            raise ValueError(f'head must be "auxiliary" or "classes", got {head!r}')

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "concatenated_kd"}``; 0 when nobody is taught.

        Raises
        ------
        ValueError
            When the step lacks the teachers' logits or the student's features, or they have other widths than said.
        """
        if step.said is None:
            return no_loss(step, "concatenated_kd", objective=self)
        if step.said.logits is None:
            raise ValueError("the step has no logits of the teachers")
        widths = tuple(each.shape[-1] for each in step.said.logits)
        if widths != self.widths:
            raise ValueError(f"the teachers' logits must have widths {self.widths}, got {widths}")
        target = joined(step.said.logits)
        if self.class_map is not None:
            loss = _divergence(step.logits[step.taught], self.class_map(target), self.temperature)
        else:
            assert self.head is not None
            if step.features is None:
                raise ValueError("the step has no features of the student")
            loss = _divergence(self.head(step.features[step.taught]), target, self.temperature)
            # Keeps the student's own classifier in the graph, for data-parallel runs.
            loss = loss + step.logits[:0].sum()
        return {"loss": loss, "concatenated_kd": loss.detach()}
