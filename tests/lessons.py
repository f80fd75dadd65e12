"""What the tests of training train on, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fusecli.training.data import part_of

#: Width of the features of the fixture `lesson`.
D = 16
QUICK = ("--num-heads", 2, "--batch-size", 16, "--lr", 1e-3, "--seed", 3)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Have torch compute on so many threads; afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_held_out(id: str) -> bool:
    return part_of(id, 0.1, 0.2) == "held-out"


def scores_of(facts: dict[str, Any]) -> dict[str, float]:
    return {row["features"]: row["score"] for row in facts["table"]}
