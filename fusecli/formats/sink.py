"""Where bytes go: whole files that appear at once, and streams."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fusecli.errors import STDOUT, OutputError, unwritable
from fusecli.formats.source import NumpyArray, as_bytes
from fusecli.machine import write_all

#: Bytes written at once: pieces of megabytes took the kernel two to ten times as long here.
PIECE = 2**18


class Sink(Protocol):
    """Bytes by position, with a name."""

    name: str

    def put(self, offset: int, data: bytes | NumpyArray) -> None:
        """Write ``data`` at ``offset``."""


class FileSink:
    """A file, written by position; ``head`` are its first bytes, which go out with those that follow them."""

    __slots__ = ("_fd", "_head", "name")

    def __init__(self, name: str, fd: int, head: bytes = b"") -> None:
        self.name, self._fd, self._head = name, fd, head

    def put(self, offset: int, data: bytes | NumpyArray) -> None:
        """See `Sink`."""
        try:
            self._put(offset, _as_bytes(data))
        except OSError as error:
            error.filename = self.name
            raise

    def _put(self, offset: int, view: memoryview) -> None:
        if self._head:
            head, self._head = self._head, b""
            together = offset == len(head)
            done = os.pwritev(self._fd, [head, view[:PIECE]] if together else [head], 0) - len(head)
            if done < 0:
                self._put(0, memoryview(head))
            elif together:
                view, offset = view[done:], offset + done
        while view:
            done = os.pwrite(self._fd, view[:PIECE], offset)
            view, offset = view[done:], offset + done


class StreamSink:
    """A pipe or terminal: what comes ahead of its turn is held until then."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self._fd = name, fd
        self._at = 0
        self._held: dict[int, bytes] = {}

    def put(self, offset: int, data: bytes | NumpyArray) -> None:
        """See `Sink`."""
        if offset != self._at:
            self._held[offset] = bytes(_as_bytes(data))
            return
        self._send(_as_bytes(data))
        while self._at in self._held:
            self._send(memoryview(self._held.pop(self._at)))

    def _send(self, view: memoryview) -> None:
        try:
            write_all(self._fd, view)
        except OSError as error:
            error.filename = self.name
            raise
        self._at += len(view)


def _as_bytes(data: bytes | NumpyArray) -> memoryview:
    if isinstance(data, bytes):
        return memoryview(data)
    return as_bytes(np.ascontiguousarray(data))


def is_stream(path: str) -> bool:
    """True if ``path`` is ``-``, a pipe or a device: something that cannot be written twice."""
    if path == "-":
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path)
    except OSError:
        return False


@contextlib.contextmanager
def open_sink(path: str) -> Iterator[Sink]:
    """Open ``path`` for writing; ``-`` is standard output.

    A file is written beside its place, without a name where the system can do that, and moved there at the end, so
    nobody sees half of it, and after an error the old file is as it was. Its mode is that of the old file, or follows
    the umask.

    Raises:
        OutputError: no such folder, no permission, no space.
        BrokenPipeError: nobody reads the pipe any more.
    """
    shown = STDOUT if path == "-" else path
    try:
        if is_stream(path):
            fd = os.dup(1) if path == "-" else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                yield StreamSink(shown, fd)
            finally:
                os.close(fd)
        else:
            yield from _whole_file(shown)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno == errno.EBADF:
            raise OutputError("is closed", where=shown) from error
        raise unwritable(shown, error) from error


def require_folder(path: str) -> str:
    """The folder that a file is to be in, links followed; `OutputError` if there is none."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        hint = None if os.path.lexists(folder) else f"mkdir -p {shlex.quote(folder)}"
        raise OutputError("no such folder", where=path, found=folder, hint=hint)
    return folder


def _whole_file(path: str) -> Iterator[Sink]:
    target = os.path.realpath(path)  # a link stays a link
    if os.path.isdir(target):
        raise OutputError("is a directory", where=path, wanted="a file name")
    folder = require_folder(path)
    with _Unnamed(target, os.path.join(folder, f".fusecli-{os.urandom(6).hex()}.tmp")) as fd:
        keep_mode(fd, target)
        yield FileSink(path, fd)


def keep_mode(fd: int, target: str) -> None:
    """Who was kept from reading the file ``target``, if there is one, is kept from reading what replaces it."""
    try:
        mode = stat.S_IMODE(os.stat(target).st_mode) & 0o777
    except OSError:
        return
    try:
        os.fchmod(fd, mode)
    except OSError as error:  # some file systems have one mode for all files
        if stat.S_IMODE(os.fstat(fd).st_mode) & ~mode:
            error.filename = target
            raise


def require_replaceable(path: str) -> None:
    """Raise `OutputError` if the file ``path`` belongs to somebody else, in a folder where that protects it."""
    target = os.path.realpath(path)
    try:
        file, folder = os.lstat(target), os.stat(os.path.dirname(target))
    except OSError:
        return
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, file.st_uid, folder.st_uid):
        raise OutputError("belongs to another user and cannot be replaced", where=path, hint="write elsewhere")


class Replacing:
    """Gives a descriptor of the new file ``temporary``, which becomes ``target`` at the end, or goes after an error.

    Both must lie on one file system.
    """

    __slots__ = ("_fd", "_target", "_temporary")

    def __init__(self, target: str, temporary: str) -> None:
        self._target, self._temporary = target, temporary

    def __enter__(self) -> int:
        self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return self._fd

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            try:
                if kind is None:
                    self._link()
            finally:
                os.close(self._fd)
            if kind is None:
                os.rename(self._temporary, self._target)
                return
        except BaseException:
            kind = BaseException
            raise
        finally:
            if kind is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary)

    def _link(self) -> None:
        """Give the file its temporary name."""


class _Unnamed(Replacing):
    """The same, and the file has no name while it is written, where the system can do that (Linux, most file systems).

    So nothing is left of it even after ``kill -9``. To name it takes twice the time of making a small file.
    """

    __slots__ = ("_unnamed",)

    def __enter__(self) -> int:
        self._unnamed = hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")
        if self._unnamed:
            try:
                self._fd = os.open(os.path.dirname(self._temporary), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
            except OSError:  # not on this file system; anything else will come again
                self._unnamed = False
        return self._fd if self._unnamed else super().__enter__()

    def _link(self) -> None:
        if self._unnamed:
            try:
                # With a descriptor, which an absolute path makes no use of, Python follows the link in /proc.
                os.link(f"/proc/self/fd/{self._fd}", self._temporary, src_dir_fd=self._fd)
            except OSError:  # a sandbox may forbid it
                self._copy()

    def _copy(self) -> None:
        os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as unnamed, open(self._temporary, "xb") as named:
            os.fchmod(named.fileno(), stat.S_IMODE(os.fstat(self._fd).st_mode))
            shutil.copyfileobj(unnamed, named)


def write_whole(path: str, data: bytes) -> None:
    """Write ``data`` as the whole of a file; see `open_sink`.

    Raises:
        OutputError: it cannot be written.
    """
    with open_sink(path) as sink:
        sink.put(0, data)
