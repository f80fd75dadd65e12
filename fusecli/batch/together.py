"""One item on a GPU: pairs of one shape are computed together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from fusecli.arrays import compute_dtype
from fusecli.batch.job import Item, Job, Outcome, Task, failed
from fusecli.batch.worker import fuse_task, open_side
from fusecli.formats import NumpyArray, Stored
from fusecli.fusion import pairs_together
from fusecli.methods import FusedRows
from fusecli.pairs import read_finite
from fusecli.pipeline import Seconds, fuse_alike


@dataclass
class _Pair:
    at: int  # in its item
    task: Task
    image: Stored
    text: Stored
    seconds: Seconds = field(default_factory=Seconds)
    result: FusedRows | None = None


def work(job: Job, item: Item) -> list[Outcome]:
    """Do ``item``; one outcome a task, in order, as far as it went if one says to stop. Never raises."""
    outcomes: dict[int, Outcome] = {}
    with np.errstate(all="ignore"):  # what overflows is found by looking
        for at, outcome in _work(job, item):
            outcomes[at] = outcome
            if job.ends_with(outcome):
                break
    return [outcomes[at] for at in sorted(outcomes)]


def _work(job: Job, item: Item) -> Iterator[tuple[int, Outcome]]:
    alike: dict[tuple[int, int, str], list[_Pair]] = {}
    for at, task in enumerate(item):
        began = perf_counter()
        image = open_side(job, task.id, task.image, "image")
        text = open_side(job, task.id, task.text, "text")
        if isinstance(image, Outcome):
            yield at, image
        elif isinstance(text, Outcome):
            yield at, text
        else:
            shape = text.shape[0], image.shape[0], compute_dtype(image.dtype, text.dtype)
            alike.setdefault(shape, []).append(_Pair(at, task, image, text, Seconds(perf_counter() - began)))
    for (n, m, dtype), pairs in alike.items():
        size = pairs_together(job.weights, n, m)
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            bad = _compute(job, some, dtype) if size > 1 else {}
            for pair in some:
                yield pair.at, bad.get(pair.at) or _write(job, pair)


def _write(job: Job, pair: _Pair) -> Outcome:
    result, pair.result = pair.result, None  # it need not stay
    return fuse_task(job, pair.task, pair.image, pair.text, pair.seconds, result=result)


def _compute(job: Job, pairs: list[_Pair], dtype: str) -> dict[int, Outcome]:
    """Read pairs of one shape and fuse them; gives those that have failed."""
    bad: dict[int, Outcome] = {}
    images: list[NumpyArray] = []
    texts: list[NumpyArray] = []
    for pair in pairs:
        began = perf_counter()
        try:
            image, text = (read_finite(side, not job.options.allow_nonfinite) for side in (pair.image, pair.text))
        except Exception as error:
            bad[pair.at] = failed(pair.task.id, error)
        else:
            images.append(image)
            texts.append(text)
        pair.seconds.read += perf_counter() - began
    good = [pair for pair in pairs if pair.at not in bad]
    if not good or job.to_device is None:
        return bad
    began = perf_counter()
    try:
        results = fuse_alike(job.weights, images, texts, dtype, job.to_device, job.attention is not None)
    except Exception as error:
        return bad | {pair.at: failed(pair.task.id, error) for pair in good}
    each = (perf_counter() - began) / len(good)
    for pair, result in zip(good, results, strict=True):
        pair.result = result
        pair.seconds.fuse += each
    return bad
