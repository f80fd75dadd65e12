"""Results that are to be a stack have one shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fusecli.batch.job import Outcome
from fusecli.batch.store import PartStore, Store
from fusecli.errors import OutputError
from fusecli.formats import has_names


def is_stack(store: Store) -> bool:
    """Whether results share a file, and have rows there instead of names."""
    return isinstance(store, PartStore) and not has_names(store.path)


class OneShape:
    """Sees to it that results have the one shape and dtype that a stack can have."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.first: tuple[str, tuple[int, ...], str] | None = None  # its id, shape and dtype

    def add(self, id: str, shape: Sequence[int], dtype: str) -> None:
        """Raise `OutputError` if a result does not stack with the first."""
        if self.first is None:
            self.first = id, tuple(shape), dtype
        first, first_shape, first_dtype = self.first
        if (tuple(shape), dtype) != (first_shape, first_dtype):
            raise OutputError(
                "results of different shapes do not stack",
                where=self._path,
                found=f"{list(shape)} {dtype} for {id}",
                wanted=f"{list(first_shape)} {first_dtype}, as for {first}",
                hint="write to a folder or to .safetensors; or mend the input, and --overwrite",
            )


class Stacks:
    """Sees to it while a run is under way, so that nobody waits for a stack that cannot be."""

    def __init__(self, stores: Iterable[Store]) -> None:
        self._stacks = [OneShape(store.path) if is_stack(store) else None for store in stores]

    def see(self, outcomes: Iterable[Outcome]) -> None:
        """Raise `OutputError` if what has just been fused does not stack."""
        for outcome in outcomes if any(self._stacks) else ():
            if outcome.status == "fused":
                told = outcome.facts, outcome.facts.get("attention")
                self.add(outcome.id, *((facts["shape"], facts["dtype"]) for facts in told if facts))

    def add(self, id: str, *results: tuple[Any, ...] | None) -> None:
        """The same for the results of one pair, which begin with shape and dtype, as the stores are."""
        for stacked, result in zip(self._stacks, results, strict=False):
            if stacked and result:
                stacked.add(id, *result[:2])
