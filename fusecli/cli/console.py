"""Where words go."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, TextIO

from fusecli.errors import STDOUT, OutputError, unwritable
from fusecli.machine import write_all

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


class _Descriptor(io.RawIOBase):
    """Standard output or error as a descriptor, -1 if it is closed.

    Args:
        fd: the descriptor.
        heedless: what cannot be written is dropped: nobody may be listening (a full disk, a reader that has gone), and
            that must not stop the work. Otherwise errors say where they are from.
    """

    def __init__(self, fd: int, heedless: bool) -> None:
        self._fd, self.heedless = fd, heedless or fd < 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd if self._fd >= 0 else super().fileno()

    def isatty(self) -> bool:
        return self._fd >= 0 and os.isatty(self._fd)

    def write(self, data: Any) -> int:
        try:
            write_all(self._fd, memoryview(data))
        except BrokenPipeError:
            if not self.heedless:
                raise
        except OSError as error:
            if not self.heedless:
                raise unwritable(STDOUT, error) from error
        return len(data)


def open_streams() -> None:
    """Take over standard output and error of the process; where one is closed, what goes there is lost."""
    if not os.environ.get("COLUMNS", "1").strip("0"):
        del os.environ["COLUMNS"]  # a terminal of no width shows nothing
    if sys.stdout is sys.__stdout__:  # else taken over before, or somebody else's
        sys.stdout = _taken(sys.stdout, heedless=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _taken(sys.stderr, heedless=True)


def _taken(stream: Any, heedless: bool) -> TextIO:
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Descriptor(-1, heedless)), "utf-8")
    raw = _Descriptor(stream.fileno(), heedless)
    through = stream.write_through  # PYTHONUNBUFFERED
    encoding, lines = stream.encoding, stream.line_buffering
    buffer: Any = raw if through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=lines, write_through=through)


def flush_stdout() -> Exception | None:
    """Send out what is left for standard output; returns why that cannot be done, and drops it then.

    Python would try once more as it ends, and exit with a code of its own.
    """
    try:
        sys.stdout.flush()
    except (OSError, OutputError) as error:
        raw = getattr(sys.stdout.buffer, "raw", None)
        if isinstance(raw, _Descriptor):
            raw.heedless = True
        return error
    return None


def emit(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value), flush=True)
