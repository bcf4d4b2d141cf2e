"""What a piece of work takes: seconds and peak memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_STATUS = Path("/proc/self/status")
_MIB = 2**20


class Meter:
    """Measures the block it encloses.

    Attributes
    ----------
    seconds : float
        Wall time [s].
    peak_mb : float
        Highest resident memory of the process during the block [MiB], interpreter and libraries included: what a
        machine must have for it.
    peak_gpu_mb : float or None
        Highest memory that torch held on the current CUDA device [MiB]; None without CUDA.

    Notes
    -----
    A process that does one piece of work after another keeps the peak of the largest. Linux resets its own mark
    (``VmHWM``) on request; where it does not, memory is sampled every 20 ms.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_mb = 0.0
        self.peak_gpu_mb: float | None = None
        self._sampled = 0.0
        self._stop: threading.Event | None = None

    def __enter__(self) -> Meter:
        _release()
        if not _reset_peak():
            self._stop = threading.Event()
            threading.Thread(target=self._sample, args=(self._stop,), daemon=True).start()
        cuda = _cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cuda = _cuda()
        if cuda is not None:
            cuda.synchronize()
            self.peak_gpu_mb = cuda.max_memory_allocated() / _MIB
        self.seconds = time.perf_counter() - self._began
        if self._stop is not None:
            self._stop.set()
            self.peak_mb = max(self._sampled, _resident())
        else:
            self.peak_mb = _field("VmHWM")

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            self._sampled = max(self._sampled, _resident())


def _cuda() -> Any:
    """Return torch.cuda if the work has brought it along."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _release() -> None:
    """Give freed memory back to the system, so that it does not count for the next piece of work."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        pass


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _field("VmHWM") > 0


def _resident() -> float:
    here = _field("VmRSS")
    if here:
        return here
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def _field(name: str) -> float:
    """Return one field of the process' status [MiB], 0 where there is none."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
