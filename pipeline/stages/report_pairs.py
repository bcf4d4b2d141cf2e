"""Students of several runs on the same test images, compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import FacultyError
from pipeline.stages.base import Run
from pipeline.stages.gate import credit, fingerprint_of, paired
from pipeline.stages.heads import heads_of
from pipeline.stages.report_images import predictions_of
from pipeline.stages.report_kept import kept_credits
from pipeline.stages.teachers import table_of

if TYPE_CHECKING:
    from torch import Tensor


def pairs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Compare the first run's student with each other one's, where both were tested on the same images.

    Returns
    -------
    list of dict
        One for each run but the first: ``difference`` (that run's − the first's, in [−1, 1]), ``error`` (two standard
        errors over the test images, in pairs), ``images``; or ``why`` they can't be compared.
    """
    first, *others = [_tested(run) for run in runs]
    return [_compared(first, other) for other in others]


def _compared(first: tuple[str, Tensor | None, str], other: tuple[str, Tensor | None, str]) -> dict[str, Any]:
    for _, credits, why in (first, other):
        if credits is None:
            return {"why": why}
    if first[0] != other[0]:
        return {"why": "they were tested on other images: accuracies may not be compared"}
    assert first[1] is not None and other[1] is not None
    gap, error = paired(other[1], first[1])
    return {"difference": gap, "error": 2 * error, "images": len(first[1])}


def _tested(run: Run) -> tuple[str, Tensor | None, str]:
    """Return the fingerprint of the test images, and what each adds to the accuracy of the student, in their order."""
    if not {"ingest", "distill"} <= run.records.keys():
        return "", None, "one of them has no student"
    try:
        split = table_of(run).split("test")
        if not len(split):
            return "", None, "one of them has no test images"
        order = sorted(range(len(split)), key=split.ids.__getitem__)
        found = kept_credits(run.folder("evaluate")).get("student") if "evaluate" in run.records else None
        if found is None:
            logits = predictions_of(run.folder("distill"))
            found = None if logits is None else credit(logits.float(), split.labels, heads_of(run))
        if found is None or len(found) != len(split):
            return "", None, "the student's predictions were not kept"
        return fingerprint_of(split), found[order].double(), ""
    except (FacultyError, OSError) as error:
        return "", None, f"{run.files.root.name}: its images can't be read ({error})"
