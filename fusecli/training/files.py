"""What lies beside a checkpoint: its head, a log, and the state of an unfinished run."""

from __future__ import annotations

import contextlib
import json
import os
from typing import NamedTuple

from fusecli.errors import UsageError
from fusecli.formats import require_replaceable

#: What goes in place of the suffix of the checkpoint.
HEAD, LOG, STATE = ".head.safetensors", ".log.jsonl", ".state.pt"


def beside(output: str, suffix: str) -> str:
    """The name of a file that belongs to a checkpoint."""
    return os.path.splitext(output)[0] + suffix


def files_of(output: str) -> list[str]:
    """What is written beside a checkpoint; the state last."""
    return [beside(output, suffix) for suffix in (HEAD, LOG, STATE)]


def goes_on(output: str, resume: bool, overwrite: bool) -> bool:
    """Whether there is an unfinished run to go on with; that it is said what to do with it, and can be replaced.

    Raises:
        UsageError: it is not said, or twice.
        OutputError: a file of another user is in the way.
    """
    if resume and overwrite:
        raise UsageError("exclude each other", where="--resume --overwrite", hint="leave one of them out")
    state = beside(output, STATE)
    there = os.path.exists(state)
    if there and not resume and not overwrite:
        raise UsageError("there is an unfinished run", where=state, hint="--resume or --overwrite")
    for path in (output, *files_of(output)):
        require_replaceable(path)
    return resume and there


class Begun(NamedTuple):
    """What an unfinished run was begun with, as far as the first line of its log tells."""

    start: int | None = None  # which of the weights to begin with
    threads: int | None = None
    bfloat16: bool | None = None


def begun_with(output: str) -> Begun:
    """See `Begun`."""
    damaged = ValueError, AttributeError, TypeError, RecursionError
    with contextlib.suppress(OSError, *damaged), open(beside(output, LOG), "rb") as file:
        first = json.loads(file.readline())
        found = {**first, "bfloat16": first.get("run", {}).get("bfloat16", False)}  # an older version had none
        kinds = {"start": int, "threads": int, "bfloat16": bool}
        return Begun(**{name: found[name] for name, kind in kinds.items() if type(found.get(name)) is kind})
    return Begun()
