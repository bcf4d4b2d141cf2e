"""Choice of the set of teachers: greedy by marginal gain on labelled images, with none as a possible answer.

Shapes: T teachers, V labelled images that what is said of them was not fitted on, C_s target classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.amalgamation.ambiguity import assign
from pipeline.transport import _checks

Reason = Literal[
    "chosen",
    "no relation",
    "not among the best alone",
    "no marginal gain",
    "over budget",
    "set no better than no teacher",
]

_RESAMPLES = 2000
# What single precision leaves of a difference that is none.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Pick:
    """One step of the greedy choice.

    Attributes
    ----------
    teacher
    gain
        What the set's score rose by when this teacher joined.
    score
        The set's score with it, see `select_set`.
    confidence
        Share of bootstrap resamples of the labelled images in which the gain is above `min_gain`.
    """

    teacher: str
    gain: float
    score: float
    confidence: float


@dataclass(frozen=True)
class Verdict:
    """What was decided of one teacher, and from what.

    Attributes
    ----------
    reason
    score
        Of the teacher alone, see `select_set`.
    gain
        What it would add, or did add, to the set when it was last tried.
    confidence
        That this gain is above `min_gain`.
    """

    reason: Reason
    score: float
    gain: float
    confidence: float


@dataclass(frozen=True)
class Selection:
    """The chosen set; made by `select_set`.

    Attributes
    ----------
    chosen
        Names in the order of choice; empty when no teacher should teach.
    picks
        The greedy steps, also where the whole set was rejected in the end.
    verdicts
        One for every teacher.
    best_single
        The teacher with the best score alone, None for an empty repository.
    score
        Of the chosen set; the reference's score when it is empty.
    reference_score
        Of what needs no teacher.
    score_interval
        The central 90 % of the score's bootstrap distribution over the labelled images.
    advantage_interval
        Likewise of the set's score less the reference's, pair by pair; of the greedy set where it was rejected.
    confidence
        Share of resamples in which the greedy set is better than the reference.
    coverage : (C_s,) tensor
        The set's score on the images of each class, NaN for a class without one.
    shares
        Share of the labelled images of which each member is the least ambiguous.
    """

    chosen: tuple[str, ...]
    picks: tuple[Pick, ...]
    verdicts: dict[str, Verdict]
    best_single: str | None
    score: float
    reference_score: float
    score_interval: tuple[float, float]
    advantage_interval: tuple[float, float]
    confidence: float
    coverage: Tensor
    shares: dict[str, float]


def select_set(
    carried: Mapping[str, Tensor],
    labels: Tensor,
    *,
    together: Callable[[Sequence[str]], Tensor] | None = None,
    reference: Tensor | None = None,
    gains: Mapping[str, float] | None = None,
    parameters: Mapping[str, int] | None = None,
    max_teachers: int | None = 4,
    max_params: int | None = None,
    min_gain: float = 0.01,
    confidence: float = 0.9,
    consider: int | None = 32,
    seed: int = 0,
) -> Selection:
    """Choose teachers one by one, each time the one that adds most to what the set says of the labelled images.

    A set's score is E_b [r_b(y_b)], with r_b what the set says of image b, by `together` or else by its least ambiguous
    member (`assign`): the accuracy to expect of an answer drawn from r_b. It is smooth, where an accuracy on a few
    images moves in steps, and bounded, where a likelihood hangs on the worst image. A teacher joins when its gain is
    the largest and, in a share `confidence` of bootstrap resamples of the images, above `min_gain`. In the end the set
    as a whole must beat the reference with the same confidence; otherwise none is chosen. Ties go to the smaller
    teacher, then by name. Ours.

    Parameters
    ----------
    carried : mapping of name to (V, C_s) tensor
        Every teacher's distributions over the target's classes, as it says alone.
    labels : (V,) tensor
        Target classes.
    together : function of the names of two or more teachers to (V, C_s) tensor, optional
        What they say as a set, for instance `pipeline.amalgamation.together.together_held_out`.
    reference : (V, C_s) tensor, optional
        What can be said without a teacher, for instance by a bridge over `pixel_features`; by default the class
        frequencies.
    gains
        Transport gain of each teacher. One that is not above 0 has no relation to the task and is not considered.
    parameters
        Size of each teacher, for the budget and for ties.
    max_teachers
        Largest set; None for no limit.
    max_params
        Largest sum of parameters; None for no limit.
    min_gain
        Least marginal gain, in the unit of the score.
    confidence
        In [0, 1).
    consider
        With `together`, the most teachers that are tried in a set, those with the best scores alone: each trial is a
        fit. None for all.
    seed
        Of the resamples.

    Raises
    ------
    ValueError
        For values that are no distributions, shapes that do not match, a budget below 1 or without sizes, and
        names that one mapping has and another lacks.
    """
    sizes = _check(carried, labels, gains, parameters, max_teachers, max_params, min_gain, confidence, consider)
    y = labels.long().cpu()
    votes = {name: value.detach().double().cpu() for name, value in carried.items()}
    rows = torch.arange(len(y))
    if reference is None:
        classes = next(iter(carried.values())).shape[1] if carried else int(y.max()) + 1
        reference = (torch.bincount(y, minlength=classes).double() / len(y)).expand(len(y), -1)
    _checks.distributions("reference", reference, next(iter(carried.values())).shape[1] if carried else None)
    if len(reference) != len(y):
        raise ValueError(f"reference must have {len(y)} rows, got shape {tuple(reference.shape)}")
    without = reference.double().cpu()[rows, y]
    chance = without if not carried else torch.bincount(y).double()[y] / len(y)
    resamples = torch.randint(len(y), (_RESAMPLES, len(y)), generator=torch.Generator().manual_seed(seed))

    def surety(difference: Tensor, least: float) -> float:
        return float((difference[resamples].mean(1) > least).double().mean())

    def interval(samples: Tensor) -> tuple[float, float]:
        low, high = torch.quantile(samples[resamples].mean(1), torch.tensor([0.05, 0.95], dtype=torch.float64))
        return float(low), float(high)

    def scores(names: list[str]) -> Tensor:
        if together is not None and len(names) > 1:
            said = _checks.distributions("together", together(names), reference.shape[1])
            return said.detach().double().cpu()[rows, y]
        return assign(torch.stack([votes[name] for name in names])).target[rows, y]

    alone = {name: scores([name]) for name in votes}
    verdicts: dict[str, Verdict] = {}
    open_names = []
    for name in sorted(votes, key=lambda name: (sizes.get(name, 0), name)):
        advantage = alone[name] - chance
        if (gains is not None and gains[name] <= 0) or float(advantage.mean()) <= _ROUNDING:
            mean = float(advantage.mean())
            verdicts[name] = Verdict("no relation", float(alone[name].mean()), mean, surety(advantage, min_gain))
        else:
            open_names.append(name)

    # What each would add; at first what it has over chance.
    trials = {name: alone[name] - chance for name in open_names}

    def turn_down(name: str, reason: Reason) -> None:
        added = trials[name]
        verdicts[name] = Verdict(reason, float(alone[name].mean()), float(added.mean()), surety(added, min_gain))
        open_names.remove(name)

    if together is not None:
        for name in [name for name in open_names if not _fits([name], sizes, max_teachers, max_params)]:
            turn_down(name, "over budget")
        # The order is that of size and name among equals.
        best_alone = sorted(open_names, key=lambda name: -float(alone[name].mean()))[:consider]
        for name in [name for name in open_names if name not in best_alone]:
            turn_down(name, "not among the best alone")

    members: list[str] = []
    picks: list[Pick] = []
    current = chance
    while open_names:
        affordable = [name for name in open_names if _fits([*members, name], sizes, max_teachers, max_params)]
        # A trial of a set that looks together is a fit: none for those that could not join.
        tried = open_names if together is None else affordable
        if members:
            trials |= {name: scores([*members, name]) - current for name in tried}
        sure = {name: surety(trials[name], min_gain) for name in open_names}
        useful = [name for name in open_names if sure[name] >= confidence and float(trials[name].mean()) > min_gain]
        worthy = [name for name in useful if name in affordable]
        if not worthy:
            for name in list(open_names):
                turn_down(name, "over budget" if name in useful else "no marginal gain")
            break
        best = max(worthy, key=lambda name: float(trials[name].mean()))  # the first of equals, hence the smaller
        members.append(best)
        open_names.remove(best)
        current = current + trials[best]
        gain = float(trials[best].mean())
        picks.append(Pick(best, gain, float(current.mean()), sure[best]))
        verdicts[best] = Verdict("chosen", float(alone[best].mean()), gain, sure[best])

    overall = surety(current - without, 0.0) if members else 0.0
    accepted = bool(members) and overall >= confidence
    if members and not accepted:
        for name in members:
            old = verdicts[name]
            verdicts[name] = Verdict("set no better than no teacher", old.score, old.gain, old.confidence)
    chosen = members if accepted else []
    final = current if accepted else without
    classes = reference.shape[1]
    counts = torch.bincount(y, minlength=classes)
    coverage = torch.zeros(classes, dtype=torch.float64).index_add_(0, y, final) / counts
    shares: dict[str, float] = {}
    if chosen:
        teacher = assign(torch.stack([votes[name] for name in chosen])).teacher
        shares = {name: float((teacher == number).double().mean()) for number, name in enumerate(chosen)}
    best_single = max(sorted(votes), key=lambda name: float(alone[name].mean())) if votes else None
    return Selection(
        chosen=tuple(chosen),
        picks=tuple(picks),
        verdicts={name: verdicts[name] for name in carried},
        best_single=best_single,
        score=float(final.mean()),
        reference_score=float(without.mean()),
        score_interval=interval(final),
        advantage_interval=interval(current - without),
        confidence=overall,
        coverage=coverage,
        shares=shares,
    )


def _fits(names: list[str], sizes: Mapping[str, int], max_teachers: int | None, max_params: int | None) -> bool:
    within = max_params is None or sum(sizes[name] for name in names) <= max_params
    return within and (max_teachers is None or len(names) <= max_teachers)


def _check(
    carried: Mapping[str, Tensor],
    labels: Tensor,
    gains: Mapping[str, float] | None,
    parameters: Mapping[str, int] | None,
    max_teachers: int | None,
    max_params: int | None,
    min_gain: float,
    confidence: float,
    consider: int | None,
) -> Mapping[str, int]:
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must have shape (V,) with V >= 1, got shape {tuple(labels.shape)}")
    for name, value in carried.items():
        _checks.distributions(f"carried[{name!r}]", value, next(iter(carried.values())).shape[-1])
        _checks.labels("labels", labels, len(value), value.shape[1])
    if not 0 <= confidence < 1:
        raise ValueError(f"confidence must be in [0, 1), got {confidence}")
    if not min_gain >= 0:
        raise ValueError(f"min_gain must be >= 0, got {min_gain}")
    for field, limit in (("max_teachers", max_teachers), ("max_params", max_params), ("consider", consider)):
        if limit is not None and limit < 1:
            raise ValueError(f"{field} must be >= 1 or None, got {limit}")
    if max_params is not None and parameters is None:
        raise ValueError("parameters must be given when max_params is, got None")
    for field, mapping in (("gains", gains), ("parameters", parameters)):
        missing = sorted(set(carried) - set(mapping)) if mapping is not None else []
        if missing:
            raise ValueError(f"{field} must cover every teacher, {missing[0]!r} is missing")
    return parameters or {}
