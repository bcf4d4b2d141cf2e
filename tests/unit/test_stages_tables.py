"""What the terminal shows of a stage: nothing is cut or broken that a reader needs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.report.console import Display
from pipeline.stages import tables
from pipeline.stages.report_folder import kept_run
from tests.madefolder import Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("tables"), ("a", "b"), ("one", "two"), name="made", per_class=4, seed=0)
    made.ingest()
    made.assess(2)
    return made


def shown(made: Made, width: int, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    run = kept_run(made.root, Display(console))
    reasons = {"one": "1. choice, +0.123 (100% sure)", "two": "no marginal gain, -0.014 (0% sure)"}
    tables._teachers(run, {"chosen": ["one"], "reasons": reasons})  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_terminal_gets_fewer_scores_and_whole_reasons(made: Made) -> None:
    wide, narrow = shown(made, 200, terminal=True), shown(made, 100, terminal=True)
    assert "k-NN" in wide and "not shown" not in wide
    assert "1. choice, +0.123 (100% sure)" in narrow
    assert "not shown for want of room: " in narrow and "k-NN" in narrow.partition("not shown")[2]
    assert "k-NN" not in narrow.partition("not shown")[0]
    for text in (wide, narrow):
        assert "1.000 ± 0.100" in text  # a number is never broken


def test_a_log_keeps_every_score(made: Made) -> None:
    assert "k-NN" in shown(made, 100, terminal=False) and "not shown" not in shown(made, 100, terminal=False)
