"""What the site needs beside the pages: the plots of the benchmarks, and the page of the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = "../benchmarks/results/"  # as pages name it, so that they are whole in the repository, too


def on_files(files: Files, *, config: Any) -> Files:
    """Add files that do not lie under docs/."""
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Let pages show the plots that were added."""
    return markdown.replace(f"]({RESULTS}", "](results/")
