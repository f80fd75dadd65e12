"""Medians of things done in turns, so that noise hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

Job = Callable[[], object]


def side_by_side(jobs: dict[str, Job], rounds: int = 5, calls: int = 5) -> dict[str, float]:
    """Median seconds of each job.

    Each round gives every job ``calls`` calls in a row after a pause and one call that does not count: two
    libraries' thread pools, called in quick turns, would wait for each other's idle threads.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            time.sleep(0.02)
            job()
            for _ in range(calls):
                start = time.perf_counter()
                job()
                seconds[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}
