"""Who is at work in a folder: a lock that the system takes back however a process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


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
