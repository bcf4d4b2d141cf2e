from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.spec import SplitSpec
from pipeline.data.splits import SPLITS, UNLABELLED, UNUSED, assign, assign_test
from pipeline.errors import DataError

CLASSES = ("cat", "dog", "fox")


def make_ids(count: int, start: int = 0) -> np.ndarray:
    numbers = np.arange(start, start + count, dtype=">u8")
    return np.concatenate([np.zeros((count, 8), np.uint8), numbers.view(np.uint8).reshape(count, 8)], axis=1)


def by_id(ids: np.ndarray, codes: np.ndarray) -> dict[bytes, int]:
    return {row.tobytes(): int(code) for row, code in zip(ids, codes, strict=True)}


@st.composite
def problems(draw):
    spec = SplitSpec(
        train_labelled=draw(st.integers(1, 4)),
        probe=draw(st.integers(1, 3)),
        validation=draw(st.integers(1, 3)),
        test=draw(st.one_of(st.none(), st.integers(1, 4))),
        train_unlabelled=draw(st.integers(0, 6)),
    )
    needed = spec.train_labelled + spec.probe + spec.validation + (spec.test or 1)
    labels = [UNLABELLED] * draw(st.integers(0, 5))
    for number in range(len(CLASSES)):
        labels += [number] * (needed + draw(st.integers(2, 8)))
    return spec, np.array(draw(st.permutations(labels)))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(-(2**60), 2**60))
def test_every_class_gets_what_was_asked_for(problem, seed):
    spec, labels = problem
    codes = assign(make_ids(len(labels)), labels, CLASSES, spec, seed=seed, where="here")
    assert codes.min() >= UNUSED and codes.max() < len(SPLITS)
    for number in range(len(CLASSES)):
        found = Counter(SPLITS[code] for code in codes[labels == number] if code != UNUSED)
        for name in ("train_labelled", "probe", "validation"):
            assert found[name] == getattr(spec, name)
        assert found["test"] == spec.test or (spec.test is None and found["test"] >= 1)
    assert (codes == SPLITS.index("train_unlabelled")).sum() == spec.train_unlabelled
    # A sample without a label teaches nothing but as an unlabelled one, and goes first.
    unlabelled = codes[labels == UNLABELLED]
    assert set(unlabelled.tolist()) <= {UNUSED, SPLITS.index("train_unlabelled")}
    assert (unlabelled != UNUSED).sum() == min(len(unlabelled), spec.train_unlabelled)
    if spec.test is None:
        assert not (codes[labels != UNLABELLED] == UNUSED).any()


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_the_source_changes_nothing(problem, seed, random):
    spec, labels = problem
    ids = make_ids(len(labels))
    order = list(range(len(labels)))
    random.shuffle(order)
    first = assign(ids, labels, CLASSES, spec, seed=seed, where="here")
    second = assign(ids[order], labels[order], CLASSES, spec, seed=seed, where="here")
    assert by_id(ids, first) == by_id(ids[order], second)


def test_another_seed_gives_another_split():
    labels = np.repeat(np.arange(3), 40)
    spec = SplitSpec(train_labelled=5, probe=5, validation=5, test=5)
    first, second = (assign(make_ids(120), labels, CLASSES, spec, seed=seed, where="here") for seed in (0, 1))
    assert (first != second).any()


def test_more_labels_leave_test_validation_and_probe_alone():
    labels = np.repeat(np.arange(3), 40)
    few, many = (
        assign(
            make_ids(120),
            labels,
            CLASSES,
            SplitSpec(train_labelled=count, probe=5, validation=5, test=5),
            seed=3,
            where="here",
        )
        for count in (2, 20)
    )
    for name in ("probe", "validation", "test"):
        assert (few == SPLITS.index(name)).tolist() == (many == SPLITS.index(name)).tolist()
    assert set(np.flatnonzero(few == 0)) < set(np.flatnonzero(many == 0))


def test_unlabelled_samples_are_drawn_in_proportion():
    labels = np.repeat(np.arange(3), (64, 34, 24))  # 60, 30 and 20 are left after one for each of the four others
    spec = SplitSpec(train_labelled=1, probe=1, validation=1, test=1, train_unlabelled=11)
    codes = assign(make_ids(len(labels)), labels, CLASSES, spec, seed=0, where="here")
    assert np.bincount(labels[codes == SPLITS.index("train_unlabelled")]).tolist() == [6, 3, 2]


def test_with_a_test_source_the_main_one_gives_nothing_to_test():
    labels = np.repeat(np.arange(3), 10)
    spec = SplitSpec(train_labelled=2, probe=2, validation=2, test=None, train_unlabelled=None)
    codes = assign(make_ids(30), labels, CLASSES, spec, seed=0, where="here", test_source=True)
    assert np.bincount(codes, minlength=5).tolist() == [6, 12, 6, 6, 0]
    everything = assign_test(make_ids(30), labels, CLASSES, None, seed=0, where="there")
    assert (everything == SPLITS.index("test")).all()
    some = assign_test(make_ids(30), labels, CLASSES, 4, seed=0, where="there")
    assert np.bincount(labels[some == SPLITS.index("test")]).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        ([0] * 9 + [2] * 9, {}, r"there\.npz: class 'dog' has no labelled sample; .*`only`"),
        ([0] * 9, {}, r"class 'dog' has no labelled sample \(nor have 1 others\)"),
        (
            [0] * 9 + [1] * 3 + [2] * 9,
            {},
            r"each class for 4 labelled samples \(test 1 \+ .*\), but class 'dog' has 3;",
        ),
        ([0, 1, 2] * 4, {"test": None, "train_unlabelled": 0, "probe": 2}, r"test 1 or more\), but class 'cat' has 4,"),
        ([0, 1, 2] * 5, {"train_unlabelled": 4}, r"`splits.train_unlabelled` is 4, but only 3 of 15 samples are left"),
        (
            [0, 1, 2] * 5,
            {"train_unlabelled": 1, "probe": 2, "test": None},
            r"only 0 of 15 samples are left after .*, at least 1 a class for test\); lower it or give null",
        ),
    ],
)
def test_what_the_samples_cannot_meet_is_an_error_with_the_counts(labels, change, message):
    spec = SplitSpec(**({"train_labelled": 1, "probe": 1, "validation": 1, "test": 1} | change))
    with pytest.raises(DataError, match=message):
        assign(make_ids(len(labels)), np.array(labels), CLASSES, spec, seed=0, where="there.npz")


def test_both_rests_contradict_each_other_unless_test_has_a_source():
    spec = SplitSpec(train_unlabelled=None, test=None)
    assert "can't both take the rest" in (spec.problem(test_source=False) or "")
    assert spec.problem(test_source=True) is None
    assert SplitSpec(train_unlabelled=None, test=3).problem(test_source=False) is None
