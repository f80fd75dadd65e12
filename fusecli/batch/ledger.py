"""What was done with every pair: a file of JSON lines that is only ever added to.

A run begins with a line ``{"began": …, "run": …}`` that holds the time and all that decides the results; a line for
each pair follows. Every part of a divided run has a ledger of its own; together, in the order in which their runs
began, they tell what is done.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fusecli.batch.job import Outcome
from fusecli.batch.lock import is_held, lock_of
from fusecli.batch.store import GATHERED, Piece, believed
from fusecli.errors import OutputError, UsageError, unwritable
from fusecli.machine import write_all

#: How the line of a run starts.
BEGAN = b'{"began": '


class Pieces(NamedTuple):
    """What was written for a pair."""

    fused: Piece
    attention: Piece | None

    def of(self, kind: str) -> Piece | None:
        """The one of a kind, ``fused`` or ``attention``."""
        return self.attention if kind == "attention" else self.fused


_Kind: TypeAlias = "tuple[tuple[Any, ...], tuple[Any, ...] | None]"


class History:
    """What the ledgers of an output say.

    It is held in columns, a hundred bytes a pair: there may be millions.
    """

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []  # what decided the results: one, unless parts contradict each other
        self._begun: dict[str, Any] | None = None  # of which nothing has come yet
        self.began = 0.0  # when the last run did
        self.failed: set[str] = set()
        self.missing: set[str] = set()
        self._ids: list[str] = []
        self._kinds: list[_Kind | None] = []  # all of a pair's pieces but their offsets; None: it failed later
        self._at = array("q")
        self._attention_at = array("q")
        self._order = array("q")  # of the columns, by id
        self._shared: dict[_Kind, _Kind] = {}

    @classmethod
    def read(cls, folder: str) -> History:
        """Read every ledger in ``folder``; lines that a crash cut short are passed over.

        Raises:
            OutputError: one cannot be read.
        """
        history = cls()
        for run in sorted(chain.from_iterable(map(_runs, _ledgers(folder)))):
            history.began, history._begun = run.began, None
            for record in _lines(run):
                with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):  # no line of ours
                    history._take(record)
        history._sort()
        return history

    def pieces(self, id: str) -> Pieces | None:
        """What was written for a pair last, None if nothing was, or if it failed after that."""
        found = bisect_right(self._order, id, key=self._ids.__getitem__) - 1
        if found < 0 or self._ids[self._order[found]] != id:
            return None
        at = self._order[found]
        kind = self._kinds[at]
        if kind is None:
            return None
        fused, attention = kind
        dump = Piece._make((*attention, self._attention_at[at])) if attention else None
        return Pieces(Piece._make((*fused, self._at[at])), dump)

    def ids(self, but: Container[str] = ()) -> Iterator[str]:
        """The ids of which something was written, ``but`` some, in the order in which they first came."""
        seen: set[str] = set()
        for id in self._ids:
            if id not in seen and id not in but and self.pieces(id):
                seen.add(id)
                yield id

    def move(self, moved: Iterator[tuple[str, Piece | None]], kind: str, stays: Callable[[Piece], bool] | None) -> None:
        """Record new places of pieces; keep those for which ``stays(piece)`` is true.

        Args:
            moved: ids, each with its piece where it lies now.
            kind: of the pieces, ``fused`` or ``attention``.
            stays: whether a piece is still where it was.
        """
        for id, piece in moved:
            before = self.pieces(id)
            now = before and before.of(kind)
            if before and piece and not (stays and now and stays(now)):
                self._add(id, *before._replace(**{kind: piece}))
        self._sort()

    def undone(self, id: str) -> bool:
        """Whether a pair has failed, or lacked a side when it was last looked for."""
        return id in self.failed or (id in self.missing and self.pieces(id) is None)

    def _take(self, record: dict[str, Any]) -> None:
        run = record.get("run")
        if isinstance(run, dict):
            self._begun = run
            return
        id, status = record["id"], record["status"]
        if self._begun is not None:
            self.runs += [self._begun] if self._begun not in self.runs else []
            self._begun = None
        if type(id) is not str or "line" in record:
            return
        if status == "fused":
            dump = record.get("attention")
            self._add(id, _piece(record), _piece(dump) if dump else None)
            self.failed.discard(id)
        elif status == "failed":
            self.failed.add(id)
            self._append(id, None, 0, 0)
        elif status == "missing":
            self.missing.add(id)

    def _add(self, id: str, fused: Piece, attention: Piece | None) -> None:
        kind: _Kind = fused[:3], attention[:3] if attention else None
        self._append(id, self._shared.setdefault(kind, kind), fused.at, attention.at if attention else 0)

    def _append(self, id: str, kind: _Kind | None, at: int, attention_at: int) -> None:
        self._ids.append(id)
        self._kinds.append(kind)
        self._at.append(at)
        self._attention_at.append(attention_at)

    def _sort(self) -> None:
        self._order = array("q", sorted(range(len(self._ids)), key=self._ids.__getitem__))  # stable: the last is last


def _ledgers(folder: str) -> list[Path]:
    # `Path.glob` would pass over a folder that cannot be read.
    with _reading(folder):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [Path(folder, name) for name in sorted(fnmatch.filter(names, "ledger*.jsonl"))]


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "what was done before is written there; see that you may read it, or write to another output"
        raise OutputError("cannot be read", where=str(path), found=error.strerror, hint=hint) from error


class _Run(NamedTuple):
    """What one run wrote to a ledger."""

    began: float  # in seconds since 1970; a part of the ledger that does not say it comes first
    path: Path
    start: int
    end: int


def _runs(path: Path) -> list[_Run]:
    """The runs in a ledger, by the lines that begin them; each began after those before it, whatever a clock said."""
    runs, at, start, began = [], 0, 0, 0.0
    with _reading(path), open(path, "rb") as file:
        for line in file:
            if line.startswith(BEGAN):
                runs.append(_Run(began, path, start, at))
                start = at
                with contextlib.suppress(ValueError):
                    told = float(line[len(BEGAN) :].partition(b",")[0])
                    began = max(began, told) if math.isfinite(told) else began
            at += len(line)
    return [*runs, _Run(began, path, start, at)]


def _lines(run: _Run) -> Iterator[dict[str, Any]]:
    with open(run.path, "rb") as file:
        file.seek(run.start)
        left = run.end - run.start
        for line in file:
            left -= len(line)
            if left < 0:
                return
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line.decode("utf-8", "replace"))
                if isinstance(record, dict):
                    yield record


def _piece(facts: dict[str, Any]) -> Piece:
    piece = believed(facts["shape"], facts["dtype"], facts.get("part"), facts.get("at", 0))
    if piece.part == GATHERED:
        raise ValueError(piece)
    return piece


def runs_beside(mine: str) -> list[dict[str, Any]]:
    """What decides the results of the runs of other parts than that of the ledger ``mine``, and of its own before.

    Where nothing has come of a run, and it is under way no more, it decides nothing.
    """
    found = []
    for path in _ledgers(os.path.dirname(mine)):
        other, shard = path != Path(mine), path.stem.removeprefix("ledger").removeprefix("-")
        for one in _runs(path):
            lines = _lines(one)
            run = next(lines, {}).get("run")
            if isinstance(run, dict) and (next(lines, None) or (other and is_held(lock_of(str(path.parent), shard)))):
                found.append(run)
    return found


class Ledger:
    """The ledger that this run adds to."""

    def __init__(self, folder: str, shard: str | None) -> None:
        self.path = f"{folder}/ledger{f'-{shard}' if shard else ''}.jsonl"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._fd).st_size
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._write(b"\n")  # a line that was cut short stays by itself
            self._size += 1

    def begin(self, run: dict[str, Any], after: float) -> None:
        """A run starts, later than the one that began at ``after``, whatever the clock of that machine said."""
        began = max(time.time(), after + 0.001)
        self._write(BEGAN + f'{began:.3f}, "run": {json.dumps(run, sort_keys=True)}}}\n'.encode())

    def show(self) -> None:
        """Let other machines see what has been written."""
        with contextlib.suppress(OSError):  # not everywhere
            os.fsync(self._fd)

    def take_back(self) -> None:
        """Nothing has come of the run: it is as if it had never begun."""
        os.ftruncate(self._fd, self._size)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keep what happened.

        Raises:
            OutputError: it cannot be written.
        """
        self._write(b"".join(json.dumps(outcome.record()).encode() + b"\n" for outcome in outcomes))

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._fd, memoryview(data))
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Nothing more will come."""
        os.close(self._fd)


def require_same_run(runs: Iterable[dict[str, Any]], new: dict[str, Any], output: str, hint: str) -> None:
    """Raise `UsageError` with the difference, and a hint, if an output was begun with other weights or options."""
    for old in runs:
        _require_same(old, new, output, hint)


def _require_same(old: dict[str, Any], new: dict[str, Any], output: str, hint: str) -> None:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if not names:
        return
    if "method" in names:  # its own options would say nothing more
        names = [name for name in names if name in old and name in new]
    changes = (f"{name} {_shown(old.get(name))} -> {_shown(new.get(name))}" for name in names)
    raise UsageError(
        f"was begun with other weights or options: {', '.join(changes)}",
        where=output,
        hint=hint,
    )


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
