"""What every command shares: options, and where words go."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def note(text: str, quiet: bool) -> None:
    """A line for the user on stderr."""
    if not quiet:
        print(text, file=sys.stderr)


def complain(text: str, hint: str | None) -> None:
    """An error on stderr, and what to do about it."""
    print("error:", " ".join(text.split()), file=sys.stderr)
    if hint:
        print("hint:", hint, file=sys.stderr)


def emit(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value), flush=True)
