"""The pages: the site builds strictly and fetches nothing from elsewhere, links lead somewhere, tables are filled."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from benchmarks import claims, results
from tests.documents import PAGES, ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


class Fetched(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        if tag in ("script", "img", "source", "iframe"):
            self.found.append(about.get("src") or "")
        elif tag == "link" and about.get("rel") != "canonical":
            self.found.append(about.get("href") or "")


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="needs mkdocs-material, which the extra `dev` brings"
)
def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    built = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    assert {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")} <= built
    for name in built:
        fetched = Fetched((tmp_path / "site" / name).read_text(encoding="utf-8")).found
        assert not [one for one in fetched if "//" in one], name
        here = (tmp_path / "site" / name).parent
        lost = [one for one in fetched if one and "/" != one[0] and not (here / one.split("?")[0]).exists()]
        assert not lost, (name, lost)


def test_every_page_has_a_place_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = [page for entry in yaml.safe_load(text)["nav"] for page in places(entry)]
    assert sorted(nav) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def places(entry: str | dict | list) -> list[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in places(part)]


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


@pages
def test_paths_of_the_repository_are_there(page: Path) -> None:
    for path in re.findall(r"`((?:conf|pipeline|benchmarks|tests|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_recipes_are_all_told_of() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "conf" / "recipes").glob("*.yaml") if f"`{path.name}`" not in text]


# --- tables ---

STORED = sorted(path.stem for path in results.RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", results.DOCUMENTS)
def test_tables_are_those_of_the_stored_results(name: str) -> None:
    content = (ROOT / name).read_text(encoding="utf-8")
    assert results.filled_in(content) == content, "run python -m benchmarks.results"


def test_every_result_and_its_goals_are_shown() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^<!-- ([a-z_]+(?: [a-z_]+)?) -->$", text, re.MULTILINE))
    for name in set(STORED) - {"scale"}:  # a simulation, which has a page of its own
        goals = json.loads((results.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["goals"]
        assert name in shown
        assert not goals or f"{name} goals" in shown, name


def test_every_goal_is_part_of_one_claim() -> None:
    for name in STORED:
        goals = json.loads((results.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["goals"]
        for one in goals:
            parts = [
                claim for claim in claims.CLAIMS if claim.benchmark == name and re.search(claim.goals, one["name"])
            ]
            assert len(parts) == 1, (name, one["name"], parts)


def test_a_miss_is_shown_whatever_its_claim() -> None:
    missed = [one for _, goals in claims.found(results.RESULTS) for one in goals if not one["met"]]
    for everything in (True, False):
        table = claims.table(results.RESULTS, everything=everything)
        told = re.findall(r"\*\*missed\*\*(?: in (\d+) of \d+)?", table)
        assert sum(int(count or 1) for count in told) == len(missed)


def test_goals_are_worded_with_what_was_wanted(tmp_path: Path) -> None:
    met = results.goal("speed", 3.0, 2.0, "ratio")
    missed = results.goal("memory", 5.0, 4.0, "GiB", at_most=True)
    assert claims.goals_told([met]) == "Goals: the one that was set is met."
    assert claims.goals_told([met, missed]).splitlines() == [
        "Goals: 1 of 2 met. Missed:",
        "",
        "- memory: 5 GiB, wanted ≤ 4",
    ]
    stored = {"goals": [results.goal("time of ot.solve_batch", 60.0, 50, "ratio"), missed | {"name": "unheard of"}]}
    (tmp_path / "transport.json").write_text(json.dumps(stored), encoding="utf-8")
    rows = claims.table(tmp_path, everything=False).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["60 x", "5 GiB"]
    assert [row.split(" | ")[3:] for row in rows] == [["≥ 50 x", "met |"], ["≤ 4 GiB", "**missed** |"]]


def test_marks_are_filled_in_and_may_be_filled_again() -> None:
    document = "a\n<!-- demo -->\nold\n<!-- /demo -->\nb\n<!-- demo goals -->\n<!-- /demo goals -->\n"
    once = results.filled_in(document)
    assert "old" not in once
    assert "no teacher" in once
    assert "Goals: all" in once
    assert results.filled_in(once) == once
    with pytest.raises(ValueError, match="NAME goals"):
        results.filled_in("<!-- demo gaols -->\n<!-- /demo gaols -->")
