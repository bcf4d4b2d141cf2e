"""Where each stage of a run stands, for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from pipeline.config import Settings
from pipeline.report.console import Display
from pipeline.stages.run import show_status


def print_status(settings: Settings, *, until: str = "register") -> None:
    """Print ``{"name", "run_dir", "stages": [{"stage", "state", "why"}]}``, and nothing beside it."""
    found = show_status(settings, until=until, display=Display(Console(quiet=True)))
    told = {"name": settings.name, "run_dir": settings.run_dir, "stages": [asdict(status) for status in found]}
    print(json.dumps(told, indent=2))
