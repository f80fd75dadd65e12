"""What was done with every pair: a file of JSON lines that is only ever added to.

A run begins with a line ``{"run": …}`` that holds all that decides the results; a line for each pair follows.
Every part of a divided run has a ledger of its own; together they tell what is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecli.batch.job import Outcome
from fusecli.batch.store import Piece
from fusecli.errors import OutputError, UsageError


@dataclass
class History:
    """What the ledgers of an output say."""

    run: dict[str, Any] | None = None
    fused: dict[str, tuple[Piece, Piece | None]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: str) -> History:
        """Read every ledger in ``folder``; lines that a crash cut short are passed over."""
        history = cls()
        shapes: dict[Any, Any] = {}
        for path in sorted(Path(folder).glob("ledger*.jsonl")):
            for record in _lines(path):
                history._take(record, shapes)
        return history

    def _take(self, record: dict[str, Any], shared: dict[Any, Any]) -> None:
        try:
            if "run" in record:
                self.run = record["run"]
                return
            id, status = record["id"], record["status"]
            if status == "fused":
                dump = record.get("attention")
                self.fused[id] = (_piece(record, shared), _piece(dump, shared) if dump else None)
                self.failed.discard(id)
            elif status == "failed":
                self.failed.add(id)
                self.fused.pop(id, None)
            elif status == "missing":
                self.missing.add(id)
        except (KeyError, TypeError, AttributeError):
            pass  # not a line of ours


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _piece(facts: dict[str, Any], shared: dict[Any, Any]) -> Piece:
    kind = tuple(facts["shape"]), facts["dtype"], facts.get("part")
    shape, dtype, part = shared.setdefault(kind, kind)  # one copy of what many have in common
    return Piece(shape, dtype, part, facts.get("at", 0))


class Ledger:
    """The ledger that this run adds to."""

    def __init__(self, folder: str, shard: str | None) -> None:
        self.path = f"{folder}/ledger{f'-{shard}' if shard else ''}.jsonl"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._write(b"\n")  # a line that was cut short stays by itself

    def begin(self, run: dict[str, Any]) -> None:
        """A run starts."""
        self._write(json.dumps({"run": run}, sort_keys=True).encode() + b"\n")

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keep what happened.

        Raises:
            OutputError: it cannot be written.
        """
        self._write(b"".join(json.dumps(outcome.record()).encode() + b"\n" for outcome in outcomes))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise OutputError("cannot be written", where=self.path, found=error.strerror) from error

    def close(self) -> None:
        """Nothing more will come."""
        os.close(self._fd)


def require_same_run(old: dict[str, Any] | None, new: dict[str, Any], output: str) -> None:
    """Raise `UsageError` with the difference if an output was begun with other weights or options."""
    if old is None or old == new:
        return
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    raise UsageError(
        "was begun with other weights or options",
        where=output,
        found=", ".join(f"{name} {_shown(old.get(name))}" for name in names),
        wanted=", ".join(f"{name} {_shown(new.get(name))}" for name in names),
        hint="write to another output, or start afresh with --overwrite",
    )


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


class Lock:
    """One output has one writer: a lock that the system takes back when the process ends.

    Parts of a divided run share the output and exclude each their own kind; a whole run excludes all.
    """

    def __init__(self, folder: str, shard: str | None) -> None:
        self._held: list[int] = []
        if shard:
            self._take(f"{folder}/lock-{shard}", fcntl.LOCK_EX)
        self._take(f"{folder}/lock", fcntl.LOCK_SH if shard else fcntl.LOCK_EX)

    def _take(self, path: str, how: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._held.append(fd)
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            folder = os.path.dirname(path)
            raise OutputError("another run is writing here", where=folder, hint="wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks

    def release(self) -> None:
        """Let others in; also called in workers, which do not hold it for themselves."""
        for fd in self._held:
            os.close(fd)
        self._held.clear()
