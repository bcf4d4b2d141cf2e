"""What a second worker brings, and how work and data spread over four nodes: `make bench-scaling`.

    python -m benchmarks.scaling [--rounds N] [--steps N] [--dry]

Two ranks in one gloo group, each on a processor of its own, train as the product's workers do. A simulated cluster of
four nodes on this machine then runs teachers over an image table in blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.results import ROOT, goal, write
from benchmarks.training.ours import Ours, Reference
from benchmarks.training.turns import Ratio
from benchmarks.training.world import BATCH, LABELLED, TAUGHT, WORLDS, Run, Task
from pipeline.cluster.blocks import Block, Group, map_blocks
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.data.table import ImageTable
from pipeline.engine.arms import TAUGHT as TAUGHT_SPLITS
from pipeline.engine.context import LocalContext

RANKS, NODES = 2, 4
TEACHERS, BLOCK = 4, 256  # that run over the table on the nodes, and images of one block
STEPS = {"small": 60, "cifar": 10}
CPU = torch.device("cpu")
TITLES = {
    "one": "one rank, the other processor idle",
    "beside": "two trainings of one rank each, side by side",
    "same": "two ranks, the same global batch",
    "more": "two ranks, the same batch a rank",
}
COLUMNS = {
    "task": "task",
    "title": "what",
    "measured": "measured",
    "efficiency": "efficiency",
    "beside": "of two side by side",
}


class GroupContext(LocalContext):
    """A worker of the process group that this process is in; like those of a cluster, without Ray."""

    def __init__(self) -> None:
        super().__init__(device=CPU)
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap the module."""
        return DistributedDataParallel(
            model.to(self.device),
            find_unused_parameters=False,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def barrier(self) -> None:
        """Wait for the others."""
        distributed.barrier()


# --- two ranks --------------------------------------------------------------------------------------------------------


def rank(number: int, cores: list[int], folder: str, steps: dict[str, int], rounds: int) -> None:
    """Be one rank: train in every way, in turn, and leave the seconds in a file."""
    os.sched_setaffinity(0, {cores[number]})
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a machine need not resolve to an address of it
    store = (Path(folder) / "store").as_uri()
    distributed.init_process_group(
        "gloo", init_method=store, rank=number, world_size=RANKS, timeout=timedelta(minutes=30)
    )
    try:
        seconds = {name: timed(Task(WORLDS[name], steps[name], Path(folder) / name), rounds) for name in steps}
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    (Path(folder) / f"rank-{number}.json").write_text(json.dumps(seconds), encoding="utf-8")


def timed(task: Task, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every way of training, a round each; a first round warms up."""
    ways = dict(ways_of(task))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, build in ways.items():
            run = build()
            distributed.barrier()
            began = time.perf_counter()
            if run is not None:
                run()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def ways_of(task: Task) -> Iterator[tuple[str, Callable[[], Run | None]]]:
    """Yield by name what builds a training; None where this rank only waits."""

    def alone() -> Run:
        return Ours(task, CPU).cached("default", 1)

    def joined(times: int) -> Callable[[], Run]:
        return lambda: Ours(task, CPU, GroupContext(), (times * LABELLED, times * TAUGHT)).cached("default", 1)

    yield "one", lambda: alone() if distributed.get_rank() == 0 else None
    yield "beside", alone
    yield "same", joined(1)
    yield "more", joined(RANKS)


def two_ranks(steps: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """Measure one rank against two; return the rows."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        raise SystemExit(f"{RANKS} processors are needed, one a rank; this process may use {len(cores)}")
    with tempfile.TemporaryDirectory(prefix="faculty-bench-") as folder:
        for name, count in steps.items():
            task = Task(WORLDS[name], count, Path(folder) / name)
            task.write()
            Ours(task, CPU).teaching("default", 1)
        multiprocessing.start_processes(
            rank, (cores[:RANKS], folder, steps, rounds), nprocs=RANKS, join=True, start_method="spawn"
        )
        parts = [json.loads((Path(folder) / f"rank-{n}.json").read_text(encoding="utf-8")) for n in range(RANKS)]
    return [
        row for name, count in steps.items() for row in rows_of(name, count * BATCH, [part[name] for part in parts])
    ]


def rows_of(name: str, images: int, parts: list[dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a task, with two ratios, each the median of those of the rounds.

    Efficiency is rate(2 ranks) / (2 · rate(1 rank)). Processors that share a core are slower together, whatever runs
    on them: rate(2 ranks) / rate(2 trainings side by side) leaves that out.
    """
    rates = {}
    for way in TITLES:
        longest = [max(values) for values in zip(*(part[way] for part in parts), strict=True)]
        trained = images * (RANKS if way == "beside" else 1)
        rates[way] = [trained / seconds for seconds in longest]
    for way, title in TITLES.items():
        rate = statistics.median(rates[way])
        row = {"task": WORLDS[name].title, "name": way, "title": title, "images_per_second": rate}
        row["measured"] = f"{rate:,.0f} images/s"
        if way != "one":
            each = [two / (RANKS * one) for one, two in zip(rates["one"], rates[way], strict=True)]
            ratio = Ratio(statistics.median(each), min(each), max(each))
            row |= {"value": ratio.median, "range": [ratio.least, ratio.largest], "efficiency": str(ratio)}
        if way in ("same", "more"):
            each = [two / both for both, two in zip(rates["beside"], rates[way], strict=True)]
            ratio = Ratio(statistics.median(each), min(each), max(each))
            row |= {"of_beside": ratio.median, "beside": str(ratio)}
        yield row


# --- four nodes -------------------------------------------------------------------------------------------------------


def make_reader(payload: tuple[str, str, int]) -> Callable[[int, int], dict[str, Any]]:
    """Load a teacher; return the function that runs it over some rows of the table. On a worker."""
    import ray

    table, world, number = payload
    torch.set_num_threads(1)
    teacher = Reference(WORLDS[world], number).load()
    split = ImageTable.open(table).split(*TAUGHT_SPLITS)
    node = ray.get_runtime_context().get_node_id()

    def read(start: int, stop: int) -> dict[str, Any]:
        images = split.images(slice(start, stop))
        teacher(images)
        return {"node": node, "images": len(images), "bytes": images.nbytes}

    return read


def four_nodes(steps: int) -> list[dict[str, Any]]:
    """Run teachers over a table on a simulated cluster; return a row a node."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="faculty-bench-", ignore_cleanup_errors=True) as folder, searched(ROOT):
        task = Task(WORLDS["small"], steps, Path(folder))
        task.write()
        groups = [
            Group(f"teacher {number}", (str(task.table), "small", number), len(task), BLOCK)
            for number in range(TEACHERS)
        ]
        cluster = Cluster()
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=1, temp_dir=f"{folder}/ray")  # no other Ray here takes it for its default
            with session(ClusterSpec(address=cluster.address)):
                blocks = map_blocks(make_reader, groups)
        finally:
            cluster.shutdown()
    return list(rows_of_nodes(blocks))


@contextlib.contextmanager
def searched(folder: Path) -> Iterator[None]:
    """Let processes that are started meanwhile, and what they start, import from a folder."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def rows_of_nodes(blocks: list[Block]) -> Iterator[dict[str, Any]]:
    """Yield a row for each node."""
    by_node: dict[str, list[Block]] = {}
    for block in blocks:
        if block.row is None:
            raise RuntimeError(f"{block.name}, rows {block.start} to {block.stop}: {block.error}")
        by_node.setdefault(block.row["node"], []).append(block)
    for number, own in enumerate(sorted(by_node.values(), key=len, reverse=True), start=1):
        read = sum(block.row["bytes"] for block in own if block.row is not None)
        teachers = len({block.name for block in own})
        yield {
            "task": f"{NODES} nodes of one processor, simulated",
            "name": f"node {number}",
            "title": f"node {number} of {NODES}",
            "blocks": len(own),
            "teachers": teachers,
            "bytes": read,
            "measured": f"{len(own)} of {len(blocks)} blocks, of {teachers} teachers, {read / 2**20:.1f} MiB read",
        }


# --- all --------------------------------------------------------------------------------------------------------------


def goals_of(ranks: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the goals."""
    joined = [row for row in ranks if row["name"] in ("same", "more")]
    found = [goal(f"{row['task']}: efficiency of {row['title']}", row["value"], 0.85, "ratio") for row in joined] + [
        goal(f"{row['task']}: {row['title']}, of two side by side", row["of_beside"], 0.85, "ratio") for row in joined
    ]
    busiest = max(row["blocks"] for row in nodes) / (sum(row["blocks"] for row in nodes) / NODES)
    return [
        *found,
        goal("nodes that had work", len(nodes), NODES, "nodes"),
        goal("blocks of the busiest node over an even share", busiest, 1.5, "ratio", at_most=True),
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of measurements, after one to warm up")
    parser.add_argument("--steps", type=int, help="steps of one measurement, instead of each task's own number")
    parser.add_argument("--dry", action="store_true", help="print the rows; write nothing")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.steps or RANKS) < RANKS or (options.steps or RANKS) % RANKS:
        parser.error(f"--rounds must be >= 1, --steps a multiple of {RANKS}")
    steps = STEPS if options.steps is None else dict.fromkeys(STEPS, options.steps)
    ranks = two_ranks(steps, options.rounds)
    nodes = four_nodes(steps["small"])
    goals = goals_of(ranks, nodes)
    note = (
        f"Medians of {options.rounds} rounds, all ways in turn in each, and the least and largest round. A rank is a "
        f"process with one thread on a processor of its own; gloo. The default recipe with what teachers say cached; a "
        f"global batch of {BATCH} images, or {BATCH} a rank. Efficiency: images per second of two over twice those of "
        "one. Two trainings side by side exchange nothing: what the machine itself loses, for instance where its "
        "processors are threads of one core. Nodes: Ray's simulated "
        f"cluster on this machine, {TEACHERS} teachers over a table in blocks of {BLOCK} images; read is what the "
        "blocks took out of the memory-mapped table."
    )
    for row in [*ranks, *nodes]:
        print(" | ".join(str(row.get(key, "")) for key in COLUMNS))
    for one in goals:
        sign = "<=" if one["at_most"] else ">="
        print(f"{'met   ' if one['met'] else 'missed'} {one['name']}: {one['value']:.3f} {sign} {one['target']}")
    if not options.dry:
        write("scaling", [*ranks, *nodes], goals, COLUMNS, note)


if __name__ == "__main__":
    main(sys.argv[1:])
