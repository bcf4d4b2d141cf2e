"""What the command `plan` does: make the plan, keep it in the run folder, show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.report.console import Display


def plan_run(
    config: Sequence[Path],
    overrides: Sequence[str],
    described: str | None,
    price: float | None,
    calibration: bool | None,
    as_json: bool,
    display: Display | None = None,
) -> int:
    """Plan a run; return the exit code: 0, or 2 where something stands against it.

    Parameters
    ----------
    config, overrides
        See `pipeline.settings_files.load_settings`.
    described, price, calibration
        See `pipeline.planning.plan.make_plan`.
    as_json : bool
        Print the plan as JSON on standard output, and the progress on standard error.
    display : Display, optional
    """
    from pipeline.planning.plan import as_text, keep, make_plan
    from pipeline.settings_files import load_settings

    display = display or Display(Console(stderr=True, highlight=False) if as_json else None)
    settings = load_settings(config, overrides)
    plan = make_plan(settings, described=described, price=price, calibration=calibration, display=display)
    path = keep(plan)
    if as_json:
        print(as_text(plan))
    else:
        from pipeline.planning.show import show

        show(plan, display)
        display.note(f"kept in {path}, for plan against actual")
    return 2 if plan.refused else 0
