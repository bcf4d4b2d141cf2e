"""Ingest: any source of images becomes an image table."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.data.layout import FILE_NAME, Layout, fingerprint_of, fixed_binary, write_table
from pipeline.data.pixels import Canonical, UnreadableImageError, canonical
from pipeline.data.sources import RawSample, Source, open_source
from pipeline.data.spec import ImageSpec, SourceSpec, SplitSpec
from pipeline.data.splits import SPLITS, UNLABELLED, UNUSED, assign, assign_test, sampling_order
from pipeline.data.storage import publish
from pipeline.data.table import ImageTable
from pipeline.errors import ConfigError, DataError

_CHUNK = 256
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class IngestReport:
    """What ingest made of the source.

    Attributes
    ----------
    path : str
        The table's file.
    rows : int
        Samples in the table.
    counts : dict
        Split → class → samples, as `ImageTable.counts`.
    classes : tuple of str
    fingerprint : str
    skipped : list of (str, str)
        Origin of each unreadable image, and the reason.
    duplicates : int
        Samples left out because the same image came before.
    conflicts : int
        Images that came with different labels; their label is unknown, so they can only serve as unlabelled.
    overlap : int
        Samples left out because the test source has the same image.
    unused : int
        Samples that no split asked for.
    """

    path: str
    rows: int
    counts: dict[str, dict[str, int]]
    classes: tuple[str, ...]
    fingerprint: str
    skipped: list[tuple[str, str]]
    duplicates: int
    conflicts: int
    overlap: int
    unused: int


def build_table(
    source: SourceSpec,
    image: ImageSpec,
    splits: SplitSpec,
    seed: int,
    destination_dir: str | Path,
    *,
    test_source: SourceSpec | None = None,
) -> IngestReport:
    """Read a source and write its image table, ``images.arrow``, to a folder.

    The source is gone through once. Memory holds the ids and labels of all samples (some 150 bytes each) and a few
    hundred images; all the rest wait in a temporary file in the destination.

    Parameters
    ----------
    source : SourceSpec
    image : ImageSpec
    splits : SplitSpec
    seed : int
        Same samples and same seed: same table, in whatever order the source gives them.
    destination_dir : str or Path
        Local folder, or a URI that ``pyarrow.fs`` knows.
    test_source : SourceSpec, optional
        Where the test split comes from, if it has a source of its own. Its images stay out of all other splits.

    Raises
    ------
    ConfigError
        If `splits` contradicts itself.
    DataError
        If the source can't be read or holds too little, too many images are unreadable, or the table can't be written.
    """
    if problem := splits.problem(test_source=test_source is not None):
        raise ConfigError(f"splits: {problem}")
    if "://" in str(destination_dir):
        target = f"{str(destination_dir).rstrip('/')}/{FILE_NAME}"
        with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
            report = _build(source, test_source, image, splits, seed, Path(folder), target)
            publish(Path(folder) / FILE_NAME, target)
        return report
    folder_path = Path(destination_dir).expanduser()
    try:
        folder_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder_path}: can't be made ({error.strerror}); choose another destination") from None
    return _build(source, test_source, image, splits, seed, folder_path, str(folder_path / FILE_NAME))


def _build(
    source: SourceSpec,
    test_source: SourceSpec | None,
    image: ImageSpec,
    splits: SplitSpec,
    seed: int,
    folder: Path,
    name: str,
) -> IngestReport:
    main = open_source(source)
    test = None if test_source is None else open_source(test_source)
    with _Spool(folder, len(main.classes)) as spool:
        skipped: list[tuple[str, str]] = []
        if test is not None:  # first, so that its images are known when they come again in the main source
            skipped += _collect(test, image, spool, _renumbering(test, main))
        of_test = len(spool)
        skipped += _collect(main, image, spool, None)
        ids, labels = spool.ids(), spool.labels()
        codes = np.full(len(ids), UNUSED, dtype=np.int8)
        if test is not None:
            codes[:of_test] = assign_test(
                ids[:of_test], labels[:of_test], main.classes, splits.test, seed=seed, where=test.where
            )
        codes[of_test:] = assign(
            ids[of_test:],
            labels[of_test:],
            main.classes,
            splits,
            seed=seed,
            where=main.where,
            test_source=test is not None,
        )
        labels = np.where(codes == SPLITS.index("train_unlabelled"), UNLABELLED, labels)

        used = sampling_order(ids, seed)
        used = used[codes[used] != UNUSED]
        used = used[np.argsort(codes[used], kind="stable")]  # split by split, in random order within each
        ids, labels, codes = ids[used], labels[used], codes[used]
        fingerprint = fingerprint_of(main.classes, image.shape, ids, labels, codes)
        layout = Layout(main.classes, image.shape, image.storage, fingerprint)
        try:
            path = folder / FILE_NAME
            write_table(path, layout, ids, labels, codes, lambda part: spool.images(used[part], image))
        except OSError as error:
            raise DataError(f"{path}: can't be written ({error.strerror}); choose another destination") from None
        table = ImageTable.open(path)
        return IngestReport(
            path=name,
            rows=len(table),
            counts=table.counts(),
            classes=table.classes,
            fingerprint=table.fingerprint,
            skipped=skipped,
            duplicates=spool.duplicates,
            conflicts=spool.conflicts,
            overlap=spool.overlap,
            unused=len(spool) - len(table),
        )


@dataclass(frozen=True)
class Reading:
    """How fast a source is read.

    Attributes
    ----------
    opening : float
        Seconds until it is open and has given its first images, theirs left out.
    seconds : float
        Of an image.
    size : float
        Mean bytes of an image as it is stored.
    """

    opening: float
    seconds: float
    size: float


def try_reading(
    source: SourceSpec, image: ImageSpec, folder: Path, *, seconds: float, most: int = 2048
) -> Reading | None:
    """Read the first images of a source as `build_table` does, and keep none of them.

    Parameters
    ----------
    source : SourceSpec
    image : ImageSpec
    folder : Path
        For a temporary file.
    seconds : float
        After which no more are begun.
    most : int
        Images.

    Returns
    -------
    Reading or None
        None where none of them can be read.

    Raises
    ------
    DataError
        If the source can't be opened, or the folder can't be written to.
    """
    began, seen = time.perf_counter(), 0
    found = open_source(source)
    times: list[float] = []
    with _Spool(folder, len(found.classes)) as spool, _unworried():
        for sample, one in _convert(found, image):
            seen += 1
            if not isinstance(one, str):
                spool.add(one, sample.label)
            if seen % _CHUNK == 0:
                times.append(time.perf_counter() - began)
                if times[-1] > seconds or seen >= most:
                    break
        over = time.perf_counter() - began
        if not len(spool):
            return None
        size = spool.size / len(spool)
    if len(times) > 1:
        each = (times[-1] - times[0]) / (_CHUNK * (len(times) - 1))
        return Reading(max(times[0] - _CHUNK * each, 0.0), each, size)
    return Reading(0.0, over / seen, size)


@contextmanager
def _unworried() -> Iterator[None]:
    """Keep Pillow's warnings of large or odd images back: what can't serve is skipped and listed anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


class _Spool:
    """The distinct images of all sources: ids and labels in memory, pixels in a temporary file.

    Parameters
    ----------
    folder : Path
        Where the file is made; it has no name there, so that it goes with the process whatever happens.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise DataError(f"{folder}: can't be written to ({error.strerror}); choose another destination") from None
        self._folder, self._classes = folder, classes
        self._row_of: dict[bytes, int] = {}
        self._labels, self._ends = array("i"), array("q", [0])
        self._conflicting: set[int] = set()
        self._first = 0
        self.duplicates = self.overlap = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return self._ends[-1]

    @property
    def conflicts(self) -> int:
        return len(self._conflicting)

    def start_source(self) -> None:
        """Mark that what follows comes from another source."""
        self._first = len(self)

    def add(self, image: Canonical, label: int | None) -> None:
        """Keep an image unless it is there already; what two copies say of the label is brought together."""
        number = UNLABELLED if label is None else label
        row = self._row_of.setdefault(image.sample_id, len(self))
        if row == len(self):
            self._labels.append(number)
            try:
                self._file.write(image.payload)
            except OSError as error:
                raise DataError(f"{self._folder}: can't be written to ({error.strerror}); make room there") from None
            self._ends.append(self._ends[-1] + len(image.payload))
        elif row < self._first:
            self.overlap += 1
        else:
            self.duplicates += 1
            if number in (UNLABELLED, self._labels[row]) or row in self._conflicting:
                return
            if self._labels[row] == UNLABELLED:
                self._labels[row] = number
            else:
                self._labels[row] = UNLABELLED
                self._conflicting.add(row)

    def ids(self) -> np.ndarray:
        return np.frombuffer(b"".join(self._row_of), dtype=np.uint8).reshape(-1, 16)

    def labels(self) -> np.ndarray:
        return np.array(self._labels, dtype=np.int32)

    def images(self, rows: np.ndarray, spec: ImageSpec) -> pa.Array:
        """Return images as an Arrow array."""
        self._file.flush()
        stored = np.asarray(np.memmap(self._file, np.uint8, mode="r"))
        if spec.storage == "encoded":
            return self._encoded(stored, rows)
        return fixed_binary(stored.reshape(len(self), -1)[rows])

    def _encoded(self, stored: np.ndarray, rows: np.ndarray) -> pa.Array:
        """Gather images of different lengths into one buffer: Arrow would hold them twice while it makes its own."""
        ends = np.frombuffer(self._ends, dtype=np.int64)
        starts, lengths = ends[rows], ends[rows + 1] - ends[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        gathered = np.empty(offsets[-1], dtype=np.uint8)
        for place, start, length in zip(offsets.tolist(), starts.tolist(), lengths.tolist(), strict=False):
            gathered[place : place + length] = stored[start : start + length]
        return pa.BinaryArray.from_buffers(
            pa.binary(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(gathered)]
        )


def _collect(source: Source, spec: ImageSpec, spool: _Spool, renumber: list[int] | None) -> list[tuple[str, str]]:
    """Bring all images of a source into the spool; return the unreadable ones."""
    spool.start_source()
    skipped: list[tuple[str, str]] = []
    seen = 0
    with _unworried():
        for sample, found in _convert(source, spec):
            seen += 1
            if isinstance(found, str):
                skipped.append((sample.origin, found))
                continue
            label = sample.label
            spool.add(found, label if label is None or renumber is None else renumber[label])
    if not seen:
        raise DataError(f"{source.where}: has no samples; check the source's settings")
    if len(skipped) > spec.max_unreadable * seen:
        reasons = Counter(reason for _, reason in skipped).most_common(3)
        raise DataError(
            f"{source.where}: {len(skipped)} of {seen} images are unreadable, more than `image.max_unreadable` "
            f"{spec.max_unreadable:g}; the first: {skipped[0][0]} ({skipped[0][1]}); most often: "
            f"{', '.join(f'{reason} ({count})' for reason, count in reasons)}; mend them or raise "
            "`task.image.max_unreadable`"
        )
    return skipped


def _convert(source: Source, spec: ImageSpec) -> Iterator[tuple[RawSample, Canonical | str]]:
    """Yield each sample with its canonical image, or the reason why it has none."""

    def work(sample: RawSample) -> Canonical | str:
        if sample.image is None:
            return sample.problem
        try:
            return canonical(sample.image, spec, sample.origin)
        except UnreadableImageError as error:
            return str(error)

    samples = iter(source)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ingest") as threads:
        while chunk := list(islice(samples, _CHUNK)):
            yield from zip(chunk, threads.map(work, chunk), strict=True)


def _renumbering(test: Source, main: Source) -> list[int]:
    """Return the main source's number of each class of the test source."""
    unknown = [name for name in test.classes if name not in main.classes]
    if unknown:
        raise DataError(
            f"{test.where}: class {unknown[0]!r} is none of the training source's ({', '.join(main.classes[:20])}); "
            "give both sources the same `classes` or `only`"
        )
    return [main.classes.index(name) for name in test.classes]
