"""Where bytes come from: files, read by position; pipes, read once and kept."""

from __future__ import annotations

import math
import os
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np

from fusecli.arrays import FLOAT_NAMES, rows_of
from fusecli.errors import STDIN, FileError, ValuesError

NumpyArray: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

#: What a pipe is read by; a header that lies costs at most this much memory.
CHUNK = 2**20


class Source(Protocol):
    """Bytes with a name."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def size(self, end: int) -> int:
        """Bytes in all; of a pipe those up to ``end``, for which it is read."""

    def read(self, offset: int, count: int) -> bytes:
        """Up to ``count`` bytes from ``offset``; fewer where it ends."""

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill ``target`` from ``offset``; returns the number of bytes that were there."""


@dataclass(frozen=True)
class FileSource:
    """A regular file, read with ``pread``: no page of it stays in this process's memory."""

    name: str
    fd: int

    def size(self, end: int) -> int:
        """See `Source`."""
        return os.fstat(self.fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        count = max(0, min(count, self.size(0) - offset))
        data = os.pread(self.fd, count, offset)
        if len(data) == count:  # as ever; without a second copy of a header of megabytes
            return data
        target = bytearray(count)
        return bytes(target[: self.read_into(offset, memoryview(target))])

    def read_into(self, offset: int, target: memoryview) -> int:
        """See `Source`."""
        done = 0
        while done < len(target):
            got = os.preadv(self.fd, [target[done:]], offset + done)
            if not got:
                break
            done += got
        return done

    def __del__(self) -> None:
        _close(self.fd)


class BytesSource(NamedTuple):
    """A small file, read at once: one system call instead of one for each part of it."""

    name: str
    data: bytes

    def size(self, end: int) -> int:
        """See `Source`."""
        return len(self.data)

    def read(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        return self.data[offset : offset + count]

    def read_into(self, offset: int, target: memoryview) -> int:
        """See `Source`."""
        part = memoryview(self.data)[offset : offset + len(target)]
        target[: len(part)] = part
        return len(part)


@dataclass
class StreamSource:
    """A pipe: read as far as asked, never further, so that a second array may follow the first."""

    name: str
    fd: int
    _held: bytearray = field(default_factory=bytearray)

    def read(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        self.size(offset + count)
        return bytes(self._held[offset : offset + count])

    def read_into(self, offset: int, target: memoryview) -> int:
        """See `Source`."""
        end = offset + len(target)
        part = memoryview(self._held)[offset:end] if self.size(end) > offset else memoryview(b"")
        target[: len(part)] = part
        return len(part)

    def size(self, end: int) -> int:
        """See `Source`; all of that is held."""
        while len(self._held) < end:
            chunk = os.read(self.fd, min(CHUNK, end - len(self._held)))
            if not chunk:
                break
            self._held += chunk
        return len(self._held)

    def __del__(self) -> None:
        _close(self.fd)


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


def open_source(path: str, *, regular: bool = False, at_once: int = 0) -> Source:
    """Open ``path`` for reading; ``-`` is standard input.

    Args:
        path: the file.
        regular: refuse pipes and devices, which might keep us waiting.
        at_once: the same, and files of up to so many bytes are read at once and closed.

    Raises:
        FileError: it is missing, unreadable or a directory.
    """
    if path == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise FileError("is closed", where=STDIN)
        return StreamSource(STDIN, os.dup(0))  # a file on stdin too: a second array may follow the first
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if regular or at_once else 0))
    except FileNotFoundError:
        if not path:
            raise FileError("empty file name", hint="check that the variable is set") from None
        raise FileError("no such file", where=path) from None
    except (OSError, ValueError) as error:
        raise FileError("cannot be opened", where=path, found=reason(error)) from error
    if at_once and (data := _whole(fd, at_once)):
        return BytesSource(path, data)
    return _on_descriptor(path, fd, regular or at_once > 0)


def _whole(fd: int, most: int) -> bytes:
    """All of a file of up to ``most`` bytes, which is closed then; else nothing, and what it is must be asked."""
    with suppress(OSError):  # a folder, a pipe
        data = os.pread(fd, most + 1, 0)
        if 0 < len(data) <= most:
            os.close(fd)
            return data
    return b""


def _on_descriptor(name: str, fd: int, regular: bool) -> Source:
    info = os.fstat(fd)
    if stat.S_ISDIR(info.st_mode):
        os.close(fd)
        raise FileError(
            "is a directory", where=name, wanted="a file", hint="name a file in it; fusecli batch takes folders"
        )
    if regular and not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise FileError("is a pipe or a device", where=name, wanted="a file")
    # Some systems give /dev/fd/N the position of N: then it is read on from there.
    if not stat.S_ISREG(info.st_mode) or os.lseek(fd, 0, os.SEEK_CUR):
        return StreamSource(name, fd)
    return FileSource(name, fd)


def reason(error: Exception) -> str:
    """Why the system would not, in its words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_bytes(source: Source, offset: int, count: int) -> bytes:
    """Up to ``count`` bytes from ``offset``; fewer where the source ends.

    Raises:
        FileError: the system cannot read it.
    """
    try:
        return source.read(offset, count)
    except OSError as error:
        raise FileError("cannot be read", where=source.name, found=reason(error)) from error


def read_header(source: Source, offset: int, length: int, most: int) -> bytes:
    """The ``length`` bytes of a header; no format has one of more than ``most``.

    Raises:
        FileError: it claims to be longer, or ends early.
    """
    if length > most:
        raise FileError("header too long", where=source.name, found=f"{length} bytes", wanted=f"at most {most}")
    data = read_bytes(source, offset, length)
    if len(data) < length:
        raise FileError("cut short in its header", where=source.name, found=f"{len(data)} bytes", wanted=f"{length}")
    return data


class Stored(NamedTuple):
    """One array where it lies: known by its header, read by rows."""

    source: Source
    name: str  # of the tensor; "" in a file of one array
    shape: tuple[int, ...]
    dtype: str  # "float32", ...; a name outside FLOAT_NAMES can be listed, not read
    offset: int
    big_endian: bool = False
    fortran: bool = False

    @property
    def where(self) -> str:
        """For messages: the file, and the tensor in it."""
        return f"{self.source.name}[{self.name}]" if self.name else self.source.name

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def as_rows(self) -> Stored:
        """The same seen as ``[rows, width]``: one vector is one row, a leading axis of 1 goes.

        Raises:
            ShapeError: other axes, or no rows.
        """
        shape = rows_of(self.shape, self.where)
        return self if shape == self.shape else self._replace(shape=shape)

    def require_float(self) -> None:
        """Raise `ValuesError` if this is no array of floats."""
        if self.dtype not in FLOAT_NAMES:
            hint = "convert it first, e.g. x.astype('float32')"
            if self.dtype.startswith("complex"):
                hint = "store real numbers, e.g. numpy.abs(x)"
            if self.dtype == "void16":
                hint = ".npy cannot name bfloat16 and lost it: store it as .safetensors"
            raise ValuesError(
                "not floats", where=self.where, found=self.dtype, wanted=", ".join(FLOAT_NAMES), hint=hint
            )

    def read(self, rows: slice | None = None) -> NumpyArray:
        """The array, or ``rows`` of it (the first axis), in native byte order and C order.

        Raises:
            ValuesError: it does not hold floats.
            FileError: the data end early, or cannot be read.
        """
        self.require_float()
        rows = rows or slice(0, self.shape[0] if self.shape else 1)
        shape = (rows.stop - rows.start, *self.shape[1:]) if self.shape else ()
        if self.fortran and shape != self.shape:
            return self._read_columns(rows) if len(shape) == 2 else self.read()[rows]
        dtype = self._numpy_dtype()
        begin = self.offset
        if not self.fortran:
            begin += rows.start * math.prod(shape[1:]) * dtype.itemsize
        stored = shape[::-1] if self.fortran else shape
        if isinstance(self.source, BytesSource):
            block = np.frombuffer(self.source.data, dtype, math.prod(shape), begin).reshape(stored)
        else:
            block = np.empty(stored, dtype)
            self._fill(block, begin)
        return self._native(block.T if self.fortran else block)

    def _read_columns(self, rows: slice) -> NumpyArray:
        # Fortran order: the rows of a block lie apart, one run a column.
        height, width = self.shape
        block = np.empty((width, rows.stop - rows.start), self._numpy_dtype())
        for column, run in enumerate(block):
            self._fill(run, self.offset + (column * height + rows.start) * block.itemsize)
        return self._native(block.T)

    def _fill(self, block: NumpyArray, offset: int) -> None:
        target = as_bytes(block)
        try:
            got = self.source.read_into(offset, target)
        except OSError as error:
            raise FileError("cannot be read", where=self.where, found=reason(error)) from error
        if got < len(target):
            raise FileError("the data end early: the file shrank while it was read", where=self.where)

    def _numpy_dtype(self) -> np.dtype[Any]:
        if self.dtype == "bfloat16":
            from ml_dtypes import bfloat16  # only where it is needed: 15 ms

            return cast("np.dtype[Any]", np.dtype(bfloat16))
        return np.dtype(self.dtype)

    def _native(self, block: NumpyArray) -> NumpyArray:
        return np.ascontiguousarray(block.byteswap() if self.big_endian else block)


def require_sane(shape: Any, where: str | None) -> None:
    """Raise `FileError` unless ``shape`` is a list of axes that some array could have."""
    sane = len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**62 for n in shape)
    if sane:
        sane = math.prod(n for n in shape if n) < 2**58  # in bytes NumPy counts to 2**63, empty axes or not
    if not sane:
        found = f"shape {shape!r}"[:80]
        raise FileError("malformed header", where=where, found=found, wanted="a shape of whole numbers from 0")


def as_bytes(x: NumpyArray) -> memoryview:
    """The memory of a C-contiguous array (its own, not a copy), of any dtype."""
    try:
        return memoryview(cast(Any, x)).cast("B")
    except (TypeError, ValueError):  # dtypes that Python has no letter for, and no numbers at all
        return memoryview(cast(Any, x.reshape(-1).view(np.uint8)))


@lru_cache(maxsize=64)
def itemsize(dtype: str) -> int:
    """Bytes of one number of ``dtype``."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
