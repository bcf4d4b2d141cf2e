"""What registered teachers are called, and the tags that they are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.errors import ConfigError
from pipeline.stages.push import parse_tags
from pipeline.tracking.teachers import teacher_names


def test_names_of_models_become_names_of_teachers() -> None:
    versions = [SimpleNamespace(name=name, version="7") for name in ("a b", "a-b", "a/b", "_x", "é", "m" * 90)]
    names = list(teacher_names(versions, numbered=False).values())
    assert names[1] == "a-b"
    assert len(set(names)) == len(names)
    assert all(len(name) <= 80 for name in names)
    assert names[0].startswith("a-b-") and names[2].startswith("a-b-")
    assert names[3:5] == ["x", "model"]
    assert list(teacher_names(versions[1:2], numbered=True).values()) == ["a-b-v7"]


def test_bad_tags_are_told() -> None:
    assert parse_tags(["task=birds", "note=a=b"]) == {"task": "birds", "note": "a=b"}
    for bad in ("task", "=x", "a b=c"):
        with pytest.raises(ConfigError, match="not of the form key=value"):
            parse_tags([bad])
