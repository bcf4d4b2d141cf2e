"""Blocks of rows on an actor pool of one real Ray with two processors and a GPU that exists on paper."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.blocks import Block, Group, map_blocks
from pipeline.errors import UserError

pytestmark = pytest.mark.integration


class Teacher:
    """Counts how many of its kind a process holds."""

    alive = 0

    def __init__(self, scale):
        Teacher.alive += 1
        self.scale = scale

    def __del__(self):
        Teacher.alive -= 1

    def features(self, rows):
        return np.stack([rows * self.scale, np.sqrt(rows)], axis=1)


def load(payload):
    """Leave a mark for every load and every block, so that none happens twice unnoticed."""
    name, kind, scale, folder = payload
    if kind == "unknown":
        raise LookupError("no such teacher\nin the zoo")
    with (Path(folder) / f"loaded-{name}-{os.getpid()}").open("x"):
        pass
    teacher = Teacher(scale)

    def call(start, stop):
        if kind == "raise" and start == 8:
            raise KeyError("image 8\nis cut short")
        if kind == "die" and start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "die once" and start == 4 and not (Path(folder) / f"{name}-died").exists():
            (Path(folder) / f"{name}-died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (Path(folder) / f"{name}-{start}-{stop}.npy").open("xb") as shard:
            np.save(shard, teacher.features(np.arange(start, stop)))
        return {
            "rows": np.int64(stop - start),
            "alive": Teacher.alive,
            "pid": os.getpid(),
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "main": threading.current_thread() is threading.main_thread(),
        }

    return call


# Ray Data has most to say when it runs for the first time: this test comes first.
def test_an_error_of_the_caller_stays_itself_and_nothing_is_printed(cluster, tmp_path, capfd):
    heard = []

    def refuse(block):
        heard.append(block)
        raise LookupError("no room for it")

    with pytest.raises(LookupError, match="no room for it"):
        map_blocks(load, [Group("g", ("g", "plain", 1.0, str(tmp_path)), 400, 1)], max_concurrent=1, on_result=refuse)
    assert heard == [Block("g", 0, 1, heard[0].row, None)]
    assert len(list(tmp_path.glob("*.npy"))) < 400  # the others were not begun
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.fixture(scope="module")
def mapped(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    plan = [
        ("once", "die once", 0.5, 16, 4),
        ("dead", "die", 1.0, 12, 4),
        ("plain", "plain", 2.0, 35, 8),
        ("empty", "plain", 1.0, 0, 8),
        ("bad", "raise", 3.0, 20, 4),
        ("gone", "unknown", 1.0, 8, 4),
    ]
    groups = [Group(name, (name, kind, scale, str(folder)), rows, block) for name, kind, scale, rows, block in plan]
    heard = []
    blocks = map_blocks(
        load,
        groups,
        resources={"CPU": 1, "GPU": 0.5},
        max_failures=1,
        done=[("plain", 8, 16), ("plain", 24, 32)],
        on_result=heard.append,
    )
    return folder, groups, blocks, heard


def test_every_row_lies_in_one_block():
    for rows in (0, 1, 7, 8, 9, 24):
        ranges = Group("g", None, rows, 8).ranges()
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
        assert all(0 < stop - start <= 8 for start, stop in ranges)


@pytest.mark.parametrize(("rows", "block", "message"), [(-1, 8, "rows must be >= 0"), (8, 0, "block must be >= 1")])
def test_a_group_is_checked(rows, block, message):
    with pytest.raises(ValueError, match=message):
        Group("g", None, rows, block)


def test_blocks_come_back_in_order_and_each_is_announced_once(mapped):
    _, groups, blocks, heard = mapped
    expected = [(group.name, *span) for group in groups for span in group.ranges()]
    expected = [span for span in expected if span not in {("plain", 8, 16), ("plain", 24, 32)}]
    assert [(block.name, block.start, block.stop) for block in blocks] == expected
    assert sorted(heard, key=repr) == sorted(blocks, key=repr)
    assert all((block.row is None) != (block.error is None) for block in blocks)


def test_the_shards_are_what_this_process_computes(mapped):
    folder, groups, blocks, _ = mapped
    done = [block for block in blocks if block.row is not None]
    scales = {group.name: group.payload[2] for group in groups}
    assert len(done) == 4 + 2 + 3 + 4
    for block in done:
        shard = np.load(folder / f"{block.name}-{block.start}-{block.stop}.npy")
        np.testing.assert_array_equal(shard, Teacher(scales[block.name]).features(np.arange(block.start, block.stop)))
        assert block.row["rows"] == block.stop - block.start and type(block.row["rows"]) is int
    assert len(list(folder.glob("*.npy"))) == len(done)  # those that were done before have not been done again


def test_an_actor_holds_one_teacher_and_calls_it_in_its_main_thread(mapped):
    rows = [block.row for block in mapped[2] if block.row is not None]
    assert {row["alive"] for row in rows} == {1}
    assert all(row["main"] for row in rows)
    assert os.getpid() not in {row["pid"] for row in rows}


def test_two_actors_share_a_gpu(mapped):
    rows = [block.row for block in mapped[2] if block.row is not None]
    assert {row["gpu"] for row in rows} == {"0"}
    assert len({row["pid"] for row in rows}) >= 2


def test_an_error_is_that_of_its_block_alone(mapped):
    bad = {block.start: block for block in mapped[2] if block.name == "bad"}
    assert bad.pop(8).error == r"KeyError: 'image 8\nis cut short'"
    assert all(block.error is None for block in bad.values())


def test_a_teacher_that_does_not_load_is_the_error_of_its_blocks(mapped):
    gone = [block.error for block in mapped[2] if block.name == "gone"]
    assert gone == ["LookupError: no such teacher in the zoo"] * 2


def test_a_killed_block_is_repeated_and_then_given_up(mapped):
    folder, _, blocks, _ = mapped
    assert (folder / "once-died").exists()
    assert [block.error for block in blocks if block.name == "once"] == [None] * 4
    dead = [block.error for block in blocks if block.name == "dead"]
    assert "worker process died" in dead[0] and dead[1:] == [None, None]


def test_what_can_not_run_is_refused(cluster):
    with pytest.raises(UserError, match=r"16 CPU asked for"):
        map_blocks(load, [Group("g", None, 1, 1)], resources={"CPU": 16})
    with pytest.raises(ValueError, match=r"unique, got \['g'\]"):
        map_blocks(load, [Group("g", None, 1, 1), Group("g", None, 2, 1)])
    assert map_blocks(load, [Group("g", None, 0, 1)]) == []
