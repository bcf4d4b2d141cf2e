"""Memory of a training with cached teachers, each in a process of its own.

python -m benchmarks.training.memory REQUEST, where REQUEST is the JSON of a `Request`, prints it as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.results import ROOT
from benchmarks.training.ours import Ours
from benchmarks.training.world import WORLDS, Task

MIB = 2**20


@dataclass(frozen=True)
class Request:
    """What a process is to train.

    Attributes
    ----------
    world : str
    steps : int
        Of its epoch.
    folder : str
        Where the table and the teachers' say lie.
    teachers : int
        0: none.
    device : str
    threads : int
    """

    world: str
    steps: int
    folder: str
    teachers: int
    device: str
    threads: int


def peaks(task: Task, counts: tuple[int, ...], device: torch.device) -> dict[int, dict[str, float]]:
    """Return by number of teachers the memory after an epoch [MiB]: `own`, and the peak of the `device` on a GPU.

    All that is read was written before, so that writing it has no part in it. Pages of mapped files are not counted:
    the system takes them back when it needs them. The teachers have a thousand classes, so that the outputs of one
    would show.
    """
    task.write()
    ours = Ours(task, torch.device("cpu"))
    for count in counts:
        if count:
            ours.teaching("wide", count)
    found = {}
    for count in counts:
        request = Request(task.world.name, task.steps, str(task.folder), count, str(device), torch.get_num_threads())
        command = [sys.executable, "-m", "benchmarks.training.memory", json.dumps(asdict(request))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        found[count] = json.loads(done.stdout)
    return found


def measured(request: Request) -> dict[str, float]:
    """Train in this process; return the memory it has."""
    torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    task = Task(WORLDS[request.world], request.steps, Path(request.folder))
    ours = Ours(task, device)
    run = ours.cached("wide", request.teachers) if request.teachers else ours.alone()
    run()
    found = {"own": own() / MIB}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device) / MIB
    return found


def own() -> int:
    """Return the memory that belongs to this process alone [bytes]; where nothing tells, all that it ever had."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measured(Request(**json.loads(sys.argv[1])))))
