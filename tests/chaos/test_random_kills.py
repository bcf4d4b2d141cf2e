"""`kill -9` of a training at twenty random moments: the weights are those of a training that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
KILLS = 20


def trained(folder: Path) -> None:
    """Train a small student with checkpoints two steps apart, the next one being stored while training goes on."""
    import torch

    from tests.unit.test_engine_resume import spec, train

    weights, _ = train(spec(epochs=6, ema=0.9, mixup=0.4), folder)
    torch.save(weights, folder / "weights.pt")


def child(folder: Path, kill_after: float | None) -> int:
    """Train in a process of its own, killed after some seconds; return its exit status."""
    pid = os.fork()
    if not pid:
        if kill_after is not None:
            threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        trained(folder)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(home: Path) -> None:
    import torch

    import tests.unit.test_engine_resume  # noqa: F401

    # Once, and not in each child: the first optimiser imports a good part of torch.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    torch.set_num_threads(1)
    (home / "whole").mkdir()
    began = time.perf_counter()
    assert child(home / "whole", None) == 0
    seconds = time.perf_counter() - began
    expected = torch.load(home / "whole" / "weights.pt", weights_only=True)
    random.seed(0)
    killed, same = 0, 0
    for number in range(KILLS):
        folder = home / str(number)
        folder.mkdir()
        # Twice in a row, at any moment of the training: in a step, in a copy, between file and manifest.
        killed += sum(child(folder, random.uniform(0.05, 1.0) * seconds) != 0 for _ in range(2))
        assert child(folder, None) == 0
        found = torch.load(folder / "weights.pt", weights_only=True)
        same += all(torch.equal(value, found[name]) for name, value in expected.items())
    print(json.dumps({"killed": killed, "same": same}))


def test_weights_do_not_depend_on_when_a_training_was_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    # A process that has started no thread, so that it may fork.
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.test_random_kills", str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == KILLS
    assert found["killed"] >= KILLS  # some of the second kills come after the end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
