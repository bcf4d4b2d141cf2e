"""Data-parallel inference: blocks of rows on the actors of Ray Data, each with one teacher in memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray._private import worker
from ray.exceptions import WorkerCrashedError

from pipeline.cluster.causes import one_line
from pipeline.cluster.nodes import answer_here
from pipeline.cluster.session import active, calm, slots
from pipeline.engine.checkpoint import plain
from pipeline.errors import StageError

Row = dict[str, Any]
_AUTOSCALED = 1024
_DEATH = one_line(WorkerCrashedError())


@dataclass(frozen=True)
class Group:
    """Rows that one function serves.

    Attributes
    ----------
    name : str
        Unique among the groups of a call.
    payload : object
        What `make` builds the function from; small and picklable.
    rows : int
        How many rows there are.
    block : int
        How many of them are done at once; the last block may be smaller.
    """

    name: str
    payload: Any
    rows: int
    block: int

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows must be >= 0, got {self.rows}")
        if self.block < 1:
            raise ValueError(f"block must be >= 1, got {self.block}")

    def ranges(self) -> list[tuple[int, int]]:
        """Return start and stop of every block: each row lies in exactly one of them."""
        return [(start, min(start + self.block, self.rows)) for start in range(0, self.rows, self.block)]


@dataclass(frozen=True)
class Block:
    """What became of one block.

    Attributes
    ----------
    name : str
        Of its group.
    start, stop : int
        Its rows, `stop` excluded.
    row : dict or None
        What the function returned, tensors of one element as numbers.
    error : str or None
        One line; of `row` and `error` one is None.
    """

    name: str
    start: int
    stop: int
    row: Row | None
    error: str | None


def map_blocks(
    make: Callable[[Any], Callable[[int, int], Row]],
    groups: Sequence[Group],
    *,
    resources: dict[str, float] | None = None,
    max_concurrent: int | None = None,
    max_failures: int = 1,
    done: Collection[tuple[str, int, int]] = (),
    on_result: Callable[[Block], None] | None = None,
    verbose: bool = False,
) -> list[Block]:
    """Call ``make(group.payload)(start, stop)`` for every block of every group, side by side.

    The blocks are handed out group by group, in order, to the actors of a pool (Ray Data's ``map_batches`` with an
    ``ActorPoolStrategy``). An actor calls `make` at its first block of a group and keeps that function until the first
    block of the next group: one teacher at a time is in its memory, and none is loaded twice by it.

    Parameters
    ----------
    make : callable
        Importable by name on the workers. Loads what a group needs and returns the function of its blocks, which writes
        its own results (a shard) and returns a small row of scalars and strings.
    groups : sequence of Group
        The work. Groups without rows have no blocks.
    resources : dict of str to float, optional
        Of each actor, fractions allowed: ``{"CPU": 1, "GPU": 0.25}``; default one CPU.
    max_concurrent : int, optional
        How many actors there are at most; by default as many as the cluster holds now.
    max_failures : int
        How often a block is repeated whose process died. An exception is no such failure.
    done : collection of (name, start, stop), optional
        Blocks that need not run again; they are not among the results.
    on_result : callable, optional
        ``on_result(block)`` in this thread as soon as a block has ended, in the order of completion. If it raises, no
        further block is begun, and what it raised reaches the caller.
    verbose : bool
        Show Ray Data's progress and its log.

    Returns
    -------
    list of Block
        In the order of the groups and, in each, of the rows. An exception in `make` is the error of all blocks that
        this actor would have done with it; one in the function is the error of its block alone.

    Raises
    ------
    UserError
        When the cluster can't hold a single actor.
    ValueError
        When two groups have one name.
    StageError
        When no actor comes to life.
    """
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"group names must be unique, got {sorted({n for n in names if names.count(n) > 1})} twice")
    skipped = set(done)
    items = [
        (index, start, stop)
        for index, group in enumerate(groups)
        for start, stop in group.ranges()
        if (group.name, start, stop) not in skipped
    ]
    wanted = {key: value for key, value in (resources or {"CPU": 1}).items() if value > 0}
    room = slots(wanted)
    if not items:
        return []
    width = min(len(items), max_concurrent or len(items), _AUTOSCALED if active().autoscaling else room)
    blocks: dict[int, Block] = {}

    def deliver(item: int, row: Row | None, error: str | None) -> None:
        group, start, stop = items[item]
        blocks[item] = Block(groups[group].name, start, stop, row, error)
        if on_result is not None:
            on_result(blocks[item])

    with calm(verbose), _silent(verbose):
        stream = _stream(make, groups, items, wanted, (min(width, max(room, 1)), width), max_failures, verbose)
        with contextlib.closing(stream):
            for item, row, error in stream:
                deliver(item, row, error)
    for item in range(len(items)):
        if item not in blocks:
            deliver(item, None, "the block ended without a result")
    return [blocks[item] for item in range(len(items))]


def _stream(
    make: Callable[[Any], Callable[[int, int], Row]],
    groups: Sequence[Group],
    items: list[tuple[int, int, int]],
    wanted: dict[str, float],
    actors: tuple[int, int],
    max_failures: int,
    verbose: bool,
) -> Generator[tuple[int, Row | None, str | None], None, None]:
    """Run the blocks; yield (item, row, error) as they end."""
    from ray import data

    context = data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = verbose
    context.execution_options.preserve_order = False
    context.max_errored_blocks = -1  # what Ray Data gives up is missing from the results, and the others go on
    context.max_consecutive_actor_init_deaths = max_failures
    context.execution_no_progress_timeout_s = -1  # a block takes as long as it takes
    named = ("CPU", "GPU", "memory")
    with data.DataContext.current(context), _changed(_quieter(verbose) + _lighter(active().local)):
        table = data.from_items(
            [
                {"item": item, "group": group, "start": start, "stop": stop}
                for item, (group, start, stop) in enumerate(items)
            ],
            override_num_blocks=len(items),
        )
        outcomes = table.map_batches(
            BlockWorker,
            # Pickled here and unpickled at a block: a module that a worker lacks is then an error of the block.
            fn_constructor_args=(
                cloudpickle.dumps(make),
                [cloudpickle.dumps(group.payload) for group in groups],
                max_failures,
            ),
            batch_size=1,
            batch_format="pyarrow",
            # One block at a time: what waits behind a block that kills its process would count as killed, too.
            compute=data.ActorPoolStrategy(
                min_size=actors[0],
                max_size=actors[1],
                max_tasks_in_flight_per_actor=1,
                enable_true_multi_threading=True,  # that is: in the main thread, which knows how often Ray has tried
            ),
            num_cpus=wanted.get("CPU", 0),
            num_gpus=wanted.get("GPU"),
            memory=wanted.get("memory"),
            resources={key: value for key, value in wanted.items() if key not in named} or None,
        )
        stream = iter(outcomes.iter_batches(prefetch_batches=0, batch_size=None, batch_format="pyarrow"))
        with contextlib.closing(stream):  # type: ignore[type-var]
            while True:
                try:
                    batch: Any = next(stream, None)
                except ray.exceptions.RayError as error:
                    raise StageError(f"the pool of workers failed: {one_line(error)}") from error
                if batch is None:
                    return
                for line in batch.to_pylist():
                    yield line["item"], *pickle.loads(line["outcome"])


class BlockWorker:
    """What an actor of the pool does; it holds the function of one group at a time.

    Parameters
    ----------
    make : bytes
        The pickled function that builds a group's function.
    payloads : list of bytes
        The pickled payload of each group.
    max_failures : int
        How often a block may be begun again.
    """

    def __init__(self, make: bytes, payloads: list[bytes], max_failures: int) -> None:
        self._make = make
        self._payloads = payloads
        self._max_failures = max_failures
        self._group: int | None = None
        self._function: Callable[[int, int], Row] | None = None
        self._error: str | None = None

    def __call__(self, batch: Any) -> Any:
        """Do one block; an exception is part of the outcome, for it need not be picklable."""
        import pyarrow

        [line] = batch.to_pylist()
        # Ray Data repeats a block for as long as its process dies under it.
        core: Any = worker.global_worker
        if core.core_worker.get_current_task_attempt_number() > self._max_failures:
            outcome: tuple[Row | None, str | None] = (None, _DEATH)
        else:
            outcome = self._run(line["group"], line["start"], line["stop"])
        return pyarrow.table(
            {"item": [line["item"]], "outcome": pyarrow.array([pickle.dumps(outcome)], pyarrow.binary())}
        )

    def _run(self, group: int, start: int, stop: int) -> tuple[Row | None, str | None]:
        self._turn_to(group)
        if self._function is None:
            return None, self._error
        try:
            row = plain(self._function(start, stop))
            pickle.dumps(row)
            return row, None
        except Exception as error:
            return None, one_line(error)

    def _turn_to(self, group: int) -> None:
        if group == self._group:
            return
        self._group, self._function, self._error = group, None, None
        _release()  # before the next teacher comes: two may not fit
        try:
            answer_here()
            self._function = cloudpickle.loads(self._make)(cloudpickle.loads(self._payloads[group]))
        except Exception as error:
            self._error = one_line(error)


def _release() -> None:
    """Give back what the last group held, on the GPU as well."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _silent(verbose: bool) -> Iterator[None]:
    """Keep Ray Data's log off the console; its file in the session's folder stays."""
    if verbose:
        yield
        return
    from ray.data._internal import logging as settings

    # Ray Data sets its handlers up anew now and then, from these settings.
    handlers: Any = settings.DEFAULT_CONFIG["handlers"]
    console = handlers["console"]
    before = console["level"]

    def turn(level: int | str) -> None:
        console["level"] = level
        for handler in logging.getLogger("ray.data").handlers:
            if handler.name == "console":
                handler.setLevel(level)

    turn(logging.CRITICAL + 1)
    try:
        yield
    finally:
        turn(before)


class _Nobody:
    """In place of an actor: any method may be called, and nothing happens."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def remote(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""


class _FixedCluster:
    """In place of what asks an autoscaler for nodes: a Ray of one's own has those it has."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        from ray.data import ExecutionResources

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._total = ExecutionResources.zero()
        for node in nodes:
            self._total = self._total.add(ExecutionResources.from_resource_dict(node))

    def try_trigger_scaling(self) -> None:
        """Ask for nothing."""

    def on_executor_shutdown(self) -> None:
        """Take nothing back."""

    def get_total_resources(self) -> Any:
        """Return the sum over the nodes."""
        return self._total


Change = tuple[Any, str, Any]


@contextlib.contextmanager
def _changed(changes: list[Change]) -> Iterator[None]:
    """Replace names of modules and classes, and take that back."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _lighter(local: bool) -> list[Change]:
    """Leave out the processes that Ray Data starts beside the actors of a pool.

    They count for its dashboard, ask the autoscaler for nodes and know which node an actor lives on. On a Ray of one's
    own nobody asks, and each would take about three seconds of a processor before the first block starts.
    """
    if not local:
        return []
    from ray.data._internal import stats
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool

    nobody = _Nobody()
    return [
        (stats, "get_or_create_stats_actor", lambda: nobody),
        (streaming_executor, "create_cluster_autoscaler", _FixedCluster),
        (pool, "get_or_create_actor_location_tracker", lambda: nobody),
        (pool, "get_actor_locations", lambda actors: {}),
    ]


def _quieter(verbose: bool) -> list[Change]:
    """Start actors without a word: Ray's core writes a notice about their restarts past Python's streams."""
    if verbose:
        return []
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    begin = ActorPoolMapOperator._start_actor

    def begin_quietly(*arguments: Any, **keywords: Any) -> Any:
        with _no_stderr():
            return begin(*arguments, **keywords)

    return [(ActorPoolMapOperator, "_start_actor", begin_quietly)]


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
