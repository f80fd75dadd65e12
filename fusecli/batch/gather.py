"""Parts become one file: a packed ``.safetensors`` or a stacked ``.npy``.

Beside it lies an index, a JSON line ``[id, shape, dtype, offset]`` a result in order, so that a later run finds
the results again when the parts are gone. While the file is replaced there are an old and a new index; the one whose
size and checksum are those of the file is true.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import operator
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np

from fusecli.batch.ledger import History
from fusecli.batch.stacks import OneShape, is_stack
from fusecli.batch.store import GATHERED, STATE, PartStore, Piece, Store, believed, look_into
from fusecli.dumps import GATE
from fusecli.errors import OutputError
from fusecli.formats import (
    FileSink,
    NumpyArray,
    Replacing,
    Sink,
    as_bytes,
    keep_mode,
    npy,
    open_sink,
    open_source,
    safetensors,
)
from fusecli.pipeline import arrays_of

#: Bytes copied at once.
BLOCK = 2**22

Result = tuple[str, Piece | None]


def read_history(folder: str, stores: Iterable[Store]) -> History:
    """What the ledgers say of ``stores``, of fused features and maybe of attention; and where gathered results are."""
    history = History.read(folder)
    for store in stores:
        if isinstance(store, PartStore):
            store.look_again()
            # A part that is there was written after the last gathering, which removes them.
            history.move(gathered(store), store.kind, store.has if _parts(store) else None)
    return history


def _parts(store: PartStore) -> list[str]:
    names = os.listdir(store.folder) if os.path.isdir(store.folder) else []
    return [name for name in names if name.startswith(f"{store.kind}-") and name.endswith(".part")]


def remove_parts(store: PartStore) -> None:
    """Remove what has been gathered, or belongs to no result."""
    for name in _parts(store):
        os.unlink(f"{store.folder}/{name}")


def _temporary(store: PartStore) -> str:
    return f"{os.path.realpath(store.path)}{STATE}-tmp"


def remove_left(stores: Iterable[Store], states: Iterable[str | None]) -> None:
    """Remove what killed runs have left on its way to ``stores`` and their ``states``; nobody else may be at work."""
    left = [_temporary(store) for store in stores if isinstance(store, PartStore)]
    for folder in filter(None, states):
        left += glob.glob(f"{glob.escape(folder)}/.fusecli-*.tmp")
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def gather(store: PartStore, results: Callable[[], Iterator[Result]]) -> None:
    """Write results to ``store.path`` in order, and remove the parts.

    In a stack, where a row's number says which pair it is, a pair that failed (None) is a row of NaN. ``results`` is
    called several times: there may be too many to hold.

    Raises:
        OutputError: they do not stack, or the file cannot be written.
    """
    if not is_stack(store):
        told = store.label.of_many(id for id, _ in results()) if store.label else {}
        header = safetensors.header(_tensors(results(), store.gate), told)
        hole = b""
    else:
        shape, dtype = _common(store, results())
        header = npy.header([("", (sum(1 for _ in results()), *shape), dtype)])
        hole = np.full(shape, np.nan, dtype).tobytes()
    target, temporary = os.path.realpath(store.path), _temporary(store)
    with _named(store.path), Replacing(target, temporary) as fd:
        keep_mode(fd, target)
        sink = FileSink(store.path, fd)
        sink.put(0, header)
        _copy(store, results(), sink, len(header), hole)
        info = os.fstat(fd)
        _write_index(store, results(), [info.st_size, len(header), zlib.crc32(header), info.st_ino], len(hole))
        for written in (temporary, _new_index(store)):  # the parts go now, and with them the only other copy
            _reach_the_disk(written)
    os.replace(_new_index(store), _index(store))
    remove_parts(store)


def _reach_the_disk(path: str) -> None:
    """Wait until a file would outlive a power failure, where the system can tell."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _tensors(results: Iterator[Result], gate: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """What a packed file holds, in order."""
    for id, piece in results:
        if piece:
            yield from arrays_of(id, piece.shape, piece.dtype, gate, id + GATE)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors here are of ``path``, not of the file that is to take its place."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


def _common(store: PartStore, results: Iterator[Result]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype that all results share."""
    shared = OneShape(store.path)
    for id, piece in results:
        if piece:
            shared.add(id, piece.shape, piece.dtype)
    if shared.first is None:
        raise OutputError("no pair was fused, so there is nothing to stack", where=store.path)
    return shared.first[1:]


def _copy(store: PartStore, results: Iterator[Result], sink: Sink, begin: int, hole: bytes) -> None:
    at = begin
    for part, start, nbytes in _stretches(results, len(hole), store.gate):
        if part is None:
            for offset in range(0, nbytes, len(hole)):
                sink.put(at + offset, hole)
        else:
            source = open_source(store.file_of(part))
            for done in range(0, nbytes, BLOCK):
                block: NumpyArray = np.empty(min(BLOCK, nbytes - done), np.uint8)
                if source.read_into(start + done, as_bytes(block)) < len(block):
                    raise OutputError("results are gone", where=store.file_of(part), hint="start again")
                sink.put(at + done, block)
        at += nbytes


def _stretches(results: Iterator[Result], hole: int, gate: bool) -> Iterator[tuple[str | None, int, int]]:
    """(part, offset, bytes) of results that follow one another in one part."""
    part: str | None = None
    start = nbytes = 0
    for _, piece in results:
        name, at, size = (piece.part, piece.at, piece.nbytes(gate)) if piece else (None, 0, hole)
        if nbytes and name == part and (name is None or at == start + nbytes):
            nbytes += size
            continue
        if nbytes:
            yield part, start, nbytes
        part, start, nbytes = name, at, size
    if nbytes:
        yield part, start, nbytes


def _index(store: PartStore) -> str:
    return f"{store.folder}/{store.kind}.index"


def _new_index(store: PartStore) -> str:
    return f"{store.folder}/{store.kind}.new.index"


def _write_index(store: PartStore, results: Iterator[Result], about: list[int], hole: int) -> None:
    """Write the new index: ``about`` is size, length of the header, its checksum, and what file of all it is."""
    with open_sink(_new_index(store)) as sink:
        block = json.dumps(about).encode() + b"\n"
        offset, at = 0, about[1]
        for id, piece in results:
            block += json.dumps([id, *(piece[:2] if piece else (None, None)), at]).encode() + b"\n"
            at += piece.nbytes(store.gate) if piece else hole
            if len(block) > 2**16:
                sink.put(offset, block)
                offset, block = offset + len(block), b""
        sink.put(offset, block)


def is_whole(store: PartStore, rows: list[str] | None = None) -> bool:
    """Whether the gathered file is as `gather` left it, and there is nothing that is not in it.

    A stack is also to have just these ``rows``, if they are given.
    """
    path = _fitting(store)
    if path is None or _parts(store):
        return False
    if rows is None or not is_stack(store):
        return True
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        there = chain((id for id, *_ in _index_lines(path)), repeat(None))
        return all(map(operator.eq, rows, there)) and next(there) is None
    return False


def _index_lines(path: str) -> Iterator[Any]:
    """What an index says of each result."""
    with open(path, "rb") as file:
        file.readline()
        yield from map(json.loads, file)


def _fitting(store: PartStore) -> str | None:
    """The index that is true of the gathered file: the new one, if a run was killed between the two renames."""
    target = os.path.realpath(store.path)
    for path in (_new_index(store), _index(store)):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if look_into(path, 0)[0] >= 0:
                with open(path, "rb") as file:
                    about = json.loads(file.readline())
                # Stacks of as many rows have one header: before the first rename the new one would fit the old file.
                # Afterwards the file may have been moved to another disk.
                new = path == _new_index(store)
                if _fits(target, about) and (not new or os.stat(target).st_ino in about[3:]):
                    return path
    return None


def _fits(target: str, about: object) -> bool:
    if not isinstance(about, list) or len(about) < 3 or not all(type(n) is int for n in about):
        return False
    size, start = look_into(target, min(max(0, about[1]), safetensors.MAX_HEADER + 8))
    return [size, len(start), zlib.crc32(start)] == about[:3]


def gathered(store: PartStore) -> Iterator[Result]:
    """What `gather` wrote last, if the file is still as it was; pieces are of the part `GATHERED`."""
    path = _fitting(store)
    if path is None:
        return
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        end = 0
        for id, shape, dtype, at in _index_lines(path):
            piece = believed(shape, dtype, GATHERED, at) if shape is not None else None
            if type(id) is not str or at < end:
                return
            end = at + (piece.nbytes(store.gate) if piece else 0)
            yield id, piece
