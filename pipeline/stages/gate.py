"""The gate before the registry: whether the student beats no teacher, and what is served now."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import FacultyError
from pipeline.stages import training
from pipeline.stages.base import Run
from pipeline.stages.distill import control_arm, student_arm
from pipeline.stages.heads import heads_of, student_classes
from pipeline.stages.teachers import has_labels, table_of
from pipeline.tracking.champion import AGAINST_TAG, FAILED, NOBODY, NOT_JUDGED, PASSED
from pipeline.tracking.redact import one_line
from pipeline.tracking.versions import WEIGHTS_TAG

if TYPE_CHECKING:
    import torch

    from pipeline.data.table import ImageSplit
    from pipeline.distillation.step import Head
    from pipeline.engine.spec import Arm
    from pipeline.tracking.versions import Registry, Version

NO_TEACHER, CHAMPION = "no teacher", "champion"
NEEDLESS = "not needed"
TEST_TAG = "faculty.test_fingerprint"


@dataclass(frozen=True)
class Hurdle:
    """One comparison on the test images.

    Attributes
    ----------
    against : {"no teacher", "champion"}
    outcome : {"passed", "failed", "not judged", "not needed"}
        `not needed`: there is nothing to beat.
    why : str
        In one line, with the numbers.
    ours, theirs : float or None
        Test accuracies in [0, 1].
    difference : float or None
        Ours − theirs.
    standard_error : float or None
        Of the difference, over the test images, which both have answered.
    images : int
    version : str or None
        The champion's version.
    same_test : bool or None
        Whether the champion was tested on these very images when it was registered. One that was not may have been
        trained on some of them, which is to its advantage.
    """

    against: str
    outcome: str
    why: str
    ours: float | None = None
    theirs: float | None = None
    difference: float | None = None
    standard_error: float | None = None
    images: int = 0
    version: str | None = None
    same_test: bool | None = None


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes
    ----------
    gate : {"passed", "failed", "not judged"}
        `passed` when no hurdle failed and all could be judged; only then may the version become champion.
    admitted : bool
        Whether it becomes a version.
    hurdles : tuple of Hurdle
    test_fingerprint : str
        Hash of the test images, see `fingerprint_of`; "" without any.
    against : str
        The version of the champion that it was compared with, or ``none``.
    """

    gate: str
    admitted: bool
    hurdles: tuple[Hurdle, ...]
    test_fingerprint: str
    against: str

    @property
    def accuracy(self) -> float | None:
        """The student's own on the test images; the mean over seeds, where it was compared with no teacher."""
        return self.hurdles[0].ours

    @property
    def why(self) -> str:
        """All hurdles in one line."""
        return "; ".join(hurdle.why for hurdle in self.hurdles)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return asdict(self) | {"hurdles": [asdict(hurdle) for hurdle in self.hurdles], "why": self.why}


def judge(run: Run, registry: Registry, champion: Version | None, weights: str) -> Decision:
    """Hold the student against no teacher, and against the champion.

    Parameters
    ----------
    run : Run
        With all stages up to `evaluate` finished.
    registry : Registry
    champion : Version or None
        What is served now.
    weights : str
        Hash of the student's weights.
    """
    settings, test = run.settings.registration, table_of(run).split("test")
    fingerprint = fingerprint_of(test) if len(test) else ""
    first = _against_no_teacher(run)
    admitted = first.outcome != FAILED or not settings.gate
    against = NOBODY
    if not admitted:
        second = Hurdle(CHAMPION, NEEDLESS, "the champion was not asked")
    elif champion is None:
        second = Hurdle(CHAMPION, NEEDLESS, "there is no champion yet")
    else:
        second = _against_champion(run, registry, champion, weights, fingerprint)
        against = champion.number
        if second.outcome == NEEDLESS and second.version == against:
            # It is the champion's content: what it was promoted over stays what it was compared with.
            against = champion.tags.get(AGAINST_TAG, against)
    hurdles = (first, second)
    outcomes = {hurdle.outcome for hurdle in hurdles}
    gate = FAILED if FAILED in outcomes else NOT_JUDGED if NOT_JUDGED in outcomes else PASSED
    return Decision(gate, admitted, hurdles, fingerprint, against)


def fingerprint_of(split: ImageSplit) -> str:
    """Hash what a student is tested on: classes, image shape, sample ids and labels, whatever their order.

    Ids come from the images' content, so that the same images under other paths, or from another split of other
    settings, are the same test.
    """
    import numpy as np

    order = np.lexsort(split.raw_ids.T[::-1])
    digest = hashlib.sha256(json.dumps([list(split.classes), list(split.image_shape)]).encode())
    digest.update(split.raw_ids[order].tobytes())
    digest.update(split.labels.numpy()[order].astype("<i4").tobytes())
    return digest.hexdigest()


def credit(logits: torch.Tensor, labels: torch.Tensor, heads: Sequence[Head]) -> torch.Tensor:
    """Return what each image adds to the accuracy: an (N,) tensor whose mean is the accuracy.

    Without heads c_i = 1 where the most probable class is the label, else 0. With H heads, of which head h has n_h of
    the N images, c_i = Σ_h N / (H · n_h) · hit_h,i, so that mean(c) is the mean of the heads' accuracies.
    """
    import torch

    if not heads:
        return (logits.argmax(1) == labels).double()
    total = torch.zeros(len(labels), dtype=torch.double)
    for head in heads:
        own = torch.tensor([*head.members, -1])[labels]
        hit = (logits[:, head.place].argmax(1) == own) & (own >= 0)
        total += hit.double() * len(labels) / (len(heads) * int((own >= 0).sum()))
    return total


def paired(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Return the mean difference d of two credits (N,) and its standard error s(d) / √N."""
    gap = ours - theirs
    error = float(gap.std(correction=1)) / math.sqrt(len(gap)) if len(gap) > 1 else math.inf
    return float(gap.mean()), error


def _against_no_teacher(run: Run) -> Hurdle:
    test, settings = table_of(run).split("test"), run.settings
    if not len(test):
        return Hurdle(NO_TEACHER, NOT_JUDGED, "there are no test images (task.splits.test)")
    ours = _mean_credit(run, [_kept(run)])
    if not has_labels(run):
        why = "without labels there is no student without teachers to compare with"
        return Hurdle(NO_TEACHER, NOT_JUDGED, why, ours=float(ours.mean()), images=len(test))
    alone = [control_arm(run, seed) for seed in range(settings.evaluate.seeds)]
    if _kept(run) == alone[0]:
        why = "the student is itself the one without teachers"
        return Hurdle(NO_TEACHER, NEEDLESS, why, ours=float(ours.mean()), images=len(test))
    if "no_teacher" not in settings.evaluate.controls:
        why = "it was not compared with no teacher: evaluate.controls has no no_teacher"
        return Hurdle(NO_TEACHER, NOT_JUDGED, why, ours=float(ours.mean()), images=len(test))
    seeds = [student_arm(run, seed) for seed in range(settings.evaluate.seeds)]
    return _compared(
        NO_TEACHER, _mean_credit(run, seeds), _mean_credit(run, alone), margin=settings.registration.margin, errors=0.0
    )


def _against_champion(run: Run, registry: Registry, champion: Version, weights: str, fingerprint: str) -> Hurdle:
    from pipeline.tracking.versions import load_version

    version, settings, test = champion.number, run.settings.registration, table_of(run).split("test")
    if champion.tags.get(WEIGHTS_TAG) == weights:
        why = f"the champion, version {version}, has the very same weights"
        return Hurdle(CHAMPION, NEEDLESS, why, images=len(test), version=version)

    def not_judged(reason: str) -> Hurdle:
        why = f"the champion, version {version}, can't be compared: {reason}"
        return Hurdle(CHAMPION, NOT_JUDGED, why, images=len(test), version=version)

    if not len(test):
        return not_judged("there are no test images (task.splits.test)")
    import torch

    classes, heads = student_classes(run), heads_of(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded = load_version(registry, champion, device)
        if sorted(loaded.classes) != sorted(classes):
            return not_judged("it has other classes" if loaded.classes else "it does not tell its classes")
        if loaded.image_shape not in (None, test.image_shape):
            return not_judged(f"it takes images of another shape {loaded.image_shape}")
        logits = _ask(run, loaded.module, test, device)
        if logits.shape != (len(test), len(classes)) or not torch.isfinite(logits).all():
            return not_judged(f"its answers are no {len(classes)} numbers an image")
    except (FacultyError, RuntimeError, ValueError, TypeError) as error:  # whatever somebody's program may raise
        return not_judged(one_line(error))
    order = [loaded.classes.index(name) for name in classes]
    found = _compared(
        CHAMPION,
        _mean_credit(run, [_kept(run)]),
        credit(logits[:, order], test.labels, heads),
        margin=settings.margin,
        errors=settings.standard_errors,
        called=f"the champion, version {version}",
    )
    before = champion.tags.get(TEST_TAG)
    same = None if before is None else before == fingerprint
    why = found.why + (
        "; it was tested on other images, and may have learnt from some of these" if same is False else ""
    )
    return replace(found, why=why, version=version, same_test=same)


def _ask(run: Run, module: torch.nn.Module, test: ImageSplit, device: str) -> torch.Tensor:
    import torch

    from pipeline.engine.evaluation import predict

    with run.display.working("asking the champion"):
        images = (images for _, images in test.batches(run.settings.amalgamate.batch_size))
        return predict(module, images, torch.device(device))


def _compared(
    against: str, ours: torch.Tensor, theirs: torch.Tensor, *, margin: float, errors: float, called: str = ""
) -> Hurdle:
    """Compare two credits (N,): passed when d > margin and d > errors · SE(d)."""
    gap, error = paired(ours, theirs)
    enough, sure = 100 * gap > margin, gap > errors * error or not errors
    text = f"{100 * gap:+.1f} points (± {200 * error:.1f}) against {called or against} on {len(ours)} test images"
    if not enough:
        text += f", not above the margin of {margin:g}"
    elif not sure:
        text += f", within {errors:g} standard errors"
    return Hurdle(
        against,
        PASSED if enough and sure else FAILED,
        text,
        ours=float(ours.mean()),
        theirs=float(theirs.mean()),
        difference=gap,
        standard_error=error if math.isfinite(error) else None,
        images=len(ours),
    )


def _kept(run: Run) -> Arm:
    """Return the training whose student is the one to register."""
    guard = run.records["distill"].summary.get("guard") or {}
    return control_arm(run) if guard.get("kept") == "no_teacher" else student_arm(run)


def _mean_credit(run: Run, arms: Sequence[Arm]) -> torch.Tensor:
    import torch

    labels, heads = table_of(run).split("test").labels, heads_of(run)
    return torch.stack([credit(training.predictions(arm)["test"], labels, heads) for arm in arms]).mean(0)
