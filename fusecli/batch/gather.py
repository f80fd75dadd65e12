"""Parts become one file: a packed ``.safetensors`` or a stacked ``.npy``.

Beside it lies an index, a JSON line ``[id, shape, dtype, offset]`` a result in order, so that a later run finds
the results again when the parts are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from fusecli.batch.store import STATE, WHOLE, PartStore, Piece, believed, look_into
from fusecli.errors import OutputError
from fusecli.formats import FileSink, NumpyArray, Replacing, Sink, as_bytes, npy, open_sink, open_source, safetensors

#: Bytes copied at once.
BLOCK = 2**22

Result = tuple[str, Piece | None]


def gather(store: PartStore, results: Callable[[], Iterator[Result]]) -> None:
    """Write results to ``store.path`` in order, and remove the parts.

    In a stack, where a row's number says which pair it is, a pair that failed (None) is a row of NaN. ``results`` is
    called several times: there may be too many to hold.

    Raises:
        OutputError: they do not stack, or the file cannot be written.
    """
    if store.path.endswith(safetensors.SUFFIXES):
        told = store.label.of_many(id for id, _ in results()) if store.label else {}
        header = safetensors.header_of_many(((id, p.shape, p.dtype) for id, p in results() if p), told)
        hole = b""
    else:
        shape, dtype = _common(store, results())
        header = npy.header("", (sum(1 for _ in results()), *shape), dtype, {})
        hole = np.full(shape, np.nan, dtype).tobytes()
    temporary = f"{store.path}{STATE}-tmp"  # always the same: what a killed run leaves, the next one takes away
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    with Replacing(os.path.realpath(store.path), temporary) as fd:
        sink = FileSink(store.path, fd)
        sink.put(0, header)
        _copy(store, results(), sink, len(header), hole)
    _write_index(store, results(), header, len(hole))
    for name in os.listdir(store.folder):
        if name.startswith(f"{store.kind}-") and name.endswith(".part"):
            os.unlink(f"{store.folder}/{name}")


def _common(store: PartStore, results: Iterator[Result]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype that all results share."""
    first: tuple[str, Piece] | None = None
    for id, piece in results:
        if piece is None:
            continue
        if first is None:
            first = id, piece
        if piece[:2] != first[1][:2]:
            raise OutputError(
                "results of different shapes do not stack",
                where=store.path,
                found=f"{list(piece.shape)} {piece.dtype} for {id}",
                wanted=f"{list(first[1].shape)} {first[1].dtype}, as for {first[0]}",
                hint="write to a folder or to .safetensors",
            )
    if first is None:
        raise OutputError("no pair was fused, so there is nothing to stack", where=store.path)
    return first[1].shape, first[1].dtype


def _copy(store: PartStore, results: Iterator[Result], sink: Sink, begin: int, hole: bytes) -> None:
    at = begin
    for part, start, nbytes in _runs(results, len(hole)):
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


def _runs(results: Iterator[Result], hole: int) -> Iterator[tuple[str | None, int, int]]:
    """(part, offset, bytes) of results that follow one another in one part."""
    part: str | None = None
    start = nbytes = 0
    for _, piece in results:
        name, at, size = (piece.part, piece.at, piece.nbytes) if piece else (None, 0, hole)
        if nbytes and name == part and (name is None or at == start + nbytes):
            nbytes += size
            continue
        if nbytes:
            yield part, start, nbytes
        part, start, nbytes = name, at, size
    if nbytes:
        yield part, start, nbytes


def _index_path(store: PartStore) -> str:
    return f"{store.folder}/{store.kind}.index"


def _write_index(store: PartStore, results: Iterator[Result], header: bytes, hole: int) -> None:
    with open_sink(_index_path(store)) as sink:
        block = json.dumps([os.stat(store.path).st_size, len(header), zlib.crc32(header)]).encode() + b"\n"
        offset, at = 0, len(header)
        for id, piece in results:
            block += json.dumps([id, *(piece[:2] if piece else (None, None)), at]).encode() + b"\n"
            at += piece.nbytes if piece else hole
            if len(block) > 2**16:
                sink.put(offset, block)
                offset, block = offset + len(block), b""
        sink.put(offset, block)


def is_whole(store: PartStore) -> bool:
    """Whether the gathered file is as `gather` left it, and there is nothing that is not in it."""
    if any(name.startswith(f"{store.kind}-") and name.endswith(".part") for name in os.listdir(store.folder)):
        return False
    with contextlib.suppress(OSError, ValueError), open(_index_path(store), "rb") as file:
        return _fits(store, file.readline())
    return False


def _fits(store: PartStore, line: bytes) -> bool:
    wanted = json.loads(line)
    if not isinstance(wanted, list) or len(wanted) != 3 or not all(type(n) is int for n in wanted):
        return False
    size, start = look_into(os.path.realpath(store.path), min(max(0, wanted[1]), safetensors.MAX_HEADER + 8))
    return [size, len(start), zlib.crc32(start)] == wanted


def gathered(store: PartStore) -> Iterator[Result]:
    """What `gather` wrote last, if the file is still as it was; pieces are of the part `WHOLE`."""
    path = _index_path(store)
    if look_into(path, 0)[0] < 0:
        return
    with contextlib.suppress(OSError, ValueError, TypeError), open(path, "rb") as file:
        if not _fits(store, file.readline()):
            return
        end = 0
        for line in file:
            id, shape, dtype, at = json.loads(line)
            piece = believed(shape, dtype, WHOLE, at) if shape is not None else None
            if type(id) is not str or at < end:
                return
            end = at + (piece.nbytes if piece else 0)
            yield id, piece
