"""Stage ingest: the task's images become one table with fixed splits."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.spec import SourceSpec
from pipeline.errors import DataError
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.own import code_of
from pipeline.stages.recording import optional, recorded
from pipeline.stages.recording_data import record_datasets

if TYPE_CHECKING:
    from pipeline.data.ingest import IngestReport

_HASHED_BYTES = 256 * 2**20


class Ingest:
    """Images from any source → `images.arrow`, `ingest.json`."""

    name = "ingest"
    version = 1
    needs: tuple[str, ...] = ()

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the task's settings, the seed of the splits, and the content of the source."""
        task = run.settings.task
        sources = {"source": task.source, "test_source": task.test_source}
        return {
            "task": _without_paths(task.model_dump(mode="json", exclude={"subtasks"})),
            "seed": run.settings.seed,
            "content": {name: source_identity(source) for name, source in sources.items() if source is not None},
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Build the table."""
        from pipeline.data.ingest import build_table

        task = run.settings.task
        with run.display.working("reading images"):
            report = build_table(
                task.source, task.image, task.splits, run.settings.seed, folder, test_source=task.test_source
            )
        details = asdict(report) | {"path": str(Path(report.path).relative_to(folder))}
        write_json(folder / "ingest.json", details)
        _record(run, report, folder)
        sizes = {split: sum(by_class.values()) for split, by_class in report.counts.items()}
        summary = {"rows": report.rows, "classes": len(report.classes), "skipped": len(report.skipped), **sizes}
        return Outcome(digest=report.fingerprint, summary=summary)


def _record(run: Run, report: IngestReport, folder: Path) -> None:
    """Record the splits as inputs of this stage and of the whole run, and their images by class."""
    from pipeline.data.table import ImageTable

    if not recorded(run):
        return
    record_datasets(run, ImageTable.open(report.path), root=True)
    with optional("the images"):
        run.tracker.artifact(folder / "ingest.json")
        run.tracker.tags({"fingerprint": report.fingerprint})
        run.root.tags({"data.fingerprint": report.fingerprint})
        names = list(dict.fromkeys(name for counts in report.counts.values() for name in counts))
        rows = [
            {"class": name} | {split: counts.get(name, 0) for split, counts in report.counts.items()} for name in names
        ]
        run.tracker.table("classes", rows)


def table_path(run: Run) -> Path:
    """Return the path of the run's image table."""
    folder = run.folder("ingest")
    return folder / json.loads((folder / "ingest.json").read_text(encoding="utf-8"))["path"]


def source_identity(source: SourceSpec) -> str:
    """Hash what a source holds: names and content of its files, or their sizes and times where they are large.

    A URI, and a published data set, count by their names; code of one's own by its source, its arguments and what lies
    at a `path` or `root` among them.

    Raises
    ------
    DataError
        If a local path holds nothing.
    """
    if source.type == "torchvision":  # published: it does not change under its name
        return hashlib.sha256(repr((source.name, source.train, source.split)).encode()).hexdigest()
    if source.type == "own":
        places = {key: source.kwargs[key] for key in ("path", "root") if isinstance(source.kwargs.get(key), str)}
        rest = {key: value for key, value in source.kwargs.items() if key not in places}
        found = {key: _content_of(place) for key, place in places.items()}
        return digest_of([code_of([source.factory]), rest, source.version, found])
    return _content_of(source.path)


def _content_of(place: str) -> str:
    location = place if "://" in place else os.path.expanduser(place)
    if "://" in location:
        return hashlib.sha256(location.encode()).hexdigest()
    files = sorted(_files(location))
    if not files:
        raise DataError(f"task.source: {location} does not exist or holds no file; check the path")
    content = sum(path.stat().st_size for path in files) <= _HASHED_BYTES
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        # In an image folder the name of the folder is the label.
        name = path.relative_to(location) if Path(location).is_dir() else path.name
        digest.update(f"{name}\0{stat.st_size}\0".encode())
        if content:
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        else:
            digest.update(f"{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _files(location: str) -> Iterator[Path]:
    path = Path(location)
    if path.is_dir():
        yield from (found for found in path.rglob("*") if found.is_file())
    elif path.is_file():
        yield path
    else:
        yield from (Path(found) for found in glob.glob(location, recursive=True) if Path(found).is_file())


def _without_paths(data: Any) -> Any:
    """Drop paths: a data set that has been moved is the same data set."""
    if isinstance(data, dict):
        return {key: _without_paths(value) for key, value in data.items() if key not in ("path", "root")}
    return data
