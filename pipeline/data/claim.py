"""Who works in a run folder of a store: one object in it, written anew every few seconds, tells a second driver.

A store has no locks. Two drivers that begin in the same second may both believe for a moment that they are alone; the
one whose object was overwritten finds that out before it has sent anything. Whether a holder is alive is told by its
object changing, not by clocks, which differ between machines.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from pipeline.data.mirror import Mirror, freely
from pipeline.errors import FacultyError, StageError, UserError

NAME = ".lock"
BEAT_S = 10.0
PATIENCE_S = 45.0  # without a change for so long, a holder is taken for dead
_LONG_GONE_S = 3600.0  # of that age there is nothing to wait for, whatever the clocks say
_SETTLE_S = 0.5

_log = logging.getLogger("pipeline.data")


@contextlib.contextmanager
def claim(
    mirror: Mirror,
    *,
    notice: Callable[[str], None] = lambda text: None,
    beat: float = BEAT_S,
    patience: float = PATIENCE_S,
) -> Iterator[None]:
    """Hold a run folder for the length of the block.

    Parameters
    ----------
    mirror : Mirror
        Sends nothing any more once another driver has taken the folder over.
    notice : callable
        Told that a former holder is waited for, or has been taken over from.
    beat, patience : float
        Seconds between two signs of life, and without one.

    Raises
    ------
    UserError
        If another driver holds it; names it.
    """
    held = _Claim(mirror, beat, patience)
    held.take(notice)
    mirror.may_send = held.check
    try:
        yield
    finally:
        mirror.may_send = freely
        held.release()


class _Claim:
    def __init__(self, mirror: Mirror, beat: float, patience: float) -> None:
        self._mirror, self._beat, self._patience = mirror, beat, patience
        self._mine: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "holder": f"{_user()}@{socket.gethostname()} (process {os.getpid()})",
            "since": datetime.now().strftime("%Y-%m-%d %H:%M"),
            "machine": _machine(),
            "pid": os.getpid(),
            "beats": 0,
        }
        self._last = time.monotonic()
        self._taken_by: str | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="faculty-claim", daemon=True)

    def take(self, notice: Callable[[str], None]) -> None:
        """Take the folder, from a holder that is dead if need be."""
        other = self._read()
        if other is not None:
            holder = other.get("holder", "somebody")
            if not self._dead(other):
                notice(f"run_dir {self._mirror.uri} was left by {holder}; looking for a sign of life of it")
                self._watch(other)
            notice(f"run_dir {self._mirror.uri} is taken over from {holder}, which gives no sign of life")
        self._write()
        time.sleep(_SETTLE_S)
        now = self._read()
        if now is not None and now.get("token") != self._mine["token"]:
            raise self._in_use(now)
        self._thread.start()

    def check(self) -> None:
        """Raise where somebody else has taken the folder over; ask if the last sign of life was long ago."""
        with self._lock:
            if self._taken_by is None and time.monotonic() - self._last > self._patience / 2:
                self._renew()
            if self._taken_by is not None:
                raise StageError(
                    f"run_dir {self._mirror.uri}: was taken over by {self._taken_by}, as nothing was heard of this run "
                    f"for {self._patience:g} s; what it still had to write is dropped"
                )

    def release(self) -> None:
        """Give the folder back."""
        self._ended.set()
        self._thread.join()
        with self._lock, contextlib.suppress(FacultyError):
            now = self._read()
            if now is not None and now.get("token") == self._mine["token"]:
                self._mirror.store.delete(NAME)

    def _keep(self) -> None:
        while not self._ended.wait(self._beat):
            with self._lock:
                try:
                    self._renew()
                except FacultyError as error:
                    _log.warning("%s", error)
                if self._taken_by is not None:
                    return

    def _renew(self) -> None:
        now = self._read()
        if now is not None and now.get("token") != self._mine["token"]:
            self._taken_by = str(now.get("holder", "somebody"))
        else:
            self._write()

    def _watch(self, other: dict[str, Any]) -> None:
        """Wait as long as a holder may be silent.

        Raises
        ------
        UserError
            When it gives a sign of life.
        """
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            time.sleep(min(self._beat / 4, 1.0))
            now = self._read()
            if now is None:
                return
            if now != other:
                raise self._in_use(now)

    def _dead(self, other: dict[str, Any]) -> bool:
        """Whether a holder is known to be dead: a process of this machine, or one that wrote an hour ago."""
        if other.get("machine") == self._mine["machine"]:
            try:
                os.kill(int(other["pid"]), 0)
            except ProcessLookupError:
                return True
            except (OSError, KeyError, ValueError):
                pass
        changed = self._mirror.store.changed(NAME)
        return changed is not None and time.time() - changed > _LONG_GONE_S

    def _in_use(self, other: dict[str, Any]) -> UserError:
        return UserError(
            f"run_dir {self._mirror.uri}: in use by {other.get('holder', 'somebody')} since "
            f"{other.get('since', 'a while')}; wait for it, or choose another run_dir"
        )

    def _read(self) -> dict[str, Any] | None:
        content = self._mirror.store.read(NAME)
        if content is None:
            return None
        try:
            found = json.loads(content)
            return found if isinstance(found, dict) else {}
        except ValueError:
            return {}

    def _write(self) -> None:
        self._mine["beats"] += 1
        self._mirror.store.write(NAME, json.dumps(self._mine).encode())
        self._last = time.monotonic()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())


def _machine() -> str:
    """Return what tells process numbers of this machine, since it was started, from those of others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
