"""What is kept of a sweep's trials: one file for each that has ended, written whole; they are what a resume goes by.

Layout::

    <run_dir>/sweep/<key>/sweep.yaml             what was swept
    <run_dir>/sweep/<key>/trials/<trial>/row.json  how a trial ended
    <run_dir>/sweep/<key>/trials/<trial>/error.log the traceback of one that failed
    <run_dir>/sweep/<key>/trials/<trial>/member.json where one of a population stands
    <run_dir>/sweep/<key>/trials.parquet         all rows
    <run_dir>/sweep/<key>/best.json, best.yaml   the best trial, and its settings as an overlay for `-c`
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.data.mirror import share
from pipeline.stages.artefacts import clock, write_json, write_text
from pipeline.sweep_spec import Mode, SweepSpec

State = Literal["done", "stopped", "failed"]
# Errors that come again whenever the same settings do.
_LASTING = ("ConfigError", "DataError", "TeacherError", "UserError")


@dataclass(frozen=True)
class TrialRow:
    """How a trial ended.

    Attributes
    ----------
    trial : str
        Its number, a hash of its settings.
    state : str
        ``done``; ``stopped`` by a scheduler before its last epoch; or ``failed``.
    values : dict
        Of the settings that are swept; with a population those that it ended with.
    metric : float or None
        At its end; of a trial that was stopped, at its last epoch.
    scores : dict of str to float
        All that was measured at its end.
    epochs : int
    seconds : float
    curve : tuple of (int, float)
        The metric by epoch.
    error, error_type : str or None
    student : str or None
        Folder of the student, inside the run folder.
    finished : float
        Seconds since the epoch.
    """

    trial: str
    state: State
    values: dict[str, Any]
    metric: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    error_type: str | None = None
    student: str | None = None
    finished: float = field(default_factory=clock)

    @property
    def final(self) -> bool:
        """Whether the same trial need not be run again."""
        return self.state != "failed" or self.error_type in _LASTING


@dataclass(frozen=True)
class Member:
    """Where a member of a population stands: the values that it has by now, and the metric by epoch so far."""

    values: dict[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()


class SweepFolder:
    """A sweep's folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def trial(self, trial: str) -> Path:
        """Return the folder of a trial."""
        return self.root / "trials" / trial

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write what is swept."""
        text = yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True)
        write_text(self.root / "sweep.yaml", text)

    def keep(self, row: TrialRow, traceback: str | None = None) -> None:
        """Keep a row, whole or not at all."""
        if traceback:
            write_text(self.trial(row.trial) / "error.log", traceback)
        write_json(self.trial(row.trial) / "row.json", asdict(row))
        share(self.trial(row.trial))  # where the run folder is in a store: a row counts once it is there

    def keep_member(self, trial: str, member: Member) -> None:
        """Keep where a member of a population stands: after an interruption it goes on from there."""
        write_json(self.trial(trial) / "member.json", asdict(member))
        share(self.trial(trial) / "member.json")

    def member(self, trial: str) -> Member:
        """Return where a member stood when that was last kept; at its beginning where it was not."""
        try:
            data = json.loads((self.trial(trial) / "member.json").read_text(encoding="utf-8"))
            return Member(dict(data["values"]), _curve(data["curve"]))
        except (OSError, ValueError, TypeError, KeyError):
            return Member()

    def rows(self) -> dict[str, TrialRow]:
        """Return the rows that are there and whole, by trial; one that was cut off does not count."""
        found = {}
        for path in sorted((self.root / "trials").glob("*/row.json")):
            row = _read(path)
            if row is not None and row.trial == path.parent.name:
                found[row.trial] = row
        return found

    def finish(self, spec: SweepSpec, rows: Sequence[TrialRow], images: int) -> TrialRow | None:
        """Write the table and the best trial; return the latter, None where no trial has come to its end."""
        write_table(spec, rows, self.root / "trials.parquet")
        best = best_of(rows, spec.direction)
        if best is None:
            return None
        write_json(self.root / "best.json", asdict(best) | about_best(spec, rows, best, images))
        write_text(self.root / "best.yaml", overlay(spec, best))
        return best


def _read(path: Path) -> TrialRow | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return TrialRow(**data | {"curve": _curve(data["curve"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _curve(pairs: Any) -> tuple[tuple[int, float], ...]:
    return tuple((int(epoch), float(value)) for epoch, value in pairs)


def best_of(rows: Iterable[TrialRow], mode: Mode) -> TrialRow | None:
    """Return the best of the trials that have come to their end.

    Small validation splits give equal accuracies: among those the one with the lower negative log-likelihood is taken,
    then the one with the lower number.
    """
    sign = -1.0 if mode == "max" else 1.0
    judged = [row for row in rows if row.state == "done" and row.metric is not None and math.isfinite(row.metric)]
    return min(
        judged,
        key=lambda row: (
            sign * (row.metric or 0.0),
            row.scores.get("validation_nll", row.scores.get("faculty_nll", 0.0)),
            row.trial,
        ),
        default=None,
    )


def about_best(spec: SweepSpec, rows: Sequence[TrialRow], best: TrialRow, images: int) -> dict[str, Any]:
    """Return how sure it is that the best trial is the best one.

    An accuracy p on n images has the standard error √(p (1 − p) / n). The best of many is in part the luckiest: on the
    images that it was chosen by it looks better than it is.
    """
    found: dict[str, Any] = {"images": images, "trials": len(rows), "direction": spec.direction}
    if spec.metric.endswith("_accuracy") and best.metric is not None and images:
        error = math.sqrt(best.metric * (1 - best.metric) / images)
        near = [row for row in rows if row.state == "done" and row.metric is not None]
        found |= {
            "standard_error": error,
            "within_one_error": sum(row.metric >= best.metric - error for row in near if row.metric is not None),
        }
    return found


def overlay(spec: SweepSpec, best: TrialRow) -> str:
    """Return settings, as YAML for ``-c``, with which a run is the best trial."""
    nested: dict[str, Any] = {}
    for path, value in (best.values | spec.retrain).items():
        *above, last = path.split(".")
        place = nested
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    head = f"# The best trial of a sweep by {spec.metric}: {best.trial}.\n"
    return head + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def write_table(spec: SweepSpec, rows: Sequence[TrialRow], path: Path) -> None:
    """Write all rows, best first: a column for each setting that is swept, and for each score."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sign = -1.0 if spec.direction == "max" else 1.0
    order = {"done": 0, "stopped": 1, "failed": 2}
    ordered = sorted(
        rows, key=lambda row: (order[row.state], sign * row.metric if row.metric is not None else math.inf, row.trial)
    )
    scores = sorted({name for row in rows for name in row.scores})
    numeric = {name for name, domain in spec.space.items() if domain.dist != "choice"}
    columns: dict[str, Any] = {
        "trial": pa.array([row.trial for row in ordered], pa.string()),
        "state": pa.array([row.state for row in ordered], pa.string()),
        "metric": pa.array([row.metric for row in ordered], pa.float64()),
        "epochs": pa.array([row.epochs for row in ordered], pa.int64()),
        "seconds": pa.array([row.seconds for row in ordered], pa.float64()),
    }
    for name in spec.space:
        values = [row.values.get(name) for row in ordered]
        if name in numeric:
            columns[f"set.{name}"] = pa.array([None if one is None else float(one) for one in values], pa.float64())
        else:
            columns[f"set.{name}"] = pa.array([json.dumps(one) for one in values], pa.string())
    for name in scores:
        columns[f"score.{name}"] = pa.array([row.scores.get(name) for row in ordered], pa.float64())
    columns["error"] = pa.array([row.error for row in ordered], pa.string())
    columns["student"] = pa.array([row.student for row in ordered], pa.string())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def common_epoch(rows: Sequence[TrialRow]) -> int | None:
    """Return the epoch at which trials can be compared: None where all of them have come to their end.

    A trial that was stopped early is not to be judged against the end of another one.
    """
    if not any(row.state == "stopped" for row in rows):
        return None
    return min((row.epochs for row in rows if row.state != "failed" and row.epochs), default=None)


def compared(rows: Sequence[TrialRow]) -> tuple[list[TrialRow], list[float], int | None]:
    """Return the trials that can be compared, their metrics, and the epoch these are of; None: of their end."""
    epoch = common_epoch(rows)
    kept, values = [], []
    for row in rows:
        value = row.metric if epoch is None else dict(row.curve).get(epoch)
        if row.state != "failed" and value is not None and math.isfinite(value):
            kept.append(row)
            values.append(value)
    return kept, values, epoch
