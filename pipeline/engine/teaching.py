"""What the teachers say of every taught image: files that each worker maps, read batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.distillation.objectives import CrossEntropy, SoftTargets, TransportDistillation, ramped
from pipeline.engine.spec import ObjectiveSpec
from pipeline.errors import StageError

_TENSORS, _ABOUT = "teaching.safetensors", "teaching.json"


@dataclass(frozen=True)
class TaughtBatch:
    """What the teachers say of the taught images of one batch.

    Attributes
    ----------
    teacher : (B,) int64 tensor
        Which teacher teaches each image.
    p : (B, L_max) tensor
        Its distribution over its own label space, zero beyond that space's size.
    target : (B, C_s) tensor
        What it stands for among the task's classes.
    weight : (B,) tensor
        How much it counts, in [0, 1].
    """

    teacher: Tensor
    p: Tensor
    target: Tensor
    weight: Tensor


class Teaching:
    """The teachers' say over all taught images, row by row.

    Attributes
    ----------
    teachers : tuple of str
    costs : list of (L_t, C_s) tensor
        Ground cost of each teacher's label space.
    digest : str
        Hash of the content.
    """

    def __init__(self, teachers: Sequence[str], costs: list[Tensor], rows: Mapping[str, Tensor], about: dict) -> None:
        self.teachers, self.costs, self._rows = tuple(teachers), costs, rows
        self.digest: str = about["digest"]
        self._ids: str = about["ids"]

    @staticmethod
    def save(
        folder: Path,
        *,
        ids: Sequence[str],
        teachers: Sequence[str],
        costs: Sequence[Tensor],
        teacher: Tensor,
        p: Tensor,
        target: Tensor,
        weight: Tensor,
    ) -> str:
        """Write what the teachers say; return its digest. Shapes as in `TaughtBatch`, over all N taught images."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "teacher": teacher.to(torch.int16),
            "p": p.half().contiguous(),
            "target": target.half().contiguous(),
            "weight": weight.half().contiguous(),
            **{f"cost.{number}": cost.float().clone() for number, cost in enumerate(costs)},
        }
        save_file(tensors, folder / f".{_TENSORS}")
        (folder / f".{_TENSORS}").replace(folder / _TENSORS)
        with (folder / _TENSORS).open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        about = {"teachers": list(teachers), "ids": _digest_of_ids(ids), "digest": digest}
        (folder / f".{_ABOUT}").write_text(json.dumps(about), encoding="utf-8")
        (folder / f".{_ABOUT}").replace(folder / _ABOUT)
        return digest

    @classmethod
    def open(cls, folder: str | Path) -> Teaching:
        """Map the files of `save`."""
        folder = Path(folder)
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        with safe_open(folder / _TENSORS, "pt") as handle:  # tensors stay views of the memory map
            rows = {name: handle.get_tensor(name) for name in ("teacher", "p", "target", "weight")}
            costs = [handle.get_tensor(f"cost.{number}") for number in range(len(about["teachers"]))]
        return cls(about["teachers"], costs, rows, about)

    def __len__(self) -> int:
        return len(self._rows["teacher"])

    def shares(self) -> dict[str, int]:
        """Return how many images each teacher teaches."""
        counts = torch.bincount(self._rows["teacher"].long(), minlength=len(self.teachers))
        return {name: int(count) for name, count in zip(self.teachers, counts, strict=True)}

    def check(self, ids: Sequence[str]) -> None:
        """Check that the rows speak of these images in this order.

        Raises
        ------
        StageError
            If they do not: the table was made anew after the teachers had spoken.
        """
        if len(ids) != len(self) or _digest_of_ids(ids) != self._ids:
            raise StageError("what the teachers said belongs to another image table; run amalgamate again")

    def batch(self, rows: Tensor, device: torch.device) -> TaughtBatch:
        """Return what the teachers say of some rows."""
        found = {name: value[rows].to(device) for name, value in self._rows.items()}
        p, target = found["p"].float(), found["target"].float()
        return TaughtBatch(  # half precision has rounded the sums away from 1
            teacher=found["teacher"].long(),
            p=p / p.sum(1, keepdim=True),
            target=target / target.sum(1, keepdim=True),
            weight=found["weight"].float(),
        )


def _digest_of_ids(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


class TeachingObjective(nn.Module):
    """The loss of a student that has labels for some images and teachers for others.

    loss = w_ce · CE(labelled) + ramp · mean_b weight_b (w_t · S_ε(p_b, q_b; M_t(b)) + w_s · τ² KL(target_b ‖ q_b)),
    each image taught by its own teacher t(b) in that teacher's label space.

    Parameters
    ----------
    spec : ObjectiveSpec
    teaching : Teaching or None
        None: the labels alone.
    """

    def __init__(self, spec: ObjectiveSpec, teaching: Teaching | None, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.weight, self.ramp, self.confidence = spec.cross_entropy, spec.ramp, spec.confidence
        self.labels = CrossEntropy(label_smoothing=label_smoothing)
        self.transport: TransportDistillation | None = None
        self.soft_targets: SoftTargets | None = None
        if teaching is not None and spec.transport:
            self.transport = TransportDistillation(teaching.costs, reg=spec.reg, weight=spec.transport, ramp=spec.ramp)
        if teaching is not None and spec.soft_targets:
            self.soft_targets = SoftTargets(weight=spec.soft_targets, temperature=spec.temperature)

    def forward(
        self, logits: Tensor, labels: Tensor, targets: TaughtBatch | None, *, progress: float
    ) -> dict[str, Tensor]:
        """Return ``{"loss", "cross_entropy", "transport", "soft_targets"}``, the parts without their weights.

        Parameters
        ----------
        logits : (A + B, C_s) tensor
            Labelled images first, then taught ones.
        labels : (A + B,) tensor
            −1 for taught images.
        targets : TaughtBatch of B images, or None
        progress : float
            Part of the training done, in [0, 1).
        """
        parts = self.labels(logits, labels)
        loss = self.weight * parts.pop("loss")
        if targets is not None:
            taught = logits[-len(targets.teacher) :]
            weights = targets.weight if self.confidence else None
            if self.transport is not None:
                found = self.transport(taught, targets.teacher, targets.p, weights=weights, progress=progress)
                loss = loss + found.pop("loss")
                parts |= found
            if self.soft_targets is not None:
                found = self.soft_targets(taught, targets.target, weights=weights)
                loss = loss + ramped(progress, self.ramp) * found.pop("loss")
                parts |= found
        return {"loss": loss, **parts}
