"""The runner for a GPU: in this process, which alone has the device.

A thread takes each item through reading, computing and writing; two of them, so that the disk is busy while the
device is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait

from fusecli.batch.job import Items, Outcome, Stop, Work

THREADS = 2


def run(work: Work, items: Items, stop: Stop) -> Iterator[list[Outcome]]:
    """Do all items, or those begun before ``stop``; gives the outcomes of each in order."""
    under_way: deque[Future[list[Outcome]]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        while under_way or not (items.ended() or stop.asked):
            item = None if stop.asked or len(under_way) > THREADS else items.take()
            if item is not None:
                under_way.append(threads.submit(work, item))
            elif under_way:
                yield under_way.popleft().result()
            elif not items.ended():  # tell what is known of pairs without work, and wait for lines to come
                yield []
                if items.fileno() is not None:
                    wait([items.fileno(), stop.fileno()])  # type: ignore[list-item]
