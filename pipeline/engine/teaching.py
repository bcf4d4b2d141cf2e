"""What the teachers say of every taught image: files that each worker maps, read batch by batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data.mirror import here
from pipeline.distillation.step import Said
from pipeline.engine.spec import RAW, SPOKEN
from pipeline.errors import StageError

_TENSORS, _ABOUT = "teaching.safetensors", "teaching.json"


@dataclass(frozen=True)
class Speaker:
    """A teacher and where its say lies.

    Attributes
    ----------
    name : str
    classes : tuple of str
        Its own, C_t names.
    gain : float
        Its transport gain, ≥ 0.
    folder : str
        Holds ``spoken.safetensors``: p over its label space (N, L) and what that stands for among the task's classes,
        `carried` (N, C_s); and, where an objective needs them, ``raw.safetensors``: `logits` (N, C_t) and `features`
        (N, D). With V views there are V · N rows in each. Its name tells one content from another.
    """

    name: str
    classes: tuple[str, ...]
    gain: float
    folder: str


class Teaching:
    """The teachers' say over all taught images, row by row.

    Attributes
    ----------
    speakers : tuple of Speaker
    costs : list of (L_t, C_s) tensor
        Ground cost of each teacher's label space.
    weights : (T, N) tensor
        How much each teacher counts for each image.
    digest : str
        Hash of the content.
    views : int or None
        Of how many views of each image they speak, view by view and in each row by row; None: of the image as it is.
    """

    def __init__(self, folder: Path, about: dict) -> None:
        with safe_open(folder / _TENSORS, "pt") as handle:
            self.weights = handle.get_tensor("shares")
            self.costs = [handle.get_tensor(f"cost.{number}") for number in range(len(about["speakers"]))]
        self.speakers = tuple(
            Speaker(one["name"], tuple(one["classes"]), one["gain"], str((folder / one["folder"]).resolve()))
            for one in about["speakers"]
        )
        self.digest: str = about["digest"]
        self.views: int | None = about["views"]
        self._ids: str = about["ids"]
        self._maps: dict[str, list[dict[str, Tensor]]] = {}

    @staticmethod
    def save(
        folder: Path,
        *,
        ids: Sequence[str],
        speakers: Sequence[Speaker],
        costs: Sequence[Tensor],
        shares: Tensor,
        views: int | None = None,
    ) -> str:
        """Write who teaches which image; return the digest.

        Parameters
        ----------
        folder : Path
        ids : N sample ids
        speakers : T teachers
        costs : T tensors (L_t, C_s)
        shares : (T, N) tensor
            See `pipeline.distillation.step.Said`.
        views : int, optional
            Of how many views of each image the speakers' files are.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "shares": shares.half().contiguous(),
            **{
                f"cost.{number}": cost.float().clone(memory_format=torch.contiguous_format)
                for number, cost in enumerate(costs)
            },
        }
        save_file(tensors, folder / f".{_TENSORS}")
        (folder / f".{_TENSORS}").replace(folder / _TENSORS)
        content = hashlib.sha256((folder / _TENSORS).read_bytes())
        for one in speakers:
            content.update(f"{Path(one.folder).name}\0{one.classes}\0{one.gain!r}\0".encode())
        about: dict[str, Any] = {
            # Relative, so that a run folder can be moved.
            "speakers": [asdict(one) | {"folder": os.path.relpath(one.folder, folder)} for one in speakers],
            "ids": _digest_of_ids(ids),
            "views": views,
            "digest": content.hexdigest(),
        }
        (folder / f".{_ABOUT}").write_text(json.dumps(about), encoding="utf-8")
        (folder / f".{_ABOUT}").replace(folder / _ABOUT)
        return about["digest"]

    @classmethod
    def open(cls, folder: str | Path) -> Teaching:
        """Map the files of `save`."""
        folder = here(folder)
        return cls(folder, json.loads((folder / _ABOUT).read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return self.weights.shape[1]

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers."""
        return tuple(one.name for one in self.speakers)

    def shares(self) -> dict[str, int]:
        """Return for how many images each teacher counts most."""
        taught = self.weights.float().sum(0) > 0
        counts = torch.bincount(self.weights.float().argmax(0)[taught], minlength=len(self.speakers))
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

    def feature_dims(self) -> list[int]:
        """Return how many penultimate features every teacher has."""
        return [one["features"].shape[1] for one in self._files(RAW)]

    def features(self, rows: Tensor) -> list[Tensor]:
        """Return every teacher's penultimate features of some rows."""
        return [one["features"][rows].float() for one in self._files(RAW)]

    def batch(self, rows: Tensor, views: Tensor, wants: Collection[str] = ()) -> Said:
        """Return what the teachers say of some views of some rows; logits and features where `wants` names them."""
        spoken = self._files(SPOKEN)
        raw = self._files(RAW) if {"said.logits", "said.features"} & set(wants) else []
        places = rows if self.views is None else views * len(self) + rows

        def gathered(name: str) -> tuple[Tensor, ...] | None:
            return tuple(one[name][places].float() for one in raw) if f"said.{name}" in wants else None

        return Said(
            shares=self.weights[:, rows].float(),
            p=tuple(_distributions(one["p"][places]) for one in spoken),
            target=torch.stack([_distributions(one["carried"][places]) for one in spoken]),
            logits=gathered("logits"),
            features=gathered("features"),
        )

    def _files(self, name: str) -> list[dict[str, Tensor]]:
        if name not in self._maps:
            found = []
            for one in self.speakers:
                with safe_open(here(Path(one.folder) / name), "pt") as handle:  # tensors stay views of the memory map
                    found.append({key: handle.get_tensor(key) for key in handle.keys()})
            self._maps[name] = found
        return self._maps[name]


def _distributions(stored: Tensor) -> Tensor:
    """Undo what half precision did to the sums."""
    p = stored.float()
    return p / p.sum(1, keepdim=True)


def _digest_of_ids(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
