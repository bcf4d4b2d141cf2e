"""Ground cost from class names, and the reading of word vectors."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.transport.names import load_vectors, name_words, names_cost

VECTORS = {
    "shoe": torch.tensor([1.0, 0.0]),
    "sneaker": torch.tensor([1.0, 0.0]),
    "running": torch.tensor([0.0, 1.0]),
    "truck": torch.tensor([-1.0, 0.0]),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("T-shirt/top", ["t", "shirt", "top"]),
        ("ankle_boot", ["ankle", "boot"]),
        ("ankleBoot", ["ankle", "boot"]),
        ("HTMLPage2Go", ["html", "page2", "go"]),
        ("n01440764", ["n01440764"]),
        ("École supérieure", ["école", "supérieure"]),
        (" + ", []),
    ],
)
def test_words_of_a_name(name, words):
    assert name_words(name) == words


def test_the_same_name_costs_nothing_however_it_is_written():
    M = names_cost(["ankle_boot", "T-shirt", "+", "0"], ["Ankle Boot", "t shirt", "-", "+", "0"])
    expected = torch.full((4, 5), 0.5)
    expected[0, 0] = expected[1, 1] = expected[2, 3] = expected[3, 4] = 0
    assert torch.equal(M, expected)


def test_names_that_share_letters_are_near_and_names_that_share_meaning_are_not():
    M = names_cost(["running shoe"], ["running shoes", "shoes", "sneaker", "truck"])[0].tolist()
    assert 0 < M[0] < M[1] < M[2] == M[3] == 0.5


def test_lexical_cost_equals_counting_n_grams():
    names = ["running shoe", "shoes", "banana", "ban an"]

    def counts(name):
        words = [f"<{word}>" for word in name.split()]
        return Counter(w[i : i + n] for w in words for n in (3, 4, 5) for i in range(len(w)) if i + n <= len(w))

    M = names_cost(names, names)
    for (i, one), (j, other) in itertools.product(enumerate(map(counts, names)), repeat=2):
        product = sum(one[gram] * other[gram] for gram in one)
        norm = (sum(n * n for n in one.values()) * sum(n * n for n in other.values())) ** 0.5
        assert float(M[i, j]) == pytest.approx((1 - product / norm) / 2, abs=1e-6)


def test_many_target_names_are_taken_in_blocks():
    names = [f"class {number}" for number in range(1100)]
    M = names_cost(names[:3] + names[-3:], names)
    assert M.shape == (6, 1100) and torch.equal(M[-3:, -3:], names_cost(names[-3:], names[-3:]))
    assert M.argmin(1).tolist() == [0, 1, 2, 1097, 1098, 1099]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(max_size=8), min_size=1, max_size=5),
    st.lists(st.text(max_size=8), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_text_is_a_name(teacher, target, semantic):
    vectors = VECTORS if semantic else None
    M = names_cost(teacher, target, vectors)
    assert M.shape == (len(teacher), len(target)) and M.dtype == torch.float32
    assert float(M.min()) >= 0 and float(M.max()) <= 1
    torch.testing.assert_close(names_cost(target, teacher, vectors), M.t(), atol=1e-6, rtol=0)
    assert not names_cost(teacher, teacher, vectors).diagonal().any()


def test_vectors_are_averaged_over_the_words():
    M = names_cost(["sneaker", "Running-shoe", "lorry"], ["shoe", "truck", "lorry", "running"], VECTORS)
    half = (1 - 0.5**0.5) / 2
    expected = torch.tensor([[0.0, 1.0, 0.5, 0.5], [half, 1 - half, 0.5, half], [0.5, 0.5, 0.0, 0.5]])
    torch.testing.assert_close(M, expected)
    # A known word beside one that is not: the known one alone counts.
    torch.testing.assert_close(names_cost(["blue sneaker"], ["shoe"], VECTORS), torch.zeros(1, 1))
    assert torch.equal(names_cost(["a", "b"], ["b"], {}), torch.tensor([[0.5], [0.0]]))


@pytest.mark.parametrize(
    ("teacher", "vectors", "message"),
    [
        ("shoe", None, "teacher_names must be a sequence of names, got the string 'shoe'"),
        ([], None, "teacher_names must hold at least one name"),
        ([3], None, "teacher_names must hold strings, got 3"),
        (["shoe"], {"shoe": torch.zeros(1, 2)}, r"vectors\['shoe'\] must have shape \(D,\), got shape \(1, 2\)"),
        (["shoe"], {"shoe": torch.zeros(0)}, r"vectors\['shoe'\] must have shape \(D,\)"),
        (
            ["shoe", "truck"],
            {"shoe": torch.zeros(2), "truck": torch.zeros(3)},
            r"vectors\['truck'\] must have shape \(2,\), got shape \(3,\)",
        ),
        (["shoe"], {"shoe": torch.tensor([1.0, float("nan")])}, r"vectors\['shoe'\] must be finite, got nan"),
    ],
)
def test_bad_names_are_named(teacher, vectors, message):
    with pytest.raises(ValueError, match=message):
        names_cost(teacher, ["truck"], vectors)


def written(tmp_path, text):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("header", ["", "4 2\n"])
def test_only_the_words_asked_for_are_read(tmp_path, header):
    path = written(tmp_path, header + "the 0 0 \nshoe 1 -0.5\nbad line that nobody asks for\nshoe 9 9\ntruck 1e-2 2")
    found = load_vectors(path, ["truck", "shoe", "boot"])
    assert list(found) == ["shoe", "truck"]
    assert torch.equal(found["shoe"], torch.tensor([1.0, -0.5])) and found["truck"].tolist() == pytest.approx([0.01, 2])
    assert names_cost(["shoe"], ["truck"], found).shape == (1, 1)
    assert load_vectors(path, []) == {}


def test_words_with_spaces_or_bad_bytes_do_not_disturb(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbfthe 0 0\nemail me@example.org 1 2\n\n\xff\xfe 3 4\nemail 5 6\n")
    found = load_vectors(path, {"email", "the"})
    assert {word: vector.tolist() for word, vector in found.items()} == {"the": [0, 0], "email": [5, 6]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2\nshoe 1\n", "vectors.txt, line 2: expected a word and 2 numbers, got 1 numbers"),
        ("the 1 2\nshoe 1 2 3\n", "vectors.txt, line 2: expected a word and 2 numbers, got 3 numbers"),
        ("9 3\nthe 1 2\n", "vectors.txt, line 2: expected a word and 3 numbers, got 2 numbers"),
        ("the 1 2\nshoe 1 two\n", "vectors.txt, line 2: expected a finite number, got 'two'"),
        ("the 1 2\nshoe 1 nan\n", "vectors.txt, line 2: expected a finite number, got 'nan'"),
        ("<html>\n", "vectors.txt, line 1: expected a word and its numbers, got 0 numbers"),
        ("", "vectors.txt holds no word vectors"),
        (b"2 3\nshoe \x00\x01\x02", "vectors.txt, line 2: expected a word and 3 numbers"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_vectors(written(tmp_path, text), ["shoe", "truck"])
