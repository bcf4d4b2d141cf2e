"""What `faculty schema` does: print the reference of the settings, or write it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.data.whole import replacing
from pipeline.errors import UserError


def schema_text() -> str:
    """Return the JSON Schema of a settings file, as docs/run.schema.json holds it."""
    from pipeline.reference.schema import settings_schema

    return json.dumps(settings_schema(), indent=1, ensure_ascii=False) + "\n"


def write_reference(out: Path | None, *, markdown: bool = False) -> None:
    """Print the JSON Schema, or the page of Markdown; or write it to a file, over an older one.

    Raises
    ------
    UserError
        When the file can't be written.
    """
    if markdown:
        from pipeline.reference.markdown import settings_page

        text = settings_page()
    else:
        text = schema_text()
    if out is None:
        sys.stdout.write(text)
        return
    try:
        with replacing(out) as sink:
            sink.write(text.encode())
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror or error})") from None
