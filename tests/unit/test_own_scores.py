"""Scores of one's own: called with what they name, refused before anything runs where they can't be."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import AssessSettings, DistillSettings
from pipeline.errors import ConfigError
from pipeline.stages.own import code_of
from pipeline.stages.own_scores import GIVEN, own_columns, own_needing_labels, own_scores, score_own
from pipeline.stages.teachers import scoring
from pipeline.stages.training import decisive

ME = __name__


def share_of(labels, num_classes, *, of=0):
    return float((labels == of).float().mean()) * num_classes


def width(features):
    return torch.tensor(float(features.shape[1]))


def everything(logits, features, num_classes, classifier_weight, parameters, labels, fitted):
    rows = len(logits) + len(features) + len(labels) + fitted.sum()
    return rows + num_classes + (classifier_weight is None) + parameters


def infinite(logits):
    return math.inf


def broken(logits):
    raise KeyError("gone")


def asks_for_more(logits, secrets):
    return 0.0


def own(*names: str, **settings) -> AssessSettings:
    return AssessSettings(own={f"{ME}:{name}": settings for name in names})


def given(labelled: bool = True) -> dict:
    about = {"logits": torch.zeros(4, 3), "features": torch.zeros(4, 5), "num_classes": 2, "parameters": 7}
    about["classifier_weight"] = None
    labels = {"labels": torch.tensor([0, 0, 0, 1]), "fitted": torch.tensor([True, True, False, False])}
    return about | (labels if labelled else {})


def test_a_score_gets_what_it_names_and_its_settings() -> None:
    assert score_own(own("share_of", of=1), given()) == {"own.share_of": 0.5}
    found = score_own(own("width", "everything"), given())
    assert found == {"own.width": 5.0, "own.everything": 4 + 4 + 4 + 2 + 2 + 1 + 7}
    assert set(given()) == set(GIVEN)


def test_without_labels_those_that_need_none_remain() -> None:
    settings = own("width", "share_of")
    assert own_columns(settings) == ("own.width", "own.share_of")
    assert own_needing_labels(settings) == {"own.share_of"}
    assert score_own(settings, given(labelled=False)) == {"own.width": 5.0}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({f"{ME}:share_off": {}}, "has no 'share_off'; nearest: share_of"),
        ({"no_such_module:x": {}}, "module 'no_such_module' can't be imported .* PYTHONPATH"),
        ({ME: {}}, "is not of the form package.module:function"),
        ({f"{ME}:share_of": {"off": 1}}, "unexpected keyword argument 'off'"),
        ({f"{ME}:asks_for_more": {}}, "missing a required argument: 'secrets'; a score is called with"),
        ({f"{ME}:GIVEN": {}}, "is no function or class"),
    ],
)
def test_a_score_that_can_t_be_called_is_refused_with_its_name(named: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        own_scores(AssessSettings(own=named))
    assert str(caught.value).startswith(f"assess.own.{next(iter(named))}")


def test_two_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_scores.py").write_text("def width(features):\n    return 0.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"there is a score 'own\.width' already"):
        own_scores(AssessSettings(own={f"{ME}:width": {}, "other_scores:width": {}}))


def test_a_score_that_fails_is_that_teacher_s_error() -> None:
    with pytest.raises(ValueError, match=r"own\.broken fails with KeyError: 'gone'"):
        score_own(own("broken"), given())
    with pytest.raises(ValueError, match=r"own\.infinite gives inf; a score must be a finite number"):
        score_own(own("infinite"), given())


def test_code_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "changing_scores.py"
    file.write_text("a = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_of(["changing_scores:x", "nowhere_at_all:x", "nowhere_at_all.deeper:x"])
    assert before["nowhere_at_all:x"] == before["nowhere_at_all.deeper:x"] == "unknown"
    assert "changing_scores" not in sys.modules
    file.write_text("a = 2\n", encoding="utf-8")
    assert code_of(["changing_scores:x"]) != {"changing_scores:x": before["changing_scores:x"]}
    assert code_of([]) == {}


def test_without_code_of_one_s_own_the_keys_are_what_they_were_and_with_it_they_tell_its_content() -> None:
    run = SimpleNamespace(settings=SimpleNamespace(assess=AssessSettings()))
    assert not {"own", "code"} & set(scoring(run, set()))
    run.settings.assess = own("width")
    found = scoring(run, set())
    assert found["own"] == {f"{ME}:width": {}} and found["code"] == code_of([f"{ME}:width"]) != {
        f"{ME}:width": "unknown"
    }
    assert decisive(DistillSettings())["objective"] == DistillSettings().objective.model_dump(mode="json")
    loss = DistillSettings(objective={"own": {f"{ME}:Order": {}}})
    assert decisive(loss)["objective"]["code"] == code_of([f"{ME}:Order"])
