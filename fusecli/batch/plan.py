"""From ids to work: which pairs there are, which part of them is ours, and which go together."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from fusecli.collections import Collection

#: Pairs of one item at most: enough that the weights, which the pairs between push out of the cache, are read from
#: memory once for many; few enough to lose.
ITEM_PAIRS = 64
#: Items for each worker at least, so that all of them finish at about the same time.
ITEMS_PER_WORKER = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """The ``number``-th of ``count`` parts, from 1; an id belongs to the same part for ever."""

    number: int
    count: int

    def has(self, id: str) -> bool:
        """Whether ``id`` is in this part."""
        return zlib.crc32(id.encode("utf-8", "surrogateescape")) % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


@dataclass(frozen=True, slots=True)
class Matched:
    """Which ids have both sides, in the images' order, and which have one."""

    both: list[str]
    no_text: list[str]
    no_image: list[str]


def match(images: Collection, texts: Collection, shard: Shard | None = None) -> Matched:
    """Bring ids together by name."""
    ours = [id for id in images if shard is None or shard.has(id)]
    both = [id for id in ours if id in texts]
    no_text = [id for id in ours if id not in texts] if len(both) < len(ours) else []
    no_image = [id for id in texts if id not in images and (shard is None or shard.has(id))]
    return Matched(both, no_text, no_image)


def item_size(pairs: int, workers: int) -> int:
    """Pairs of one item, where ``workers`` share ``pairs``; without any, a GPU computes those of an item together."""
    return max(1, min(ITEM_PAIRS, pairs // (workers * ITEMS_PER_WORKER))) if workers else ITEM_PAIRS
