"""Who teaches: what the settings say, or what suits the task and the loss."""

import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.settings_files import load_settings
from pipeline.stages import select
from pipeline.stages.together import choice_of
from tests.tiny import make_settings

NO_LABELS = "task.splits={train_labelled: 0, probe: 0, validation: 0, train_unlabelled: 200, test: 20}"


def choice(folder: Path, *overrides: str) -> str:
    return choice_of(load_settings([make_settings(folder)], overrides))


def test_together_unless_something_needs_each_teacher(tmp_path: Path) -> None:
    assert choice(tmp_path) == "together"
    assert choice(tmp_path, "amalgamate.choice=average") == "average"
    assert choice(tmp_path, NO_LABELS) == "together"
    for override in (
        "distill.flow={}",
        "distill.objective.hints={}",
        "distill.objective.concatenated={}",
        "distill.objective.relations={}",
        "distill.objective.dropping={}",
        "assess.bridge.kind=prototype",
    ):
        assert choice(tmp_path, override) == "least_ambiguous", override
    assert choice(tmp_path, "assess.bridge.kind=prototype", "amalgamate.choice=together") == "together"
    components = ("amalgamate.mode=components", "distill.objective.target={}", "amalgamate.choice=together")
    assert choice(tmp_path, *components) != "together"  # it plays no part there, and is no mistake


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("distill.flow={}", "needs what each teacher says, or its layers"),
        ("distill.objective.b_tuning={}", "needs what each teacher says, or its layers"),
    ],
)
def test_together_is_refused_where_it_can_not_be(tmp_path: Path, override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"amalgamate.choice: together can't be, .*{why}.*; set it to"):
        choice(tmp_path, override, "amalgamate.choice=together")


def test_no_class_is_lost_where_fewer_images_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.cat([torch.zeros(500), torch.ones(3), torch.full((40,), 2)]).long()
    monkeypatch.setattr(select, "_JUDGED", 60)
    rows = select._judged(labels, 3, seed=0)
    assert labels[rows].bincount().tolist() == [20, 3, 20] and len(rows.unique()) == 43
    assert torch.equal(rows, select._judged(labels, 3, seed=0))
    monkeypatch.setattr(select, "_JUDGED", 1)
    assert labels[select._judged(labels, 3, seed=0)].bincount().tolist() == [2, 2, 2]


def test_a_small_fit_has_one_thread_and_others_have_theirs_again() -> None:
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(2)
    try:
        with select._undisturbed(1e6):
            assert torch.get_num_threads() == 1 and sys.getswitchinterval() < 1e-3
        assert (torch.get_num_threads(), sys.getswitchinterval()) == (2, before[1])
        with select._undisturbed(1e12):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
