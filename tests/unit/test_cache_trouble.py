"""The cache of teacher outputs when files are damaged, the disk is full, or entries are evicted."""

import errno
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import entry as entry_module
from pipeline.cache import shard as shard_module
from pipeline.cache import store as store_module
from pipeline.cache.store import CacheError, Entry, OutputStore
from pipeline.errors import FacultyError
from tests.unit.test_cache_store import assert_reads, files, fill, ids_of, key, outputs


@pytest.fixture
def entry(tmp_path) -> Entry:
    return OutputStore(tmp_path / "cache").entry(key())


# Damage


@pytest.mark.parametrize("lost", [slice(0, None), slice(100, None), slice(-1, None), None])
def test_a_shard_that_was_cut_off_is_computed_again(entry, lost):
    whole, cut = fill(entry, range(5), range(5, 10))
    content = (entry.path / cut).read_bytes()
    if lost is None:  # from the middle of the values, which Arrow does not notice
        start = content.index(outputs(range(5, 10))["map"].numpy().tobytes())
        lost = slice(start, start + 64)
    (entry.path / cut).write_bytes(content.replace(content[lost], b"", 1))
    fresh = Entry(entry.path)
    for one in (entry, fresh):  # also that which had it open
        assert one.missing(ids_of(range(10))).tolist() == [5, 6, 7, 8, 9]
    assert_reads(fresh, range(5))
    fill(fresh, [11])
    assert not (entry.path / cut).exists() and (entry.path / whole).exists()
    assert fill(fresh, range(5, 10)) == [cut]
    assert_reads(entry, range(10))


def test_verify_finds_every_flipped_bit(entry):
    good, bad = fill(entry, range(5), range(5, 10))
    path = entry.path / bad
    content = path.read_bytes()
    # Arrow writes the metadata twice, and reads what is at the end.
    places = {
        "id": content.index(ids_of([7])[0].tobytes()),
        "logits": content.index(outputs(range(5, 10))["logits"].numpy().tobytes()) + 33,
        "map": content.index(outputs(range(5, 10))["map"].numpy().tobytes()) + 50,
        "metadata": content.rindex(b'"checksum"') + 30,
        "dtype": content.rindex(b'"float16"') + 7,
        "magic": len(content) - 2,
    }
    for what, place in places.items():
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert entry.verify() == [bad], what
        assert files(entry) == sorted([good, "used"])
        assert entry.missing(ids_of(range(10))).tolist() == [5, 6, 7, 8, 9]
        assert fill(entry, range(5, 10)) == [bad]
        assert entry.verify() == []
        assert_reads(entry, range(10))


def test_no_flipped_bit_of_a_whole_file_raises_or_changes_what_was_verified(entry):
    (name,) = fill(entry, range(3))
    path = entry.path / name
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(content), 300).tolist():
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << int(random.integers(8)))]) + content[place + 1 :]
        )
        fresh = Entry(entry.path)
        if fresh.verify():
            assert fresh.missing(ids_of(range(3))).tolist() == [0, 1, 2]
        else:  # padding, or a part that Arrow has twice
            assert_reads(fresh, range(3))


def test_an_entry_that_is_open_reads_what_another_process_repaired(entry):
    (name,) = fill(entry, range(5))
    path = entry.path / name
    content = path.read_bytes()
    place = content.index(outputs(range(5))["map"].numpy().tobytes())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    fresh = Entry(entry.path)
    assert fresh.reader(ids_of(range(5))).gather("map", torch.tensor([0]))[0, 0, 0] != 0  # no read looks for it
    assert Entry(entry.path).verify() == [name]
    assert fill(Entry(entry.path), range(5)) == [name]
    assert_reads(fresh, range(5))


def test_a_shard_under_a_name_that_is_not_its_own_is_not_read(entry):
    (name,) = fill(entry, range(3))
    os.rename(entry.path / name, entry.path / ("0" * 32 + name[32:]))
    assert entry.missing(ids_of(range(3))).tolist() == [0, 1, 2]
    assert len(entry.verify()) == 1


def test_names_tell_what_is_in_a_shard(tmp_path):
    variants = [
        {"x": torch.zeros(2, 4)},
        {"x": torch.zeros(2, 2, 2)},
        {"x": torch.zeros(2, 4, dtype=torch.int32)},
        {"y": torch.zeros(2, 4)},
        {"x": torch.ones(2, 4)},
    ]
    store = OutputStore(tmp_path)
    names = [store.entry(key(number)).put(ids_of(range(2)), tensors) for number, tensors in enumerate(variants)]
    names += [
        store.entry(key("ids")).put(ids_of(range(1, 3)), variants[0]),
        store.entry(key("about")).put(ids_of(range(2)), variants[0], {"teacher": "A"}),
    ]
    assert len({name[:32] for name in names}) == len(names)


def test_a_shard_of_another_format_version_is_not_read(entry, monkeypatch):
    monkeypatch.setattr(shard_module, "FORMAT_VERSION", 0)
    fill(entry, range(3))
    monkeypatch.undo()
    assert Entry(entry.path).missing(ids_of(range(3))).tolist() == [0, 1, 2]


def test_other_files_in_the_folder_do_not_matter(entry):
    fill(entry, range(3))
    (entry.path / "notes.txt").write_text("mine")
    (entry.path / "other.arrow").write_text("mine")
    assert entry.verify() == []
    assert_reads(entry, range(3))
    assert (entry.path / "notes.txt").exists()


# No space, no permission


def nearly_full(error: CacheError, entry: Entry) -> None:
    message = str(error)
    assert message.startswith(f"{entry.path}: the disk is full; ") and "\n" not in message
    assert "cache.path" in message and "cache.quota_gb" in message
    assert isinstance(error, FacultyError)
    assert not list(entry.path.glob(".writing-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk(entry, monkeypatch, where, code):
    fill(entry, range(3))

    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    if where == "write":
        monkeypatch.setattr(shard_module.pa.ipc, "new_file", full)
    elif where == "fsync":
        monkeypatch.setattr(shard_module.os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CacheError) as caught:
        fill(entry, range(3, 6))
    nearly_full(caught.value, entry)
    monkeypatch.undo()
    assert len(files(entry)) == 2
    assert_reads(entry, range(3))
    fill(entry, range(3, 6))
    assert_reads(entry, range(6))


@pytest.fixture
def small_files():
    """The system refuses to write more than 64 KiB to a file, in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("columns", [1, 4])
def test_a_write_that_is_really_refused(tmp_path, small_files, columns):
    entry = OutputStore(tmp_path).entry(key())

    def put(first, stop):
        entry.put(ids_of(range(first, stop)), {f"x{n}": torch.zeros(stop - first, 1000) for n in range(columns)})

    put(0, 2)
    with pytest.raises(CacheError, match=r"cache\.path"):
        put(2, 30)
    assert len(files(entry)) == 2
    assert entry.verify() == []
    assert entry.missing(ids_of(range(30))).tolist() == list(range(2, 30))
    assert entry.reader(ids_of(range(2))).gather("x0", torch.arange(2)).sum() == 0


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match=r"can't be read \(Not a directory\).* `cache.path`"):
        fill(OutputStore(tmp_path / "cache").entry(key()), range(3))


def test_a_disk_that_may_not_be_written(entry, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(shard_module.os, "fsync", refuse)
    with pytest.raises(CacheError, match=r"can't be written \(Read-only file system\); set another `cache.path`"):
        fill(entry, range(3))
    assert files(entry) == ["used"]


def test_a_folder_that_may_only_be_read_serves(entry, monkeypatch):
    fill(entry, range(3))
    used(entry, 3600)

    def refuse(self):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    assert_reads(OutputStore(entry.path.parent).entry(key()), range(3))


def test_a_folder_that_may_not_be_read(entry, monkeypatch):
    fill(entry, range(3))

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(entry_module, "open_shard", refuse)
    fresh = Entry(entry.path)
    for act in (lambda: fresh.missing(ids_of([0])), fresh.verify):
        with pytest.raises(CacheError, match=r"can't be read \(Permission denied\)"):
            act()
    monkeypatch.undo()
    assert_reads(fresh, range(3))  # what can't be read is not taken for damaged


# Eviction


def used(entry: Entry, seconds_ago: float) -> None:
    os.utime(entry.path / "used", (time.time() - seconds_ago,) * 2)


@pytest.fixture
def aged(tmp_path) -> tuple[OutputStore, list[Entry]]:
    """Four entries of one size, used 4, 3, 2 and 1 hours ago."""
    store = OutputStore(tmp_path / "cache")
    entries = [store.entry(key(number)) for number in range(4)]
    for number, entry in enumerate(entries):
        fill(entry, range(8))
        used(entry, 3600 * (4 - number))
    return store, entries


def test_size_is_that_of_all_files(aged):
    store, entries = aged
    assert store.size() == sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) > 0
    assert OutputStore(store.root / "nowhere").size() == 0
    (store.root / "mine.bin").write_bytes(b"x" * 1000)
    assert store.size() == 4 * sum(path.stat().st_size for path in entries[0].path.iterdir())


def test_the_least_recently_used_go_first(aged):
    store, entries = aged
    size = store.size()
    assert OutputStore(store.root).evict() == []
    assert OutputStore(store.root, size).evict() == []
    assert OutputStore(store.root, size - 1).evict() == [key(0)]
    assert OutputStore(store.root, size // 4).evict() == [key(1), key(2)]
    assert sorted(path.name for path in store.root.iterdir()) == [key(3)]
    assert OutputStore(store.root, 0).evict() == [key(3)]
    assert store.size() == 0 and not list(store.root.iterdir())
    assert OutputStore(store.root / "nowhere", 0).evict() == []
    assert entries[0].missing(ids_of(range(8))).tolist() == list(range(8))


def test_what_is_kept_stays(aged):
    store, _ = aged
    assert OutputStore(store.root, 0).evict([key(0), key(2)]) == [key(1), key(3)]


def test_what_was_just_used_stays(aged):
    store, entries = aged
    small = OutputStore(store.root, 0)
    Entry(entries[0].path).missing(ids_of([0]))  # by someone else
    used(entries[1], 500)
    assert small.evict(grace_seconds=600) == [key(2), key(3)]
    assert small.evict(grace_seconds=400) == [key(1)]
    assert small.evict() == []
    used(entries[0], -3600)  # another machine's clock is ahead
    assert small.evict() == []
    assert small.evict(grace_seconds=-7200) == [key(0)]


def test_an_entry_that_was_just_begun_stays(tmp_path):
    store = OutputStore(tmp_path, 0)
    (tmp_path / key()).mkdir()
    (tmp_path / key() / "something").write_text("x")
    assert store.evict() == []
    assert store.evict(grace_seconds=0) == [key()]


@pytest.mark.parametrize("act", ["open", "missing", "reader", "put", "gather"])
def test_use_is_marked_once_a_minute(aged, monkeypatch, act):
    store, entries = aged
    mark, ids = entries[0].path / "used", ids_of(range(8))
    reader = entries[0].reader(ids)
    acts = {
        "open": lambda: store.entry(key(0)),
        "missing": lambda: Entry(entries[0].path).missing(ids),
        "reader": lambda: Entry(entries[0].path).reader(ids),
        "put": lambda: fill(Entry(entries[0].path), range(8)),
        "gather": lambda: reader.gather("rest", torch.arange(2)),
    }
    used(entries[0], 3000)
    clock = time.monotonic() + 100  # the reader marked it a moment ago, too
    monkeypatch.setattr(entry_module.time, "monotonic", lambda: clock)
    acts[act]()
    first = mark.stat().st_mtime_ns
    assert 0 <= time.time() - first / 1e9 < 60
    acts[act]()
    assert mark.stat().st_mtime_ns == first
    used(entries[0], 30)
    first = mark.stat().st_mtime_ns
    acts[act]()
    assert mark.stat().st_mtime_ns == first


def test_a_mark_of_a_clock_that_was_ahead_is_set_right(aged):
    store, entries = aged
    used(entries[0], -7200)
    store.entry(key(0))
    assert (entries[0].path / "used").stat().st_mtime < time.time() + 1


def test_opening_makes_nothing(tmp_path):
    entry = OutputStore(tmp_path / "cache").entry(key())
    assert entry.missing(ids_of([0])).tolist() == [0]
    assert entry.verify() == []
    assert not (tmp_path / "cache").exists()


def test_a_reader_goes_on_after_its_entry_was_evicted(aged):
    store, entries = aged
    fill(entries[0], range(8, 20))
    reader = entries[0].reader(ids_of(range(20)))
    used(entries[0], 3600)
    assert OutputStore(store.root, 0).evict([key(1), key(2), key(3)]) == [key(0)]
    assert not entries[0].path.exists()
    for name, values in outputs(range(20)).items():
        assert torch.equal(reader.gather(name, torch.arange(20)), values)
    assert not entries[0].path.exists()  # reading brings no empty entry back
    fill(entries[0], range(3))
    assert_reads(entries[0], range(3))
    assert entries[0].missing(ids_of(range(5))).tolist() == [3, 4]


def test_a_writer_whose_entry_is_evicted_meanwhile_writes_again(aged, monkeypatch):
    store, entries = aged
    real, evictions = os.fsync, []

    def evict_once(descriptor):
        if not evictions:
            used(entries[0], 3600)
            evictions.extend(OutputStore(store.root, 0).evict([key(1), key(2), key(3)]))
        real(descriptor)

    monkeypatch.setattr(shard_module.os, "fsync", evict_once)
    fill(entries[0], range(20, 25))
    assert evictions == [key(0)]
    assert_reads(entries[0], range(20, 25))
    assert len(files(entries[0])) == 2 and not list(store.root.glob(".*"))


def test_an_entry_that_is_deleted_again_and_again(entry, monkeypatch):
    def vanish(*_):
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(entry_module, "write_shard", vanish)
    with pytest.raises(CacheError, match="deleted again and again"):
        fill(entry, range(2))


def test_what_someone_else_evicts_at_once_counts_as_gone(aged, monkeypatch):
    store, entries = aged
    size = store.size()
    real = Path.rename

    def race(self, target):
        if self.name == key(0):
            real(self, self.with_name("elsewhere"))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", race)
    assert OutputStore(store.root, size * 3 // 4).evict() == []
    assert entries[1].path.exists()


def test_the_rest_of_an_eviction_that_was_cut_off_goes(aged, monkeypatch):
    store, _ = aged
    monkeypatch.setattr(store_module.shutil, "rmtree", lambda *_, **__: None)
    assert OutputStore(store.root, store.size() - 1).evict() == [key(0)]
    assert len(list(store.root.glob(".evicted-*"))) == 1
    monkeypatch.undo()
    assert OutputStore(store.root, store.size()).evict() == []
    assert not list(store.root.glob(".*"))


def test_folders_that_are_no_entries_are_never_deleted(aged):
    store, _ = aged
    for name in ("images", ".evicted-mine", key(9)[:40]):
        (store.root / name).mkdir()
        (store.root / name / "used").write_text("mine")
        os.utime(store.root / name / "used", (0, 0))
    assert len(OutputStore(store.root, 0).evict()) == 4
    assert len(list(store.root.iterdir())) == 3
