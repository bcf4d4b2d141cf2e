"""Functions run on several data-parallel ranks: gloo processes on this machine's CPU."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# Of a collective that a rank waits in alone, so that a test fails rather than hangs.
PATIENCE = timedelta(seconds=60)
# What the first DistributedDataParallel and the first optimiser of a process load.
_SLOW_TO_LOAD = ("torch.nn.parallel", "torch._dynamo", "torch.optim")


def run_ranks(
    function: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, timeout: float = 180.0
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in `world_size` new processes that form one gloo group.

    Warnings are errors in them, as in the tests themselves. No process outlives the call but the one that all ranks are
    forked from, which has torch loaded; it ends with the tests.

    Parameters
    ----------
    function
        Importable by name: a module's own, neither local nor a lambda.
    world_size : int
    tmp_path : Path
        Where the processes meet and leave their results, in a folder of each call's own.
    *args
        That can be pickled.
    timeout : float
        Seconds after which all are ended.

    Returns
    -------
    list
        What each rank returned; tensors are best detached.

    Raises
    ------
    RuntimeError
        With the traceback of the rank that failed first; the others are ended.
    TimeoutError
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    multiprocessing.set_forkserver_preload(["tests.ddp", *_SLOW_TO_LOAD])
    context = multiprocessing.start_processes(
        _rank,
        (world_size, str(folder), function, args),
        nprocs=world_size,
        join=False,
        daemon=True,
        start_method="forkserver",
    )
    try:
        end = time.monotonic() + timeout
        while not context.join(timeout=max(end - time.monotonic(), 0), grace_period=2):
            if time.monotonic() >= end:
                raise TimeoutError(f"ranks still run after {timeout:g} s")
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        # The first to end may be one that only lost its peer: the first to fail says why.
        failed = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if not failed:
            raise
        message = f"rank {failed[0].stem} failed:\n{failed[0].read_text(encoding='utf-8')}"
        raise RuntimeError(message) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        # torch leaves the traceback of each failed process there.
        for path in context.error_files:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # The name of a machine need not resolve to an address that reaches it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("error")
    store = (Path(folder) / "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        result = function(rank, world_size, *args)
        # None leaves the group while another rank still talks to it.
        distributed.barrier()
    except BaseException:
        # Before the group is left, by which the others fail too.
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        distributed.destroy_process_group()
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
