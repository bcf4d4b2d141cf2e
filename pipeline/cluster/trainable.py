"""One trial, on its worker and in the driver."""

from __future__ import annotations

import contextlib
import gc
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

from pipeline.cluster.causes import is_death, one_line
from pipeline.cluster.measure import Meter
from pipeline.cluster.nodes import answer_here
from pipeline.engine.checkpoint import plain

Row = dict[str, Any]

ROW = "faculty_row"  # apart from the many keys that Tune adds to a result


class Assessment(tune.Trainable):
    """Calls the function once a rung; the process then serves the next trial, with torch and the like imported."""

    def setup(  # type: ignore[override]
        self,
        config: Row,
        function: bytes,
        payloads: dict[str, bytes],
        rungs: int | None = None,
        shared: Any = None,
    ) -> None:
        """Take what all trials share."""
        self._function = function
        self._payloads = payloads
        self._rungs = rungs
        self._shared = {} if shared is None else {"shared": shared}
        self._settled = False
        self._begin()

    def _begin(self) -> None:
        self._rung = 0
        self._seconds = 0.0

    def step(self) -> Row:
        """Run the trial to its end, or to the end of a rung."""
        name = self.config["name"]
        keywords = self._shared | ({} if self._rungs is None else {"rung": self._rung})
        row: Row
        with Meter() as meter:
            try:
                answer_here()
                function: Callable[..., Row] = cloudpickle.loads(self._function)
                row = plain(function(cloudpickle.loads(self._payloads[name]), **keywords))
            except Exception as error:
                row = {
                    "error": one_line(error),
                    "error_type": type(error).__name__,
                    "traceback": traceback.format_exc(),
                }
        self._seconds += meter.seconds
        if not self._settled:
            # What the first trial has imported stays for good: looking through it again before every trial, for the
            # memory measured to be the trial's own, takes a tenth of a second.
            gc.collect()
            gc.freeze()
            self._settled = True
        row |= {"seconds": self._seconds, "peak_mb": meter.peak_mb}
        if meter.peak_gpu_mb is not None:
            row["peak_gpu_mb"] = meter.peak_gpu_mb
        if self._rungs is not None:
            row["rung"] = self._rung
            self._rung += 1
        return {ROW: row, "done": "error" in row or self._rungs is None or self._rung == self._rungs}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep where a trial stands that waits between two rungs; what it computed, it keeps itself."""
        state = {"rung": self._rung, "seconds": self._seconds}
        (Path(checkpoint_dir) / "rung.json").write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on where the trial stood."""
        state = json.loads((Path(checkpoint) / "rung.json").read_text(encoding="utf-8"))
        self._rung, self._seconds = state["rung"], state["seconds"]

    def reset_config(self, new_config: Row) -> bool:
        """Agree to serve another trial: nothing of the last one is kept."""
        self._begin()
        return True


class Refused(BaseException):
    """The caller could not take a row, which ends the run; Tune would take an Exception for a fault of the trial."""


class DeliveryCallback(tune.Callback):
    """Hands every trial's row over as soon as it has ended, with the reason if it was ended before its last rung."""

    def __init__(self, deliver: Callable[[str, Row], None], reasons: dict[str, str]) -> None:
        self.error: Exception | None = None
        self._deliver = deliver
        self._reasons = reasons

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks with the experiment; what the driver does with a row stays in the driver.
        return {"error": None, "_deliver": None, "_reasons": {}}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Deliver the row of a trial that ran to its end."""
        if ROW in trial.last_result:
            self._hand_over(trial, dict(trial.last_result[ROW]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Deliver a row for a trial that Tune has given up."""
        self._hand_over(trial, _given_up(trial))

    def _hand_over(self, trial: Any, row: Row) -> None:
        name = trial.config["name"]
        row["trial_id"] = trial.trial_id
        if name in self._reasons:
            row["dropped"] = self._reasons[name]
        try:
            if self.error is None:
                self._deliver(name, row)
        except Exception as error:
            self.error = error
            raise Refused from error


def _given_up(trial: Any) -> Row:
    """Return the row of a trial whose process died once too often, or never came to life."""
    error: Exception = RuntimeError("Tune gave the trial up")
    with contextlib.suppress(OSError, AttributeError, EOFError):
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    text = str(error)
    if is_death(error) and "creation task" not in text:
        return {"error": one_line(error), "error_type": "WorkerDied"}
    # An error while the process was set up (a module that is not there) comes as the text of a remote traceback.
    last = [line for line in text.splitlines() if line.strip()][-1:] or ["no message"]
    return {"error": last[0].strip()[:400], "error_type": type(error).__name__, "traceback": text}
