"""What README.md and docs/ show: fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes
    ----------
    where : str
        Page and line.
    kind : str
        What stands after the fence.
    text : str
    """

    where: str
    kind: str
    text: str

    def __str__(self) -> str:
        return self.where


def blocks(*kinds: str) -> list[Block]:
    """Return the blocks of these kinds on all pages."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] in kinds:
                line = text[: match.start()].count("\n") + 1
                found.append(Block(f"{path.relative_to(ROOT)}:{line}", match[1], match[2]))
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield where and the words of each command; a line that ends with a backslash goes on in the next.

    In a console block commands are the lines after ``$``, and what follows their backslashes.
    """
    for block in blocks("bash", "console"):
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for line in joined.splitlines():
            if block.kind == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            words = shlex.split(line, comments=True)
            if words:
                yield block.where, words
