"""Paths that were given on the command line: what a pair is called after them, and which name one file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from fusecli.errors import UsageError


def pair_id(image: str, text: str) -> str:
    """What a single pair is called: what the paths of its files end in alike, as in ``batch``; else both stems.

    ``images/animals/ant.npy`` and ``texts/animals/ant.npy`` are ``animals/ant``.
    """
    one, other = _steps(image), _steps(text)
    alike = 0
    while alike < min(len(one), len(other)) and one[-1 - alike] == other[-1 - alike]:
        alike += 1
    if not alike:
        return f"{one[-1]} + {other[-1]}"
    return one[-1] if one == other else "/".join(one[-alike:])


def _steps(path: str) -> list[str]:
    return ["stdin"] if path == "-" else os.path.splitext(os.path.abspath(path))[0].split("/")


def refuse_same_file(outputs: Sequence[str | None], inputs: Sequence[str | None]) -> None:
    """Raise `UsageError` if a file would be written that is also read, or two results would go to one place."""
    taken = {_identity(path, 0) for path in inputs if path} - {"-"}
    pipes: set[object] = set()
    for path in outputs:
        if not path:
            continue
        mine, pipe = _identity(path, 1), _pipe(path)
        if mine in taken or (pipe is not None and pipe in pipes):
            raise UsageError("output is also an input or another output", where=path, hint="write to another file")
        taken.add(mine)
        pipes.add(pipe)


def _pipe(path: str) -> object:
    """What two names of one pipe to write to have in common; None for anything else."""
    try:
        info = os.fstat(1) if path == "-" else os.stat(path)
    except OSError:
        return None
    return (info.st_dev, info.st_ino) if stat.S_ISFIFO(info.st_mode) else None


def _identity(path: str, standard: int) -> object:
    """What two names of one file have in common; ``standard`` is the descriptor that ``-`` stands for."""
    try:
        info = os.fstat(standard) if path == "-" else os.stat(path)
    except OSError:
        return os.path.realpath(path)  # not there yet
    if stat.S_ISREG(info.st_mode):
        return info.st_dev, info.st_ino
    return "-" if path == "-" else object()  # pipes and devices may be named as often as one likes
