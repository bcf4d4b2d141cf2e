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

from pipeline.distillation.objectives import labelled_cross_entropy
from pipeline.engine.spec import ObjectiveSpec
from pipeline.errors import StageError
from pipeline.transport.sinkhorn import transport_loss

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
        found = {name: value[rows] for name, value in self._rows.items()}
        return TaughtBatch(
            teacher=found["teacher"].long().to(device),
            p=found["p"].float().to(device),
            target=found["target"].float().to(device),
            weight=found["weight"].float().to(device),
        )


def _digest_of_ids(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


class TeachingObjective(nn.Module):
    """The loss of a student that has labels for some images and teachers for others.

    loss = w_ce · CE(labelled) + ramp · mean_b weight_b (w_t · S_ε(p_b, q_b; M_t(b)) + w_s · KL(target_b ‖ q_b)),
    each image taught by its own teacher t(b) in that teacher's label space.

    Parameters
    ----------
    spec : ObjectiveSpec
    teaching : Teaching or None
        None: the labels alone.
    """

    def __init__(self, spec: ObjectiveSpec, teaching: Teaching | None, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.spec, self.label_smoothing = spec, label_smoothing
        self.teachers = len(teaching.teachers) if teaching is not None else 0
        for number, cost in enumerate(teaching.costs if teaching is not None else ()):
            self.register_buffer(f"cost_{number}", cost, persistent=False)

    def forward(
        self, logits: Tensor, labels: Tensor, targets: TaughtBatch | None, *, progress: float
    ) -> dict[str, Tensor]:
        """Return ``{"loss", "cross_entropy", "transport", "soft_targets"}``.

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
        spec = self.spec
        cross_entropy = labelled_cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        parts = {"cross_entropy": cross_entropy.detach()}
        loss = spec.cross_entropy * cross_entropy
        if targets is not None:
            taught = logits[-len(targets.teacher) :]
            share = min(progress / spec.ramp, 1.0) if spec.ramp else 1.0
            if spec.transport:
                transport = self._transport(taught.softmax(1), targets)
                parts["transport"] = transport.detach()
                loss = loss + share * spec.transport * transport
            if spec.soft_targets:
                divergence = torch.nn.functional.kl_div(taught.log_softmax(1), targets.target, reduction="none").sum(1)
                soft = (targets.weight * divergence).mean()
                parts["soft_targets"] = soft.detach()
                loss = loss + share * spec.soft_targets * soft
        return {"loss": loss, **parts}

    def _transport(self, q: Tensor, targets: TaughtBatch) -> Tensor:
        total = q.new_zeros(())
        for number in range(self.teachers):
            mine = targets.teacher == number
            if not bool(mine.any()):
                continue
            cost = self.get_buffer(f"cost_{number}")
            p = targets.p[mine, : cost.shape[0]]
            each = transport_loss(p / p.sum(1, keepdim=True), q[mine], cost, self.spec.reg, "none")
            total = total + (targets.weight[mine] * each).sum()
        return total / len(targets.teacher)
