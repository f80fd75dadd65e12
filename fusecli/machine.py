"""What the machine gives: processors, peace from signals, to be alone in a folder, patience with pipes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: What a container may use of its processors, where one is limited (cgroups, version 2): microseconds of a period, or
#: "max", and the period.
CPU_MAX = "/sys/fs/cgroup/cpu.max"

#: What OpenBLAS takes the number of its threads from as it is loaded.
BLAS_THREADS = "OPENBLAS_NUM_THREADS"

#: Signals that end a process, and of which it learns.
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def cores() -> int:
    """How many processors this process may use: of many, a job of a cluster or a container often has some."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError), open(CPU_MAX, encoding="ascii") as file:
        quota, period = map(int, file.read().split())
        allowed = min(allowed, max(1, -(-quota // period)))
    return allowed


def have_threads_sleep() -> None:
    """Have torch's threads sleep soon where they find no work, if it is not loaded yet and the user says nothing else.

    Those of libgomp, which torch has on Linux, else look for it for about a millisecond, and keep others from the
    processors: beside a busy process learning took twice as long, and each of two trainings three times. Alone it takes
    4% longer so.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def listen(number: int, handler: Any) -> Any:
    """Install a handler, unless the signal came ignored (``nohup``, ``&`` in a script); returns the one before."""
    before = signal.getsignal(number)
    return before if before is signal.SIG_IGN else signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that would end the process wait until this is over: clearing up is not to be left half-way."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def alone_in(folder: str) -> Iterator[bool]:
    """Be the one at work in ``folder``, if nobody else is; False also where a file system has no locks.

    Raises:
        OSError: there is no such folder.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def write_all(fd: int, view: memoryview) -> None:
    """Write all of ``view``, however long it takes a pipe or terminal."""
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # who else has the pipe does not want to wait for it
            ready = select.poll()
            ready.register(fd, select.POLLOUT)
            ready.poll()
