"""Named arrays and where they lie: folders, packed and stacked files.

An id is never matched by its position, only by its name:

- a folder: the path below it without the suffix (``animals/fish/seahorse``), sorted;
- a packed ``.safetensors``: the name of the tensor, sorted;
- a stacked ``.npy`` ``[B, D]`` or ``[B, M, D]``: the number of the row, counted from 0.

A pattern such as ``{id}.image.npy`` says what an id is in a path (or in a tensor's name), so that both sides may
share a folder. (A manifest, `fusecli.batch.manifest`, names both sides of each pair itself.)
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

from fusecli.errors import FileError, ShapeError, UsageError
from fusecli.formats import FORMATS, Source, Stored, has_names, open_source, open_tensors, safetensors, sniff

SUFFIXES = tuple(suffix for module in FORMATS.values() for suffix in module.SUFFIXES)


class Span(NamedTuple):
    """An array inside a large file, known without reading its header again."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    big_endian: bool = False
    stamp: tuple[int, ...] = ()  # of the file that the rest is true of


def stamp_of(info: os.stat_result) -> tuple[int, ...]:
    """What tells a file from the one that replaces it."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


class Place(NamedTuple):
    """Where one array lies; small, so that it crosses processes in place of the array."""

    path: str
    key: str | None = None
    span: Span | None = None


def key_for(path: str, key: str | None) -> str | None:
    """``key`` where the file has names for its arrays, else None: a folder may hold ``.npy`` files as well."""
    return key if has_names(path) else None


class Collection(Protocol):
    """One side of many pairs. Iterates over its ids in a stable order."""

    def __iter__(self) -> Iterator[str]:
        """The ids."""

    def __len__(self) -> int:
        """How many there are."""

    def __contains__(self, id: object) -> bool:
        """Whether there is such an id."""

    def place(self, id: str) -> Place:
        """Where the array of ``id`` lies.

        Raises:
            InputError: it is there, but not to be used.
        """

    def paths(self) -> Iterator[str]:
        """The files it consists of."""


@dataclass
class Folder:
    """A tree of files. Hidden ones are passed over; links to files are followed, links to folders are not."""

    root: str
    key: str | None = None
    _found: dict[str, str] = field(default_factory=dict)  # id: its suffix
    _twice: dict[str, list[str]] = field(default_factory=dict)  # ids that more than one file has: all their suffixes
    _links: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls, root: str, key: str | None = None, pattern: str | None = None, without: Container[str] = ()
    ) -> Folder:
        """List the tree at ``root``, but for the trees ``without``.

        Raises:
            FileError: it cannot be listed.
        """
        found: dict[str, str] = {}
        twice: dict[str, list[str]] = {}
        links: list[str] = []
        if pattern is None:
            for path in _walk(root, without, links):
                stem, dot, ending = path.rpartition(".")
                if (suffix := dot + ending).lower() not in SUFFIXES:
                    continue
                if stem in found:
                    twice.setdefault(stem, [found[stem]]).append(suffix)
                found[stem] = suffix
            return cls(root, key, {id: found[id] for id in sorted(found)}, twice, links)
        match = matcher(pattern)
        for path in _walk(root, without, links):
            id = match(path)
            if id is not None:
                found[id] = path
        return _Patterned(root, key, {id: found[id] for id in sorted(found)}, twice, links)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, id: object) -> bool:
        return id in self._found

    def place(self, id: str) -> Place:
        """See `Collection`."""
        if id in self._twice:
            found = " and ".join(f"{id}{suffix}" for suffix in sorted(self._twice[id]))
            raise FileError("two files for one id", where=self.root, found=found, wanted="one of them")
        suffix = self._found[id]
        return Place(f"{self.root}/{id}{suffix}", key_for(suffix, self.key))

    def paths(self) -> Iterator[str]:
        """See `Collection`."""
        for id, suffix in self._found.items():
            for each in self._twice.get(id, (suffix,)):
                yield f"{self.root}/{id}{each}"

    def links(self) -> Iterator[str]:
        """Those of its files that are links."""
        return (f"{self.root}/{path}" for path in self._links)


class _Patterned(Folder):
    """A tree where a pattern tells the ids: their paths are kept whole."""

    def place(self, id: str) -> Place:
        return Place(f"{self.root}/{self._found[id]}", key_for(self._found[id], self.key))

    def paths(self) -> Iterator[str]:
        return (f"{self.root}/{path}" for path in self._found.values())


def _walk(root: str, without: Container[str], links: list[str]) -> Iterator[str]:
    """Paths of the files below ``root``, relative to it; those that are links are also added to ``links``."""
    stack = [""]
    while stack:
        below = stack.pop()
        try:
            entries = list(os.scandir(f"{root}/{below}"))
        except OSError as error:
            raise FileError("cannot be listed", where=f"{root}/{below}".rstrip("/"), found=error.strerror) from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if not _is_folder(entry):
                    links.append(below + entry.name)
                    yield below + entry.name
            elif not entry.is_dir():
                yield below + entry.name
            elif os.path.realpath(entry.path) not in without:
                stack.append(f"{below}{entry.name}/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which will fail as a file
        return False


def matcher(pattern: str) -> Callable[[str], str | None]:
    """What finds the id in a path under a pattern such as ``{id}.image.npy``, and gives None where there is none.

    Raises:
        ValueError: ``{id}`` is not in it just once.
    """
    before, mark, after = pattern.partition("{id}")
    if not mark or "{id}" in after:
        raise ValueError(pattern)

    def match(path: str) -> str | None:
        enough = len(path) > len(before) + len(after)
        if enough and path.startswith(before) and path.endswith(after):
            return path[len(before) : len(path) - len(after)]
        return None

    return match


@dataclass
class Packed:
    """A ``.safetensors`` file with a tensor an id."""

    path: str
    _index: safetensors.Index
    _ids: list[str]  # sorted
    _order: array[int] | None  # which tensor each id is, None if their order is that of the file
    _stamp: tuple[int, ...]

    @classmethod
    def open(cls, path: str, pattern: str | None = None) -> Packed:
        """Read the header.

        Raises:
            FileError: it makes no sense.
        """
        stamp = stamp_of(os.stat(path))
        index = safetensors.read_index(open_source(path))
        ids: list[str] = index.names
        if pattern is None and all(a < b for a, b in pairwise(ids)):
            return cls(path, index, ids, None, stamp)
        match = matcher(pattern or "{id}")
        found = sorted((id, at) for at, name in enumerate(ids) if (id := match(name)) is not None)
        return cls(path, index, [id for id, _ in found], array("q", (at for _, at in found)), stamp)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: object) -> bool:
        at = bisect_left(self._ids, str(id))
        return at < len(self._ids) and self._ids[at] == id

    def place(self, id: str) -> Place:
        """See `Collection`."""
        at = bisect_left(self._ids, id)
        at = at if self._order is None else self._order[at]
        dtype, shape = self._index.kinds[at]
        offset = self._index.begin + self._index.firsts[at]
        return Place(self.path, None, Span(self._index.names[at], shape, dtype, offset, stamp=self._stamp))

    def paths(self) -> Iterator[str]:
        """See `Collection`."""
        yield self.path


@dataclass
class Stacked:
    """A ``.npy`` of ``[B, D]`` or ``[B, M, D]``: an id a row."""

    stored: Stored
    _stamp: tuple[int, ...]

    @classmethod
    def open(cls, path: str) -> Stacked:
        """Read the header.

        Raises:
            FileError, ShapeError, ValuesError: it holds no rows of floats.
        """
        stamp = stamp_of(os.stat(path))
        stored = next(iter(open_tensors(path).values()))
        stored.require_float()
        found = str(list(stored.shape))
        if len(stored.shape) not in (2, 3) or 0 in stored.shape:
            raise ShapeError("not a stack of features", where=path, found=found, wanted="[B, D] or [B, M, D]")
        if stored.fortran:
            hint = "numpy.save(path, numpy.ascontiguousarray(x))"
            raise FileError("a stack in Fortran order cannot be read by rows", where=path, wanted="C order", hint=hint)
        return cls(stored, stamp)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(len(self)))

    def __len__(self) -> int:
        return self.stored.shape[0]

    def __contains__(self, id: object) -> bool:
        if not (
            isinstance(id, str) and len(id) < 20 and id.isascii() and id.isdecimal()
        ):  # of 4,300 digits on, int fails
            return False
        return str(int(id)) == id and int(id) < len(self)

    def place(self, id: str) -> Place:
        """See `Collection`."""
        stored, row = self.stored, int(id)
        offset = stored.offset + row * (stored.nbytes // len(self))
        span = Span(id, stored.shape[1:], stored.dtype, offset, stored.big_endian, self._stamp)
        return Place(stored.source.name, None, span)

    def paths(self) -> Iterator[str]:
        """See `Collection`."""
        yield self.stored.source.name


def open_collection(
    path: str, key: str | None = None, pattern: str | None = None, without: Container[str] = ()
) -> Collection:
    """The collection at ``path``: a folder, a packed ``.safetensors`` or a stacked ``.npy``.

    Args:
        path: a folder or a file.
        key: the tensor to take from each ``.safetensors`` file of a folder.
        pattern: what an id is in a path or name, e.g. ``{id}.image.npy``.
        without: folders that do not belong to it, by their real paths: where results go.

    Raises:
        InputError: it cannot be read, or is none of these.
        UsageError: it is a file, where a key says nothing, or a stack, where a pattern does not.
    """
    if os.path.isdir(path):
        return Folder.open(path.rstrip("/") or "/", key, pattern, without)
    if key is not None:
        hint = "leave out --image-key and --text-key, or give a folder"
        raise UsageError("a packed or stacked file takes no key", where=path, found=key, hint=hint)
    if sniff(open_source(path, regular=True)) == "safetensors":
        return Packed.open(path, pattern)
    if pattern is not None:
        raise UsageError("rows of a stack have numbers and no names", where=path, found=pattern, hint="leave it out")
    return Stacked.open(path)


def stored_at(span: Span, source: Source) -> Stored:
    """The array of a span, in an opened file.

    Raises:
        ValuesError, ShapeError: it holds no rows of floats.
    """
    stored = Stored(source, span.name, span.shape, span.dtype, span.offset, span.big_endian)
    stored.require_float()
    return stored.as_rows()
