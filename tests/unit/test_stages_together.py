"""Who teaches: what the settings say, or what suits the task and the loss."""

from pathlib import Path

import pytest

from pipeline.config import load_settings
from pipeline.errors import ConfigError
from pipeline.stages.together import choice_of
from tests.tiny import make_settings

NO_LABELS = "task.splits={train_labelled: 0, probe: 0, validation: 0, train_unlabelled: 200, test: 20}"


def choice(folder: Path, *overrides: str) -> str:
    return choice_of(load_settings([make_settings(folder)], overrides))


def test_together_unless_something_needs_each_teacher(tmp_path: Path) -> None:
    assert choice(tmp_path) == "together"
    assert choice(tmp_path, "amalgamate.choice=average") == "average"
    for override in (
        NO_LABELS,
        "distill.flow={}",
        "distill.objective.hints={}",
        "distill.objective.concatenated={}",
        "distill.objective.relations={}",
        "assess.bridge.kind=prototype",
    ):
        assert choice(tmp_path, override) == "least_ambiguous", override
    assert choice(tmp_path, "assess.bridge.kind=prototype", "amalgamate.choice=together") == "together"


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (NO_LABELS, "the task has no labels"),
        ("distill.flow={}", "needs the logits, features or layers of each teacher"),
        ("distill.objective.b_tuning={}", "needs the logits, features or layers of each teacher"),
    ],
)
def test_together_is_refused_where_it_can_not_be(tmp_path: Path, override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"amalgamate.choice: together can't be, .*{why}.*; set it to"):
        choice(tmp_path, override, "amalgamate.choice=together")
