"""Where words go."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

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
    print(printable(line), file=sys.stderr, flush=True)


class _Spoken(io.TextIOWrapper):
    """Standard error: nobody may be listening (a full disk, a reader that has gone), which must not stop the work."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class _Printed(io.TextIOWrapper):
    """Standard output: errors say that they are of it."""

    def write(self, text: str) -> int:
        with _of_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _of_stdout():
            super().flush()


@contextlib.contextmanager
def _of_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


def open_streams() -> None:
    """Take over standard output and error; where one is closed, what goes there is lost."""
    if not os.environ.get("COLUMNS", "1").strip("0"):
        del os.environ["COLUMNS"]  # a terminal of no width shows nothing
    sys.stdout = _taken(sys.stdout, _Printed)
    sys.stderr = _taken(sys.stderr, _Spoken)


def _taken(stream: TextIO | None, kind: type[io.TextIOWrapper]) -> TextIO:
    if stream is None:
        return io.StringIO()
    if type(stream) is not io.TextIOWrapper:  # taken over before, or somebody else's
        return stream
    encoding, lines, through = stream.encoding, stream.line_buffering, stream.write_through
    return kind(stream.detach(), encoding, "backslashreplace", line_buffering=lines, write_through=through)


def flush_stdout() -> OSError | None:
    """Send out what is left for standard output; returns why that cannot be done, and drops it then.

    Python would try once more as it ends, and exit with a code of its own.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error
    return None


def emit(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value), flush=True)
