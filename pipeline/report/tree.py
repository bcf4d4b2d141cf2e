"""The lineage of a student as a tree for the terminal: run, data, settings, code, and teachers down to the last one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.tree import Tree

_COLOURS = {"passed": "green", "failed": "red", "not judged": "yellow"}


def lineage_tree(found: Mapping[str, Any]) -> Tree:
    """Return the tree of what `pipeline.tracking.lineage.trace` found."""
    tree = Tree(_title(found), guide_style="dim")
    _fill(tree, found)
    return tree


def _title(found: Mapping[str, Any]) -> str:
    aliases = f" ({_text(', '.join(found['aliases']))})" if found.get("aliases") else ""
    return f"[bold]{_text(found['name'])}[/bold] version {found['version']}{aliases}"


def _fill(tree: Tree, found: Mapping[str, Any]) -> None:
    lineage = found.get("lineage")
    tags = found.get("tags", {})
    if tags.get("faculty.gate"):
        colour = _COLOURS.get(tags["faculty.gate"], "yellow")
        tree.add(f"gate  [{colour}]{_text(tags['faculty.gate'])}[/]  {_text(tags.get('faculty.gate.why', ''))}")
    if found.get("note"):
        tree.add(f"[yellow]{_text(found['note'])}[/yellow]")
    if not lineage:
        return
    run = lineage.get("run", {})
    tree.add(f"run  {_text(run.get('name', '-'))}  [dim]{_text(run.get('run_id') or '-')}[/dim]")
    _data(tree, lineage.get("data", {}))
    _made(tree, lineage)
    teachers = lineage.get("teachers", {})
    how = {"together": ", together", "components": ", by component nets", "none": ", of whom none taught"}
    if not teachers:
        tree.add("teachers  none")
        return
    branch = tree.add(f"teachers  {len(teachers)}{how.get(lineage.get('teaching', ''), '')}")
    for name, teacher in teachers.items():
        _teacher(branch, name, teacher)


def _data(tree: Tree, data: Mapping[str, Any]) -> None:
    images = ", ".join(f"{split} {count}" for split, count in data.get("images", {}).items())
    branch = tree.add(f"data  [dim]{_short(data.get('fingerprint'))}[/dim]  {_text(images)}")
    for name, source in data.get("sources", {}).items():
        branch.add(f"{_text(name)}  {_text(source['type'])}  {_text(source['location'])}")
    if data.get("test_fingerprint"):
        branch.add(f"test images  [dim]{_short(data['test_fingerprint'])}[/dim]")


def _made(tree: Tree, lineage: Mapping[str, Any]) -> None:
    settings, code, student = (lineage.get(key, {}) for key in ("settings", "code", "student"))
    losses = ", ".join(settings.get("objective", ())) or "-"
    tree.add(
        f"settings  [dim]{_short(settings.get('sha256'))}[/dim]  student {_text(student.get('name', '-'))}, losses "
        f"{_text(losses)}, {settings.get('epochs', '-')} epochs, seed {settings.get('seed', '-')}"
    )
    packages = code.get("packages", {})
    told = ", ".join(f"{name} {packages[name]}" for name in ("faculty", "torch", "ray", "mlflow") if name in packages)
    commit = (
        f"commit {_short(code['commit'])}{' (changed)' * bool(code.get('changed'))}, " if code.get("commit") else ""
    )
    tree.add(f"code  {commit}{_text(told)}")


def _teacher(tree: Tree, name: str, teacher: Mapping[str, Any]) -> None:
    source = teacher.get("source", {})
    parts = [f"[bold]{_text(name)}[/bold]", _score(teacher.get("scores", {})), _share(teacher.get("share"))]
    licence = teacher.get("licence")
    parts.append(_text(licence) if licence else "[yellow]no licence stated[/yellow]")
    branch = tree.add("  ".join(part for part in parts if part))
    branch.add(f"{_text(source.get('type', '-'))}  {_text(source.get('location', '-'))}")
    weights = teacher.get("weights_sha256")
    branch.add(f"weights  [dim]{_short(weights)}[/dim]" if weights else "weights  [dim]known by their name alone[/dim]")
    student = teacher.get("student")
    if student is not None:
        inner = branch.add(_title(student))
        _fill(inner, student)


def _score(scores: Mapping[str, Any]) -> str:
    if scores.get("score") is None:
        return ""
    text = f"score {scores['score']:.3f}"
    if scores.get("score_low") is not None and scores.get("score_high") is not None:
        text += f" ({scores['score_low']:.3f} to {scores['score_high']:.3f})"
    return text


def _share(share: Any) -> str:
    if isinstance(share, Mapping):
        return _text(", ".join(f"{name} {part:.0%}" for name, part in share.items()))
    return "" if share is None else f"{share:.0%} of the images"


def _short(digest: Any) -> str:
    return _text(str(digest)[:12]) if digest else "-"


def _text(value: object) -> str:
    """Return text that others wrote, in one line, its brackets no markup."""
    return escape(" ".join(str(value).split()))
