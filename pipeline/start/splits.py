"""How many images of each class go where, from how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.data.spec import SplitSpec
from pipeline.errors import DataError

_LEAST = {"train_labelled": 1, "probe": 1, "validation": 1, "test": 1}
_STEPS = 600  # that a small net needs to learn anything


def propose_splits(counts: dict[str, int], *, test_apart: bool = False, labels: int | None = None) -> SplitSpec:
    """Share the labelled images of the smallest class out; larger classes leave the rest to be used without labels.

    A fifth is for the test (at most 100 a class), a tenth each for probe and validation (at most 50), and all others
    are to train on. A task whose classes have no image with a label is one without labels.

    Parameters
    ----------
    counts : dict of str to int
        Labelled images by class.
    test_apart : bool
        Whether the test split comes from a folder of its own.
    labels : int, optional
        Labelled images a class to train on; the others are used without their labels.

    Returns
    -------
    splits : SplitSpec
        With `train_unlabelled` null: all that no other split asks for.

    Raises
    ------
    DataError
        When a class has too few images.
    """
    if not any(counts.values()):
        return SplitSpec(train_labelled=0, probe=0, validation=0, test=0, train_unlabelled=None)
    needed = {name: count for name, count in _LEAST.items() if not (test_apart and name == "test")}
    smallest = min(counts, key=lambda name: counts[name])
    have, least = counts[smallest], sum(needed.values())
    if have < least:
        raise DataError(
            f"class {smallest!r} has {have} images; each needs at least {least} ({', '.join(needed)}): add some, or "
            "move its folder away"
        )
    test = 0 if test_apart else _between(have // 5, 1, 100)
    held = _between(have // 10, 1, 50)
    spare = have - test - 2 * held
    if labels is not None and not 1 <= labels <= spare:
        raise DataError(f"--labels {labels}: class {smallest!r} has {spare} images to train on; give 1 to {spare}")
    return SplitSpec(
        train_labelled=labels or spare,
        probe=held,
        validation=held,
        test=None if test_apart else test,
        train_unlabelled=None,
    )


def batch_sizes(splits: SplitSpec, classes: int, total: int) -> tuple[int, int]:
    """Choose how many taught and labelled images a step has: at most 128 and 64, and no more than there are.

    Parameters
    ----------
    splits : SplitSpec
    classes : int
    total : int
        Images for all splits together.
    """
    labelled = splits.train_labelled * classes
    return _power(_taught(splits, classes, total), 128), _power(max(1, labelled), 64)


def epochs_for(splits: SplitSpec, classes: int, total: int) -> int:
    """Choose how many passes a training makes: 20, or as many as make 600 steps where images are few; at most 200.

    Parameters
    ----------
    splits : SplitSpec
    classes : int
    total : int
        Images for all splits together.
    """
    steps = math.ceil(_taught(splits, classes, total) / batch_sizes(splits, classes, total)[0])
    return _between(math.ceil(_STEPS / steps), 20, 200)


def _taught(splits: SplitSpec, classes: int, total: int) -> int:
    held = (splits.probe + splits.validation + (splits.test or 0)) * classes
    return max(1, total - held)


def _between(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))


def _power(count: int, most: int) -> int:
    """Return the largest power of two up to `count` and `most`, so that workers can share it."""
    return min(most, 1 << (count.bit_length() - 1))


def shown_counts(counts: Sequence[int]) -> str:
    """Say how many images classes have: ``120`` or ``80 to 120``."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
