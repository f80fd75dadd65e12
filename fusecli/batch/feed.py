"""Where pairs come from: matched collections, a manifest, or lines of one that arrive in time."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from fusecli.batch.apart import Inputs
from fusecli.batch.job import Item, Outcome, Task, failed
from fusecli.batch.manifest import Entry, Manifest
from fusecli.batch.plan import ITEM_PAIRS, Matched, Shard
from fusecli.collections import Collection, Place
from fusecli.errors import FileError, InputError

#: Ids without work after which it is told how far we are.
TELL = 4096
#: Gives the outcome of an id that needs no work, else None.
Keep = Callable[[str], Outcome | None]


@dataclass
class Pairs:
    """Pairs that are all known before the work begins."""

    ids: list[str]
    places: Callable[[str], tuple[Place, Place]]  # raises InputError for a pair that cannot be used
    known: list[Outcome] = field(default_factory=list)  # pairs that cannot be done, and why
    rows: list[str] = field(default_factory=list)  # ids, and "" for lines without one, as a stack of results has them
    inside: set[str] = field(default_factory=set)  # inputs that lie in an output


def from_collections(images: Collection, texts: Collection, found: Matched, inputs: Inputs) -> Pairs:
    """What `fusecli.batch.plan.match` brought together."""
    known = [Outcome(id, "missing", {"missing": "text"}) for id in found.no_text]
    known += [Outcome(id, "missing", {"missing": "image"}) for id in found.no_image]
    for side in (images, texts):
        inputs.see_all(side)
    rows = list(images) if found.no_text else found.both
    return Pairs(found.both, lambda name: (images.place(name), texts.place(name)), known, rows, inputs.found)


def from_manifest(reader: Manifest, path: str, shard: Shard | None, inputs: Inputs) -> Pairs:
    """The pairs that the manifest at ``path`` names, in its order.

    Raises:
        FileError: it cannot be read, or has no header. A line that makes no sense is an outcome.
    """
    lines = _Lines(reader, shard, inputs)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in file:
                lines.take(line)
    except OSError as error:
        raise FileError("cannot be read", where=path, found=error.strerror) from None
    entries = lines.entries
    if not entries and not lines.known and shard is None:
        raise FileError("names no pairs", where=path, wanted="lines with id,image,text")
    return Pairs(list(entries), lambda name: entries[name][2:], lines.known, lines.rows, inputs.found)


class _Lines:
    """What the lines of a manifest come to."""

    def __init__(self, reader: Manifest, shard: Shard | None, inputs: Inputs | None = None) -> None:
        self._reader, self._shard, self._inputs = reader, shard, inputs
        self.entries: dict[str, Entry] = {}
        self.known: list[Outcome] = []  # lines that name no pair
        self.rows: list[str] = []  # see `Pairs`

    def take(self, line: str) -> Entry | None:
        """The pair that a line names, if it is a new one of this part.

        Raises:
            FileError: it should be a header, and is none.
        """
        try:
            entry = self._reader.read(line)
        except InputError as error:
            if self._reader.headless:
                raise
            self._fail(error)
            return None
        if entry and self._inputs:  # those of other parts too
            self._inputs.see(entry.image.path)
            self._inputs.see(entry.text.path)
        if entry is None or (self._shard and not self._shard.has(entry.id)):
            return None
        if entry.id in self.entries:
            where = f"{self._reader.name}, line {entry.line}"
            found = f"{entry.id}, also in line {self.entries[entry.id].line}"
            self._fail(FileError("duplicate id", where=where, found=found))
            return None
        self.entries[entry.id] = entry
        self.rows.append(entry.id)
        return entry

    def _fail(self, error: InputError) -> None:
        line = self._reader.line
        outcome = failed(f"line {line}", error)
        # What has a line is no pair's id.
        self.known.append(outcome._replace(facts={"line": line, **outcome.facts}))
        self.rows.append("")


class _Feed:
    """What both kinds of feed come to know of pairs without any work."""

    def __init__(self) -> None:
        self._known: list[Outcome] = []

    def outcomes(self) -> list[Outcome]:
        """What has become known since the last call."""
        known, self._known = self._known, []
        return known


class ListFeed(_Feed):
    """Items of `Pairs`, made as they are taken."""

    streams = False

    def __init__(self, pairs: Pairs, ids: Sequence[str], keep: Keep, size: int, limit: int | None) -> None:
        super().__init__()
        #: Pairs that will be looked at; None: as many as it takes to do ``limit``.
        self.total = len(ids) if limit is None or limit >= len(ids) else None
        self._pairs, self._ids, self._keep, self._size = pairs, iter(ids), keep, size
        self._left = limit
        self._ended = False

    def take(self) -> Item | None:
        """See `Items`."""
        item: Item = []
        size = self._size if self._left is None else min(self._size, self._left)
        while len(item) < size and len(self._known) < TELL:
            ids = list(islice(self._ids, size - len(item)))
            if not ids:
                break
            item += [task for id in ids if (task := self._task(id))]
        if self._left is not None:
            self._left -= len(item)
        self._ended = not item and len(self._known) < TELL
        return item or None

    def _task(self, id: str) -> Task | None:
        known = self._keep(id)
        if known is None:
            try:
                return Task(id, *self._pairs.places(id))
            except InputError as error:
                known = failed(id, error)
        self._known.append(known)
        return None

    def ended(self) -> bool:
        """See `Items`."""
        return self._ended

    def fileno(self) -> int | None:
        """See `Items`: they are all there."""
        return None

    @property
    def ids(self) -> list[str]:
        """All of them, in their order."""
        return self._pairs.ids

    @property
    def rows(self) -> list[str]:
        """See `Pairs`."""
        return self._pairs.rows


class StreamFeed(_Feed):
    """Items of a manifest on standard input: each line is work as soon as it is there (if its id is ``wanted``)."""

    total = None
    streams = True

    def __init__(
        self,
        reader: Manifest,
        fd: int,
        shard: Shard | None,
        keep: Keep,
        limit: int | None,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__()
        self._fd, self._keep, self._left, self._wanted = fd, keep, limit, wanted
        self._lines = _Lines(reader, shard)
        self._waiting: deque[Task] = deque()
        self._rest = bytearray()  # of a line that has not ended
        self._ended = limit == 0

    def take(self) -> Item | None:
        """See `Items`; never waits."""
        if not self._waiting and not self._ended and select.select([self._fd], [], [], 0)[0]:
            self._read()
        count = min(len(self._waiting), max(1, min(ITEM_PAIRS, len(self._waiting) // 4)))
        return [self._waiting.popleft() for _ in range(count)] or None

    def _read(self) -> None:
        data = os.read(self._fd, 2**16)
        self._ended = not data
        self._rest += data
        if data and b"\n" not in data:  # so a line of any length is looked through once
            return
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        if self._ended and rest:
            lines = [rest]
        for line in lines:
            if self._left == 0:  # how much of the rest has arrived is chance, so none of it is looked at
                break
            entry = self._lines.take(line.decode("utf-8", "surrogateescape"))
            if entry and (self._wanted is None or self._wanted(entry.id)):
                known = self._keep(entry.id)
                if known:
                    self._known.append(known)
                else:
                    self._waiting.append(Task(entry.id, entry.image, entry.text))
                    self._left = None if self._left is None else self._left - 1
        self._known += self._lines.known
        self._lines.known.clear()
        self._ended |= self._left == 0

    def ended(self) -> bool:
        """See `Items`."""
        return self._ended and not self._waiting

    def fileno(self) -> int | None:
        """See `Items`."""
        return None if self._ended or self._waiting else self._fd

    @property
    def ids(self) -> list[str]:
        """Those that have come, in their order."""
        return list(self._lines.entries)

    @property
    def rows(self) -> list[str]:
        """See `Pairs`; of those that have come."""
        return self._lines.rows
