"""Which results a gathered file tells of, and in what order: that of the run, with what runs before it have left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, zip_longest
from typing import Protocol

from fusecli.batch.gather import Result, gather, gathered, is_whole, remove_parts
from fusecli.batch.ledger import History
from fusecli.batch.stacks import is_stack
from fusecli.batch.store import PartStore, Piece

#: What is still there of a pair's result.
Held = Callable[[str], Piece | None]


class Feed(Protocol):
    """What a run has taken its pairs from."""

    streams: bool  # they came in time, and those of runs before it come before them

    @property
    def ids(self) -> list[str]:
        """All ids of the run, in order."""

    @property
    def rows(self) -> list[str]:
        """The ids that a stack has a row for, ``""`` where nobody knows one."""


def gather_what_is_there(store: PartStore, history: History, feed: Feed) -> None:
    """Write the file of a store anew, if what is there is not what it holds."""

    def held(id: str) -> Piece | None:
        pieces = history.pieces(id)
        piece = pieces.of(store.kind) if pieces else None
        return piece if piece and store.has(piece) else None

    stacked = is_stack(store)
    if not stacked:
        order = _order(store, history, held, feed)
    elif feed.streams:
        order = _rows_with_earlier(store, history, held, feed.rows)
    else:
        order = _rows(history, held, feed.rows)
    mine = partial(_results, held, order, stacked)
    if not any(piece for _, piece in mine()):
        remove_parts(store)  # of pairs that failed half-way
    elif not is_whole(store) or any(wanted != there for wanted, there in zip_longest(mine(), gathered(store))):
        gather(store, mine)


def _rows(history: History, held: Held, rows: list[str]) -> list[str]:
    """The rows of a stack: it ends with the last pair of which something is known.

    What was not done before that has a row too, or the numbers of rows would say nothing.
    """
    known = history.failed | history.missing
    last = max((at for at, id in enumerate(rows) if not id or id in known or held(id)), default=-1)
    return rows[: last + 1]


def _rows_with_earlier(store: PartStore, history: History, held: Held, rows: list[str]) -> list[str]:
    """The rows of a stack that a stream adds to: they stay as they are, and what is new comes behind them.

    Where it is the same stream again, or goes on from there, lines that make no sense have a row as well.
    """
    before = [id for id, _ in gathered(store)]
    before += [id for id in history.ids(but={*before, *rows}) if held(id)]
    rows = _rows(history, held, rows)
    same = min(len(before), len(rows))
    if before[:same] == rows[:same]:
        return max(before, rows, key=len)
    there = {"", *before}
    return before + [id for id in rows if id not in there]


def _order(store: PartStore, history: History, held: Held, feed: Feed) -> list[str]:
    """The ids that a packed file tells of: those of this run, and what is there of runs before it."""
    known = set(feed.ids)
    standing = (id for id, _ in gathered(store))
    before = dict.fromkeys(chain(standing, history.ids(but=known)))  # as they stand, then as they came
    earlier = [id for id in before if id not in known and held(id)]
    return earlier + feed.ids if feed.streams else feed.ids + earlier


def _results(held: Held, order: list[str], stacked: bool) -> Iterator[Result]:
    """What a gathered file tells of; only in a stack is there a row for a pair that has no result."""
    for id in order:
        piece = held(id)
        if piece or stacked:
            yield id, piece
