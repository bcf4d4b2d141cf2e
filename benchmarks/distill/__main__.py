"""The benchmark's commands: `python -m benchmarks.distill build --work DIR`, then `run`, then `report`."""

from __future__ import annotations

import sys

from benchmarks.distill import report, rows, teachers

# None of them is itself the main module: their functions travel to other processes by name.
COMMANDS = {"build": teachers.main, "run": rows.main, "report": report.main}

if __name__ == "__main__":
    command, rest = sys.argv[1] if len(sys.argv) > 1 else "build", sys.argv[2:]
    if command not in COMMANDS:
        raise SystemExit(f"unknown command {command!r}; there is: {', '.join(COMMANDS)}")
    COMMANDS[command](rest)
