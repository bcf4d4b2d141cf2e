"""`kill -9` of a training at twenty random moments: the weights are those of a training that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
KILLS = 20


def trained(folder: Path, kill_in: tuple[int, float] | None) -> None:
    """Train a small student, 30 steps with checkpoints two apart, the next one being stored while training goes on.

    With `kill_in` the process is killed some seconds after a step of its own has begun.
    """
    import torch

    from tests.unit.test_engine_resume import spec, train

    def begun(step: int) -> None:
        if kill_in is not None and step == kill_in[0]:
            threading.Timer(kill_in[1], os.kill, (os.getpid(), signal.SIGKILL)).start()

    weights, _ = train(spec(epochs=6, ema=0.9, mixup=0.4), folder, hooked=begun)
    torch.save(weights, folder / "weights.pt")


def child(folder: Path, kill_in: tuple[int, float] | None) -> int:
    """Train in a process of its own; return its exit status."""
    pid = os.fork()
    if not pid:
        trained(folder, kill_in)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(home: Path) -> None:
    import torch

    import tests.unit.test_engine_resume  # noqa: F401

    torch.set_num_threads(1)
    (home / "whole").mkdir()
    assert child(home / "whole", None) == 0
    expected = torch.load(home / "whole" / "weights.pt", weights_only=True)
    random.seed(0)
    killed, same = 0, 0
    for number in range(KILLS):
        folder = home / str(number)
        folder.mkdir()
        # Twice in a row, at any moment: in a step, in a copy, between file and manifest.
        killed += sum(child(folder, (random.randint(1, 20), random.uniform(0, 0.01))) != 0 for _ in range(2))
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
    assert found["killed"] > KILLS  # some of the second trainings have fewer steps left than that


if __name__ == "__main__":
    main(Path(sys.argv[1]))
