"""The run folder: keys, freshness, what changed, and who may write."""

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.stages.artefacts import Record, RunFolder, digest_of, flatten, key_of, write_json, write_settings


def record(stage: str, key: str, inputs: dict, finished: float = 1.0) -> Record:
    return Record(stage, key, "d", inputs, {}, 0.5, finished)


@pytest.fixture
def files(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    return folder


def test_a_key_depends_on_content_and_not_on_order() -> None:
    assert key_of("assess", 1, {"a": 1, "b": 2}) == key_of("assess", 1, {"b": 2, "a": 1})
    keys = {key_of("assess", 1, {"a": 1}), key_of("assess", 2, {"a": 1}), key_of("select", 1, {"a": 1})}
    assert len(keys | {key_of("assess", 1, {"a": 2})}) == 4


def test_missing_then_partial_then_fresh_then_stale(files: RunFolder) -> None:
    inputs = {"assess.k": 5, "teachers.a": "x"}
    key = key_of("assess", 1, inputs)
    assert files.status("assess", key, inputs).state == "missing"
    files.folder("assess", key).mkdir(parents=True)
    assert files.status("assess", key, inputs).state == "partial"
    files.finish(record("assess", key, inputs))
    assert files.status("assess", key, inputs).state == "fresh"
    changed = {"assess.k": 7, "teachers.b": "y"}
    status = files.status("assess", key_of("assess", 1, changed), changed)
    assert status.state == "stale"
    assert status.why == "assess.k: 5 → 7; teachers.a: x → absent; teachers.b: absent → y"


def test_going_back_to_former_settings_finds_the_former_result(files: RunFolder) -> None:
    for value in (1, 2):
        inputs = {"k": value}
        files.finish(record("assess", key_of("assess", 1, inputs), inputs, finished=float(value)))
    assert files.record("assess", key_of("assess", 1, {"k": 1})) is not None
    newest = files.newest("assess")
    assert newest is not None
    assert newest.inputs == {"k": 2}


def test_a_record_that_was_cut_off_counts_as_unfinished(files: RunFolder) -> None:
    files.finish(record("assess", "k", {}))
    path = files.folder("assess", "k") / "stage.json"
    path.write_text(path.read_text()[:-20])
    assert files.record("assess", "k") is None


def test_a_stage_that_asks_for_it_runs_again(files: RunFolder) -> None:
    inputs = {"k": 1}
    key = key_of("assess", 1, inputs)
    files.finish(Record("assess", key, "d", inputs, {}, 0.5, 1.0, again="big failed in a way that may pass"))
    assert files.record("assess", key) is None
    status = files.status("assess", key, inputs)
    assert (status.state, status.why) == ("stale", "big failed in a way that may pass")


def test_another_format_is_refused(files: RunFolder) -> None:
    write_json(files.root / "run.json", {"format": 99})
    with pytest.raises(UserError, match="run folder of format 99, this version reads 1; choose another run_dir"):
        files.prepare()


def test_a_folder_that_is_not_ours_is_refused(files: RunFolder) -> None:
    (files.root / "run.json").write_text("not json")
    with pytest.raises(UserError, match="is not a run marker"):
        files.prepare()


def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    folder = Path("/sys") if os.geteuid() == 0 else tmp_path  # root may write anywhere but in the kernel's own folder
    with pytest.raises(UserError, match=r"can't be written \(.*\); choose another run_dir"):
        RunFolder(folder / "run").prepare()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"can't be written \(.*\); choose another run_dir"):
        RunFolder(tmp_path / "run" / "deeper").prepare()


def test_two_processes_do_not_share_a_folder(files: RunFolder) -> None:
    with files.lock():
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), RunFolder(files.root).lock():
            pass
    with files.lock():
        pass


def test_write_json_leaves_the_former_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["x.json"]


def test_flatten_and_digest() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_a_run_keeps_its_identity_and_shares_it_with_no_other(files: RunFolder, tmp_path: Path) -> None:
    identity = files.identity
    files.prepare()
    assert files.identity == identity
    other = RunFolder(tmp_path / "other")
    other.prepare()
    assert other.identity != identity


def test_settings_are_written_without_credentials(tmp_path: Path) -> None:
    write_settings(tmp_path / "s.yaml", {"tracking": {"uri": "https://user:sentinel@host/x"}})
    text = (tmp_path / "s.yaml").read_text()
    assert "sentinel" not in text
    assert "host/x" in text
