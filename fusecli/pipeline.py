"""The one path of a pair: read → fuse → write."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from time import perf_counter
from typing import NamedTuple, TypeAlias

import numpy as np

from fusecli.arrays import Array, cast, compute_dtype, first_nonfinite, to_numpy
from fusecli.errors import OutputError
from fusecli.formats import FileSource, NumpyArray, Sink, Stored, format_of, has_names, itemsize, open_sink
from fusecli.fusion import Prepared, fuse_together, pairs_together
from fusecli.methods import FusedRows, View
from fusecli.one_row import single_rows
from fusecli.pairs import read_finite, require_widths
from fusecli.weights import Weights

#: Text rows of a block that is only checked and answered, with M = 1: it stays in the cache.
COPIED_ROWS = 128
#: Text rows of a block otherwise: some threads with such blocks, of D = 768 and 8 heads, stay under 300 MiB.
FUSED_ROWS = 2048

#: Opens the place of one result: ``(shape, dtype)`` to a sink and the offset where the numbers begin.
Opener: TypeAlias = Callable[[tuple[int, ...], str], AbstractContextManager[tuple[Sink, int]]]


class Output(NamedTuple):
    """Where results go and in what form."""

    fused: Opener
    attention: Opener | None = None
    attention_mean: bool = False  # [N, M] instead of [H, N, M]
    attention_dtype: str | None = None  # None: what the pair is computed in
    dtype: str | None = None  # None: the text's
    finite: bool = True  # refuse NaN and Inf
    stream: bool = False  # what has gone out cannot be taken back
    gate: bool = False  # the attention's place has room for the mean gate of each token behind it, see `arrays_of`
    threads: int = 1  # for texts of many blocks


def takes_gate(weights: Weights, path_or_suffix: str) -> bool:
    """Whether attention that is written there has the gates beside it: where there are gates, and names."""
    return weights.config.method == "gated" and has_names(path_or_suffix)


def gate_shape(attention: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the mean gates that belong to attention of a shape, ``[H, N, M]`` or ``[N, M]``."""
    return (attention[-2],)


def arrays_of(
    name: str, shape: tuple[int, ...], dtype: str, gate: bool, gates: str = "gate"
) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of a result and, with ``gate``, of the ``gates`` that stand behind it in its file."""
    return [(name, shape, dtype), (gates, gate_shape(shape), dtype)] if gate else [(name, shape, dtype)]


def to_file(
    path: str, name: str, format: str | None = None, gate: bool = False, metadata: Mapping[str, str] | None = None
) -> Opener:
    """Results into one file, in ``format`` or by its suffix.

    Args:
        path: of the file; ``-`` is standard output.
        name: of the array, in a format that has names.
        format: as `format_of` has it.
        gate: leave room for gates behind it.
        metadata: what the file says of itself, in a format that has room for it.
    """

    @contextmanager
    def opener(shape: tuple[int, ...], dtype: str) -> Iterator[tuple[Sink, int]]:
        if os.path.isdir(path):
            raise OutputError("is a directory", where=path, wanted="a file name")
        header: bytes = format_of(path, format).header(arrays_of(name, shape, dtype, gate), metadata)
        with open_sink(path) as sink:
            sink.put(0, header)
            yield sink, len(header)

    return opener


@dataclass(slots=True)
class Seconds:
    """Where the time went, of all threads together."""

    read: float = 0.0
    fuse: float = 0.0
    write: float = 0.0

    def add(self, other: Seconds) -> None:
        """Count those of another as well."""
        self.read += other.read
        self.fuse += other.fuse
        self.write += other.write


class Pair(NamedTuple):
    """The two sides of a pair, from `find_features` or `features_at`, and what is known of it already."""

    image: Stored
    text: Stored
    row: Array = None  # what `fusecli.one_row.single_rows` gave for the image
    result: FusedRows | None = None  # what `fuse_alike` gave for both


class Fused(NamedTuple):
    """What was done with one pair."""

    n: int
    m: int
    dim: int
    dtype: str
    seconds: Seconds


#: Moves an array to where the work is done; None where NumPy does it.
Mover: TypeAlias = Callable[[NumpyArray], Array] | None
NOWHERE = nullcontext(None)


def fuse_pair(weights: Weights, pair: Pair, output: Output, to_device: Mover = None) -> Fused:
    """Read a pair, fuse it, write it: text rows go through in blocks, memory stays flat in ``N``.

    Args:
        weights: the fusion.
        pair: what to fuse.
        output: where and how to write.
        to_device: to a GPU.

    Raises:
        InputError: a file is bad, or does not fit the weights; nothing has been written then.
        OutputError: the result cannot be written, or finite features gave numbers that its dtype cannot hold.
    """
    image, text = pair.image, pair.text
    require_widths(image, text, weights)
    n, m, dtype, finite = text.shape[0], image.shape[0], output.dtype or text.dtype, output.finite
    alike = to_device is not None and pair.result is None and pairs_together(weights, n, m) > 1
    work = (_Whole if alike or pair.result else _Blocks)(weights, pair, output, to_device)
    began = perf_counter()
    attention: AbstractContextManager[_ArrayFile | None] = NOWHERE
    if output.attention:
        shape = (n, m) if output.attention_mean else (weights.config.num_heads, n, m)
        of_attention = output.attention_dtype or compute_dtype(image.dtype, text.dtype)
        attention = _opened(output.attention, shape, of_attention, finite)
    with _opened(output.fused, (n, weights.dim), dtype, finite) as fused, attention as dump:
        opened = perf_counter()
        work.do_all(_Results(output, fused, dump))
        done = perf_counter()
    work.seconds.write += perf_counter() - done + opened - began
    return Fused(n, m, weights.dim, dtype, work.seconds)


def fuse_alike(
    weights: Weights,
    images: list[NumpyArray],
    texts: list[NumpyArray],
    dtype: str,
    to_device: Callable[[NumpyArray], Array],
    need_weights: bool,
) -> list[FusedRows]:
    """Fuse pairs of one shape on a GPU: ``images [M, Di]`` and ``texts [N, Dt]``, one result a pair, for NumPy.

    At most `pairs_together`; the numbers of a pair do not depend on the others.

    Args:
        weights: the fusion.
        images: of the pairs, all of one shape.
        texts: likewise.
        dtype: ``"float32"`` or ``"float64"``, what to compute in.
        to_device: to the GPU.
        need_weights: give the attention, and gates where there are some, as well.

    Raises:
        torch.OutOfMemoryError: the GPU has no room for them.
    """
    rows = to_device(np.stack([cast(image, dtype) for image in images]))  # [B, M, Di]
    if rows.shape[1] == 1 and weights.config.one_row_is_added:  # so there is nothing left to do for a GPU
        answers = to_numpy(single_rows(weights, rows[:, 0]))  # [B, D]
        return [
            Prepared(View(weights, None, row, len(text), dtype, row=row)).fuse(text, need_weights=need_weights)
            for row, text in zip(answers, texts, strict=True)
        ]
    many = to_device(np.stack([cast(text, dtype) for text in texts]))  # [B, N, Dt]
    result = fuse_together(weights, rows, many, dtype, need_weights=need_weights)
    parts = [None if x is None else to_numpy(x) for x in result]
    return [FusedRows(*(None if x is None else x[at] for x in parts)) for at in range(len(images))]


@dataclass(slots=True)
class _Results:
    """Where the results of a pair go, block by block."""

    output: Output
    fused: _ArrayFile
    attention: _ArrayFile | None

    def put(self, start: int, result: FusedRows, alike: bool = False) -> None:
        """Write what came of the text rows from ``start`` on; ``alike`` if all of them are equal."""
        self.fused.put_rows(start, to_numpy(result.fused), alike=alike)
        if self.attention:
            attended = to_numpy(result.attention)
            self.attention.put_rows(start, attended.mean(0) if self.output.attention_mean else attended)
            if self.output.gate:
                self.attention.put_behind(start, to_numpy(result.gate))


class _Whole:
    """A pair that is fused at once, if that has not been done yet."""

    def __init__(self, weights: Weights, pair: Pair, output: Output, to_device: Mover) -> None:
        self.seconds = Seconds()
        if pair.result is not None:
            self._result = pair.result
            return
        assert to_device is not None
        began = perf_counter()
        sides = [read_finite(pair.image, output.finite)], [read_finite(pair.text, output.finite)]
        read, compute = perf_counter(), compute_dtype(pair.image.dtype, pair.text.dtype)
        [self._result] = fuse_alike(weights, *sides, compute, to_device, output.attention is not None)
        self.seconds = Seconds(read - began, perf_counter() - read)

    def do_all(self, results: _Results) -> None:
        """Write it."""
        began = perf_counter()
        results.put(0, self._result)
        self.seconds.write += perf_counter() - began


class _Blocks:
    """Takes the text of one pair through reading, fusing and writing, a block of rows at a time.

    The image and the first block are read at once, and all of them if what is written cannot be taken back.
    """

    def __init__(self, weights: Weights, pair: Pair, output: Output, to_device: Mover) -> None:
        began = perf_counter()
        self._to_device, self._text, self._output = to_device, pair.text, output
        compute, row = compute_dtype(pair.image.dtype, pair.text.dtype), pair.row  # [D], None if it is not known
        image = self._moved(cast(read_finite(pair.image, output.finite), compute)) if row is None else None
        read = perf_counter()
        if image is not None and len(image) == 1 and weights.config.one_row_needs_no_text:
            row = single_rows(weights, image)[0]
        if row is not None and weights.config.one_row_is_added:  # nothing is left to do for a GPU
            row, self._to_device = to_numpy(row), None
        template = image if row is None else row
        self._prepared = prepared = Prepared(View(weights, image, template, pair.text.shape[0], compute, row=row))
        looked = perf_counter()
        self._blocks = list(prepared.blocks(COPIED_ROWS if prepared.only_adds else FUSED_ROWS))
        self._first = read_finite(pair.text, output.finite, self._blocks[0])
        if output.stream:  # look before writing
            for block in self._blocks[1:]:
                read_finite(pair.text, output.finite, block)
        self.seconds = Seconds(perf_counter() - looked + read - began, looked - read)

    def _moved(self, x: NumpyArray) -> Array:
        return x if self._to_device is None else self._to_device(x)

    def do_all(self, results: _Results) -> None:
        """All blocks, on several threads if there are many."""
        blocks = self._blocks
        self._do(results, self.seconds, blocks[0], self._first)
        threads = min(self._output.threads, len(blocks) - 1)
        if threads < 2 or self._output.stream or not isinstance(self._text.source, FileSource):
            for block in blocks[1:]:
                self._do(results, self.seconds, block)
            return
        from concurrent.futures import ThreadPoolExecutor  # 10 ms that small texts do not need

        bad: list[tuple[int, BaseException]] = []  # the one raised is the first that a single thread would have met

        def every(start: int) -> Seconds:
            seconds = Seconds()
            with np.errstate(all="ignore"):
                for block in blocks[start::threads]:
                    if bad and block.start > min(first for first, _ in bad):
                        break
                    try:
                        self._do(results, seconds, block)
                    except Exception as error:
                        bad.append((block.start, error))
            return seconds

        with ThreadPoolExecutor(threads) as pool:
            try:
                for seconds in pool.map(every, range(1, 1 + threads)):
                    self.seconds.add(seconds)
            except BaseException as error:  # Ctrl-C: the threads are to stop as well
                bad.append((-1, error))
                raise
        if bad:
            raise min(bad, key=itemgetter(0))[1]

    def _do(self, results: _Results, seconds: Seconds, block: slice, part: NumpyArray | None = None) -> None:
        """One block, read already or not."""
        start, prepared = perf_counter(), self._prepared
        if part is None:
            part = read_finite(self._text, self._output.finite, block)
        read = perf_counter()
        result = prepared.fuse(self._moved(cast(part, prepared.dtype)), need_weights=results.attention is not None)
        result = result._replace(fused=to_numpy(result.fused))  # waits for the device
        fused = perf_counter()
        results.put(block.start, result, alike=prepared.rows_alike)
        seconds.read += read - start
        seconds.fuse += fused - read
        seconds.write += perf_counter() - fused


@contextmanager
def _opened(opener: Opener, shape: tuple[int, ...], dtype: str, finite: bool) -> Iterator[_ArrayFile]:
    with opener(shape, dtype) as (sink, begin):
        yield _ArrayFile(sink, begin, shape, dtype, finite)


class _ArrayFile:
    """An array written in blocks along its last axis but one."""

    __slots__ = ("_begin", "_dtype", "_finite", "_shape", "_sink")

    def __init__(self, sink: Sink, begin: int, shape: tuple[int, ...], dtype: str, finite: bool) -> None:
        self._sink, self._begin, self._shape, self._dtype, self._finite = sink, begin, shape, dtype, finite

    def put_rows(self, start: int, block: NumpyArray, alike: bool = False) -> None:
        """Write ``block [n, width]`` or ``[H, n, width]`` from row ``start`` on; ``alike`` if all rows are equal."""
        stored = cast(block, self._dtype)
        bad = first_nonfinite(stored[:1] if alike else stored) if self._finite else None
        if bad is not None:
            row = bad[-2] + start
            found = f"{float(block[bad]):.4g} in row {row}, column {bad[-1]}"
            hint = "pass --dtype float32" if itemsize(self._dtype) < 4 else "scale the features down"
            raise OutputError(f"result does not fit {self._dtype}", where=self._sink.name, found=found, hint=hint)
        if stored.ndim == 2:
            self._sink.put(self._begin + start * self._shape[1] * stored.itemsize, stored)
            return
        rows, width = self._shape[-2:]
        for head, part in enumerate(stored):
            self._sink.put(self._begin + (head * rows + start) * width * stored.itemsize, part)

    def put_behind(self, start: int, values: NumpyArray) -> None:
        """Write ``values [n]`` of an array ``[N]`` that stands behind this one, from ``start`` on."""
        stored = np.ascontiguousarray(cast(values, self._dtype))
        end = self._begin + math.prod(self._shape) * stored.itemsize
        self._sink.put(end + start * stored.itemsize, stored)
