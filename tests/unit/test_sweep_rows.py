"""Rows of trials: written whole, read if they are whole, and what is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.stages.sweep import draw
from pipeline.stages.sweep_rows import (
    Member,
    SweepFolder,
    TrialRow,
    about_best,
    best_of,
    common_epoch,
    compared,
    overlay,
)
from pipeline.sweep_spec import SweepSpec

SPEC = SweepSpec(
    space={
        "distill.loop.optim.lr": {"dist": "loguniform", "lower": 1e-4, "upper": 1e-1},
        "distill.student": [{"name": "mlp"}, {"name": "small_cnn"}],
    }
)


def row(trial: str, metric: float | None, state: str = "done", *, lr: float = 1e-3, **more: object) -> TrialRow:
    values = {"distill.loop.optim.lr": lr, "distill.student": {"name": "mlp"}}
    return TrialRow(trial, state, values, metric, **more)  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    kept = row("a", 0.5, epochs=2, curve=((1, 0.25), (2, 0.5)), scores={"validation_nll": 1.5}, student="students/x")
    folder.keep(kept)
    folder.keep(row("b", None, "failed", error="ValueError: no", error_type="ValueError"), "Traceback …")
    assert SweepFolder(tmp_path).rows() == folder.rows() and folder.rows()["a"] == kept
    assert (folder.trial("b") / "error.log").read_text(encoding="utf-8") == "Traceback …"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_row_that_was_cut_off_does_not_count(tmp_path: Path, share: float) -> None:
    folder = SweepFolder(tmp_path)
    folder.keep(row("a", 0.5))
    folder.keep(row("b", 0.6))
    path = folder.trial("a") / "row.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: int(share * len(text))], encoding="utf-8")
    assert set(folder.rows()) == {"b"}
    path.write_text(json.dumps({"trial": "a", "unknown": 1}), encoding="utf-8")
    assert set(folder.rows()) == {"b"}
    (folder.trial("c")).mkdir()
    (folder.trial("c") / "row.json").write_bytes((folder.trial("b") / "row.json").read_bytes())  # copied by hand
    assert set(folder.rows()) == {"b"}


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_where_a_member_stands_comes_back_or_it_begins_anew(tmp_path: Path, share: float) -> None:
    folder, member = SweepFolder(tmp_path), Member({"distill.loop.optim.lr": 0.02}, ((1, 1.5), (2, 1.25)))
    assert folder.member("a") == Member({}, ())
    folder.keep_member("a", member)
    assert SweepFolder(tmp_path).member("a") == member and folder.rows() == {}
    path = tmp_path / "trials" / "a" / "member.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: int(share * len(text))], encoding="utf-8")
    assert folder.member("a") == Member()


def test_what_failed_in_a_way_that_may_pass_is_tried_again() -> None:
    assert row("a", 0.5).final and row("a", 0.5, "stopped").final
    assert not row("a", None, "failed", error="x", error_type="WorkerDied").final
    assert row("a", None, "failed", error="x", error_type="ConfigError").final


def test_the_best_has_come_to_its_end() -> None:
    rows = [row("a", 0.7), row("b", 0.9, "stopped"), row("c", math.nan), row("d", None, "failed"), row("e", 0.6)]
    assert best_of(rows, "max").trial == "a" and best_of(rows, "min").trial == "e"
    assert best_of(rows[1:4], "max") is None
    tied = [row("a", 0.7, scores={"validation_nll": 1.0}), row("b", 0.7, scores={"validation_nll": 0.9})]
    assert best_of(tied, "max").trial == "b"


def test_how_sure_the_choice_is() -> None:
    rows = [row("a", 0.8), row("b", 0.77), row("c", 0.5), row("d", 0.79, "stopped")]
    about = about_best(SPEC, rows, rows[0], 100)
    assert about["standard_error"] == pytest.approx(0.04) and about["within_one_error"] == 2


def test_the_overlay_is_the_best_trial() -> None:
    text = overlay(SPEC.model_copy(update={"retrain": {"distill.loop.epochs": 9}}), row("a", 0.7, lr=0.02))
    assert text.startswith("#")
    assert yaml.safe_load(text) == {
        "distill": {"loop": {"optim": {"lr": 0.02}, "epochs": 9}, "student": {"name": "mlp"}}
    }


def test_trials_that_were_stopped_are_compared_where_all_have_been() -> None:
    whole = row("a", 0.9, epochs=9, curve=((1, 0.3), (3, 0.6), (9, 0.9)))
    short = row("b", 0.5, "stopped", epochs=3, curve=((1, 0.4), (3, 0.5)))
    failed = row("c", None, "failed", epochs=1)
    assert common_epoch([whole, failed]) is None and common_epoch([whole, short, failed]) == 3
    kept, values, epoch = compared([whole, short, failed])
    assert ([one.trial for one in kept], values, epoch) == (["a", "b"], [0.6, 0.5], 3)


def test_the_table_and_the_pictures(tmp_path: Path) -> None:
    rows = [
        row(f"t{k}", 0.5 + k / 20, lr=10.0 ** (-4 + k / 3), epochs=2, scores={"validation_accuracy": 0.5 + k / 20})
        for k in range(8)
    ]
    rows.append(row("bad", None, "failed", error="ValueError: no", error_type="ValueError"))
    best = SweepFolder(tmp_path).finish(SPEC, rows, 40)
    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert best.trial == "t7" == table[0]["trial"] and table[-1]["error"] == "ValueError: no"
    assert table[0]["set.distill.loop.optim.lr"] == rows[7].values["distill.loop.optim.lr"]
    assert json.loads(table[0]["set.distill.student"]) == {"name": "mlp"}
    draw(SPEC, rows, tmp_path)
    told = json.loads((tmp_path / "importance.json").read_text(encoding="utf-8"))
    [first] = told["settings"]  # of the student there is one kind alone: nothing to say
    assert first["name"] == "distill.loop.optim.lr" and first["explained"] > 0.99 > first["chance"]
    assert (tmp_path / "parallel.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert (tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")


def test_few_trials_say_nothing_of_importance(tmp_path: Path) -> None:
    draw(SPEC, [row("a", 0.5), row("b", 0.7, lr=0.1)], tmp_path)
    told = json.loads((tmp_path / "importance.json").read_text(encoding="utf-8"))
    assert told["settings"] == [] and "nothing can be said" in told["note"]
    assert (tmp_path / "parallel.png").exists() and not (tmp_path / "importance.png").exists()
