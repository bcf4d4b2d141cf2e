"""Credentials are taken out of everything that is printed, tagged or logged. Imports nothing."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/\s?#'\"]*@")
# A database's password may hold a bare slash, so the secret reaches to the last "@" before a blank. "host:5000/…@…" is
# no such case: what follows the colon there is a port.
_RAW_PASSWORD = re.compile(r"(?<=://)[^\s/:@'\"]*:(?!\d+(?:[/?#\s]|$))[^\s'\"]*@(?=[\w\[])")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:password|passwd|pwd|token|secret|signature|credential|api_?key|access_?key)|sig)=)[^&\s#'\"]+"
)


def redact(text: str) -> str:
    """Return `text` without the credentials of the URIs in it.

    ``scheme://user:password@host`` becomes ``scheme://host``, and the value of a query field that carries a secret
    (``password``, ``token``, ``sig``, …) becomes ``***``.
    """
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1***", _RAW_PASSWORD.sub("", _USER_INFO.sub("", text)))


def one_line(error: BaseException) -> str:
    """Return an error's message without credentials, in one line of at most 500 characters."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:497]}…"
