"""`python -m benchmarks.ranking all --work DIR`: fetch the data, build the ground truth, score, report."""

from __future__ import annotations

import sys

from benchmarks.ranking import build, fetch, report

# None of them is itself the main module: their functions travel to workers by name.
COMMANDS = {"fetch": fetch.main, "build": build.main, "score": report.score, "report": report.report}

if __name__ == "__main__":
    command, rest = sys.argv[1] if len(sys.argv) > 1 else "report", sys.argv[2:]
    for name in COMMANDS if command == "all" else (command,):
        COMMANDS[name](rest)
