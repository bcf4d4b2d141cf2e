"""Sub-tasks: which teachers share one, what they say of it, and who teaches which sample of it.

Shapes: B samples, C_t classes of teacher t, C_sub classes of a sub-task, K of them that a teacher knows.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.amalgamation.ambiguity import Assignment, assign
from pipeline.transport import _checks

_SEPARATOR = "/"


@dataclass(frozen=True)
class SubTask:
    """Classes among which an image has exactly one, such as the kinds of footwear.

    Attributes
    ----------
    name : str
        Without "/"; "" for a sub-task that needs no name beside others.
    classes : tuple of str
        C_sub ≥ 2 different names.

    Raises
    ------
    ValueError
        For a name with "/", fewer than two classes, and a class that is named twice.
    """

    name: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if _SEPARATOR in self.name:
            raise ValueError(f"name of a sub-task must not hold {_SEPARATOR!r}, got {self.name!r}")
        if len(self.classes) < 2:
            raise ValueError(f"sub-task {self.name!r} must have at least 2 classes, got {len(self.classes)}")
        if twice := _repeated(self.classes):
            raise ValueError(f"sub-task {self.name!r} has the class {twice!r} more than once")

    @property
    def qualified(self) -> tuple[str, ...]:
        """Its classes as "sub-task/class"; as they are where the sub-task has no name."""
        return tuple(f"{self.name}{_SEPARATOR}{one}" for one in self.classes) if self.name else self.classes

    @classmethod
    def of(cls, classes: Sequence[str], name: str | None = None) -> SubTask:
        """Return the sub-task of classes that may be qualified.

        Parameters
        ----------
        classes : C_sub names
        name : str, optional
            By default the part before "/" that all of them share, and "" where there is none.
        """
        if name is None:
            prefixes = {one.partition(_SEPARATOR)[0] if _SEPARATOR in one else "" for one in classes}
            name = prefixes.pop() if len(prefixes) == 1 else ""
        return cls(name, tuple(one.removeprefix(f"{name}{_SEPARATOR}") for one in classes))


@dataclass(frozen=True)
class Source:
    """What a teacher knows of a sub-task.

    Attributes
    ----------
    teacher : int
        Its number.
    columns : (K,) int64 tensor
        Which of its logits belong to the sub-task.
    places : (K,) int64 tensor
        For each of them the class of the sub-task.
    """

    teacher: int
    columns: Tensor
    places: Tensor


def sources_of(subtask: SubTask, teachers: Sequence[Sequence[str]]) -> list[Source]:
    """Return what each teacher knows of a sub-task, in the order of the teachers.

    A class is known by its exact name, or by "sub-task/class", which wins: it tells two heads of a teacher apart. A
    teacher that knows fewer than two classes of the sub-task has nothing to tell apart, and is left out. One that
    has several sub-tasks belongs to each of them.

    Parameters
    ----------
    subtask : SubTask
    teachers : T sequences of C_t class names

    Raises
    ------
    ValueError
        When a teacher has a class of the sub-task more than once.
    """
    found = []
    for number, names in enumerate(teachers):
        at = {name: column for column, name in enumerate(names)}
        columns, places = [], []
        for place, known_as in enumerate(zip(subtask.qualified, subtask.classes, strict=True)):
            name = next((name for name in known_as if name in at), None)
            if name is None:
                continue
            if list(names).count(name) > 1:
                raise ValueError(
                    f"teacher {number} has the class {name!r} more than once; "
                    f"name the one of this sub-task {subtask.qualified[place]!r}"
                )
            columns.append(at[name])
            places.append(place)
        if len(columns) >= 2:
            found.append(Source(number, torch.tensor(columns), torch.tensor(places)))
    return found


def group(subtasks: Sequence[SubTask], teachers: Sequence[Sequence[str]]) -> dict[str, list[Source]]:
    """Return for each sub-task what its teachers know of it.

    Parameters
    ----------
    subtasks : sequence of SubTask
    teachers : T sequences of C_t class names

    Raises
    ------
    ValueError
        For sub-tasks of one name, and one that no teacher shares; names the nearest classes that teachers have.
    """
    if twice := _repeated(one.name for one in subtasks):
        raise ValueError(f"there is more than one sub-task {twice!r}")
    found = {one.name: sources_of(one, teachers) for one in subtasks}
    for one in subtasks:
        if not found[one.name]:
            known = [name for names in teachers for name in names]
            raise ValueError(
                f"no teacher knows two classes of sub-task {one.name!r} ({_listed(one.classes)}); "
                f"{nearest(one.classes, known)}"
            )
    return found


def nearest(wanted: Iterable[str], known: Iterable[str]) -> str:
    """Word a hint for an error: the names in `known` that come nearest to those in `wanted`."""
    known = list(dict.fromkeys(known))
    close = [name for one in wanted for name in difflib.get_close_matches(one, known, n=1, cutoff=0.5)]
    if close:
        return f"nearest: {_listed(dict.fromkeys(close))}"
    return f"known: {_listed(known)}" if known else "there are no classes at all"


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def subtask_distribution(logits: Tensor, source: Source, size: int) -> Tensor:
    """Return what a teacher says of a sub-task, whatever else it knows.

    p_b,places[k] = exp(z_b,columns[k]) / Σ_l exp(z_b,columns[l]), and 0 for classes that it does not know.

    Parameters
    ----------
    logits : (B, C_t) tensor
        z, the teacher's, over all its classes.
    source : Source
    size
        C_sub.

    Returns
    -------
    (B, C_sub) tensor of float32, or float64 when the logits are.

    Raises
    ------
    ValueError
        For logits of another shape or that are not finite, and a source that does not fit them or `size`.
    """
    columns, places = source.columns.to(logits.device), source.places.to(logits.device)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (B, C_t), got shape {tuple(logits.shape)}")
    if columns.ndim != 1 or not len(columns) or columns.shape != places.shape:
        raise ValueError(
            "columns and places must have one shape (K,) with K >= 1, got "
            f"{tuple(columns.shape)} and {tuple(places.shape)}"
        )
    for name, indices, limit in (("columns", columns, logits.shape[1]), ("places", places, size)):
        if int(indices.min()) < 0 or int(indices.max()) >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got {indices.tolist()}")
    own = _checks.finite("logits", logits.index_select(1, columns))
    p = own.to(torch.promote_types(own.dtype, torch.float32)).softmax(1)
    return p.new_zeros(len(p), size).index_copy(1, places, p)


def assign_subtask(logits: Sequence[Tensor], sources: Sequence[Source], size: int) -> Assignment:
    """Give every sample of a sub-task to the teacher that is the least unsure of it.

    argmin_t H_t(b), H = −Σ p log p over the teacher's classes of that sub-task [1]_. `Assignment.ambiguity` is
    H / log C_sub, which is ours: one divisor for all, so that the choice is the publication's when the teachers know
    different classes too, and sub-tasks of different sizes compare. A teacher of K classes is never more ambiguous
    than log K / log C_sub, so one that knows few of them is at an advantage.

    Ties go to the first. Each sample is decided by itself: the batch it comes in does not matter, on a CPU not for a
    single bit.

    Parameters
    ----------
    logits : S tensors (B, C_t)
        Of each source's teacher, over all its classes, in the order of the sources. Show every teacher the image
        without random augmentation.
    sources : S `Source`
    size
        C_sub.

    Returns
    -------
    Assignment
        Its `teacher` is a number among the sources, its `target` is over the sub-task's classes.

    Raises
    ------
    ValueError
        For no sources, numbers of logits that do not match them, and what `subtask_distribution` refuses.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """
    if not sources or len(logits) != len(sources):
        raise ValueError(
            f"logits must be one tensor a source, with at least one source, got {len(logits)} for {len(sources)}"
        )
    if len({len(one) for one in logits}) > 1:
        raise ValueError(f"logits must be of the same samples, got {[len(one) for one in logits]} rows")
    said = [subtask_distribution(one, source, size) for one, source in zip(logits, sources, strict=True)]
    return assign(torch.stack(said))
