"""Where the results of many pairs go: a tree of files, or parts that become one file at the end."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from fusecli.arrays import FLOAT_NAMES
from fusecli.dumps import GATE, DumpMetadata
from fusecli.errors import FusecliError, OutputError
from fusecli.formats import FileSink, Replacing, Sink, format_of, has_names, itemsize, keep_mode, safetensors
from fusecli.pipeline import arrays_of, gate_shape

#: The folder in the output (or beside it, where that is a file) with the ledger and what is not finished.
STATE = ".fusecli"
#: Characters of an id that is to be a path: what systems take.
MAX_ID = 4096
#: Stands for the gathered file where the name of a part is wanted.
GATHERED = "whole"


class Piece(NamedTuple):
    """A result that has been written: what the ledger keeps of it."""

    shape: tuple[int, ...]
    dtype: str
    part: str | None = None  # the file that holds it, where results share files
    at: int = 0  # where in that file

    def nbytes(self, gate: bool = False) -> int:
        """Bytes of the numbers, with those of the ``gate`` behind them if there is one."""
        behind = math.prod(gate_shape(self.shape)) if gate else 0
        return (math.prod(self.shape) + behind) * itemsize(self.dtype)

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        where = {} if self.part is None else {"part": self.part, "at": self.at}
        return {"shape": self.shape, "dtype": self.dtype, **where}


def believed(shape: Any, dtype: Any, part: Any, at: Any) -> Piece:
    """A `Piece` from what a file says of it.

    Raises:
        ValueError: no result of ours is like that; the file has been damaged.
    """
    numbers = [*shape, at] if isinstance(shape, list) else []
    sane = len(numbers) > 2 and all(type(n) is int and 0 <= n < 2**50 for n in numbers)
    if not sane or dtype not in FLOAT_NAMES or not (part is None or (type(part) is str and not set("/\0") & set(part))):
        raise ValueError(shape)
    return Piece(tuple(shape), dtype, part, at)


class Store(Protocol):
    """Takes results by id."""

    path: str
    gate: bool  # each result has gates behind it

    def open(
        self, id: str, shape: tuple[int, ...], dtype: str, told: list[Piece]
    ) -> AbstractContextManager[tuple[Sink, int]]:
        """A context that gives a sink and the offset where the numbers begin.

        What has been written is added to ``told`` when all went well.
        """

    def holds(self, id: str, piece: Piece) -> bool:
        """Whether a result is still there, whole."""

    def is_input(self, id: str, *paths: str) -> bool:
        """Whether the result would take the place of one of ``paths``, which are read for it."""


def require_safe(id: str, root: str) -> None:
    """Raise `OutputError` for an id that would be written outside ``root``, or among our own files."""
    parts = id.split("/")
    if not all(parts) or {".", ".."} & set(parts) or parts[0] == STATE or "\0" in id or len(id) > MAX_ID:
        raise OutputError(
            "the id is not a path below the output", where=root, found=repr(id), wanted="names with / between them"
        )


def _require_name(id: str, path: str, gate: bool) -> None:
    """Raise `OutputError` for an id that no tensor can be called."""
    try:
        id.encode()
    except UnicodeEncodeError:
        raise OutputError("the id is not valid UTF-8", where=path, found=repr(id), hint="write to a folder") from None
    if not has_names(path):
        return
    if id == safetensors.METADATA:
        raise OutputError("the id is a name that the format reserves", where=path, found=id)
    if gate and id.endswith(GATE):
        hint = "write the attention to a folder"
        raise OutputError(
            "an id that ends like the name of a gate cannot be told from one", where=path, found=id, hint=hint
        )


@dataclass
class FolderStore:
    """The same tree as the ids: ``<root>/<id><suffix>``."""

    path: str
    suffix: str
    temporary: str  # folder on the same file system
    kind: str = "fused"  # or "attention"
    gate: bool = False  # each result has gates behind it
    label: DumpMetadata | None = None  # what each result says of itself, in a format that has room for it
    _there: dict[str, dict[str, str]] = field(default_factory=dict)  # what was in a folder at first, and its kind
    _count: Iterator[int] = field(default_factory=count)
    _owner: int = 0  # the process whose folder for files on their way is there

    @contextmanager
    def open(self, id: str, shape: tuple[int, ...], dtype: str, told: list[Piece]) -> Iterator[tuple[Sink, int]]:
        """See `Store`. The file appears when it is whole."""
        require_safe(id, self.path)
        target = f"{self.path}/{id}{self.suffix}"
        self._make_room(target)
        header = self._header(id, shape, dtype)
        with Replacing(target, f"{self._own_folder()}/{next(self._count)}") as fd:
            if target in self._there[target.rpartition("/")[0]]:
                keep_mode(fd, target)
            yield FileSink(target, fd, header), len(header)
        told.append(Piece(shape, dtype))

    def _own_folder(self) -> str:
        """Where this process makes its files, before they are moved to their places.

        What a killed process leaves there is not in the user's way. And a folder for each: ext4 looks for room for a
        new file near its folder, and passes over what was removed there in the last minutes one by one
        (``recently_deleted`` in fs/ext4/ialloc.c). Where another output has just been removed, that takes longer than
        all the rest.
        """
        owner = os.getpid()
        if owner != self._owner:
            os.makedirs(f"{self.temporary}/{owner}", exist_ok=True)
            self._owner = owner
        return f"{self.temporary}/{owner}"

    def is_input(self, id: str, *paths: str) -> bool:
        """See `Store`."""
        target = f"{self.path}/{id}{self.suffix}"
        return target in self._there.get(target.rpartition("/")[0], (target,)) and _is_one_of(target, paths)

    def begin(self) -> None:
        """Make room for temporary files, and remove those that a killed run left, or parts of one."""
        for left in (self.temporary, *glob.glob(f"{glob.escape(self.temporary)}-*")):  # a part's folder has no more
            shutil.rmtree(left, ignore_errors=True)
        self._own_folder()  # what keeps us from making one would keep every pair from being written

    def end(self) -> None:
        """No more results will come."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _make_room(self, target: str) -> None:
        folder = target.rpartition("/")[0]
        if folder not in self._there:
            inside = os.path.realpath(folder) + "/"
            if not inside.startswith(os.path.realpath(self.path).rstrip("/") + "/"):
                raise OutputError("a link leads out of the output", where=folder, found=inside.rstrip("/"))
            os.makedirs(folder, exist_ok=True)
            with os.scandir(folder) as entries:
                self._there[folder] = {f"{folder}/{entry.name}": _kind(entry) for entry in entries}
        kind = self._there[folder].get(target)
        if kind == "link":
            raise OutputError("is a link, which is not followed", where=target, found=os.readlink(target))
        if kind == "folder":
            raise OutputError("is a directory", where=target, wanted="a file name")

    def holds(self, id: str, piece: Piece) -> bool:
        """See `Store`: size and header are looked at."""
        path = f"{self.path}/{id}{self.suffix}"
        try:
            header = self._header(id, piece.shape, piece.dtype)
        except FusecliError:  # never written by us
            return False
        size, start = look_into(path, len(header))
        return size == len(header) + piece.nbytes(self.gate) and start == header

    @cached_property
    def _format(self) -> ModuleType:
        return format_of(f"x{self.suffix}")

    def _header(self, id: str, shape: tuple[int, ...], dtype: str) -> bytes:
        told = self.label.of_one(id, shape) if self.label else {}
        header: bytes = self._format.header(arrays_of(self.kind, shape, dtype, self.gate), told)
        return header


def _kind(entry: os.DirEntry[str]) -> str:
    return "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file"


def _is_one_of(target: str, paths: Iterable[str]) -> bool:
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samefile(target, path):
                return True
    return False


def look_into(path: str, count: int) -> tuple[int, bytes]:
    """Size and first bytes of a regular file; -1 and nothing where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):
        return -1, b""
    try:
        info = os.fstat(fd)
        return (info.st_size, os.pread(fd, count, 0)) if stat.S_ISREG(info.st_mode) else (-1, b"")
    except OSError:
        return -1, b""
    finally:
        os.close(fd)


@dataclass
class PartStore:
    """Numbers one after the other in part files, a file a process; `gather` makes one file of them."""

    path: str  # of the file that they become
    folder: str  # of the parts
    kind: str  # "fused" or "attention"
    gate: bool = False  # each result has gates behind it
    label: DumpMetadata | None = None  # what the file says of itself, in a format that has room for it
    _lock: Any = field(default_factory=threading.Lock)
    _fd: int = -1
    _owner: int = 0
    _part: str = ""
    _at: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._was_there = os.path.exists(self.path)

    @contextmanager
    def open(self, id: str, shape: tuple[int, ...], dtype: str, told: list[Piece]) -> Iterator[tuple[Sink, int]]:
        """See `Store`."""
        format_of(self.path).header([(self.kind, shape, dtype)])  # it can name the dtype
        _require_name(id, self.path, self.gate)
        if self.label:
            self.label.check(id, shape)
        with self._lock:
            if self._owner != os.getpid():
                self._begin_part()
            piece = Piece(shape, dtype, self._part, self._at)
            self._at += piece.nbytes(self.gate)
        yield FileSink(f"{self.path}[{id}]", self._fd), piece.at
        told.append(piece)

    def _begin_part(self) -> None:
        self._owner, self._at = os.getpid(), 0
        self._part = f"{self.kind}-{self._owner}-{os.urandom(4).hex()}.part"
        self._fd = os.open(f"{self.folder}/{self._part}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def is_input(self, id: str, *paths: str) -> bool:
        """See `Store`."""
        return self._was_there and _is_one_of(self.path, paths)

    def holds(self, id: str, piece: Piece) -> bool:
        """See `Store`."""
        return self.has(piece)

    def has(self, piece: Piece) -> bool:
        """Whether the part is there, and long enough."""
        return piece.part is not None and self.size(piece.part) >= piece.at + piece.nbytes(self.gate)

    def size(self, part: str) -> int:
        """Bytes in a part, 0 where it is gone; the gathered file counts as a part of the name `GATHERED`."""
        if part not in self._sizes:
            self._sizes[part] = max(0, look_into(self.file_of(part), 0)[0])
        return self._sizes[part]

    def look_again(self) -> None:
        """Forget how large parts were: workers may have added to them."""
        self._sizes.clear()

    def file_of(self, part: str) -> str:
        """The path of a part."""
        return os.path.realpath(self.path) if part == GATHERED else f"{self.folder}/{part}"
