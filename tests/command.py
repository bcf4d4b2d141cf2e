"""The command line, called in this process."""

from __future__ import annotations

import pytest

from jobs.cli import main


class Command:
    """Calls ``faculty`` with the arguments; `plainly` folds white space in what it prints, which tables are full of."""

    def __init__(self, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Return exit code, output and errors."""
        self._patch.setattr("sys.argv", ["faculty", *map(str, arguments)])
        self._patch.delenv("FACULTY_VERBOSE", raising=False)
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = self._capsys.readouterr()
        return int(code or 0), out, err

    def plainly(self, *arguments: object) -> tuple[int, str, str]:
        """Return exit code, output with single spaces, and errors."""
        code, out, err = self(*arguments)
        return code, " ".join(out.split()), err
