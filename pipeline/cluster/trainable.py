"""One trial, on its worker and in the driver."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

from pipeline.cluster.causes import is_death, one_line
from pipeline.cluster.measure import Meter
from pipeline.engine.checkpoint import plain

Row = dict[str, Any]

_ROW = "faculty_row"  # apart from the many keys that Tune adds to a result


class Assessment(tune.Trainable):
    """Calls the function once; the process then serves the next trial, with torch and the like already imported."""

    def setup(self, config: Row, function: bytes, payloads: dict[str, bytes]) -> None:  # type: ignore[override]
        """Take what all trials share."""
        self._function = function
        self._payloads = payloads

    def step(self) -> Row:
        """Run the trial to its end."""
        name = self.config["name"]
        row: Row
        with Meter() as meter:
            try:
                function: Callable[[Any], Row] = cloudpickle.loads(self._function)
                row = plain(function(cloudpickle.loads(self._payloads[name])))
            except Exception as error:
                row = {
                    "error": one_line(error),
                    "error_type": type(error).__name__,
                    "traceback": traceback.format_exc(),
                }
        row |= {"seconds": meter.seconds, "peak_mb": meter.peak_mb}
        if meter.peak_gpu_mb is not None:
            row["peak_gpu_mb"] = meter.peak_gpu_mb
        return {_ROW: row, "done": True}

    def reset_config(self, new_config: Row) -> bool:
        """Agree to serve another trial: nothing of the last one is kept."""
        return True


class Refused(BaseException):
    """The caller could not take a row, which ends the run; Tune would take an Exception for a fault of the trial."""


class DeliveryCallback(tune.Callback):
    """Hands every trial's row over as soon as it has ended."""

    def __init__(self, deliver: Callable[[str, Row], None]) -> None:
        self.error: Exception | None = None
        self._deliver = deliver

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks with the experiment; what the driver does with a row stays in the driver.
        return {"error": None, "_deliver": None}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Deliver the row of a trial that ran to its end."""
        if _ROW in trial.last_result:
            self._hand_over(trial, dict(trial.last_result[_ROW]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Deliver a row for a trial that Tune has given up."""
        self._hand_over(trial, _given_up(trial))

    def _hand_over(self, trial: Any, row: Row) -> None:
        try:
            if self.error is None:
                self._deliver(trial.config["name"], row)
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
