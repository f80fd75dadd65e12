"""One item: read its pairs, fuse them, write them, and say what happened to each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from fusecli.arrays import cast, compute_dtype
from fusecli.batch.job import Item, Job, Outcome, Task, failed
from fusecli.batch.store import PartStore, Piece
from fusecli.collections import Place
from fusecli.errors import OutputError
from fusecli.formats import NumpyArray, Stored
from fusecli.fusion import NUMBERS_IN_TURN, PAIRS_IN_TURN, InTurn, fuse_in_turn, numbers_in_turn
from fusecli.machine import alone_in
from fusecli.methods import FusedRows
from fusecli.one_row import single_rows
from fusecli.pairs import of_other_width, read_finite
from fusecli.pipeline import FUSED_ROWS, Output, Pair, Seconds, fuse_pair
from fusecli.places import features_at

#: Bytes of a text from which its blocks of rows are shared by threads: tenths of a second for one.
LARGE = 2**26
NOT_LARGE = nullcontext(False)


def work(job: Job, item: Item) -> list[Outcome]:
    """Do ``item``; one outcome a task, in order. A bad pair never raises, nor stops the others.

    Images of one row are computed together, other short pairs in turn: the weights are then read from memory once for
    many of them.
    """
    outcomes = []
    with np.errstate(all="ignore"):  # what overflows is found by looking
        for some in _short_together(job, _opened(job, item)):
            _fuse_in_turn(job, some)
            for pair in some:
                outcomes.append(pair.outcome or write(job, pair))
                if outcomes[-1].ends_run(job.fail_fast):
                    return outcomes
    return outcomes


@dataclass(slots=True)
class Underway:
    """A pair on its way: its sides, or what has become of it."""

    task: Task
    image: Any = None  # Stored
    text: Any = None  # Stored
    row: Any = None  # [D], what an image of one row comes to
    seconds: Seconds = field(default_factory=Seconds)
    result: FusedRows | None = None
    outcome: Outcome | None = None


def _opened(job: Job, item: Item) -> Iterator[Underway]:
    began = perf_counter()
    images: list[Stored | Outcome] = [open_side(job, task.id, task.image, "image") for task in item]
    rows = _rows_of_single_images(job, item, images)
    shared = (perf_counter() - began) / len(item)
    for task, image, row in zip(item, images, rows, strict=True):
        if isinstance(image, Outcome):
            yield Underway(task, outcome=image)
            continue
        began = perf_counter()
        text = open_side(job, task.id, task.text, "text")
        if isinstance(text, Outcome):
            yield Underway(task, outcome=text)
            continue
        if row is not None and compute_dtype(image.dtype) != compute_dtype(image.dtype, text.dtype):
            row = None  # the text is wider than the image: once more, in its precision
        yield Underway(task, image, text, row, Seconds(shared + perf_counter() - began))


def _short_together(job: Job, pairs: Iterator[Underway]) -> Iterator[list[Underway]]:
    """Pairs in their order, those together that `fuse_in_turn` may take at once."""
    some: list[Underway] = []
    numbers = 0
    for pair in pairs:
        if _goes_alone(job, pair):
            if some:
                yield some
            yield [pair]
            some, numbers = [], 0
            continue
        more = numbers_in_turn(job.weights, pair.text.shape[0], pair.image.shape[0])
        if some and (numbers + more > NUMBERS_IN_TURN or len(some) == PAIRS_IN_TURN):
            yield some
            some, numbers = [], 0
        some.append(pair)
        numbers += more
    if some:
        yield some


def _goes_alone(job: Job, pair: Underway) -> bool:
    """Whether a pair is bad, is taken in blocks, or has one image row that is all there is, or not yet looked at."""
    if pair.outcome or pair.text.shape[0] > FUSED_ROWS:
        return True
    one_row = pair.image.shape[0] == 1 and job.weights.config.one_row_needs_no_text
    return one_row and (pair.row is None or job.weights.config.one_row_is_added)


def _fuse_in_turn(job: Job, pairs: list[Underway]) -> None:
    """Read and fuse short pairs; a lone one is left as it is."""
    if len(pairs) == 1:
        return
    sides = read_sides(job, pairs)
    ready = [
        InTurn(image, text, compute_dtype(pair.image.dtype, pair.text.dtype), pair.row) for pair, image, text in sides
    ]
    began = perf_counter()
    try:
        results = fuse_in_turn(job.weights, ready, need_weights=job.attention is not None)
    except Exception:
        return  # each alone may do, or tell what is wrong with it
    take_over([pair for pair, _, _ in sides], results, perf_counter() - began)


def read_sides(job: Job, pairs: list[Underway]) -> list[tuple[Underway, Any, Any]]:
    """Those of ``pairs`` that can be read, with image, unless there is a `row`, and text; the others have failed."""
    read = []
    finite = not job.options.allow_nonfinite
    for pair in pairs:
        began = perf_counter()
        try:
            image = None if pair.row is not None else read_finite(pair.image, finite)
            read.append((pair, image, read_finite(pair.text, finite)))
        except MemoryError:
            continue  # alone it may do
        except Exception as error:
            pair.outcome = failed(pair.task.id, error)
        pair.seconds.read += perf_counter() - began
    return read


def take_over(pairs: list[Underway], results: list[FusedRows], seconds: float) -> None:
    """Keep what was computed for ``pairs`` together, in so many ``seconds``, until it is written."""
    for pair, result in zip(pairs, results, strict=True):
        pair.result = result
        pair.seconds.fuse += seconds / len(pairs)


def open_side(job: Job, id: str, place: Place, side: str) -> Stored | Outcome:
    """The features of one side of a pair, or why it has failed."""
    try:
        stored = features_at(place, side)
        width, other = (job.weights.image_dim, "text") if side == "image" else (job.weights.text_dim, "image")
        if stored.shape[1] != width:
            both = f"--{side}-dim {stored.shape[1]}, and --{other}-dim as the {other}s have it"
            raise of_other_width(stored, width, f"other weights: fusecli init with {both}")
    except Exception as error:
        return failed(id, error)
    return stored


def _rows_of_single_images(job: Job, item: Item, images: list[Stored | Outcome]) -> list[Any]:
    """What `single_rows` gives for each image of one row, None for the others; bad ones become outcomes."""
    rows: list[Any] = [None] * len(images)
    if not job.weights.config.one_row_needs_no_text:
        return rows
    groups: dict[str, list[tuple[int, NumpyArray]]] = {}
    for at, image in enumerate(images):
        if not isinstance(image, Outcome) and image.shape[0] == 1:
            try:
                block = read_finite(image, not job.options.allow_nonfinite)
            except Exception as error:
                images[at] = failed(item[at].id, error)
            else:
                dtype = compute_dtype(image.dtype)
                groups.setdefault(dtype, []).append((at, cast(block, dtype)))
    for group in groups.values():
        try:
            answers = single_rows(job.weights, np.concatenate([block for _, block in group]))
        except MemoryError:
            continue  # each alone may do
        for (at, _), answer in zip(group, answers, strict=True):
            rows[at] = answer
    return rows


def write(job: Job, pair: Underway) -> Outcome:
    """Write a pair, and fuse it before if that has not been done."""
    task, image, text = pair.task, pair.image, pair.text
    result, pair.result = pair.result, None  # it need not stay
    for store in (job.fused, job.attention):
        if store and store.is_input(task.id, task.image.path, task.text.path, *job.other_inputs):
            outcome = failed(task.id, OutputError("the result would replace an input", where=task.id))
            return outcome._replace(stop=isinstance(store, PartStore))  # the one file would be written all the same
    pieces: list[Piece] = []
    dumps: list[Piece] = []
    output = _output(job, task.id, pieces, dumps)
    large = job.threads > 1 and text.nbytes >= LARGE
    try:
        # With threads in all workers that are at large texts, memory would not stay in bounds.
        with alone_in(job.folder) if large else NOT_LARGE as alone:
            output = output._replace(threads=job.threads) if alone else output
            seconds = fuse_pair(job.weights, Pair(image, text, pair.row, result), output, job.to_device).seconds
    except Exception as error:
        return failed(task.id, error)
    read, fuse = pair.seconds.read + seconds.read, pair.seconds.fuse + seconds.fuse
    facts = {
        "image": image.shape,
        "text": text.shape,
        **pieces[0].facts(),
        "seconds": round(read + fuse + seconds.write, 6),
    }
    if dumps:
        facts["attention"] = dumps[0].facts()
    nbytes = image.nbytes + text.nbytes + pieces[0].nbytes() + sum(dump.nbytes(output.gate) for dump in dumps)
    return Outcome(task.id, "fused", facts, False, read, fuse, seconds.write, nbytes)


def _output(job: Job, id: str, pieces: list[Piece], dumps: list[Piece]) -> Output:
    """Where the results of a pair go, and into which lists what has been written is told."""
    return Output(
        partial(job.fused.open, id, told=pieces),
        partial(job.attention.open, id, told=dumps) if job.attention else None,
        attention_mean=job.options.attention_mean,
        attention_dtype=job.options.attention_dtype,
        dtype=job.options.dtype,
        finite=not job.options.allow_nonfinite,
        gate=job.attention is not None and job.attention.gate,
    )
