"""Teacher cards: what is known of a teacher without looking at the task's images, and the file that keeps them."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.whole import replacing
from pipeline.errors import TeacherError, UserError
from pipeline.models.teacher import Teacher, predict

FORMAT_VERSION = 1
_KEY = b"faculty.teacher_cards"
_SCHEMA = pa.schema(
    [
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("classes", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
        pa.field("parameters", pa.int64(), nullable=False),
        pa.field("feature_dim", pa.int64()),
        pa.field("accuracy", pa.float64()),
        pa.field("examples", pa.int64(), nullable=False),
        pa.field("centres", pa.binary()),  # float32, little-endian, row by row
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
    ],
    metadata={_KEY: json.dumps({"version": FORMAT_VERSION}).encode()},
)
_BATCH_ROWS, _BATCH_BYTES = 1024, 32 << 20


@dataclass(frozen=True)
class Card:
    """What is known of a teacher.

    Attributes
    ----------
    fingerprint : str
        See `teacher_fingerprint`.
    name : str
    classes : tuple of str
        C_t names, in the order of the logits.
    parameters : int
    feature_dim : int or None
        D of the penultimate features; None where the net does not tell before it has seen an image.
    accuracy : float or None
        On its own classes: measured on the examples; without examples, as its model card gives it.
    examples : int
        How many labelled images were looked at.
    reference : str
        The network that the centres are of, see `reference_id`.
    centres : (C_t, D_ref) float32 tensor or None
        Mean reference feature of the examples of each class, zero for a class without one; None without examples.
    seconds : float
        That making the card took, the teacher being loaded.
    origin : str
        A hash of what else it was made from (examples, declared accuracy): where that changes, it is out of date.
    """

    fingerprint: str
    name: str
    classes: tuple[str, ...]
    parameters: int
    feature_dim: int | None
    accuracy: float | None
    examples: int
    reference: str
    centres: Tensor | None = field(compare=False)  # a tensor has no truth value to compare with
    seconds: float
    origin: str = ""


def make_card(
    teacher: Teacher,
    *,
    fingerprint: str,
    declared_accuracy: float | None,
    images: Tensor | None,
    labels: Tensor | None,
    embed: Callable[[Tensor], Tensor],
    reference: str,
    batch_size: int = 256,
    origin: str = "",
) -> Card:
    """Make a teacher's card.

    Parameters
    ----------
    teacher : Teacher
        On the device that is to do the work.
    fingerprint, reference, origin : str
        As in `Card`.
    declared_accuracy : float or None
        Stands in where there are no examples.
    images : (N, C, H, W) uint8 tensor, optional
        Examples of the teacher's own classes, N ≥ 1.
    labels : (N,) int64 tensor, optional
        Indices into ``teacher.classes``.
    embed : callable
        The shared reference, images (B, C, H, W) to features (B, D_ref); see `reference_embedding`.
    batch_size : int

    Raises
    ------
    TeacherError
        When the teacher or the reference fails on the examples.
    ValueError
        When images and labels do not fit together.
    """
    started = time.perf_counter()
    if (images is None) != (labels is None):
        raise ValueError("images and labels must be given together")
    centres, accuracy, count = None, declared_accuracy, 0
    if images is not None and labels is not None:
        count, classes = len(images), len(teacher.classes)
        if count < 1 or labels.shape != (count,) or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(f"labels must be {count} indices below {classes}, one an image, and at least one")
        said = predict(teacher, images.split(batch_size)).logits.argmax(1)
        accuracy = float((said == labels).double().mean())
        features = torch.cat([embed(batch).float() for batch in images.split(batch_size)])
        if not torch.isfinite(features).all():
            raise TeacherError(
                f"teacher {teacher.name!r}: the reference {reference} says NaN or infinity of `examples`"
            )
        counts = torch.bincount(labels, minlength=classes)
        sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
        centres = sums / counts.clamp(min=1)[:, None]
    return Card(
        fingerprint=fingerprint,
        name=teacher.name,
        classes=teacher.classes,
        parameters=teacher.num_parameters,
        feature_dim=teacher.feature_dim,
        accuracy=accuracy,
        examples=count,
        reference=reference,
        centres=centres,
        seconds=time.perf_counter() - started,
        origin=origin,
    )


def cards_path(zoo_path: str | Path) -> Path:
    """Return where the cards of a zoo are kept: beside it."""
    return Path(zoo_path).with_suffix(".cards.arrow")


class CardStore:
    """Cards on disk, one Arrow file (Feather v2); a file that does not exist yet is an empty store.

    It is memory-mapped: opening reads the fingerprints, a card is read when it is asked for. It shows the file as it
    was when it was opened, or last written by this store.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    UserError
        When the file is no store of cards, is damaged or of another format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._load()

    @classmethod
    def open(cls, path: str | Path) -> CardStore:
        """Open a store; the same as calling the class."""
        return cls(path)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, fingerprint: str, reference: str) -> Card | None:
        """Return a teacher's card, with centres in this reference; None if it has none."""
        place = self._places.get((fingerprint, reference))
        if place is None:
            return None
        row = self._checked(place[0]).slice(place[1], 1).to_pylist()[0]
        try:
            row["classes"] = tuple(row["classes"])
            if row["centres"] is not None:
                values = np.frombuffer(row["centres"], "<f4").reshape(len(row["classes"]), -1)
                row["centres"] = torch.from_numpy(values.astype(np.float32))
        except ValueError as error:
            raise self._damaged(error) from None
        return Card(**row)

    def add(self, cards: Iterable[Card]) -> None:
        """Add cards, in the place of those with the same fingerprint and reference; the file is replaced as a whole.

        What another process has added meanwhile is kept.

        Raises
        ------
        UserError
            When it can't be written; the older file stays as it was.
        """
        new = {(card.fingerprint, card.reference): _row(card) for card in cards}
        if not new:
            return
        try:
            with self._locked():
                self._load()
                with replacing(self.path) as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
                    for batch in _gathered([*self._kept(new), *_batches_of(list(new.values()))]):
                        writer.write_batch(batch)
                self._load()
        except OSError as error:
            raise UserError(
                f"{self.path}: cards can't be written ({error.strerror or error}); free its folder"
            ) from None

    def _load(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._sound: set[int] = set()
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        try:
            # The map is of the file that is open now; one that replaces it does not disturb this store.
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            self._check(reader.schema)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                keys = [batch.column(name) for name in ("fingerprint", "reference")]
                for column in keys:
                    column.validate(full=True)
                found = zip(*(column.to_pylist() for column in keys), strict=True)
                self._places |= {key: (number, row) for row, key in enumerate(found)}
                self._batches.append(batch)
        except FileNotFoundError:
            return
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(error) from None

    def _checked(self, number: int) -> pa.RecordBatch:
        """Return a batch that was checked before its first use: damage could end the process, or be passed on."""
        batch = self._batches[number]
        if number not in self._sound:
            try:
                batch.validate(full=True)  # offsets and text; centres are not read for it
            except (ValueError, pa.ArrowException) as error:
                raise self._damaged(error) from None
            self._sound.add(number)
        return batch

    def _check(self, schema: pa.Schema) -> None:
        try:
            version = json.loads((schema.metadata or {})[_KEY])["version"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.path}: holds no teacher cards; move it away, or delete it") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.path}: teacher cards of format version {version}, this release reads {FORMAT_VERSION}; delete "
                "it and run `faculty zoo cards` again"
            )
        if not schema.equals(_SCHEMA):
            raise self._damaged("its columns are not those of teacher cards")

    def _damaged(self, reason: object) -> UserError:
        text = (str(reason).splitlines() or [type(reason).__name__])[0]
        return UserError(
            f"{self.path}: teacher cards are damaged ({text}); delete it and run `faculty zoo cards` again"
        )

    def _kept(self, new: dict[tuple[str, str], Any]) -> Iterator[pa.RecordBatch]:
        """Yield what is stored, without the rows that are replaced."""
        replaced = {self._places[key] for key in new if key in self._places}
        for number in range(len(self._batches)):
            batch = self._checked(number)
            keep = [row for row in range(len(batch)) if (number, row) not in replaced]
            if keep:
                yield batch if len(keep) == len(batch) else batch.take(pa.array(keep))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time read, add and write."""
        with self.path.with_name(f".{self.path.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _row(card: Card) -> dict[str, Any]:
    centres = None if card.centres is None else card.centres.numpy(force=True).astype("<f4").tobytes()
    return {name: getattr(card, name) for name in _SCHEMA.names} | {"classes": list(card.classes), "centres": centres}


def _batches_of(rows: list[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    for row in rows:
        yield pa.RecordBatch.from_pylist([row], schema=_SCHEMA)


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Put small batches together: what is in memory at a time stays small, and so does the number of batches."""
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if waiting and (rows + len(batch) > _BATCH_ROWS or size + batch.nbytes > _BATCH_BYTES):
            yield pa.concat_batches(waiting)
            waiting, rows, size = [], 0, 0
        waiting.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
    if waiting:
        yield pa.concat_batches(waiting)
