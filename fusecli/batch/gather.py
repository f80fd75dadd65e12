"""Parts become one file: a packed ``.safetensors`` or a stacked ``.npy``.

Beside it lies an index, a JSON line ``[id, shape, dtype, offset]`` a result in order, so that a later run finds
the results again when the parts are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator

import numpy as np

from fusecli.batch.store import WHOLE, PartStore, Piece
from fusecli.errors import InputError, OutputError
from fusecli.formats import NumpyArray, Sink, as_bytes, npy, open_sink, open_source, safetensors

#: Bytes copied at once.
BLOCK = 2**22

Result = tuple[str, Piece | None]


def gather(store: PartStore, results: Callable[[], Iterator[Result]]) -> None:
    """Write results (None: a pair that failed) to ``store.path`` in order, and remove the parts.

    A packed file lists what was fused. In a stack, where a row's number says which pair it is, a pair that failed
    is a row of NaN. ``results`` is called several times: there may be too many to hold.

    Raises:
        OutputError: they do not stack, or the file cannot be written.
    """
    if store.path.endswith(safetensors.SUFFIXES):
        every = results

        def results() -> Iterator[Result]:
            return ((id, piece) for id, piece in every() if piece)

        header = safetensors.header_of_many((id, p.shape, p.dtype) for id, p in results() if p)
        hole = b""
    else:
        shape, dtype = _common(store, results())
        header = npy.header("", (sum(1 for _ in results()), *shape), dtype, {})
        hole = np.full(shape, np.nan, dtype).tobytes()
    with open_sink(store.path) as sink:
        sink.put(0, header)
        _copy(store, results(), sink, len(header), hole)
    _write_index(store, results(), len(header), len(hole))
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


def _write_index(store: PartStore, results: Iterator[Result], at: int, hole: int) -> None:
    with open_sink(_index_path(store)) as sink:
        block = f"{os.stat(store.path).st_size}\n".encode()
        offset = 0
        for id, piece in results:
            block += json.dumps([id, *(piece[:2] if piece else (None, None)), at]).encode() + b"\n"
            at += piece.nbytes if piece else hole
            if len(block) > 2**16:
                sink.put(offset, block)
                offset, block = offset + len(block), b""
        sink.put(offset, block)


def gathered(store: PartStore) -> Iterator[Result]:
    """What `gather` wrote last, if the file is still as it was; pieces are of the part `WHOLE`."""
    with contextlib.suppress(OSError, ValueError, InputError), open(_index_path(store), "rb") as file:
        if json.loads(file.readline()) != store.size(WHOLE):
            return
        for line in file:
            id, shape, dtype, at = json.loads(line)
            yield id, Piece(tuple(shape), dtype, WHOLE, at) if shape is not None else None
