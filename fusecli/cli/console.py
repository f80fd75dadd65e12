"""Where words go."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

#: Makes one emoji of several; harmless.
JOINER = "\u200d"


def printable(text: str) -> str:
    """``text`` on one line, with what a terminal would obey (escapes, bells) spelled out."""
    return "".join(c if c.isprintable() or c == JOINER else c.encode("unicode_escape").decode() for c in text)


def note(text: str, quiet: bool) -> None:
    """A line for the user on stderr."""
    if not quiet:
        _say(text)


def complain(text: str, hint: str | None) -> None:
    """An error on stderr, and what to do about it."""
    _say(f"error: {text}")
    if hint:
        _say(f"hint: {hint}")


def _say(line: str) -> None:
    # Nobody may be listening: stderr closed, full or a broken pipe. That must not stop the work.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)


def emit(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value), flush=True)
