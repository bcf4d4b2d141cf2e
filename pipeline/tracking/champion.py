"""The version that is served: who becomes it, who was it before, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.tracking.spec import check_alias
from pipeline.tracking.versions import Registry, Version, by_alias, by_number, version_of

GATE_TAG = "faculty.gate"
WHY_TAG = "faculty.gate.why"
AGAINST_TAG = "faculty.gate.champion"
PROMOTED_TAG = "faculty.promoted"
PASSED, FAILED, NOT_JUDGED = "passed", "failed", "not judged"
NOBODY = "none"
_FORMER_TAG = "faculty.former."  # and the alias, of the registered model
_REMEMBERED = 100  # former versions: a tag is no longer than a few thousand characters


@dataclass(frozen=True)
class Promotion:
    """An alias that was moved.

    Attributes
    ----------
    name, alias : str
        The registered model and the alias.
    version : str
        The version that it points to now.
    former : str or None
        The one that it pointed to before.
    moved : bool
        False where it pointed there already.
    forced : bool
        Whether the gate was overruled.
    """

    name: str
    alias: str
    version: str
    former: str | None
    moved: bool = True
    forced: bool = False


def promote(registry: Registry, uri: str, *, alias: str = "champion", force: bool = False) -> Promotion:
    """Let the champion's alias point to a version that has passed the gate, and remember the one before.

    Parameters
    ----------
    registry : Registry
    uri : str
        ``models:/name/3`` or ``models:/name@challenger``.
    alias : str
        The champion's alias.
    force : bool
        Move it although the gate has not been passed; a tag of the version says so.

    Raises
    ------
    UserError
        When there is no such version, it has not passed the gate, or has passed it against another champion than the
        present one.
    StageError
        When the registry can't be reached or refuses.
    """
    check_alias(alias)
    version = version_of(registry, uri)
    name, number = version.name, version.number
    champion = by_alias(registry, name, alias)
    former = None if champion is None else champion.number
    if former == number:
        return Promotion(name, alias, number, former, moved=False)
    problem = _problem(version, former)
    if problem is not None and not force:
        raise UserError(f"{version.uri} is not promoted: {problem}; --force promotes it nevertheless")
    with registry.asked():
        if former is not None:
            _remember(registry, name, alias, [*_former(registry, name, alias), former])
        registry.client.set_registered_model_alias(name, alias, number)
        told = "by the gate" if problem is None else f"by force: {problem}"
        registry.client.set_model_version_tag(name, number, PROMOTED_TAG, told[:1000])
    return Promotion(name, alias, number, former, forced=problem is not None)


def demote(registry: Registry, name: str, *, alias: str = "champion") -> Promotion:
    """Take the last promotion back: the alias points to the former champion again.

    Every promotion can be taken back, one after the other. A former champion that has been deleted is passed over.

    Raises
    ------
    UserError
        When there is no such model, or it had no champion before the present one.
    StageError
        When the registry can't be reached or refuses.
    """
    check_alias(alias)
    name = name.removeprefix("models:/").partition("@")[0].partition("/")[0]
    champion = by_alias(registry, name, alias)
    if champion is None:
        raise UserError(f"models:/{name}@{alias}: there is no such model or alias in {registry.uri}")
    with registry.asked():
        remembered = _former(registry, name, alias)
        while remembered and by_number(registry, name, remembered[-1]) is None:
            remembered.pop()
        if not remembered:
            raise UserError(
                f"models:/{name}@{alias} had no version before version {champion.number}; name another one: "
                f"faculty promote models:/{name}/N"
            )
        number = remembered.pop()
        # First the alias: cut off in between, the same call puts it where it stands already, and loses nothing.
        registry.client.set_registered_model_alias(name, alias, number)
        _remember(registry, name, alias, remembered)
    return Promotion(name, alias, number, champion.number)


def _problem(version: Version, champion: str | None) -> str | None:
    """Say why a version may not replace the champion; None if it may."""
    gate, why = version.tags.get(GATE_TAG), version.tags.get(WHY_TAG, "")
    if gate is None:
        return "it has no verdict of the gate, it was not registered by `faculty register`"
    if gate != PASSED:
        return f"the gate is {gate} ({why})" if gate == NOT_JUDGED else f"it failed at the gate ({why})"
    against, now = version.tags.get(AGAINST_TAG, NOBODY), champion or NOBODY
    if against != now:
        met = "no champion" if against == NOBODY else f"version {against}"
        meets = "there is none" if now == NOBODY else f"the champion is version {now}"
        return f"it was compared with {met}, and now {meets}; `faculty register` compares it anew"
    return None


def _former(registry: Registry, name: str, alias: str) -> list[str]:
    text = registry.client.get_registered_model(name).tags.get(_FORMER_TAG + alias, "")
    return [number for number in text.split(",") if number]


def _remember(registry: Registry, name: str, alias: str, numbers: list[str]) -> None:
    registry.client.set_registered_model_tag(name, _FORMER_TAG + alias, ",".join(numbers[-_REMEMBERED:]))
