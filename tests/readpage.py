"""A page as tests read it: elements with their texts, tables by row, data of scripts. Standard library alone."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Parsed at once; `elements` are (tag, attributes, text) in the order in which they begin."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.parents: list[int | None] = []
        self.feed(html)
        self.close()
        assert not self._open, [self.elements[k][0] for k in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        self.elements.append((tag, dict(attrs), []))
        self.parents.append(self._open[-1] if self._open else None)
        if tag not in _VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an element that ends where it begins."""
        self.elements.append((tag, dict(attrs), []))
        self.parents.append(self._open[-1] if self._open else None)

    def handle_endtag(self, tag: str) -> None:
        """End the innermost element; it must be of this kind."""
        place = self._open.pop()
        assert self.elements[place][0] == tag, (self.elements[place], tag, self.getpos())

    def handle_data(self, data: str) -> None:
        """Give a text to all elements around it."""
        for place in self._open:
            self.elements[place][2].append(data)

    def by_id(self, name: str) -> str:
        """Return the text of the one element with an id."""
        (found,) = [text for _, attributes, text in self.elements if attributes.get("id") == name]
        return "".join(found)

    def ids(self) -> list[str]:
        """Return all ids."""
        return [str(attributes["id"]) for _, attributes, _ in self.elements if "id" in attributes]

    def data(self, name: str) -> Any:
        """Return what a script of data holds."""
        return json.loads(self.by_id(name))

    def rows(self, within: str) -> list[list[tuple[str, str | None]]]:
        """Return the rows of all tables inside an element: text and ``data-value`` of each cell."""
        (start,) = [place for place, (_, attributes, _) in enumerate(self.elements) if attributes.get("id") == within]
        found: list[list[tuple[str, str | None]]] = []
        inside = {start}
        for place in range(start + 1, len(self.elements)):
            if self.parents[place] not in inside:
                break  # what is inside an element follows it at once
            inside.add(place)
            tag, attributes, text = self.elements[place]
            if tag == "tr":
                found.append([])
            elif tag in ("td", "th"):
                found[-1].append((" ".join("".join(text).split()), attributes.get("data-value")))
        return found
