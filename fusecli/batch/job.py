"""The words of a batch: tasks, items, outcomes, the job that all of them share, and the wish to stop."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from fusecli.batch.store import Store
from fusecli.collections import Place
from fusecli.errors import FusecliError, InputError, is_out_of_gpu_memory, is_out_of_memory, unwritable
from fusecli.machine import listen
from fusecli.pipeline import Mover
from fusecli.weights import Weights


class Task(NamedTuple):
    """One pair to fuse."""

    id: str
    image: Place
    text: Place


#: Tasks that are done together: read, fused and written by one worker, lost together if it dies.
Item: TypeAlias = "list[Task]"


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of the results, beside the weights; kept in the ledger and compared on resume."""

    dtype: str | None = None
    attention_mean: bool = False
    attention_dtype: str | None = None
    allow_nonfinite: bool = False

    def facts(self) -> dict[str, Any]:
        """As the ledger has them."""
        return asdict(self)


class Outcome(NamedTuple):
    """What happened to one pair.

    ``status`` is ``fused``, ``failed``, ``missing`` (one side is not there) or ``skipped`` (done before).
    ``stop`` says that no other pair will fare better: the disk is full, say.
    """

    id: str
    status: str
    facts: dict[str, Any]
    stop: bool = False
    read: float = 0.0  # seconds
    fuse: float = 0.0
    write: float = 0.0
    nbytes: int = 0  # read and written

    def ends_run(self, fail_fast: bool) -> bool:
        """Whether no pair is to be done after that one."""
        return self.stop or (fail_fast and self.status == "failed")

    def record(self) -> dict[str, Any]:
        """As the ledger and ``--json`` have it."""
        return {"id": self.id, "status": self.status, **self.facts}


#: What any pair would run into, not this one alone: too many open files; in writing also no space, over quota,
#: read-only, a broken disk. What cannot be read may be one bad sector.
FATAL_IN_READING = {errno.EMFILE, errno.ENFILE}
FATAL = FATAL_IN_READING | {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def failed(id: str, error: Exception) -> Outcome:
    """The outcome of a pair that ended in ``error``, and whether the others will fare no better."""
    cause = error.__cause__ if isinstance(error, FusecliError) else error
    fatal = FATAL_IN_READING if isinstance(error, InputError) else FATAL
    stop = isinstance(cause, OSError) and cause.errno in fatal
    if is_out_of_memory(error):
        on_gpu = is_out_of_gpu_memory(error)
        way_out = "use --device cpu, or another GPU" if on_gpu else "use fewer workers, or more memory"
        error = FusecliError("out of memory", hint=way_out)
    elif isinstance(error, OSError):
        error = unwritable(error.filename2 or error.filename, error)
    elif not isinstance(error, FusecliError):
        error = FusecliError("internal error", found=f"{type(error).__name__}: {error}")
    hint = {"hint": error.hint} if error.hint else {}
    return Outcome(id, "failed", {"error": error.what, "message": str(error), **hint}, stop)


@dataclass
class Job:
    """What a worker has to know once; it reaches workers by `fork`."""

    weights: Weights
    options: Options
    fused: Store
    attention: Store | None
    to_device: Mover = None
    folder: str = ""  # with the state of the run
    threads: int = 1  # for a large text
    other_inputs: tuple[str, ...] = ()  # files that are read beside the features
    fail_fast: bool = False  # the first pair that fails is the last


#: Does one item; never raises for a bad pair.
Work: TypeAlias = Callable[[Item], "list[Outcome]"]


def unfailing(work: Work) -> Work:
    """``work`` that never raises: after an error that nobody foresaw each pair of the item is tried alone."""

    def do(item: Item) -> list[Outcome]:
        try:
            return work(item)
        except Exception as error:
            return [failed(item[0].id, error)] if len(item) == 1 else [do([task])[0] for task in item]

    return do


class Items(Protocol):
    """Items as they come."""

    def take(self) -> Item | None:
        """The next item, or None if there is none now."""

    def ended(self) -> bool:
        """Whether no further item will come."""

    def fileno(self) -> int | None:
        """What becomes readable when there may be more."""


class Stop:
    """A request to stop, from Ctrl-C or from the run itself, that wakes a waiting runner."""

    def __init__(self) -> None:
        self.asked = False
        self._reader, self._writer = os.pipe()

    def ask(self) -> None:
        """Begin nothing new."""
        self.asked = True
        os.write(self._writer, b"x")

    def fileno(self) -> int:
        """What becomes readable with the wish."""
        return self._reader

    def close(self) -> None:
        """Nobody listens any more."""
        os.close(self._reader)
        os.close(self._writer)

    @contextlib.contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Take the first Ctrl-C as the wish; the second ends the process as ever."""

        def hear(number: int, frame: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.ask()

        before = listen(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
