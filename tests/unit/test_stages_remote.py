"""A run folder in a store, as stages use it; and what the nodes of a cluster see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from pipeline.config import Settings
from pipeline.data import storage
from pipeline.data.mirror import Mirror
from pipeline.errors import ConfigError, TeacherError, UserError
from pipeline.models.sources import load_teacher
from pipeline.models.zoo import load_zoo
from pipeline.places import local_place
from pipeline.settings_files import load_settings
from pipeline.stages.artefacts import Record, RunFolder
from pipeline.stages.outputs import cache_root
from pipeline.stages.visibility import Place, _told, look_at
from tests.tiny import make_data, make_settings, make_zoo

URI = "s3://bucket/run"


class Machine:
    """A machine with a cache of its own, and the store that all machines share."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str = URI) -> None:
        self.folder, self._patch, self.uri = folder, monkeypatch, uri
        (folder / "bucket").mkdir(exist_ok=True)

    def on(self, name: str) -> RunFolder:
        self._patch.setenv("FACULTY_CACHE", str(self.folder / name))
        local = local_place(self.uri)
        store = fs.SubTreeFileSystem(str(self.folder / "bucket"), fs.LocalFileSystem())
        self._patch.setitem(Mirror._known, (self.uri, local), Mirror(self.uri, local, store))
        return RunFolder(self.uri)


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    from pipeline.data import claim

    monkeypatch.setattr(claim, "_SETTLE_S", 0.0)
    return Machine(tmp_path, monkeypatch)


def record(stage: str, key: str = "k") -> Record:
    return Record(stage, key, "d", {"a": 1}, {}, 1.0, 1.0)


def finish(files: RunFolder, stage: str, content: str = "content") -> None:
    folder = files.folder(stage, "k")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(content)
    (folder / "images.arrow").write_text("large")
    files.finish(record(stage))


def test_a_stage_that_one_machine_finished_is_fresh_on_another(machines: Machine) -> None:
    here = machines.on("here")
    here.prepare()
    with here.lock():
        finish(here, "ingest")
        identity = here.identity
    there = machines.on("there")
    there.check()
    assert there.identity == identity
    assert there.record("ingest", "k") == record("ingest")
    assert there.status("ingest", "k", {"a": 1}).state == "fresh"
    assert not (there.folder("ingest", "k") / "result.json").exists()  # nothing is fetched before it is read
    found = there.finished("ingest", "k")
    assert sorted(path.name for path in found.iterdir()) == ["result.json", "stage.json"]
    assert there.storage == "s3://bucket/run/ray"
    assert there.place == URI


def test_an_interrupted_stage_is_partial_on_another_machine_and_its_files_are_there(machines: Machine) -> None:
    here = machines.on("here")
    here.prepare()
    with pytest.raises(KeyboardInterrupt), here.lock():
        folder = here.folder("assess", "k")
        folder.mkdir(parents=True)
        (folder / "recorded.txt").write_text("one teacher")
        raise KeyboardInterrupt
    there = machines.on("there")
    there.check()
    assert there.status("assess", "k", {}).state == "partial"
    assert there.status("assess", "other", {}).state == "missing"
    assert (there.finished("assess", "k") / "recorded.txt").read_text() == "one teacher"


def test_a_result_that_was_removed_from_the_store_is_made_again(machines: Machine, tmp_path: Path) -> None:
    here = machines.on("here")
    here.prepare()
    with here.lock():
        finish(here, "ingest")
        finish(here, "assess")
    shutil.rmtree(tmp_path / "bucket/assess")
    here.check()
    assert here.record("assess", "k") is None
    assert here.record("ingest", "k") is not None
    with here.lock():
        assert not (here.folder("assess", "k") / "result.json").exists()
        finish(here, "assess", "made again")
    assert (tmp_path / "bucket/assess/k/result.json").read_text() == "made again"


def test_a_folder_that_is_in_use_is_not_taken_twice(machines: Machine) -> None:
    here = machines.on("here")
    here.prepare()
    with here.lock():
        again = RunFolder(URI)
        with pytest.raises(UserError, match="in use by process"), again.lock():
            pytest.fail("the block must not be entered")


def test_another_format_is_refused(machines: Machine, tmp_path: Path) -> None:
    (tmp_path / "bucket/run.json").write_text(json.dumps({"format": 99, "id": "x"}))
    with pytest.raises(UserError, match="run folder of format 99"):
        machines.on("here").prepare()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_data(tmp_path)
    return tmp_path


def settings_of(folder: Path, run_dir: str) -> Settings:
    return load_settings([make_settings(folder)], [f"run_dir={run_dir}"])


def test_the_settings_take_a_uri(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACULTY_CACHE", str(tiny / "cache"))
    settings = settings_of(tiny, "s3://bucket/run/")
    assert settings.run_dir == URI
    assert settings_of(tiny, f"file://{tiny}/run").run_dir == str(tiny / "run")
    assert cache_root(settings) == tiny / "cache/teacher-outputs"
    registered = settings.model_copy(update={"zoo": settings.zoo.model_copy(update={"path": None})})
    assert registered.zoo_file == str(local_place(URI) / "registered.parquet")
    for run_dir, why in (("s5://b/x", "`run_dir`: .*no store that is known"), ("s3://k:s@b/x", "holds a credential")):
        with pytest.raises(ConfigError, match=why):
            settings_of(tiny, run_dir)


def test_a_database_is_not_kept_in_a_mirror(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.tracking.connect import find_store
    from pipeline.tracking.spec import TrackingSpec

    monkeypatch.setenv("FACULTY_CACHE", str(tiny / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for place in (URI, local_place(URI)):
        with pytest.raises(ConfigError, match="the run folder s3://bucket/run is remote and can't hold a database"):
            find_store(TrackingSpec(), place)
        assert find_store(TrackingSpec(uri="jsonl"), place).uri == str(local_place(URI) / "tracking.jsonl")


# Weights and a zoo in a store


@pytest.fixture
def zoo_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the bucket, with the zoo of one teacher."""
    bucket = tmp_path / "bucket"
    make_zoo(bucket, ("untrained",))
    monkeypatch.setenv("FACULTY_CACHE", str(tmp_path / "cache"))
    store = fs.SubTreeFileSystem(str(bucket), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda uri: (store, str(uri).partition("://bucket/")[2]))
    return bucket


def test_a_zoo_in_a_store_and_its_weights_are_fetched_once(zoo_in_a_store: Path, tmp_path: Path) -> None:
    zoo, local = load_zoo("s3://bucket/zoo.yaml"), load_zoo(zoo_in_a_store / "zoo.yaml")
    assert zoo["untrained"].path == "s3://bucket/teachers/untrained.safetensors"
    assert zoo.fingerprint_of("untrained") == local.fingerprint_of("untrained")  # it does not count where a file lies
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    found = [load_teacher(zoo["untrained"]).state_dict() for _ in range(2)]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    expected = load_teacher(local["untrained"]).state_dict()
    for one in found:
        assert all(torch.equal(one[name], value) for name, value in expected.items())


def test_weights_in_a_store_are_compared_with_their_hash(zoo_in_a_store: Path) -> None:
    spec = load_zoo("s3://bucket/zoo.yaml")["untrained"]
    with pytest.raises(TeacherError, match="is a URI, of which nothing is known: give its `sha256`"):
        load_teacher(spec.model_copy(update={"sha256": None}))
    with pytest.raises(TeacherError, match="`sha256` does not fit"):
        load_teacher(spec.model_copy(update={"sha256": "0" * 64}))
    (zoo_in_a_store / "teachers/untrained.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"s3://bucket/teachers/untrained.safetensors: there is no such file"):
        load_teacher(spec)
    with pytest.raises(ConfigError, match="a catalogue is read where it lies"):
        load_zoo("s3://bucket/zoo.parquet")


# What nodes see: the root of a node's file system is a folder here


def put(root: Path, path: str, text: str) -> None:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


PLACES = [
    Place("run_dir", "/shared/run/.seen-1", "share it", token="abc"),
    Place("run_dir", "/shared/run", "share it", writable=True),
    Place("teacher 'a': source.path", "/zoo/a.safetensors", "move it", size=5),
    Place("cache.path", "/scratch/cache", "set it", writable=True),
]


def test_a_node_that_sees_all_has_nothing_to_say(tmp_path: Path) -> None:
    put(tmp_path, "/shared/run/.seen-1", "abc")
    put(tmp_path, "/zoo/a.safetensors", "12345")
    assert look_at(PLACES, root=str(tmp_path)) == []
    assert sorted(path.name for path in (tmp_path / "shared/run").iterdir()) == [".seen-1"]


def test_a_node_tells_what_it_does_not_see(tmp_path: Path) -> None:
    put(tmp_path, "/shared/run/.seen-1", "of another run")
    put(tmp_path, "/zoo/a.safetensors", "1234")
    put(tmp_path, "/scratch", "a file")
    said = {(place.path, why) for place, why in look_at(PLACES, root=str(tmp_path))}
    assert said == {
        ("/shared/run/.seen-1", "another folder has that name there"),
        ("/zoo/a.safetensors", "another file there, of 4 bytes instead of 5"),
        ("/scratch/cache", "Not a directory"),
    }
    empty = {(place.path, why) for place, why in look_at(PLACES[::2], root=str(tmp_path / "empty"))}
    assert empty == {(place.path, "No such file or directory") for place in PLACES[::2]}


def test_the_first_fault_is_told_in_one_line_with_its_remedy() -> None:
    lost = "No such file or directory"
    told = _told([("10.0.0.7", PLACES[0], lost), ("10.0.0.8", PLACES[0], lost)], 4)
    assert told == (
        "run_dir: node 10.0.0.7 does not see /shared/run as this one does (No such file or directory) (as do 1 more of "
        "4 nodes); share it"
    )
    weights = [Place(f"teacher {name!r}: source.path", f"/zoo/{name}", "move it", size=1) for name in "abc"]
    told = _told([("10.0.0.7", place, lost) for place in weights], 1)
    assert told.startswith("teacher 'a': source.path: node 10.0.0.7 does not see /zoo/a as")
    assert told.endswith("; 2 more paths like it; move it")
    assert "runtime_env" in _told([("10.0.0.7", None, "ModuleNotFoundError: No module named 'pipeline'")], 1)
