import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from pipeline.data import layout as layout_module
from pipeline.data.layout import FILE_NAME, Layout, fingerprint_of, fixed_binary, write_table
from pipeline.data.pixels import canonical, sample_id
from pipeline.data.spec import ImageSpec
from pipeline.data.splits import SPLITS, UNLABELLED
from pipeline.data.storage import fetch, local_copy
from pipeline.data.table import NO_LABEL, ImageTable
from pipeline.errors import DataError

CLASSES = ("cat", "dog")
SHAPE = (3, 4, 5)


def write(path: Path, count: int = 40, storage: str = "raw", seed: int = 0, classes=CLASSES, **changes) -> torch.Tensor:
    """Write a table of random images by hand; returns the images in its order."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    codes = changes.get("codes", np.sort(random.integers(0, len(SPLITS), count)).astype(np.int8))
    labels = np.where(codes == 1, UNLABELLED, random.integers(0, len(classes), count)).astype(np.int32)
    labels = changes.get("labels", labels)
    ids = np.frombuffer(b"".join(map(sample_id, images)), np.uint8).reshape(-1, 16)
    fingerprint = changes.get("fingerprint", fingerprint_of(classes, SHAPE, ids, labels, codes))
    spec = ImageSpec(size=SHAPE[1:], channels=3, storage=storage)

    def column(part: slice) -> pa.Array:
        if storage == "raw":
            return fixed_binary(images[part].reshape(len(images[part]), -1))
        return pa.array([canonical(one.transpose(1, 2, 0), spec, "").payload for one in images[part]], pa.binary())

    write_table(path, Layout(classes, SHAPE, storage, fingerprint), ids, labels, codes, column)
    return torch.from_numpy(images)


@pytest.fixture(params=["raw", "encoded"])
def storage(request) -> str:
    return request.param


@pytest.fixture(params=[7, 1000])
def batch_rows(request, monkeypatch) -> int:
    """Rows of a record batch: many batches, the last one shorter, or a single one."""
    monkeypatch.setattr(layout_module, "_BATCH_ROWS", request.param)
    return request.param


def test_what_was_written_is_read(tmp_path, storage, batch_rows):
    images = write(tmp_path / "t.arrow", storage=storage)
    table = ImageTable.open(tmp_path / "t.arrow")
    assert (table.classes, table.image_shape, table.storage, len(table)) == (CLASSES, SHAPE, storage, 40)
    everything = table.split(*SPLITS)
    assert torch.equal(everything.images(), images)
    assert everything.ids == [sample_id(image.numpy()).hex() for image in images]
    for name in SPLITS:
        part = table.split(name)
        rows = torch.tensor([everything.ids.index(one) for one in part.ids])
        assert torch.equal(part.images(), images[rows])
        assert part.labels.dtype == torch.int64
        assert torch.equal(part.labels, everything.labels[rows])
        assert bool((part.labels == -1).all()) is (name == "train_unlabelled")
    assert sum(len(table.split(name)) for name in SPLITS) == 40


def test_any_rows_in_any_order(tmp_path, storage, batch_rows):
    images = write(tmp_path / "t.arrow", storage=storage)
    split = ImageTable.open(tmp_path / "t.arrow").split(*SPLITS)
    for rows in (torch.randperm(40), torch.tensor([3, 3, 39, 0, 3]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(split.images(rows), images[rows])
        assert torch.equal(split.take(rows).images(), images[rows])
    assert torch.equal(split.images(slice(5, None, 3)), images[5::3])
    part = split.take(slice(10, 20)).take(torch.tensor([9, 0]))
    assert torch.equal(part.images(torch.tensor([0])), images[19:20])
    assert torch.equal(part.labels, split.labels[[19, 10]])
    for wrong in (torch.tensor([40]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0])):
        with pytest.raises(IndexError, match="rows must be"):
            split.images(wrong)


def test_what_is_read_is_a_copy(tmp_path):
    images = write(tmp_path / "t.arrow")
    split = ImageTable.open(tmp_path / "t.arrow").split(*SPLITS)
    split.images().zero_()
    split.labels.clone().zero_()
    assert torch.equal(split.images(), images)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 50), world_size=st.integers(1, 9))
def test_shards_partition_a_split(tmp_path_factory, count, world_size):
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "t.arrow", count=count)
    split = ImageTable.open(folder / "t.arrow").split(*SPLITS)
    shards = [split.shard(rank, world_size) for rank in range(world_size)]
    assert [one for shard in shards for one in shard.ids] == split.ids
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    with pytest.raises(ValueError, match="rank must be in"):
        split.shard(world_size, world_size)


def test_batches_cover_a_split_once(tmp_path, storage):
    images = write(tmp_path / "t.arrow", storage=storage)
    split = ImageTable.open(tmp_path / "t.arrow").split(*SPLITS)
    rows, parts = zip(*split.batches(16), strict=True)
    assert [len(part) for part in parts] == [16, 16, 8]
    assert torch.equal(torch.cat(rows), torch.arange(40))
    assert torch.equal(torch.cat(parts), images)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        next(split.batches(0))


def test_counts(tmp_path):
    codes = np.array([0, 0, 0, 1, 1, 4], np.int8)
    labels = np.array([0, 1, 1, -1, -1, 0], np.int32)
    write(tmp_path / "t.arrow", count=6, codes=codes, labels=labels)
    assert ImageTable.open(tmp_path / "t.arrow").counts() == {
        "train_labelled": {"cat": 1, "dog": 2},
        "train_unlabelled": {NO_LABEL: 2},
        "probe": {},
        "validation": {},
        "test": {"cat": 1},
    }


def test_tables_and_splits_pickle_as_their_path(tmp_path, storage):
    images = write(tmp_path / "t.arrow", count=2000, storage=storage)
    table = ImageTable.open(tmp_path / "t.arrow")
    content = pickle.dumps(table.split("test", "probe"))
    assert len(content) < 20_000 < images.nbytes
    again = pickle.loads(content)
    assert torch.equal(again.images(), table.split("test", "probe").images())
    assert pickle.loads(pickle.dumps(table)).fingerprint == table.fingerprint
    write(tmp_path / "t.arrow", seed=1)
    with pytest.raises(DataError, match="holds another image table than before"):
        pickle.loads(content)
    assert torch.equal(table.split(*SPLITS).images(), images)  # an open table still sees its own file


def test_a_raw_table_is_mapped_not_read(tmp_path):
    images = write(tmp_path / "t.arrow", count=50_000)
    before = pa.total_allocated_bytes()
    table = ImageTable.open(tmp_path / "t.arrow")
    assert len(table) == 50_000
    assert pa.total_allocated_bytes() - before < images.nbytes // 20
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "t.arrow") in maps.read_text()


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    base = {
        "classes": CLASSES,
        "shape": SHAPE,
        "ids": np.arange(48, dtype=np.uint8).reshape(3, 16),
        "labels": np.array([0, 1, -1], np.int32),
        "codes": np.array([0, 4, 1], np.int8),
    }
    changes = {
        "classes": ("cat", "fox"),
        "shape": (1, 4, 5),
        "ids": base["ids"] ^ np.eye(3, 16, dtype=np.uint8),
        "labels": np.array([0, 0, -1], np.int32),
        "codes": np.array([2, 4, 1], np.int8),
    }
    prints = {fingerprint_of(**(base | {name: value})) for name, value in changes.items()}
    assert len(prints | {fingerprint_of(**base)}) == 6
    (tmp_path / "elsewhere").mkdir()
    for path, kind in (("a.arrow", "raw"), ("elsewhere/b.arrow", "raw"), ("c.arrow", "encoded")):
        write(tmp_path / path, storage=kind)
    assert len({ImageTable.open(path).fingerprint for path in tmp_path.rglob("*.arrow")}) == 1


def test_a_folder_or_a_file_uri_will_do(tmp_path):
    write(tmp_path / FILE_NAME)
    expected = ImageTable.open(tmp_path / FILE_NAME).fingerprint
    assert ImageTable.open(tmp_path).fingerprint == expected
    assert ImageTable.open((tmp_path / FILE_NAME).as_uri()).fingerprint == expected


def test_a_remote_file_is_fetched_once_for_each_version(tmp_path):
    bucket, cache = tmp_path / "bucket", tmp_path / "cache"
    bucket.mkdir()
    write(bucket / FILE_NAME)
    remote = fs.SubTreeFileSystem(str(bucket), fs.LocalFileSystem())
    first = fetch(remote, FILE_NAME, "store://b/images.arrow", cache)
    assert first.read_bytes() == (bucket / FILE_NAME).read_bytes()
    inode = first.stat().st_ino
    assert fetch(remote, FILE_NAME, "store://b/images.arrow", cache).stat().st_ino == inode
    write(bucket / FILE_NAME, seed=1)
    second = fetch(remote, FILE_NAME, "store://b/images.arrow", cache)
    assert second != first and second.read_bytes() == (bucket / FILE_NAME).read_bytes()
    assert sorted(cache.iterdir()) == sorted([first, second])
    with pytest.raises(DataError, match="there is no such file"):
        fetch(remote, "nothing", "store://b/nothing", cache)
    with pytest.raises(DataError, match=r"nosuch://b/t: can't be reached"):
        local_copy("nosuch://b/t", cache=cache)


def test_a_table_of_another_format_version_says_what_to_do(tmp_path):
    path = tmp_path / "t.arrow"
    schema = pa.schema([("x", pa.int8())], metadata={b"faculty.image_table": json.dumps({"version": 99}).encode()})
    with pa.ipc.new_file(str(path), schema):
        pass
    message = r"t\.arrow: image table has format version 99, this release reads 1; write it anew with `faculty ingest`"
    with pytest.raises(DataError, match=message):
        ImageTable.open(path)


def test_files_that_are_no_whole_table(tmp_path):
    path = tmp_path / "t.arrow"
    with pytest.raises(DataError, match=r"t\.arrow: there is no such image table"):
        ImageTable.open(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"t\.arrow: image table is damaged"):
        ImageTable.open(path)
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"t\.arrow: image table is damaged"):
        ImageTable.open(path)
    with pa.ipc.new_file(str(path), pa.schema([("x", pa.int8())])):
        pass
    with pytest.raises(DataError, match="is not an image table of Faculty"):
        ImageTable.open(path)
    write(path, fingerprint="0" * 32)
    with pytest.raises(DataError, match="its rows do not match its fingerprint"):
        ImageTable.open(path)
    metadata = {"version": 1, "classes": CLASSES, "shape": SHAPE, "storage": "raw", "fingerprint": ""}
    schema = pa.schema([("x", pa.int8())], metadata={b"faculty.image_table": json.dumps(metadata).encode()})
    with pa.ipc.new_file(str(path), schema):
        pass
    with pytest.raises(DataError, match="its columns are not those"):
        ImageTable.open(path)


def test_a_damaged_image_of_an_encoded_table_is_told(tmp_path):
    path = tmp_path / "t.arrow"
    write(path, storage="encoded", codes=np.zeros(40, np.int8))
    content = bytearray(path.read_bytes())
    content[content.index(b"IHDR") + 4] ^= 0xFF  # the first image's width
    path.write_bytes(content)
    split = ImageTable.open(path).split("train_labelled")
    assert len(split.images(slice(1, None))) == 39
    with pytest.raises(DataError, match=r"t\.arrow: image table is damaged \(an image of it"):
        split.images()


def test_a_failed_write_leaves_the_former_table(tmp_path):
    path = tmp_path / "t.arrow"
    write(path)
    before = path.read_bytes()

    def fail(part: slice) -> pa.Array:
        raise RuntimeError("no more")

    ids = np.zeros((1, 16), np.uint8)
    with pytest.raises(RuntimeError, match="no more"):
        write_table(path, Layout(CLASSES, SHAPE, "raw", ""), ids, np.zeros(1, np.int32), np.zeros(1, np.int8), fail)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.arrow"]


def test_a_split_that_is_none(tmp_path):
    write(tmp_path / "t.arrow")
    table = ImageTable.open(tmp_path / "t.arrow")
    with pytest.raises(ValueError, match=r"split names must be of train_labelled, .*, got train"):
        table.split("test", "train")
    with pytest.raises(ValueError, match="got none"):
        table.split()
