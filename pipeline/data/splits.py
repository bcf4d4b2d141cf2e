"""Which sample goes to which split: stratified by class, seeded, and blind to the order of the source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.data.spec import SplitSpec
from pipeline.errors import DataError

SPLITS = ("train_labelled", "train_unlabelled", "probe", "validation", "test")
UNUSED = -1
UNLABELLED = -1

# Splits of a fixed size are filled in this order, so that a larger train_labelled takes nothing from the others.
_FIXED = ("test", "validation", "probe", "train_labelled")


def sampling_order(ids: np.ndarray, seed: int) -> np.ndarray:
    """Return a random order of samples that depends on their ids and the seed alone.

    Parameters
    ----------
    ids : (N, 16) uint8 array
    seed : int

    Returns
    -------
    order : (N,) int64 array
        Row numbers by ascending BLAKE2b hash of the id, keyed with the seed.
    """
    key = seed.to_bytes(16, "little", signed=True)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16, key=key).digest() for row in ids)
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0]))


def assign(
    ids: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    spec: SplitSpec,
    *,
    seed: int,
    where: str,
    test_source: bool = False,
) -> np.ndarray:
    """Give every sample of the main source a split.

    Parameters
    ----------
    ids : (N, 16) uint8 array
        All different.
    labels : (N,) int array
        Class numbers, `UNLABELLED` where there is none.
    classes : sequence of str
    spec : SplitSpec
    seed : int
    where : str
        The source, for errors.
    test_source : bool
        Whether the test split comes from elsewhere, so that nothing goes to it here.

    Returns
    -------
    codes : (N,) int8 array
        Index into `SPLITS`, or `UNUSED`.

    Raises
    ------
    DataError
        If a class, or the source as a whole, has fewer samples than `spec` asks for.
    """
    order = sampling_order(ids, seed)
    pools = [order[labels[order] == k] for k in range(len(classes))]
    without_label = order[labels[order] == UNLABELLED]
    rest_to_test = spec.test is None and not test_source
    wanted = {name: getattr(spec, name) or 0 for name in _FIXED}
    if test_source:
        wanted["test"] = 0
    _check_classes(pools, classes, wanted, rest_to_test, where)

    codes = np.full(len(ids), UNUSED, dtype=np.int8)
    for k, pool in enumerate(pools):
        taken = 0
        for name, count in wanted.items():
            codes[pool[taken : taken + count]] = SPLITS.index(name)
            taken += count
        pools[k] = pool[taken:]

    # A class must keep a sample for a test split that takes the rest.
    available = [len(pool) - rest_to_test for pool in pools]
    possible = len(without_label) + sum(available)
    count = possible if spec.train_unlabelled is None else spec.train_unlabelled
    if count > possible:
        raise DataError(
            f"{where}: `splits.train_unlabelled` is {count}, but only {possible} of {len(ids)} samples are left after "
            f"the other splits ({', '.join(f'{n} {c} a class' for n, c in wanted.items() if c)}"
            f"{', at least 1 a class for test' if rest_to_test else ''}); lower it or give null for all of the rest"
        )
    unlabelled = SPLITS.index("train_unlabelled")
    codes[without_label[:count]] = unlabelled
    for pool, share in zip(pools, _shares(max(0, count - len(without_label)), available), strict=True):
        codes[pool[:share]] = unlabelled
        if rest_to_test:
            codes[pool[share:]] = SPLITS.index("test")
    return codes


def assign_test(
    ids: np.ndarray, labels: np.ndarray, classes: Sequence[str], count: int | None, *, seed: int, where: str
) -> np.ndarray:
    """Choose the test split from a source of its own.

    Parameters
    ----------
    ids, labels, classes, seed, where
        As in `assign`.
    count : int or None
        Samples a class; None: all.

    Returns
    -------
    codes : (N,) int8 array
        The code of ``test``, or `UNUSED`.

    Raises
    ------
    DataError
        If a class has fewer.
    """
    order = sampling_order(ids, seed)
    pools = [order[labels[order] == k] for k in range(len(classes))]
    _check_classes(pools, classes, {"test": count or 0}, count is None, where)
    codes = np.full(len(ids), UNUSED, dtype=np.int8)
    for pool in pools:
        codes[pool[:count]] = SPLITS.index("test")
    return codes


def _check_classes(
    pools: list[np.ndarray], classes: Sequence[str], wanted: dict[str, int], rest_to_test: bool, where: str
) -> None:
    needed = sum(wanted.values()) + rest_to_test
    short = [(name, len(pool)) for name, pool in zip(classes, pools, strict=True) if len(pool) < needed]
    if not short:
        return
    empty = [name for name, have in short if have == 0]
    if empty:
        raise DataError(
            f"{where}: class {empty[0]!r} has no labelled sample{_others(empty)}; "
            "add some, or leave it out with the source's `only`"
        )
    parts = [f"{name} {count}" for name, count in wanted.items() if count] + ["test 1 or more"] * rest_to_test
    shown = ", ".join(f"{name!r} has {have}" for name, have in short[:5])
    raise DataError(
        f"{where}: `splits` asks each class for {needed} labelled samples ({' + '.join(parts)}), but class {shown}"
        f"{' and so on' * (len(short) > 5)}; lower one of these numbers or add samples"
    )


def _others(names: list[str]) -> str:
    return f" (nor have {len(names) - 1} others)" if len(names) > 1 else ""


def _shares(total: int, available: list[int]) -> list[int]:
    """Share `total` out in proportion to what is available, by largest remainders."""
    everything = sum(available)
    if not everything:
        return [0] * len(available)
    parts = [divmod(total * count, everything) for count in available]
    shares = [whole for whole, _ in parts]
    by_remainder = sorted(range(len(parts)), key=lambda k: -parts[k][1])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
