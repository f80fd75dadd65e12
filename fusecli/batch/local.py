"""The runner for one machine: a pool of processes that may die."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from fusecli.batch.job import Item, Items, Outcome, Stop, Work, failed
from fusecli.errors import FusecliError
from fusecli.machine import ENDING, listen, undisturbed

#: Items that a worker has before it at a time: the next one is there when one is done.
AHEAD = 2
#: Bytes that a pipe is to have room for while nobody reads: two that send to each other at once would wait for ever.
SMALL = 2**16
#: Seconds that items under way are given to finish after an interruption.
PATIENCE = 10.0


@dataclass(eq=False)
class _Worker:
    """One process and what it has to do."""

    pid: int
    pipe: Connection
    queue: deque[Item] = field(default_factory=deque)


class Pool:
    """Processes that do items; made by `fork`, so that they have the weights without reading them again.

    Args:
        work: does one item; must not raise.
        count: of processes.
        in_child: is called in each process before it works.
    """

    def __init__(self, work: Work, count: int, in_child: Callable[[], None] = lambda: None) -> None:
        self._work, self._count, self._in_child = work, count, in_child
        self._workers: list[_Worker] = []
        self._again: deque[Item] = deque()  # for a worker that has nothing else: pairs that were lost, large items
        self._blamed: set[str] = set()  # pairs that were under way when their worker died
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> _Worker:
        sys.stdout.flush()
        main = os.getpid()
        # Python would swallow a Ctrl-C while it forks, and a child that is told to end would do so as the main process.
        with undisturbed():
            mine, theirs, pid = _forked()
            if pid == 0:
                mine.close()
                for other in self._workers:
                    other.pipe.close()  # or it would never see that the main process is gone
                _serve(theirs, self._work, self._in_child, main)
        theirs.close()
        self._workers.append(_Worker(pid, mine))
        return self._workers[-1]

    def run(self, items: Items, stop: Stop) -> Iterator[list[Outcome]]:
        """Do all items, or those begun before ``stop``; gives the outcomes of each as it is done."""
        while not stop.asked:
            hungry = self._feed(items)
            if items.ended() and not self._again and not any(worker.queue for worker in self._workers):
                return
            heard: list[Any] = [*(worker.pipe for worker in self._workers), stop.fileno()]
            more = hungry and not items.ended()
            if more and items.fileno() is not None:
                heard.append(items.fileno())
            elif more:  # there was nothing to do in what was taken, so there is something to tell
                yield []
            yield from self._hear(wait(heard, 0 if more and items.fileno() is None else None))

    def drain(self) -> Iterator[list[Outcome]]:
        """Let the items under way finish, for a while."""
        end = time.monotonic() + PATIENCE
        while busy := [worker.pipe for worker in self._workers if worker.queue]:
            ready = wait(busy, max(0.0, end - time.monotonic()))
            if not ready:
                return
            yield from self._hear(ready)

    def close(self) -> None:
        """End all processes, at once."""
        while self._workers:
            worker = self._workers.pop()
            worker.pipe.close()
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)

    def _feed(self, items: Items) -> bool:
        """Give work to whoever has room; returns whether there would have been room for more than there was."""
        for depth in range(AHEAD):
            for number in range(self._count):
                worker = self._workers[number] if number < len(self._workers) else None
                if len(worker.queue if worker else ()) != depth:
                    continue
                if self._again and depth:
                    return False
                item = self._again.popleft() if self._again else items.take()
                if item is None:
                    return True
                message = pickle.dumps(item)
                if depth and len(message) > SMALL:
                    self._again.append(item)
                    return False
                worker = worker or self._start()
                worker.queue.append(item)
                with contextlib.suppress(OSError):  # it has died, as will be heard
                    worker.pipe.send_bytes(message)
        return False

    def _hear(self, ready: list[Any]) -> Iterator[list[Outcome]]:
        for worker in [worker for worker in self._workers if worker.pipe in ready]:
            try:
                outcomes: list[Outcome] = worker.pipe.recv()
            except (EOFError, OSError):
                worker.pipe.close()
                os.waitpid(worker.pid, 0)
                self._workers.remove(worker)
                yield from self._retry(worker.queue)
            else:
                worker.queue.popleft()
                yield outcomes

    def _retry(self, lost: deque[Item]) -> Iterator[list[Outcome]]:
        """What a dead worker was at is done again, each pair alone; a pair that kills twice has failed."""
        if not lost:
            return
        item = lost.popleft()
        if len(item) == 1 and item[0].id in self._blamed:
            yield [failed(item[0].id, FusecliError("its worker died twice", hint="out of memory?"))]
        else:
            self._blamed |= {task.id for task in item}
            self._again.extend([task] for task in item)
        self._again.extend(lost)


def _forked() -> tuple[Connection, Connection, int]:
    """Both ends of a pipe, and what `os.fork` gives.

    Raises:
        FusecliError: the system has no room for another process.
    """
    ends: tuple[Connection, ...] = ()
    try:
        mine, theirs = ends = Pipe()
        _make_room(mine, theirs)
        return mine, theirs, os.fork()
    except OSError as error:
        for end in ends:
            end.close()
        hint = "use fewer --workers"
        raise FusecliError("cannot start another process", found=error.strerror, hint=hint) from error


def _make_room(sender: Connection, receiver: Connection) -> None:
    """See that `SMALL` bytes fit in a pipe: some systems begin with 8 KiB (macOS)."""
    for end, buffer in ((sender, socket.SO_SNDBUF), (receiver, socket.SO_RCVBUF)):
        with socket.socket(fileno=os.dup(end.fileno())) as opened:
            if opened.getsockopt(socket.SOL_SOCKET, buffer) < 2 * SMALL:  # half of it may be for bookkeeping
                opened.setsockopt(socket.SOL_SOCKET, buffer, 2 * SMALL)


def _die_with_parent() -> None:
    """Where the system can do it: nobody writes on when the main process is gone, and with it the lock."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _keep_memory() -> None:
    """Let what is freed be taken again, where the C library is glibc.

    It gives memory back to the system beyond a limit of 128 KiB, which rises with the largest block that was ever freed
    (mallopt(3), M_MMAP_THRESHOLD). A few pairs are more than that, and every page that comes anew is a fault.
    """
    bytes(2**24)


def _serve(pipe: Connection, work: Work, in_child: Callable[[], None], main: int) -> None:
    """The life of a worker: it ends when the process ``main`` does, however that ends."""
    code = 1
    try:
        _die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group; the main process decides
        for number in (signal.SIGTERM, signal.SIGHUP):
            listen(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        in_child()
        _keep_memory()
        gc.freeze()  # what is there stays: do not look through it again and again
        while os.getppid() == main:
            pipe.send(work(pipe.recv()))
    except (EOFError, OSError):
        code = 0
    finally:
        os._exit(code)
