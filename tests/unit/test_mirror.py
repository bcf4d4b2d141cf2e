"""A run folder in a store and its mirrors on two machines: whole files, faults on the way, and who is newer."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from pipeline.data import objects
from pipeline.data.claim import NAME, claim
from pipeline.data.mirror import LIST, Mirror, forget, here, here_all, names_in, share
from pipeline.errors import StageError, UserError
from pipeline.places import cache_folder, is_remote, join, local_place, origin_of, own, tidy

URI = "s3://bucket/run"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the store."""
    monkeypatch.setattr(objects, "_PAUSES", (0.0, 0.0))
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def machine(folder: Path, bucket: Path, store: fs.FileSystem | None = None) -> Mirror:
    """The mirror of one machine."""
    return Mirror(URI, folder, store or fs.SubTreeFileSystem(str(bucket), fs.LocalFileSystem()))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files(folder: Path) -> dict[str, str]:
    """What is in a folder, hidden files too, but for the mirror's own list."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LIST
    }


class Faulty(fs.FileSystemHandler):
    """A store on whose way something happens to the bytes."""

    def __init__(self, bucket: Path) -> None:
        self.inner = fs.SubTreeFileSystem(str(bucket), fs.LocalFileSystem())
        self.reading: Callable[[bytes], Any] = io.BytesIO
        self.writing: Callable[[Any], Any] = lambda stream: stream

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self.inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self.inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.inner.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.inner.copy_file(src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        with self.inner.open_input_stream(path) as stream:
            return pa.PythonFile(self.reading(stream.read()), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(self.writing(self.inner.open_output_stream(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError


def test_what_one_machine_pushes_another_one_reads(tmp_path: Path, bucket: Path) -> None:
    a, b = machine(tmp_path / "a", bucket), machine(tmp_path / "b", bucket)
    write(a.local / "teachers/x-1/bridge.bin", "bridge")
    write(a.local / "distill/k/stage.json", "{}")
    write(a.local / "ray/epochs/state.pt", "goes by itself")
    write(a.local / "teachers/x-1/.row.json.17", "half")
    a.push()
    assert files(bucket) == {"teachers/x-1/bridge.bin": "bridge", "distill/k/stage.json": "{}"}
    assert not b.local.exists()
    assert b.ensure("teachers/x-1/bridge.bin").read_text() == "bridge"
    assert files(b.local) == {"teachers/x-1/bridge.bin": "bridge"}  # nothing but what was asked for
    assert not b.ensure("teachers/x-1/none.bin").exists()
    b.pull("*/*/stage.json")
    assert (b.local / "distill/k/stage.json").read_text() == "{}"


def test_nothing_is_sent_twice_and_marks_go_last(tmp_path: Path, bucket: Path) -> None:
    sent: list[str] = []
    a = machine(tmp_path / "a", bucket)
    put = a.store.put
    a.store.put = lambda source, name: (sent.append(name), put(source, name))[1]  # type: ignore[method-assign]
    for name in ("done.json", "stage.json", "a.bin", "z.bin", "row.json"):
        write(a.local / "k" / name, name)
    a.share(["k"])
    assert sent[2:] == ["k/row.json", "k/done.json", "k/stage.json"]
    assert set(sent[:2]) == {"k/a.bin", "k/z.bin"}
    a.push()
    machine(a.local, bucket).push()  # another process of this machine
    assert len(sent) == 5
    write(a.local / "k/a.bin", "changed")
    a.push()
    assert sent[5:] == ["k/a.bin"]
    assert (bucket / "k/a.bin").read_text() == "changed"


def test_a_folder_is_fetched_but_for_what_is_left_out(tmp_path: Path, bucket: Path) -> None:
    for name in ("images.arrow", "ingest.json", "deep/er/x"):
        write(bucket / "ingest/k" / name, name)
    b = machine(tmp_path / "b", bucket)
    b.ensure("ingest/k", but=("images.arrow",))
    assert set(files(b.local)) == {"ingest/k/ingest.json", "ingest/k/deep/er/x"}
    assert b.ensure("ingest/k/images.arrow").read_text() == "images.arrow"


def test_a_file_that_others_write_anew_is_compared_where_that_is_asked_for(tmp_path: Path, bucket: Path) -> None:
    a, b = machine(tmp_path / "a", bucket), machine(tmp_path / "b", bucket)
    write(a.local / "outputs/x/o.bin", "one rung")
    a.push()
    assert b.ensure("outputs/x/o.bin").read_text() == "one rung"
    write(a.local / "outputs/x/o.bin", "two rungs of it")
    a.push()
    assert b.ensure("outputs/x/o.bin").read_text() == "one rung"
    assert b.ensure("outputs/x/o.bin", newest=True).read_text() == "two rungs of it"
    # What was written here since is newer than what the store has.
    write(b.local / "outputs/x/o.bin", "three")
    assert b.ensure("outputs/x/o.bin", newest=True).read_text() == "three"


def test_the_store_is_the_truth_for_who_takes_the_folder(tmp_path: Path, bucket: Path) -> None:
    a, b = machine(tmp_path / "a", bucket), machine(tmp_path / "b", bucket)
    for name in ("same", "changed", "deleted", "appended"):
        write(a.local / "k" / name, name)
    a.push()
    b.pull("k/*")
    write(b.local / "k/changed", "by the other machine")
    b.push()
    (bucket / "k/deleted").unlink()
    write(a.local / "k/unsent", "of a run that was killed")
    write(a.local / "k/appended", "appended, and killed before it was sent")
    a.reconcile()
    assert set(files(a.local)) == {"k/same", "k/unsent", "k/appended"}
    assert a.ensure("k/changed").read_text() == "by the other machine"
    a.push()
    assert set(files(bucket)) == {"k/same", "k/changed", "k/unsent", "k/appended"}
    assert (bucket / "k/appended").read_text().startswith("appended, and")


def test_looking_disturbs_no_run_in_the_same_mirror(tmp_path: Path, bucket: Path) -> None:
    driver, reader = machine(tmp_path / "a", bucket), machine(tmp_path / "a", bucket)
    write(driver.local / "recorded.json", "old")
    write(driver.local / "a/k/stage.json", "{}")
    write(driver.local / "b/k/stage.json", "{}")
    driver.push()
    write(driver.local / "recorded.json", "being written")
    (bucket / "b/k/stage.json").unlink()
    write(bucket / "c/k/stage.json", "{}")
    reader.look("recorded.json", "*/*/stage.json")
    assert (driver.local / "recorded.json").read_text() == "being written"
    assert sorted(path.parent.parent.name for path in driver.local.glob("*/*/stage.json")) == ["a", "c"]


def test_a_sent_journal_is_not_left_in_the_store(tmp_path: Path, bucket: Path) -> None:
    a = machine(tmp_path / "a", bucket)
    journal = write(a.local / "tracking-journal/1.jsonl", "records")
    kept = write(a.local / "teachers/x/bridge.bin", "bridge")
    a.push()
    assert set(files(bucket)) == {"tracking-journal/1.jsonl", "teachers/x/bridge.bin"}
    journal.unlink()
    kept.unlink()  # by someone who clears caches: that deletes nothing
    a.push()
    assert set(files(bucket)) == {"teachers/x/bridge.bin"}
    assert a.ensure("teachers/x/bridge.bin").read_text() == "bridge"


def test_a_wiped_mirror_is_filled_anew_by_the_same_process(tmp_path: Path, bucket: Path) -> None:
    import shutil

    a = machine(tmp_path / "a", bucket)
    write(a.local / "k/x", "x")
    a.push()
    a.ensure("k/x")
    shutil.rmtree(a.local)
    a.push()
    assert files(bucket) == {"k/x": "x"}
    assert a.ensure("k/x").read_text() == "x"


def test_a_fetch_that_is_cut_off_is_tried_again_and_leaves_nothing(tmp_path: Path, bucket: Path) -> None:
    write(bucket / "k/x", "content" * 1000)
    handler = Faulty(bucket)
    b = machine(tmp_path / "b", bucket, fs.PyFileSystem(handler))
    cuts = iter([10, 3500])
    handler.reading = lambda data: io.BytesIO(data[: next(cuts, None)])
    assert b.ensure("k/x").read_text() == "content" * 1000
    assert next(cuts, None) is None  # both cuts were met

    (b.local / "k/x").unlink()
    handler.reading = lambda data: io.BytesIO(data[:10])
    with pytest.raises(StageError, match=r"run_dir s3://bucket/run: k/x can't be fetched \(10 of 7000 bytes came\)"):
        b.ensure("k/x")
    assert files(b.local) == {}


def test_a_send_that_is_cut_off_shows_nothing(tmp_path: Path, bucket: Path) -> None:
    handler = Faulty(bucket)
    a = machine(tmp_path / "a", bucket, fs.PyFileSystem(handler))
    write(a.local / "k/x", "first")
    a.push()
    write(a.local / "k/x", "second " * 1000)
    write(a.local / "k/stage.json", "{}")

    class Breaks(io.RawIOBase):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.stream.write(bytes(data)[:5])
            raise OSError("the line is broken")

        def close(self) -> None:
            self.stream.close()
            super().close()

    handler.writing = Breaks
    with pytest.raises(StageError, match=r"k/x can't be written \(.*the line is broken") as caught:
        a.push()
    assert "\n" not in str(caught.value)
    assert files(bucket) == {"k/x": "first"}  # neither a part of it, nor the mark that all is there
    handler.writing = lambda stream: stream
    a.push()
    assert files(bucket) == {"k/x": "second " * 1000, "k/stage.json": "{}"}


def test_a_store_that_is_away_is_not_asked_for_every_file(tmp_path: Path, bucket: Path) -> None:
    handler = Faulty(bucket)
    a = machine(tmp_path / "a", bucket, fs.PyFileSystem(handler))
    for number in range(500):
        write(a.local / "k" / str(number), "x")
    asked: list[object] = []

    def away(stream: Any) -> Any:
        asked.append(stream)
        stream.close()
        raise OSError("away")

    handler.writing = away
    with pytest.raises(StageError, match="away"):
        a.push()
    assert len(asked) < 3 * 500


def test_a_full_disk_is_told_as_the_mirrors(tmp_path: Path, bucket: Path) -> None:
    write(bucket / "k/x", "x")
    write(tmp_path / "b/k", "a file where a folder belongs")
    with pytest.raises(StageError, match=r"can't be written .*set FACULTY_CACHE"):
        machine(tmp_path / "b", bucket).ensure("k/x")


PROCESS = """
import sys
from pathlib import Path
from pyarrow import fs
from pipeline.data.mirror import Mirror
store = fs.SubTreeFileSystem(sys.argv[2], fs.LocalFileSystem())
mirror = Mirror("s3://bucket/run", Path(sys.argv[1]), store)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(2):
    for number in range(10):
        path = mirror.ensure(f"k/{number}", newest=True)
        assert path.read_bytes() == bytes([number]) * (100_000 + number), number
print("whole", flush=True)
"""


def test_two_processes_fetch_the_same_files_at_once(tmp_path: Path, bucket: Path) -> None:
    (bucket / "k").mkdir()
    for number in range(10):
        (bucket / "k" / str(number)).write_bytes(bytes([number]) * (100_000 + number))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "node"), str(bucket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["whole\n"] * 2
    assert sorted(path.name for path in (tmp_path / "node/k").iterdir()) == sorted(map(str, range(10)))


# A path that says by itself what it mirrors


@pytest.fixture
def known(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's mirror of the URI."""
    monkeypatch.setenv("FACULTY_CACHE", str(tmp_path / "cache"))
    local = local_place(URI)
    monkeypatch.setitem(Mirror._known, (URI, local), machine(local, bucket))
    return local


def test_a_path_of_another_machine_is_found_here(known: Path, bucket: Path) -> None:
    write(bucket / "spoken/x/spoken.bin", "said")
    elsewhere = Path("/home/somebody/.cache/faculty") / known.relative_to(cache_folder()) / "spoken/x/spoken.bin"
    assert own(elsewhere) == known / "spoken/x/spoken.bin"
    assert here(elsewhere).read_text() == "said"
    assert here(str(elsewhere)) == known / "spoken/x/spoken.bin"
    assert names_in(elsewhere.parent) == {"spoken.bin"}
    write(known / "spoken/x/rows-0-4", "rows")
    share(elsewhere.with_name("rows-0-4"))
    assert files(bucket)["spoken/x/rows-0-4"] == "rows"
    assert [path.read_text() for path in here_all([elsewhere, elsewhere.with_name("rows-0-4")])] == ["said", "rows"]
    forget(elsewhere.with_name("rows-0-4"))
    assert set(files(bucket)) == set(files(known)) == {"spoken/x/spoken.bin"}


def test_paths_that_mirror_nothing_are_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "k/x", "x")
    assert here(path) == path and here(str(path)) == path
    assert here_all([path]) == [path]
    assert names_in(path.parent) == {"x"} and names_in(tmp_path / "none") == set()
    share(path, path.parent)
    forget(path)
    assert not path.exists()


@pytest.mark.parametrize("uri", [URI, "gs://b/a=b/ä ö", "s3://b/x?endpoint_override=127.0.0.1:9000&scheme=http"])
def test_a_mirrors_name_tells_its_uri(uri: str) -> None:
    local = local_place(uri)
    assert origin_of(local) == (uri, "")
    assert origin_of(local / "a" / "b.c") == (uri, "a/b.c")
    assert local_place(local) == local
    assert not set(local.name) & set("?#%/: ")


def test_other_paths_have_no_origin(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "mirrors" / "x") is None
    assert origin_of("s3://bucket/run") is None


def test_places_are_tidied_and_those_that_are_none_told() -> None:
    assert tidy("file:///shared/my%20run") == "/shared/my run"
    assert tidy("s3://bucket/run/") == URI
    assert tidy("runs/x") == "runs/x"
    assert is_remote(URI) and not is_remote("file:///x") and not is_remote("/x")
    for place, why in (
        ("s4://bucket/x", "no store that is known"),
        ("s3:///x", "names no bucket"),
        ("s3://key:secret@bucket/x", "holds a credential"),
        ("file://host/x", "names the machine host"),
        (f"s3://bucket/{'x/' * 60}", "too long"),
    ):
        with pytest.raises(ValueError, match=why) as caught:
            tidy(place)
        assert "secret" not in str(caught.value)


def test_names_are_joined_before_the_options() -> None:
    assert join("s3://b/run?region=eu", "ray", "x") == "s3://b/run/ray/x?region=eu"
    assert join("/a/b/", "c") == "/a/b/c"


# Who works in it


def holder(bucket: Path) -> dict[str, Any]:
    return json.loads((bucket / NAME).read_text())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    from pipeline.data import claim as module

    monkeypatch.setattr(module, "_SETTLE_S", 0.0)
    yield {"beat": 0.1, "patience": 1.0}


def test_a_second_driver_is_told_who_holds_the_folder(tmp_path: Path, bucket: Path, quick: dict[str, float]) -> None:
    a, b = machine(tmp_path / "a", bucket), machine(tmp_path / "b", bucket)
    with claim(a, **quick):
        said: list[str] = []
        with pytest.raises(UserError, match=rf"in use by .*process {os.getpid()}\) since .*choose another run_dir"):
            with claim(b, notice=said.append, **quick):
                pytest.fail("the block must not be entered")
        assert holder(bucket)["beats"] >= 2
        assert "looking for a sign of life" in said[0] and len(said) == 1
    assert not (bucket / NAME).exists()
    with claim(b, **quick):
        assert holder(bucket)["beats"] == 1


def test_a_driver_that_was_killed_is_taken_over_from(tmp_path: Path, bucket: Path, quick: dict[str, float]) -> None:
    code = f"""
import os, sys
from pathlib import Path
from pyarrow import fs
from pipeline.data.claim import claim
from pipeline.data.mirror import Mirror
mirror = Mirror("{URI}", Path("{tmp_path}/c"), fs.SubTreeFileSystem("{bucket}", fs.LocalFileSystem()))
with claim(mirror):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    dead, said = holder(bucket)["pid"], list[str]()
    began = time.monotonic()
    with claim(machine(tmp_path / "b", bucket), notice=said.append, beat=10.0, patience=600.0):
        assert holder(bucket)["pid"] == os.getpid() != dead
    assert time.monotonic() - began < 300  # a process of this machine need not be waited for
    assert len(said) == 1 and "taken over" in said[0] and str(dead) in said[0]


def test_a_silent_driver_elsewhere_is_waited_for_and_finds_out(
    tmp_path: Path, bucket: Path, quick: dict[str, float]
) -> None:
    a, b = machine(tmp_path / "a", bucket), machine(tmp_path / "b", bucket)
    (tmp_path / "a").mkdir()
    said: list[str] = []
    with claim(a, beat=600.0, patience=0.0):  # beats too seldom
        elsewhere = holder(bucket) | {"machine": "another"}
        (bucket / NAME).write_text(json.dumps(elsewhere))
        with claim(b, notice=said.append, **quick):
            assert [("left by" in one, "taken over" in one) for one in said] == [(True, False), (False, True)]
            write(a.local / "k/x", "late")
            with pytest.raises(StageError, match="was taken over by"):
                a.push()
            write(b.local / "k/x", "mine")
            b.push()
    assert files(bucket) == {"k/x": "mine"}


def test_of_two_that_come_at_once_one_goes(tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import claim as module

    monkeypatch.setattr(module, "_SETTLE_S", 0.3)
    both, came, refused = threading.Barrier(2), list[str](), list[str]()
    release = threading.Event()

    def drive(name: str) -> None:
        mirror = machine(tmp_path / name, bucket)
        both.wait()
        try:
            with claim(mirror, beat=0.1, patience=1.0):
                came.append(name)
                release.wait(20)
        except UserError:
            refused.append(name)
            release.set()

    threads = [threading.Thread(target=drive, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(came) == len(refused) == 1
