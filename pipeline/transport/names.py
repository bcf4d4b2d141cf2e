"""Ground cost from the names of the classes alone: no label, no image, no forward pass."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.transport import _checks
from pipeline.transport.ground_cost import cosine_cost

_GRAMS = (3, 4, 5)
# Target names that are held as dense columns at a time.
_BLOCK = 1024
# From a small letter or a digit to a capital, and before the last capital of a run that starts a word: HTMLPage.
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]+")


def name_words(name: str) -> list[str]:
    """Return the words of a class name in lower case: those of ``"T-shirt/top"`` are t, shirt and top.

    A word ends at whatever is no letter and no digit, and within camel case.
    """
    return [word.lower() for part in _WORD.findall(name) for word in _CAMEL.split(part)]


def names_cost(
    teacher_names: Sequence[str], target_names: Sequence[str], vectors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return half the cosine distance between embeddings of class names, and 0 between names that are the same.

    M_ij = (1 − cos(e(teacher name i), e(target name j))) / 2. Names are the same when their words are.

    With ``vectors``, e is the mean vector of the name's known words, which is as semantic as the vectors are. Without,
    e counts the character n-grams of the name's words, n = 3 to 5, each word with a mark at either end [1]_. That is
    **lexical, not semantic**: it finds that "running shoe" is near "shoes" and sees no more relation between "sneaker"
    and "shoe" than between "sneaker" and "truck"; and it takes "crane", the bird, for the machine. Its counts are not
    negative, and neither is their cosine: M stays in [0, 1/2], with 1/2 between names that share no n-gram.

    Parameters
    ----------
    teacher_names : sequence of C_t strings
    target_names : sequence of C_s strings
    vectors
        From a word in lower case to its (D,) vector; see `load_vectors`. A name without a known word is at distance
        1/2 from every name but its own.

    Returns
    -------
    (C_t, C_s) float32 tensor in [0, 1]

    Raises
    ------
    ValueError
        For a side without names, a single string in place of names, a name that is no string, and vectors that are not
        one-dimensional, of one width and finite.

    References
    ----------
    .. [1] P. Bojanowski et al., "Enriching Word Vectors with Subword Information", TACL 2017, for the n-grams within
       marks; the counts in place of learnt vectors are ours.
    """
    rows = [name_words(name) for name in _names("teacher_names", teacher_names)]
    columns = [name_words(name) for name in _names("target_names", target_names)]
    cost = _lexical_cost(rows, columns) if vectors is None else _vector_cost(rows, columns, vectors)
    # Exactly 0, whatever the rounding and whether or not a word is known. A name without words ("+") is its own word.
    keys = [
        [tuple(words) or (name.strip(),) for name, words in zip(names, split, strict=True)]
        for names, split in ((teacher_names, rows), (target_names, columns))
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(itertools.chain(*keys)))}
    teacher, target = (torch.tensor([numbers[key] for key in side]) for side in keys)
    return cost.masked_fill_(teacher[:, None] == target, 0.0)


def load_vectors(path: str | os.PathLike[str], words: Iterable[str]) -> dict[str, Tensor]:
    """Return the vectors of `words` from a text file of word vectors, read line by line.

    The file is in the text format of GloVe or word2vec: a word and its numbers on each line, separated by white space,
    optionally after a line with the number of words and the width. Of a file of many GB only the wanted lines are held.

    Parameters
    ----------
    path
    words
        Words to keep, as they are written in the file; `name_words` gives those of a name. A word that the file does
        not have is left out; of a word that it has twice the first line counts.

    Returns
    -------
    dict
        From word to (D,) float32 tensor, in the order of the file.

    Raises
    ------
    ValueError
        For a file without vectors; with file and line, for a wanted word or a first line that has not as many numbers
        as it should, or one that is not finite.
    """
    wanted = set(words)
    found: dict[str, Tensor] = {}
    width = 0
    # A few published files hold bytes that are not UTF-8, in words that nobody asks for.
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and (header := re.fullmatch(r"\s*\d+\s+(\d+)\s*", line)):
                width = int(header[1])
                continue
            start = line.split(None, 1)[:1]
            # The first line is read whether or not it is wanted: a file of another kind ends here.
            first = number == 1 or (number == 2 and width > 0)
            if not start or not (first or start[0] in wanted):
                continue
            width = width or len(line.split()) - 1
            word, vector = _parse_vector(line, width, f"{os.fspath(path)}, line {number}")
            if word in wanted:
                found.setdefault(word, vector)
            if len(found) == len(wanted):
                break
    if not width:
        raise ValueError(f"{os.fspath(path)} holds no word vectors")
    return found


def _parse_vector(line: str, width: int, where: str) -> tuple[str, Tensor]:
    """Return the word and its vector; the word may hold spaces, as some in published files do."""
    word, *numbers = line.strip().rsplit(None, width)
    excess = [part for part in word.split()[1:] if _number(part) is not None]
    if width < 1 or len(numbers) != width or excess:
        expected = f"{width} numbers" if width else "its numbers"
        raise ValueError(f"{where}: expected a word and {expected}, got {len(numbers) + len(excess)} numbers")
    values = [_number(part) for part in numbers]
    for part, value in zip(numbers, values, strict=True):
        if value is None or not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {part!r}")
    return word, torch.tensor(values, dtype=torch.float32)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _names(argument: str, names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str):
        raise ValueError(f"{argument} must be a sequence of names, got the string {names!r}")
    if len(names) == 0:
        raise ValueError(f"{argument} must hold at least one name, got none")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{argument} must hold strings, got {name!r}")
    return names


def _grams(words: Iterable[str]) -> Counter[str]:
    """Return how often each character n-gram occurs within the words, a mark at either end of each."""
    marked = [f"<{word}>" for word in words]
    return Counter(word[i : i + n] for word in marked for n in _GRAMS for i in range(len(word) - n + 1))


def _unit_grams(words: Iterable[str]) -> dict[str, float]:
    counts = _grams(words)
    norm = math.sqrt(sum(count * count for count in counts.values()))
    return {gram: count / norm for gram, count in counts.items()}


def _lexical_cost(rows: Sequence[Sequence[str]], columns: Sequence[Sequence[str]]) -> Tensor:
    # N-grams are counted exactly: hashed to a fixed width, names without a common one would come out related.
    left, right = ([_unit_grams(words) for words in side] for side in (rows, columns))
    blocks = [_shared_grams(left, right[start : start + _BLOCK]) for start in range(0, len(right), _BLOCK)]
    return ((1 - torch.cat(blocks, dim=1)) / 2).clamp_(0, 1)


def _shared_grams(left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]) -> Tensor:
    """Return the products of sparse rows, left_i · right_j."""
    index = {gram: number for number, gram in enumerate(dict.fromkeys(itertools.chain(*right)))}
    table = torch.zeros(len(index) + 1, len(right))
    for column, grams in enumerate(right):
        table[[index[gram] for gram in grams], column] = torch.tensor(list(grams.values()))
    bags = [[(index[gram], value) for gram, value in grams.items() if gram in index] for grams in left]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, bags))])[:-1]
    entries = list(itertools.chain(*bags))
    numbers = torch.tensor([number for number, _ in entries], dtype=torch.int64)
    weights = torch.tensor([value for _, value in entries], dtype=torch.float32)
    return F.embedding_bag(numbers, table, offsets, mode="sum", per_sample_weights=weights)


def _vector_cost(
    rows: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], vectors: Mapping[str, Tensor]
) -> Tensor:
    known: dict[str, Tensor] = {}
    for word in dict.fromkeys(itertools.chain(*rows, *columns)):
        if word in vectors:
            vector = vectors[word].detach().to("cpu", torch.float32)
            shape = next(iter(known.values())).shape if known else (vector.numel(),)
            if vector.shape != shape or not vector.numel():
                expected = tuple(shape) if known else "(D,)"
                raise ValueError(f"vectors[{word!r}] must have shape {expected}, got shape {tuple(vector.shape)}")
            known[word] = _checks.finite(f"vectors[{word!r}]", vector)
    nothing = torch.zeros(len(next(iter(known.values())))) if known else torch.zeros(1)

    def embedded(side: Sequence[Sequence[str]]) -> Tensor:
        each = [[known[word] for word in words if word in known] for words in side]
        return torch.stack([torch.stack(parts).mean(0) if parts else nothing for parts in each])

    return cosine_cost(embedded(rows), embedded(columns))
