"""Sub-tasks: who shares one, what a teacher says of it, and who teaches which sample."""

import math

import pytest
import torch

from pipeline.amalgamation.subtasks import (
    Source,
    SubTask,
    assign_subtask,
    group,
    nearest,
    sources_of,
    subtask_distribution,
)

FOOTWEAR = SubTask("footwear", ("sandal", "boot", "sneaker"))
TOPS = SubTask("tops", ("shirt", "coat"))


def source(columns, places, teacher=0):
    return Source(teacher, torch.tensor(columns), torch.tensor(places))


def read(found):
    return [(one.teacher, one.columns.tolist(), one.places.tolist()) for one in found]


def test_sources_map_columns_of_a_teacher_to_places_of_the_subtask():
    teachers = [
        ("boot", "bag", "sandal"),
        ("bag", "boot"),
        ("sneaker", "boot", "sandal", "coat", "shirt"),
        ("Sandal", "Boot"),
    ]
    assert read(sources_of(FOOTWEAR, teachers)) == [(0, [2, 0], [0, 1]), (2, [2, 1, 0], [0, 1, 2])]
    assert read(sources_of(TOPS, teachers)) == [(2, [4, 3], [0, 1])]
    assert {key: read(value) for key, value in group([FOOTWEAR, TOPS], teachers).items()} == {
        "footwear": read(sources_of(FOOTWEAR, teachers)),
        "tops": read(sources_of(TOPS, teachers)),
    }


def test_qualified_names_tell_the_heads_of_a_teacher_apart_and_win():
    shoes, bags = SubTask("shoes", ("small", "large")), SubTask("bags", ("small", "large"))
    teacher = ("small", "bags/small", "bags/large", "large", "shoes/small")
    assert read(sources_of(bags, [teacher])) == [(0, [1, 2], [0, 1])]
    assert read(sources_of(shoes, [teacher])) == [(0, [4, 3], [0, 1])]
    assert sources_of(SubTask("hats", ("small", "wide")), [teacher]) == []


def test_a_class_that_a_teacher_has_twice_is_refused_unless_one_is_qualified():
    with pytest.raises(ValueError, match=r"teacher 1 has the class 'boot' more than once.*'footwear/boot'"):
        sources_of(FOOTWEAR, [("bag",), ("boot", "sandal", "boot")])
    assert read(sources_of(FOOTWEAR, [("boot", "sandal", "boot", "footwear/boot")])) == [(0, [1, 3], [0, 1])]


def test_a_subtask_that_no_teacher_shares_is_named_with_the_nearest_classes():
    with pytest.raises(
        ValueError, match=r"no teacher knows two classes of sub-task 'footwear' .*nearest: sandals, boot$"
    ):
        group([TOPS, FOOTWEAR], [("shirt", "coat", "boot"), ("sandals", "coat", "shirt")])
    with pytest.raises(ValueError, match=r"known: 0, 1$"):
        group([FOOTWEAR], [("0", "1")])
    with pytest.raises(ValueError, match="more than one sub-task 'tops'"):
        group([TOPS, TOPS], [("shirt", "coat")])
    assert nearest(["a"], []) == "there are no classes at all"


def test_bad_subtasks_are_named():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        SubTask("one", ("a",))
    with pytest.raises(ValueError, match="has the class 'a' more than once"):
        SubTask("one", ("a", "b", "a"))
    with pytest.raises(ValueError, match="must not hold '/'"):
        SubTask("a/b", ("a", "b"))


def test_a_subtask_is_read_from_qualified_classes():
    assert SubTask.of(FOOTWEAR.qualified) == FOOTWEAR
    assert SubTask.of(FOOTWEAR.classes) == SubTask("", FOOTWEAR.classes)
    assert SubTask.of(FOOTWEAR.classes, "footwear") == FOOTWEAR
    assert SubTask.of(("T-shirt/top", "coat")) == SubTask("", ("T-shirt/top", "coat"))
    assert SubTask("", ("a", "b")).qualified == ("a", "b")


def test_the_distribution_is_a_softmax_over_the_teachers_classes_of_the_subtask():
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = subtask_distribution(z, source([4, 1, 5], [2, 0, 3]), 5)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    total = z[:, 4].exp() + z[:, 1].exp() + z[:, 5].exp()
    expected[:, 2], expected[:, 0], expected[:, 3] = z[:, 4].exp() / total, z[:, 1].exp() / total, z[:, 5].exp() / total
    torch.testing.assert_close(found, expected)
    louder = z.clone()
    louder[:, [0, 2, 3]] += 100
    assert torch.equal(subtask_distribution(louder, source([4, 1, 5], [2, 0, 3]), 5), found)
    assert subtask_distribution(z.half(), source([4, 1], [0, 1]), 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "known", "message"),
    [
        (torch.zeros(3), source([0], [0]), r"shape \(B, C_t\)"),
        (torch.zeros(2, 3), source([0, 3], [0, 1]), r"columns must lie in \[0, 3\), got \[0, 3\]"),
        (torch.zeros(2, 3), source([0, 1], [0, 4]), r"places must lie in \[0, 4\), got \[0, 4\]"),
        (torch.zeros(2, 3), source([0, 1], [0]), r"one shape \(K,\)"),
        (torch.full((2, 3), float("inf")), source([0, 1], [0, 1]), "logits must be finite, got inf"),
    ],
)
def test_bad_logits_and_sources_are_named(logits, known, message):
    with pytest.raises(ValueError, match=message):
        subtask_distribution(logits, known, 4)


def case(seed, samples=53, scale=3.0):
    """Logits of three teachers that know three, four and two of four classes, in widths of 5, 4 and 7."""
    g = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(samples, width, generator=g) for width in (5, 4, 7)]
    return logits, [source([4, 0, 2], [1, 2, 3]), source([0, 1, 2, 3], [3, 2, 1, 0], 1), source([6, 3], [0, 2], 4)]


def test_the_least_ambiguous_teacher_over_its_classes_of_the_subtask_teaches():
    logits, sources = case(0)
    found = assign_subtask(logits, sources, 4)
    entropies = []
    for z, one in zip(logits, sources, strict=True):
        p = z.double()[:, one.columns].softmax(1)
        entropies.append(-(p * p.log()).sum(1))
    entropies = torch.stack(entropies)
    assert torch.equal(found.teacher, entropies.argmin(0))
    assert set(found.teacher.tolist()) == {0, 1, 2}
    torch.testing.assert_close(found.ambiguity.double(), entropies / math.log(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.confidence, 1 - found.ambiguity.amin(0))
    for b, t in enumerate(found.teacher.tolist()):
        assert torch.equal(found.target[b], subtask_distribution(logits[t], sources[t], 4)[b])


def test_classes_outside_the_subtask_do_not_count():
    sure_of_another = torch.tensor([[0.0, 0.0, 50.0]])
    unsure = torch.tensor([[1.0, 0.0]])
    sources = [source([0, 1], [0, 1]), source([0, 1], [0, 1], 1)]
    assert assign_subtask([sure_of_another, unsure], sources, 2).teacher.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extreme_logits_are_stable(dtype):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]], dtype=dtype)
    found = assign_subtask([z], [source([0, 1, 2], [2, 1, 0])], 3)
    expected = torch.tensor([0.0, 1.0, math.log(2) / math.log(3)])
    torch.testing.assert_close(found.ambiguity[0].float(), expected)
    target = torch.tensor([[0.0, 0, 1], [1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5]])
    torch.testing.assert_close(found.target.float(), target)


def test_ties_go_to_the_first_source():
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    same = [source([0, 1, 2], [0, 1, 2], number) for number in (3, 5)]
    assert assign_subtask([z, z.clone()], same, 3).teacher.unique().tolist() == [0]
    # Two equal classes of two, and of three, are as ambiguous.
    wide, narrow = torch.tensor([[2.0, 2.0, -1e4]]), torch.tensor([[7.0, 7.0]])
    pair = [source([0, 1, 2], [0, 1, 2]), source([0, 1], [0, 1])]
    assert assign_subtask([wide, narrow], pair, 3).teacher.tolist() == [0]
    assert assign_subtask([narrow, wide], pair[::-1], 3).teacher.tolist() == [0]


@pytest.mark.parametrize("classes", [4, 13, 100])
def test_each_sample_is_decided_by_itself(classes):
    logits, sources = case(1)
    g = torch.Generator().manual_seed(classes)
    logits.append(3 * torch.randn(53, classes, generator=g))
    sources.append(Source(5, torch.arange(classes), torch.randperm(classes, generator=g)))
    together = assign_subtask(logits, sources, classes)
    for size in (1, 7, 30, 53):
        parts = zip(*(z.split(size) for z in logits), strict=True)
        parts = [assign_subtask(part, sources, classes) for part in parts]
        for name, dim in (("teacher", 0), ("ambiguity", 1), ("confidence", 0), ("target", 0)):
            joined = torch.cat([getattr(part, name) for part in parts], dim)
            assert torch.equal(joined, getattr(together, name)), name


def test_bad_assignments_are_named():
    logits, sources = case(0)
    with pytest.raises(ValueError, match="got 2 for 3"):
        assign_subtask(logits[:2], sources, 4)
    with pytest.raises(ValueError, match="at least one source"):
        assign_subtask([], [], 4)
    with pytest.raises(ValueError, match=r"same samples, got \[53, 3, 53\] rows"):
        assign_subtask([logits[0], logits[1][:3], logits[2]], sources, 4)
