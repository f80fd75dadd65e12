"""Who may write where: one run to an output, one output to a place for attention."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from fusecli.errors import OutputError, UsageError
from fusecli.formats import write_whole

#: In the folder with the state of attention: the path of that of the features it belongs to, seen from there.
OWNER = "attention-of"


def require_unclaimed(folder: str, attended: str | None) -> None:
    """See that results meet no other ones.

    Args:
        folder: with the state of an output.
        attended: likewise of its attention.

    Raises:
        UsageError: the attention of another output goes to one of them, or other features to where attention is to go.
    """
    hint = "write to another place, or start over with --overwrite"
    for place, mine in ((folder, None), (attended, os.path.realpath(folder))):
        other = place and _owner(place)
        if other and other != mine:
            raise UsageError("holds the attention of another output", where=place, found=other, hint=hint)
    if attended and any(Path(attended).glob("ledger*.jsonl")):
        raise UsageError("holds fused features, not attention", where=attended, hint=hint)


def claim(folder: str, attended: str | None) -> None:
    """Say whose attention is written; arguments as in `require_unclaimed`."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{OWNER}")
    if attended:
        mine = os.path.relpath(*map(os.path.realpath, (folder, attended)))
        write_whole(f"{attended}/{OWNER}", os.fsencode(mine))


def _owner(folder: str) -> str | None:
    """The state of the output whose attention lies with ``folder``, as long as that is there."""
    with contextlib.suppress(OSError, ValueError), open(f"{folder}/{OWNER}", "rb") as file:
        other = os.path.realpath(f"{os.path.realpath(folder)}/{os.fsdecode(file.read())}")
        return other if os.path.isdir(other) else None
    return None


#: How often a lock that is taken is tried again, and seconds between.
TRIES, PAUSE = 2, 0.05


def is_held(path: str) -> bool:
    """Whether somebody has a lock, or nobody can tell."""
    try:
        fd = os.open(path, (os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def lock_of(folder: str, shard: str | None) -> str:
    """The file that the run of a part, or a whole run, locks."""
    return f"{folder}/lock{f'-{shard}' if shard else ''}"


class Lock:
    """One output has one writer: a lock that the system takes back when the process ends.

    Parts of a divided run share the output and exclude each their own kind; a whole run excludes all.
    """

    def __init__(self) -> None:
        self._held: list[int] = []

    def take(self, folder: str, shard: str | None) -> None:
        """Be the writer of the output whose state lies in ``folder``.

        Raises:
            OutputError: another run is.
        """
        if shard:
            self._take(lock_of(folder, shard), fcntl.LOCK_EX)
        self._take(lock_of(folder, None), fcntl.LOCK_SH if shard else fcntl.LOCK_EX)

    def _take(self, path: str, how: int) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError as error:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # somebody else made it, and lets others read it
            except FileNotFoundError:
                raise error from None
        self._held.append(fd)
        for more in range(TRIES, -1, -1):
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if more:  # somebody may just have asked `is_held`
                    time.sleep(PAUSE)
                    continue
                self.release()
                folder, hint = os.path.dirname(path), "wait for it, or stop it"
                raise OutputError("another run is writing here", where=folder, hint=hint) from None
            except OSError:
                pass  # a file system without locks
            return

    def release(self) -> None:
        """Close the files that are locked: the lock is free when no process has them open.

        Workers, which inherit them, call it as well.
        """
        for fd in self._held:
            os.close(fd)
        self._held.clear()
