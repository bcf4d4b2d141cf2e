"""The cache of teacher outputs on real files: what is read is what was written, whatever happened in between."""

import hashlib
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import shard as shard_module
from pipeline.cache import store as store_module
from pipeline.cache.reader import Index
from pipeline.cache.spec import CacheSpec
from pipeline.cache.store import CacheError, Entry, MissingOutputError, OutputStore, compact, output_key
from pipeline.errors import ConfigError, FacultyError
from pipeline.strict import validate

PARTS = {"teacher": "t", "view": "clean", "taps": ("a", "b"), "autocast": "bf16", "precision": "fp16", "top_k": None}


def key(name: object = 0) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def ids_of(numbers) -> np.ndarray:
    """Ids as the image table has them: hashes, here of numbers."""
    content = b"".join(hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in numbers)
    return np.frombuffer(content, np.uint8).reshape(-1, 16)


def outputs(numbers, dtype=torch.float16) -> dict[str, torch.Tensor]:
    """Values that tell which image they are of."""
    n = torch.tensor(list(numbers), dtype=torch.float64)
    return {
        "logits": (n[:, None] + torch.arange(10) / 16).to(dtype),
        "map": (n[:, None, None] / 8 + torch.arange(6).reshape(2, 3)).float(),
        "rest": n.float(),
        "indices": (n[:, None] + torch.arange(3)).short(),
    }


@pytest.fixture
def entry(tmp_path) -> Entry:
    return OutputStore(tmp_path / "cache").entry(key())


def fill(entry: Entry, *parts) -> list[str]:
    return [entry.put(ids_of(part), outputs(part)) for part in parts]


def assert_reads(entry: Entry, numbers, rows=None) -> None:
    numbers = list(numbers)
    reader = entry.reader(ids_of(numbers))
    rows = torch.arange(len(numbers)) if rows is None else rows
    expected = outputs([numbers[row] for row in rows.tolist()])
    assert reader.names == tuple(sorted(expected))
    for name, values in expected.items():
        found = reader.gather(name, rows)
        assert found.dtype == values.dtype == reader.dtype(name)
        assert reader.shape(name) == values.shape[1:]
        assert torch.equal(found, values)


def files(entry: Entry) -> list[str]:
    return sorted(path.name for path in entry.path.iterdir())


# What is written and read


def test_what_was_put_is_read(entry):
    (name,) = fill(entry, range(50))
    assert re.fullmatch(r"[0-9a-f]{32}-[0-9]+\.arrow", name)
    assert int(name.split("-")[1].removesuffix(".arrow")) == (entry.path / name).stat().st_size
    assert files(entry) == [name, "used"]
    assert_reads(entry, range(50))
    assert_reads(entry, range(50), torch.tensor([49, 0, 7, 7, 7]))
    assert_reads(entry, reversed(range(50)))
    assert_reads(entry, [3, 3, 9])
    assert_reads(entry, range(50), torch.tensor([], dtype=torch.int64))


def test_ids_over_several_shards_in_any_order_and_repeated(entry):
    fill(entry, range(20), range(20, 21), range(30, 64), range(15, 35))
    numbers = [*torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist(), 5, 5, 63, 0]
    assert_reads(entry, numbers)
    assert_reads(entry, numbers, torch.tensor([67, 0, 3, 3, 66]))
    assert_reads(entry, numbers, torch.tensor([2]))
    assert len(entry.reader(ids_of(numbers))) == 68


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=5), st.data())
def test_any_shards_and_any_rows(tmp_path_factory, parts, data):
    entry = OutputStore(tmp_path_factory.mktemp("cache")).entry(key())
    fill(entry, *parts)
    stored = sorted({number for part in parts for number in part})
    numbers = data.draw(st.lists(st.sampled_from(stored), min_size=1, max_size=20))
    rows = data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=20))
    assert_reads(entry, numbers, torch.tensor(rows, dtype=torch.int64))
    absent = [number for number in range(31) if number not in stored]
    assert entry.missing(ids_of(range(31))).tolist() == absent


@pytest.mark.parametrize("dtype", sorted(shard_module._DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_every_dtype_and_shape(entry, dtype, shape):
    values = (torch.arange(60).reshape(5, 12)[:, : int(np.prod(shape))].reshape(5, *shape) % 2).to(
        shard_module._DTYPES[dtype]
    )
    entry.put(ids_of(range(3)), {"x": values[:3]})
    entry.put(ids_of(range(3, 5)), {"x": values[3:]})
    for numbers in (range(3), range(5)):
        found = entry.reader(ids_of(numbers)).gather("x", torch.arange(len(numbers)))
        assert found.dtype == values.dtype and torch.equal(found, values[: len(numbers)])


def test_tensors_that_are_not_contiguous_or_need_a_gradient(entry):
    values = torch.randn(4, 6, requires_grad=True)
    entry.put(ids_of(range(6)), {"x": values.t()})
    assert torch.equal(entry.reader(ids_of(range(6))).gather("x", torch.arange(6)), values.detach().t())


def test_ids_need_not_be_contiguous(entry):
    ids = ids_of(range(10))[::2]
    entry.put(ids, {"x": torch.arange(5)})
    assert entry.reader(ids[::-1]).gather("x", torch.tensor([0, 4])).tolist() == [4, 0]


def test_what_was_gathered_is_a_copy(entry):
    fill(entry, range(5))
    reader = entry.reader(ids_of(range(5)))
    reader.gather("rest", torch.arange(5)).zero_()
    assert reader.gather("rest", torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_of_an_id_in_two_shards_every_process_reads_the_same_one(entry):
    names = {entry.put(ids_of(range(4)), {"x": torch.full((4,), float(value))}): value for value in (1, 2, 3)}
    first = names[min(names)]
    assert entry.reader(ids_of(range(4))).gather("x", torch.arange(4)).tolist() == [first] * 4


def test_missing_names_positions(entry):
    assert entry.missing(ids_of(range(3))).tolist() == [0, 1, 2]
    fill(entry, [1, 2])
    found = entry.missing(ids_of([0, 1, 0, 2, 7]))
    assert found.dtype == np.int64 and found.tolist() == [0, 2, 4]
    assert entry.missing(ids_of([])).tolist() == []


def test_a_reader_without_an_output_says_which(entry):
    fill(entry, range(3))
    ids = ids_of([0, 8, 9])
    with pytest.raises(MissingOutputError) as caught:
        entry.reader(ids)
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, FacultyError)
    assert str(caught.value).startswith(f"{entry.path}: 2 of 3 images have no stored output, the first is ")
    assert ids[1].tobytes().hex() in str(caught.value)


def test_what_another_process_put_is_found_by_an_entry_that_is_open(entry):
    other = Entry(entry.path)
    fill(entry, range(3))
    assert other.missing(ids_of(range(6))).tolist() == [3, 4, 5]
    fill(entry, range(3, 6))
    assert_reads(other, range(6))


def test_the_texts_that_go_with_it(entry):
    first = entry.put(ids_of(range(2)), {"x": torch.arange(2)}, {"teacher": "A", "device": "cpu"})
    second = entry.put(ids_of(range(2, 4)), {"x": torch.arange(2)}, {"teacher": "A", "device": "cuda", "more": "1"})
    device = "cpu" if first < second else "cuda"
    assert entry.reader(ids_of(range(4))).about() == {"teacher": "A", "device": device, "more": "1"}
    assert entry.reader(ids_of(range(2))).about() == {"teacher": "A", "device": "cpu"}


def test_without_ids_there_are_still_names_and_shapes(entry):
    fill(entry, range(3))
    reader = entry.reader(ids_of([]))
    assert reader.shape("map") == (2, 3)
    assert reader.gather("map", torch.tensor([], dtype=torch.int64)).shape == (0, 2, 3)


def test_pickles_are_small_and_work(entry):
    fill(entry, range(40))
    reader = entry.reader(ids_of(range(10)))
    content = pickle.dumps(reader)
    assert len(content) < 1500
    assert torch.equal(pickle.loads(content).gather("rest", torch.arange(10)), torch.arange(10.0))
    assert_reads(pickle.loads(pickle.dumps(entry)), range(40))


def test_precisions_that_differ_between_shards_are_read_as_the_wider(entry):
    entry.put(ids_of(range(3)), {"x": compact(torch.full((3, 2), 0.5), "fp16")})
    entry.put(ids_of(range(3, 6)), {"x": compact(torch.full((3, 2), 1e5), "fp16")})
    reader = entry.reader(ids_of([5, 0, 4, 1]))
    assert reader.dtype("x") == torch.float32
    found = reader.gather("x", torch.tensor([1, 0, 0, 3]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[0.5, 0.5], [1e5, 1e5], [1e5, 1e5], [0.5, 0.5]]
    assert reader.gather("x", torch.tensor([], dtype=torch.int64)).shape == (0, 2)
    assert entry.reader(ids_of(range(3))).dtype("x") == torch.float16


def test_half_precision_where_it_holds_the_values():
    for largest, dtype in [(1.0, torch.float16), (6e4, torch.float16), (7e4, torch.float32), (1e-3, torch.float32)]:
        assert compact(torch.tensor([0.0, -largest]), "fp16").dtype == dtype
        assert compact(torch.tensor([0.0, -largest]), "fp32").dtype == torch.float32
    for value in (float("nan"), float("inf"), -float("inf")):
        assert compact(torch.tensor([1.0, value]), "fp16").dtype == torch.float32
    assert compact(torch.tensor([1, 2], dtype=torch.int16), "fp16").dtype == torch.int16
    assert compact(torch.empty(0), "fp16").shape == (0,)
    assert compact(torch.ones(2, dtype=torch.bfloat16), "fp16").dtype == torch.float16


def test_ids_that_share_a_key_are_told_apart():
    words = np.zeros((300, 2), np.uint64)
    # a + b · odd is the same for all of them.
    words[:, 1] = np.arange(300)
    odd = np.uint64(0x9E3779B97F4A7C15)
    words[:, 0] = np.uint64(0) - words[:, 1] * odd
    ids = words.view(np.uint8).reshape(-1, 16)
    order = np.random.default_rng(0).permutation(300)
    assert np.array_equal(Index(ids[:200]).find(ids[order]), np.where(order < 200, order, -1))
    assert np.array_equal(Index(np.concatenate([ids[5:], ids])).find(ids[5:]), np.arange(295))
    assert Index(ids[:0]).find(ids[:2]).tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["counting", "hashed"])
def test_lookup_against_a_dictionary(name):
    count = 20_000
    if name == "hashed":
        ids = np.random.default_rng(0).integers(0, 256, (count, 16), dtype=np.uint8)
    else:  # in the last bytes, as a counter would be written
        ids = np.zeros((count, 2), ">u8")
        ids[:, 1] = np.arange(count) // 2
        ids = ids.view(np.uint8).reshape(-1, 16)
    known = {}
    for row, one in enumerate(ids[: count // 2]):
        known.setdefault(one.tobytes(), row)
    expected = [known.get(one.tobytes(), -1) for one in ids]
    assert Index(ids[: count // 2]).find(ids).tolist() == expected


def test_bad_arguments(entry):
    ids, x = ids_of(range(2)), torch.arange(2)
    for bad in (ids.astype(np.int64), ids[:, :8], ids[0], [b"x" * 16]):
        with pytest.raises(ValueError, match=r"ids must be an \(n, 16\) uint8 array"):
            entry.put(bad, {"x": x})
    for tensors in ({"id": x}, {"": x}, {"x": x[:1]}, {"x": torch.tensor(1)}, {"x": torch.empty(2, 0)}, {}):
        with pytest.raises(ValueError, match=r"name that a stored|must have shape|at least one image"):
            entry.put(ids, tensors)
    with pytest.raises(ValueError, match=r"must have one of the dtypes .* got torch.complex64"):
        entry.put(ids, {"x": x.to(torch.complex64)})
    with pytest.raises(ValueError, match="at least one image"):
        entry.put(ids[:0], {"x": x[:0]})
    assert not entry.path.exists()
    entry.put(ids, {"x": x})
    with pytest.raises(ValueError, match="as in the entry's other shards"):
        entry.put(ids, {"x": x[:, None]})
    reader = entry.reader(ids)
    with pytest.raises(KeyError, match="no tensor 'y' is stored; there is x"):
        reader.gather("y", torch.arange(2))
    for rows in ([2], [-1]):
        with pytest.raises(IndexError, match=r"rows must be in \[0, 2\)"):
            reader.gather("x", torch.tensor(rows))
    for rows in (torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([True])):
        with pytest.raises(IndexError, match="vector of integers"):
            reader.gather("x", rows)
    for bad in ("", "a/b", "..", "A" * 64, key()[:-1], key() + "\n"):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            OutputStore(entry.path.parent).entry(bad)
    with pytest.raises(ValueError, match="quota_bytes"):
        OutputStore(entry.path.parent, -1)


def test_shards_with_other_tensors_are_not_read_together(entry, monkeypatch):
    monkeypatch.setattr(Entry, "_shards", lambda self: {})  # as for two writers at once
    entry.put(ids_of([0]), {"x": torch.zeros(1)})
    entry.put(ids_of([1]), {"y": torch.zeros(1)})
    monkeypatch.undo()
    with pytest.raises(CacheError, match="do not hold the same tensors; delete the folder"):
        entry.reader(ids_of([0, 1]))


# Memory


def test_ten_rows_of_a_large_entry_do_not_bring_in_the_file(entry):
    count, width = 1024, 1 << 15
    values = torch.randint(-9, 9, (count, width), dtype=torch.int16)
    ids = ids_of(range(count))
    name = entry.put(ids, {"x": values})
    size = (entry.path / name).stat().st_size
    assert size > 64 << 20
    before = pa.total_allocated_bytes()
    reader = Entry(entry.path).reader(ids)
    assert torch.equal(reader.gather("x", torch.arange(500, 510)), values[500:510])
    assert pa.total_allocated_bytes() - before < 1 << 20  # a file that is read, not mapped, is in Arrow's pool
    assert not any(part.endswith(name) for part in open_files())  # the map needs no open file: thousands are no problem
    maps = Path("/proc/self/smaps")
    if maps.exists():
        resident = re.search(rf"{name}\n(?:.*\n)*?Rss:\s+(\d+) kB", maps.read_text())
        assert resident is not None and int(resident[1]) << 10 < size // 4


def open_files() -> list[str]:
    folder = Path("/proc/self/fd")
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        try:
            found.append(os.readlink(path))
        except OSError:
            continue
    return found


# Many processes


def writer(path: Path, parts: list[list[int]], barrier) -> None:
    entry = Entry(path)
    barrier.wait(timeout=120)
    for part in parts:
        fill(entry, part)


def test_two_processes_write_the_same_and_other_ids_at_once(entry):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    shared = [list(range(start, start + 5)) for start in range(0, 100, 5)]
    own = [
        [[*range(200 + 50 * which, 225 + 50 * which)], [*range(225 + 50 * which, 250 + 50 * which)]] for which in (0, 1)
    ]
    workers = [context.Process(target=writer, args=(entry.path, [*shared, *parts], barrier)) for parts in own]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=200)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(files(entry)) == 20 + 4 + 1  # the shared ones once, and the mark of use
    assert entry.verify() == []
    assert_reads(entry, [*range(100), *range(200, 300)])


def test_a_writer_that_is_killed_leaves_no_shard(entry):
    code = (
        "import os, sys, signal, numpy as np, torch\n"
        "from pathlib import Path\n"
        "from pipeline.cache.store import Entry\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Entry(Path(sys.argv[1])).put(np.zeros((2, 16), np.uint8), {'x': torch.zeros(2)})\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(entry.path)], capture_output=True, check=False)
    assert result.returncode == -9
    (left,) = entry.path.glob(".writing-*")
    assert entry.missing(np.zeros((2, 16), np.uint8)).tolist() == [0, 1]
    fill(entry, [1])
    assert left.exists()  # it could be of a writer at work
    os.utime(left, (time.time() - 7200,) * 2)
    fill(entry, [2])
    assert not left.exists()
    assert_reads(entry, [1, 2])


# Keys and settings


def test_a_key_is_the_same_for_the_same_parts():
    assert re.fullmatch("[0-9a-f]{64}", output_key(**PARTS))
    assert output_key(**PARTS) == output_key(**dict(reversed(PARTS.items())))
    assert output_key(**PARTS) == output_key(**{**PARTS, "taps": ["b", "a"]})


def test_a_key_changes_with_every_part(monkeypatch):
    changes = {
        "teacher": "u",
        "view": "3f2a",
        "taps": ("a",),
        "autocast": "none",
        "precision": "fp32",
        "top_k": 8,
    }
    assert changes.keys() == PARTS.keys()
    keys = {output_key(**PARTS)} | {output_key(**{**PARTS, name: value}) for name, value in changes.items()}
    keys |= {output_key(**{**PARTS, "taps": ("ab",)}), output_key(**{**PARTS, "taps": ("a,b",)})}
    monkeypatch.setattr(store_module, "FORMAT_VERSION", 99)
    keys.add(output_key(**PARTS))
    assert len(keys) == len(PARTS) + 4


def test_parts_that_say_nothing_are_refused():
    for name in ("teacher", "view", "autocast", "precision"):
        with pytest.raises(ValueError, match=f"{name} must not be empty"):
            output_key(**{**PARTS, name: ""})
    with pytest.raises(ValueError, match="taps must be a sequence of names"):
        output_key(**{**PARTS, "taps": "layer4"})


def test_settings():
    spec = CacheSpec()
    assert (spec.path, spec.quota_gb, spec.precision, spec.top_k) == (None, 50, "fp16", None)
    assert CacheSpec(quota_gb=0.5).quota_bytes == 500_000_000
    for bad in ({"quota_gb": 0}, {"top_k": 0}, {"precision": "bf16"}, {"paht": "x"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            validate(CacheSpec, bad, where="run.yaml")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [("spec", {"torch", "numpy", "pyarrow", "ray", "mlflow"}), ("store, pipeline.cache.topk", {"ray", "mlflow"})],
)
def test_what_the_room_brings_along(modules, absent):
    code = f"import sys, pipeline.cache.{modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "pipeline" in loaded and not absent & loaded
