"""Stage select: which teachers together help most on the labelled images, or that none does."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import SelectSettings
from pipeline.errors import ConfigError
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.assess import rows_of
from pipeline.stages.base import Outcome, Run
from pipeline.stages.probe import LABELLED, labelled_features
from pipeline.stages.recording_teachers import record_choice
from pipeline.stages.teachers import carried, has_labels, table_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.assessment.selection import Selection, Verdict


_SMALL = 1e8  # images × features² of a fit, up to which one thread is enough: some hundredths of a second
_JUDGED = 5000  # labelled images that sets are judged on, at most: each trial of a set is a fit on them


class Select:
    """Assessment → `faculty.json`: who was chosen, in which order and why, and how well the set knows each class."""

    name = "select"
    version = 3
    needs = ("ingest", "assess")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings, and the seed of the resamples."""
        return {"select": run.settings.select.model_dump(mode="json"), "seed": run.settings.seed}

    def run(self, run: Run, folder: Path) -> Outcome:
        """Choose greedily by marginal gain; the set must beat what the pixels alone say."""
        from pipeline.assessment.selection import select_set

        settings, table = run.settings.select, table_of(run)
        rows = {row["teacher"]: row for row in rows_of(run)}
        usable = [name for name, row in rows.items() if row["error"] is None and row["dropped"] is None]
        if settings.teachers is not None:
            return self._finish(run, folder, _choose_given(settings, usable, rows), rows)
        if not has_labels(run):
            choice = _choose_unverified(settings, [rows[name] for name in usable])
            return self._finish(run, folder, choice, rows)
        with run.display.working("choosing the set"):
            said = _said_together(run, usable) if settings.by == "together" else _said_alone(run, usable)
            found = select_set(
                **said,
                gains={name: rows[name]["bridge_gain"] for name in usable},
                parameters={name: rows[name]["parameters"] for name in usable},
                max_teachers=settings.max_teachers,
                max_params=settings.max_params,
                min_gain=settings.min_gain,
                confidence=settings.confidence,
                consider=settings.consider,
                seed=run.settings.seed,
            )
        return self._finish(run, folder, _describe(found, table.classes), rows)

    def _finish(self, run: Run, folder: Path, choice: dict[str, Any], rows: Mapping[str, dict[str, Any]]) -> Outcome:
        choice["reasons"] |= {name: f"dropped: {row['dropped']}" for name, row in rows.items() if row["dropped"]}
        choice["reasons"] |= {name: f"failed: {row['error']}" for name, row in rows.items() if row["error"]}
        write_json(folder / "faculty.json", choice)
        record_choice(run, folder, choice, rows.values())
        summary = {key: choice[key] for key in ("chosen", "score", "reference_score", "confidence")}
        return Outcome(digest=digest_of([choice["chosen"], choice["best_single"]]), summary=summary)


def _choose_given(settings: SelectSettings, usable: list[str], rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Take the teachers that the settings name, in the order of the assessment."""
    if settings.teachers == "all" or settings.teachers is None:
        wanted: tuple[str, ...] = tuple(usable)
    else:
        wanted = settings.teachers
        for name in wanted:
            if name not in rows:
                near = difflib.get_close_matches(name, rows, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"select.teachers: the zoo has no teacher {name!r}{hint}")
            if name not in usable:
                why = rows[name]["error"] or rows[name]["dropped"]
                raise ConfigError(f"select.teachers: {name!r} can't be taken ({why}); leave it out, or mend it")
    names = [name for name in usable if name in wanted]
    verdict = f"{len(names)} teachers, given by select.teachers: not tested against no teacher"
    reasons = {name: f"{'' if name in names else 'not '}named by select.teachers" for name in usable}
    return _choice(names, verdict, reasons, best=usable[:1])


def _choose_unverified(settings: SelectSettings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose without labels: the most informative teachers that the others do not contradict, within the budget."""
    chosen: list[str] = []
    reasons: dict[str, str] = {}
    size = 0
    for row in rows:  # best first
        name, alone = row["teacher"], len(rows) == 1
        told = f"information {row['information']:.3f}, agreement {row['agreement']:+.3f}"
        if row["information"] < settings.min_gain:
            reasons[name] = f"says next to nothing of the task, {told}"
        elif row["agreement"] <= 0 and not alone:
            reasons[name] = f"agrees with no other teacher, {told}"
        elif len(chosen) == settings.max_teachers or size + row["parameters"] > (settings.max_params or math.inf):
            reasons[name] = f"over budget, {told}"
        else:
            chosen.append(name)
            size += row["parameters"]
            reasons[name] = f"{len(chosen)}. choice, {told}"
    verdict = (
        f"{len(chosen)} teachers, unverified: there are no labels to try them on"
        if chosen
        else "no teacher says anything of the task, going by the names of its classes"
    )
    return _choice(chosen, verdict, reasons, best=chosen[:1])


def _choice(chosen: list[str], verdict: str, reasons: dict[str, str], *, best: list[str]) -> dict[str, Any]:
    """Return a choice without scores."""
    return {
        "chosen": chosen,
        "best_single": best[0] if best else None,
        "verdict": verdict,
        "score": None,
        "score_interval": None,
        "advantage_interval": None,
        "reference_score": None,
        "confidence": None,
        "reasons": reasons,
        "verdicts": {},
        "coverage": {},
        "shares": {},
    }


def _said_together(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Return what teachers, sets of them, and the images alone say of all labelled images, each held out in turn."""
    import torch

    from pipeline.amalgamation.together import together_held_out
    from pipeline.transport.bridge import pixel_features

    table = table_of(run)
    splits, size = [table.split(name) for name in LABELLED], len(table.classes)
    labels = torch.cat([split.labels for split in splits])
    judged = _judged(labels, size, run.settings.seed)
    # One that is tried in a set is tried often; of thousands of others, what they say alone is all that is wanted.
    features = lru_cache(run.settings.select.consider)(lambda name: labelled_features(run, name)[judged])

    def together(members: Sequence[str]) -> Tensor:
        found = [features(name) for name in members]
        with _undisturbed(len(judged) * sum(one.shape[1] for one in found) ** 2):
            return together_held_out(found, labels[judged], size)

    pixels = torch.cat([pixel_features(split.images()) for split in splits])[judged]
    return {
        "carried": {name: together([name]) for name in names},
        "labels": labels[judged],
        "together": together,
        "reference": together_held_out([pixels], labels[judged], size),
    }


@contextmanager
def _undisturbed(operations: float) -> Iterator[None]:
    """Keep a small fit, which is hundreds of short steps, from waiting at every one of them.

    Threads that share a step wait for each other, and each step for the interpreter: beside whoever else keeps the
    processors busy (the records of the assessment are still being sent), a fit of a tenth of a second takes seconds.
    """
    import torch

    if operations > _SMALL:
        yield
        return
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(min(interval, 5e-4))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)


def _judged(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Return the rows of at most `_JUDGED` images, as many of each class as of another; two at least."""
    import torch

    each = max(2, _JUDGED // num_classes)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = [order[labels[order] == label][:each] for label in range(num_classes)]
    return torch.cat(kept).sort().values


def _said_alone(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Return what each teacher, and the images alone, say of the validation images."""
    from pipeline.transport.bridge import fit_bridge, pixel_features

    table = table_of(run)
    labelled, validation = table.split("train_labelled"), table.split("validation")
    bridge = fit_bridge(
        "centres",
        logits=None,
        features=pixel_features(labelled.images()),
        labels=labelled.labels,
        num_classes=len(table.classes),
    )
    return {
        "carried": {name: carried(run, name, "validation") for name in names},
        "labels": validation.labels,
        "reference": bridge.carry(bridge.distribution(None, pixel_features(validation.images()))),
    }


def _describe(found: Selection, classes: tuple[str, ...]) -> dict[str, Any]:
    order = {name: number for number, name in enumerate(found.chosen)}
    coverage = {name: value for name, value in zip(classes, found.coverage.tolist(), strict=True) if value == value}
    verdict = (
        f"{len(found.chosen)} teachers: score on labelled images {found.score:.3f} against {found.reference_score:.3f} "
        f"without a teacher, {found.advantage_interval[0]:+.3f} to {found.advantage_interval[1]:+.3f} more, "
        f"confidence {found.confidence:.2f}"
        if found.chosen
        else "no set of teachers is better on the labelled images than the images alone "
        f"(score {found.reference_score:.3f})"
    )
    return {
        "chosen": list(found.chosen),
        "best_single": found.best_single,
        "verdict": verdict,
        "score": found.score,
        "score_interval": list(found.score_interval),
        "advantage_interval": list(found.advantage_interval),
        "reference_score": found.reference_score,
        "confidence": found.confidence,
        "reasons": {name: _reason(order.get(name), one) for name, one in found.verdicts.items()},
        "verdicts": {
            name: {"reason": one.reason, "score": one.score, "gain": one.gain, "confidence": one.confidence}
            for name, one in found.verdicts.items()
        },
        "coverage": coverage,
        "shares": found.shares,
    }


def _reason(place: int | None, verdict: Verdict) -> str:
    gain = f"{verdict.gain:+.3f} ({verdict.confidence:.0%} sure)"
    return f"{place + 1}. choice, {gain}" if place is not None else f"{verdict.reason}, {gain}"
