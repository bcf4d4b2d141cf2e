"""`python -m benchmarks.training`: measures, and writes `benchmarks/results/training.json` and its table.

With `--device cuda` the results are called `training_gpu`. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.training import peer as peers
from benchmarks.training.bare import Bare
from benchmarks.training.memory import peaks
from benchmarks.training.ours import BLOCK, Cache, Ours
from benchmarks.training.report import Found, publish, shown
from benchmarks.training.turns import in_turn
from benchmarks.training.world import BATCH, WORLDS, Run, Task

CACHED, LIVE, REPLAYED, HELD = (1, 4), (1, 4), (1, 8), (0, 1, 8)
# Their goals lie a few hundredths from the bare loop: more rounds, of these alone, and longer measurements.
CLOSE, CLOSER_ROUNDS, CLOSER_STEPS = ("bare", "alone", "average 8", "default 8"), 3, 2
MEMORY = 15_360  # images of the epoch whose memory is measured: 20 MB of outputs a teacher


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where there is one"
    )
    parser.add_argument("--threads", type=int, help="processors, for every side alike; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of measurements, after one to warm up")
    parser.add_argument("--steps", type=int, help="steps of a measurement, instead of each task's own number")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), help="tasks")
    parser.add_argument("--images", type=int, default=MEMORY, help="images of the epoch whose memory is measured")
    parser.add_argument("--dry", action="store_true", help="print the rows; write nothing")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; give cpu or auto")
    if options.rounds < 1 or (options.steps or 1) < 1 or (options.threads or 1) < 1:
        parser.error("--rounds, --steps and --threads must be >= 1")
    return options


def restrict(threads: int | None) -> None:
    """Give this process, and those that it starts, so many processors: worker processes of a peer share them."""
    if threads is None:
        return
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise SystemExit(f"--threads {threads}: this process may use {len(cores)} processors; ask for fewer")
        os.sched_setaffinity(0, cores[:threads])


def worker_counts() -> tuple[int, ...]:
    """Return how many worker processes the peer's data loader is tried with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tuple(sorted({0, (cores + 1) // 2, cores}))


def close_trainings(task: Task, device: torch.device) -> dict[str, Run]:
    """Return the trainings that are compared closely with the bare loop."""
    ours = Ours(task, device)
    own = {"alone": ours.alone()} | {name: ours.cached(*_kind(name)) for name in CLOSE[2:]}
    return {"bare": Bare(task, device).train()} | own


def _kind(name: str) -> tuple[str, int]:
    recipe, _, count = name.partition(" ")
    return recipe, int(count)


def trainings(task: Task, device: torch.device, bare: Bare, peer: peers.Peer | None) -> dict[str, Run]:
    """Return the other trainings of a task, and the bare loop, by the names that `report` knows them by."""
    ours = Ours(task, device)
    runs = {"bare": bare.train()}
    runs |= {f"average {count}": ours.cached("average", count) for count in CACHED}
    runs |= {f"views {count}": ours.cached("views", count) for count in LIVE}
    runs |= {"each 8": ours.cached("each", 8)}
    runs |= {f"live {count}": ours.live(count) for count in LIVE}
    runs |= {f"compiled {count}": ours.live(count, compiled=True) for count in LIVE}
    if peer is not None:
        for style in ("samples", "batches"):
            runs |= {f"peer {style} {count}": peer.live(count, style) for count in LIVE}
        runs |= {f"peer replayed {count}": peer.replayed(count) for count in REPLAYED}
    return runs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the peer's log, which it writes through the root logger, off the screen."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def measure(name: str, options: argparse.Namespace, folder: Path, workers: tuple[int, ...]) -> Found:
    """Measure one task."""
    world, device = WORLDS[name], torch.device(options.device)
    task = Task(world, options.steps or world.steps[device.type], folder / "task")
    task.write()
    bare = Bare(task, device)
    peer = peers.Peer(task, device, workers) if peers.version() is not None else None

    def say(line: str) -> None:
        print(f"{name}, {line}", file=sys.stderr, flush=True)

    with quiet():
        times = in_turn(trainings(task, device, bare, peer), options.rounds, device, say)
        longer = Task(world, CLOSER_STEPS * task.steps, folder / "longer")
        longer.write()
        close = in_turn(close_trainings(longer, device), CLOSER_ROUNDS * options.rounds, device, say)
        cache = Cache(task, device)
        filling = {"fill": cache.fill(), "forward": bare.forward(world.teacher_net(0), cache.rows, BLOCK)}
        filled = in_turn(filling, options.rounds, device, say)
    # One task tells: what is held does not depend on the net.
    steps = max(1, options.images // BATCH)
    held = peaks(Task(world, steps, folder / "memory"), HELD, device) if name == "small" else {}
    workers = None if peer is None else peer.chosen
    return Found(world, task.steps, times, longer.steps, close, filled, cache.rows, cache.sizes(), held, workers)


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    restrict(options.threads)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True  # for every side; the peer's example script does so, too
    if peers.version() is None:
        missing = "torchdistill is not installed: its rows are left out; `make bench-training` installs it"
        print(missing, file=sys.stderr, flush=True)
    workers, found = worker_counts(), []
    with tempfile.TemporaryDirectory(prefix="faculty-bench-") as folder:
        for name in options.worlds:
            found.append(measure(name, options, Path(folder) / name, workers))
    if options.dry:
        for line in shown(found, options.device):
            print(line)
        return
    publish(found, options.device, peers.version())


if __name__ == "__main__":
    main(sys.argv[1:])
