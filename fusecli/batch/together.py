"""One item on a GPU: pairs of one shape are computed together."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np

from fusecli.arrays import compute_dtype
from fusecli.batch.job import Item, Job, Outcome, failed
from fusecli.batch.worker import Underway, open_side, read_sides, take_over, write
from fusecli.fusion import pairs_together
from fusecli.pipeline import Seconds, fuse_alike


def work(job: Job, item: Item) -> list[Outcome]:
    """Do ``item``; one outcome a task, in order, as far as it went if one says to stop. Never raises."""
    outcomes: dict[str, Outcome] = {}
    with np.errstate(all="ignore"):  # what overflows is found by looking
        for outcome in _work(job, item):
            outcomes[outcome.id] = outcome
            if outcome.ends_run(job.fail_fast):
                break
    return [outcomes[task.id] for task in item if task.id in outcomes]


def _work(job: Job, item: Item) -> Iterator[Outcome]:
    alike: dict[tuple[int, int, str], list[Underway]] = {}
    for task in item:
        began = perf_counter()
        image = open_side(job, task.id, task.image, "image")
        text = open_side(job, task.id, task.text, "text")
        if isinstance(image, Outcome):
            yield image
        elif isinstance(text, Outcome):
            yield text
        else:
            shape = text.shape[0], image.shape[0], compute_dtype(image.dtype, text.dtype)
            pair = Underway(task, image, text, seconds=Seconds(perf_counter() - began))
            alike.setdefault(shape, []).append(pair)
    for (n, m, dtype), pairs in alike.items():
        size = pairs_together(job.weights, n, m)
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            if size > 1:
                _compute(job, some, dtype)
            for pair in some:
                yield pair.outcome or write(job, pair)


def _compute(job: Job, pairs: list[Underway], dtype: str) -> None:
    """Read pairs of one shape and fuse them."""
    sides = read_sides(job, pairs)
    if not sides or job.to_device is None:
        return
    good, images, texts = map(list, zip(*sides, strict=True))
    began = perf_counter()
    try:
        results = fuse_alike(job.weights, images, texts, dtype, job.to_device, job.attention is not None)
    except Exception as error:
        for pair in good:
            pair.outcome = failed(pair.task.id, error)
        return
    take_over(good, results, perf_counter() - began)
