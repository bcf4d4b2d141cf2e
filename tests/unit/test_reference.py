"""The reference of the settings: complete, current, and of use to an editor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.config import Settings
from pipeline.reference.command import schema_text, write_reference
from pipeline.reference.markdown import settings_page
from pipeline.reference.schema import all_models, settings_schema
from pipeline.strict import load_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def schema() -> dict:
    return settings_schema()


@pytest.fixture(scope="module")
def page() -> str:
    return settings_page()


def test_the_copies_in_docs_are_current(page: str) -> None:
    """After a change of settings: `make reference`."""
    assert (ROOT / "docs" / "run.schema.json").read_text(encoding="utf-8") == schema_text()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page


def test_the_schema_is_one(schema: dict) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["required"] == ["name", "task", "zoo"]


@pytest.mark.parametrize("path", ["conf/demo/run.yaml"])
def test_settings_that_load_are_valid_for_an_editor(schema: dict, path: str) -> None:
    jsonschema.validate(load_yaml(ROOT / path), schema)


def test_an_overlay_is_valid_but_for_what_it_leaves_to_the_file_before(schema: dict) -> None:
    validator = jsonschema.Draft202012Validator(schema | {"required": []})
    for path in (ROOT / "conf" / "recipes").glob("*.yaml"):
        validator.validate(load_yaml(path))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("distill: {lop: {epochs: 3}}", "lop"),
        ("distill: {loop: {epochs: 0}}", "0"),
        ("evaluate: {controls: [no_teachers]}", "no_teachers"),
        ("task: {source: {type: folder, path: x}, image: {size: 8}}", "folder"),
    ],
)
def test_an_editor_sees_what_is_wrong(schema: dict, change: str, word: str) -> None:
    data = load_yaml(ROOT / "conf" / "demo" / "run.yaml") | yaml.safe_load(change)
    with pytest.raises(jsonschema.ValidationError, match=word):
        jsonschema.Draft202012Validator(schema).validate(data)


def test_every_setting_is_told_of(schema: dict) -> None:
    silent = [
        f"{name}.{key}"
        for name, entry in {"": schema, **schema["$defs"]}.items()
        for key, prop in entry.get("properties", {}).items()
        if not prop.get("description") and "const" not in prop
    ]
    assert not silent


def test_the_page_names_every_setting_once(page: str) -> None:
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(headings) == len(set(headings)) == len(all_models())
    rows = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert len(rows) == sum(len(model.model_fields) for model in all_models())
    for name in Settings.model_fields:
        assert f"| `{Settings.model_fields[name].alias or name}` |" in page


def test_the_page_s_links_lead_somewhere(page: str) -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", page, re.M)
    }
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links and links <= anchors
    for line in page.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_it_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_reference(tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text()) == settings_schema()
    write_reference(None, markdown=True)
    assert capsys.readouterr().out.startswith("# Settings")
