"""A run as one HTML file: inline styles, script, pictures and plots, and nothing that is fetched from anywhere.

Names of classes, teachers and files come from others. All of them go through Jinja's escaping; the page's policy allows
one script, by its hash, so that even text that slipped through could not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import page_format, page_plots
from pipeline.report.page_words import figure, headline, told

# Sections in their order: the part that each tells, which is its template's name, too; its heading.
SECTIONS: tuple[tuple[str, str], ...] = (
    ("ranking", "Which teachers"),
    ("agreement", "Do the scores agree"),
    ("transport", "From their classes to yours"),
    ("classes", "Class by class"),
    ("teaching", "Who taught what"),
    ("flow", "Knowledge flow"),
    ("training", "Learning curves"),
    ("confusion", "Confusion"),
    ("calibration", "Calibration"),
    ("mistakes", "Worst mistakes"),
    ("cost", "Cost"),
    ("lineage", "Lineage"),
    ("settings", "Settings"),
)
_CSS = ("base.css", "parts.css")
_JS = ("page.js", "matrix.js")


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the templates, with every text escaped and every missing value an error."""
    made = Environment(
        loader=PackageLoader("pipeline.report", "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= page_format.FILTERS
    made.globals |= page_plots.PLOTS
    return made


def shell() -> dict[str, Any]:
    """Return what every page has: its style, its script, and the policy that allows this script alone."""
    style, script = _joined(_CSS), _joined(_JS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return {"style": Markup(style), "script": Markup(script), "policy": policy}  # our own files, nobody's text


def _joined(names: tuple[str, ...]) -> str:
    folder = resources.files("pipeline.report") / "html"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def render(facts: Mapping[str, Any]) -> str:
    """Return the page of a run.

    Parameters
    ----------
    facts : mapping
        ``head`` and ``parts`` as `pipeline.stages.report.gather` finds them.
    """
    parts, head = dict(facts["parts"]), facts["head"]
    parts["verdict"] = told(parts["verdict"])
    said = {"headline": headline(parts["verdict"]), "figure": figure(parts["verdict"])}
    sections = [_section(name, title, parts, head) for name, title in SECTIONS]
    left_out = {one["title"]: one["missing"] for one in sections if one["missing"]}
    page = environment().get_template("page.html")
    return page.render(head=head, parts=parts, sections=sections, left_out=left_out, **said, **shell())


def _section(name: str, title: str, parts: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section: its body, or why it is left out."""
    part = parts.get(name, {"missing": "it was not gathered"})
    missing, body = part.get("missing"), Markup("")
    if missing is None:
        try:
            template = environment().get_template(f"sections/{name}.html")
            body = Markup(template.render(part=part, parts=parts, head=head))  # escaped by the template
        except Exception as error:  # one section is not worth all others
            missing = f"it can't be shown ({type(error).__name__}: {error})"
    return {"id": name, "title": title, "missing": missing, "body": body}
