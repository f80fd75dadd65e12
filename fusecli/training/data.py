"""Features of many pairs, read once, and batches of them at memory speed."""

from __future__ import annotations

import hashlib
import math
import queue
import tempfile
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

import numpy as np
import torch

from fusecli.arrays import cast
from fusecli.collections import Place
from fusecli.errors import InputError, ShapeError, ValuesError, unwritable
from fusecli.formats import NumpyArray
from fusecli.functional import largest
from fusecli.pairs import read_finite
from fusecli.places import features_at

#: Batches that are made ready while one is computed.
AHEAD = 4
#: Pairs of so many batches are sorted by length together: enough for even batches, few enough for chance.
SORTED_BATCHES = 64
#: Lengths that differ by no more count as equal when batches are made.
SAME_LENGTH = 1.1

#: Numbers that features have at most: sums of their squares over all channels and rows stay numbers in float32.
LARGEST = 1e15

PARTS = ("train", "validation", "held-out")
Made = TypeVar("Made")


#: Rows, padding included, of a batch that nothing is learned from: 50 MB of 768 channels, and what is made of them.
MOST_ROWS = 2**14
#: Likewise of one that is learned from: 64 pairs of 1,000 rows. What one of 5,000 takes is not to be padded 64 times.
MOST_LEARNED = 2**16
#: Likewise where images meet several texts, each counting as often: 64 pairs of 256 and 77, images that meet 16 texts.
MOST_MET = 2**17
#: Pairs of a text row and an image row in a batch, with padding: 256 MiB of scores for 8 heads, and there are four such
#: tensors in a step. Four times as many where images meet several texts, or batches would have too few to tell apart.
MOST_SCORES = 2**23


def part_of(id: str, validation: float, held_out: float) -> str:
    """Which part of the data a pair belongs to: by its id alone, the same in every run and whatever else is there."""
    digest = hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    at = int.from_bytes(digest, "big") / 2**64
    if at < held_out:
        return "held-out"
    return "validation" if at < held_out + validation else "train"


class Rows:
    """One side of all pairs: their rows one after the other, in a file without a name that is mapped to memory.

    Float16 where everything is, else float32. The system keeps in memory what there is room for.

    Attributes:
        dtype: of the rows as they are kept.
        starts: where the rows of each pair start, and behind them the number of all rows.
        width: of a row.
        checksum: CRC-32 over shape and bytes of every pair in order: other features, or rows that moved from one pair
            to the next, have another one.
    """

    def __init__(self, arrays: Callable[[], Iterable[NumpyArray]], folder: str) -> None:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # In float16 until something wider comes, most often first of all; then once more.
                if not self._fill(file, arrays(), np.dtype(np.float16)):
                    file.seek(0)
                    file.truncate()
                    self._fill(file, arrays(), np.dtype(np.float32))
                file.flush()
                # Copy-on-write: torch wants memory that could be written to.
                self._all = np.memmap(file, self.dtype, "c", shape=(self.starts[-1], self.width))
        except OSError as error:
            raise unwritable(folder, error, "no copy of the features can be kept") from None

    def _fill(self, file: IO[bytes], arrays: Iterable[NumpyArray], dtype: np.dtype[Any]) -> bool:
        """Write all ``arrays``; False as soon as ``dtype`` does not hold one."""
        self.dtype, self.starts, self.width, self.checksum = dtype, [0], 0, 0
        for array in arrays:
            if array.dtype.itemsize > dtype.itemsize:
                return False
            rows = np.ascontiguousarray(array, dtype)
            self.checksum = zlib.crc32(rows.data, zlib.crc32(repr(rows.shape).encode(), self.checksum))
            file.write(rows.data)
            self.starts.append(self.starts[-1] + len(array))
            self.width = array.shape[1]
        return True

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> NumpyArray:
        """The rows of one pair."""
        return self._all[self.starts[at] : self.starts[at + 1]]

    def length(self, at: int) -> int:
        """How many rows a pair has."""
        return self.starts[at + 1] - self.starts[at]

    def padded(self, which: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of some pairs ``[B, longest, width]``, float32, and where they are real; zeros behind the shorter."""
        lengths = torch.tensor([self.length(at) for at in which])
        longest = int(lengths.max())
        block = np.zeros((len(which), longest, self.width), np.float32)
        for rows, at in zip(block, which, strict=True):
            rows[: self.length(at)] = self[at]
        return torch.from_numpy(block), torch.arange(longest) < lengths[:, None]

    def mean(self, at: int) -> torch.Tensor:
        """The mean row of one pair ``[width]``, in float32."""
        return torch.from_numpy(self[at].mean(0, dtype=np.float64)).float()

    def size(self, which: Sequence[int]) -> float:
        """How large the numbers of some pairs are: their root mean square."""
        squares = sum(float(np.square(self[at], dtype=np.float64).sum()) for at in which)
        return math.sqrt(squares / (self.width * sum(self.length(at) for at in which)))

    def means(self) -> torch.Tensor:
        """The mean row of each pair ``[pairs, width]``."""
        return torch.stack([self.mean(at) for at in range(len(self))])


@dataclass(frozen=True)
class Data:
    """All pairs of a training, in the order of their ids."""

    ids: list[str]
    images: Rows
    texts: Rows
    parts: dict[str, list[int]]  # positions of the pairs of each part

    def cost(self, at: int) -> tuple[int, int]:
        """What batches are sorted by: image rows, then text rows, lengths nearly the same taken as equal."""
        m, n = (round(math.log(side.length(at), SAME_LENGTH)) for side in (self.images, self.texts))
        return m, n


def read(
    ids: Sequence[str],
    places: Callable[[str], tuple[Place, Place]],
    folder: str,
    validation: float,
    held_out: float,
    tell: Callable[[int], None] = lambda done: None,
) -> Data:
    """Read all pairs, once.

    Args:
        ids: of the pairs.
        places: where image and text of an id lie.
        folder: where there is room for a copy of the features.
        validation: share of the pairs that choose the best weights.
        held_out: share of the pairs that are kept for the end.
        tell: is called with the number of pairs read.

    Raises:
        InputError: features are not there, not finite, or of different widths.
    """
    ids = sorted(ids)
    found = [places(id) for id in ids]
    images, texts = (
        Rows(partial(_arrays, [pair[at] for pair in found], side, tell if at else None), folder)
        for at, side in enumerate(("image", "text"))
    )
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for at, id in enumerate(ids):
        parts[part_of(id, validation, held_out)].append(at)
    return Data(ids, images, texts, parts)


def _arrays(places: list[Place], side: str, tell: Callable[[int], None] | None) -> Iterator[NumpyArray]:
    """The features at ``places``, those that are not float16 in float32."""
    first: tuple[int, str] | None = None
    for done, place in enumerate(places):
        stored = features_at(place, side)
        width = stored.shape[1]
        first = first or (width, stored.where)
        if width != first[0]:
            wanted = f"width {first[0]}, as in {first[1]}"
            raise ShapeError(
                f"{side} features of different widths", where=stored.where, found=str(width), wanted=wanted
            )
        if tell:
            tell(done + 1)
        try:
            rows = read_finite(stored)
        except ValuesError as error:
            raise ValuesError(error.what, where=error.where, found=error.found, wanted=error.wanted) from None
        if rows.dtype != np.float16:
            if (most := largest(rows)) > LARGEST:
                found, wanted, hint = f"{most:.3g}", f"at most {LARGEST:g}", "scale the features down"
                what = "numbers too large to learn from"
                raise ValuesError(what, where=stored.where, found=found, wanted=wanted, hint=hint)
            rows = cast(rows, "float32")
        yield rows


def batches(
    data: Data,
    which: Sequence[int],
    size: int,
    generator: torch.Generator | None,
    texts: int = 1,
    self_attention: bool = False,
) -> list[list[int]]:
    """The pairs ``which`` in batches of ``size``, pairs of about the same length together; fewer where they are long.

    Args:
        data: what they are of.
        which: the pairs.
        size: pairs of a batch.
        generator: shuffles them, to be learned from; without one they are sorted as they are cheapest.
        texts: that each image of a batch meets, as far as there are so many.
        self_attention: the rows of a text meet each other too.
    """
    if generator is None:
        return _within_bounds(data, sorted(which, key=data.cost), size, MOST_ROWS)
    most = MOST_LEARNED if texts == 1 else MOST_MET
    shuffled = [which[at] for at in torch.randperm(len(which), generator=generator).tolist()]
    made = []
    for at in range(0, len(shuffled), size * SORTED_BATCHES):
        some = sorted(shuffled[at : at + size * SORTED_BATCHES], key=data.cost)
        made += _within_bounds(data, some, size, most, texts, self_attention)
    if len(made) > 1 and len(made[-1]) == 1:  # one pair alone has nothing to be told from
        both = made[-2] + made[-1]
        if len(both) < 4 or len(_within_bounds(data, both, size + 1, most, texts, self_attention)) == 1:
            made[-2:] = [both]
        else:  # it is long: one other is padded to it
            made[-2:] = [both[:-2], both[-2:]]
    return [made[at] for at in torch.randperm(len(made), generator=generator).tolist()]


def _within_bounds(
    data: Data, order: Sequence[int], size: int, most: int, texts: int = 1, self_attention: bool = False
) -> list[list[int]]:
    lengths = [(data.images.length(at), data.texts.length(at)) for at in order]
    return [list(order[part]) for part in cut(lengths, size, most, texts, self_attention)]


def cut(
    lengths: Sequence[tuple[int, int]],
    size: int,
    most: int = MOST_ROWS,
    texts: int = 1,
    self_attention: bool = False,
) -> Iterator[slice]:
    """Cut pairs with so many rows into parts of at most ``size`` pairs, and ``most`` rows once they are padded.

    Nor have several more than `MOST_SCORES`; where texts are to be told apart, four times that, and two stay together.
    """
    start = m = n = 0
    least, scores = (1, MOST_SCORES) if texts == 1 else (2, 4 * MOST_SCORES)
    for at, own in enumerate(lengths):
        m, n = max(m, own[0]), max(n, own[1])
        count = at - start + 1
        met = min(texts, count) * n
        seen = max(m, n) if self_attention else m  # rows that a text row attends to
        full = (count > 1 and count * (m + met) > most) or (count > least and count * seen * met > scores)
        if count > size or full:
            yield slice(start, at)
            start, (m, n) = at, own
    if lengths:
        yield slice(start, len(lengths))


@dataclass(frozen=True)
class Batch:
    """Some pairs, padded."""

    which: list[int]
    images: torch.Tensor  # [B, M, Di]
    image_mask: torch.Tensor  # [B, M]
    texts: torch.Tensor  # [B, N, Dt]
    text_mask: torch.Tensor  # [B, N]

    def to(self, device: str) -> Batch:
        """The batch on ``device``."""
        if device == "cpu":
            return self
        parts = (self.images, self.image_mask, self.texts, self.text_mask)
        return Batch(self.which, *(part.pin_memory().to(device, non_blocking=True) for part in parts))


def load(data: Data, which: list[int], images: Sequence[int] | None = None) -> Batch:
    """The pairs ``which``; with ``images``, texts beside the images of other pairs."""
    return Batch(which, *data.images.padded(which if images is None else images), *data.texts.padded(which))


def ahead(make: Callable[[list[int]], Made], items: Sequence[list[int]]) -> Generator[Made]:
    """``make(item)`` for each item, in order, made by a thread while the last one is worked on."""
    ready: queue.Queue[Made | BaseException] = queue.Queue(AHEAD)
    ended = threading.Event()

    def fill() -> None:
        for item in items:
            if ended.is_set():
                return
            try:
                ready.put(make(item))
            except BaseException as error:
                ready.put(error)
                return

    thread = threading.Thread(target=fill, daemon=True)
    try:
        thread.start()
        for _ in items:
            made = ready.get()
            if isinstance(made, BaseException):
                raise made
            yield made
    finally:
        ended.set()
        while thread.is_alive():
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue


def require_enough(data: Data) -> None:
    """Raise `InputError` if a part has fewer than two pairs."""
    counts = {part: len(which) for part, which in data.parts.items()}
    if min(counts.values()) < 2:
        found = ", ".join(f"{count} for {part}" for part, count in counts.items())
        raise InputError(
            f"too few pairs to train and validate on: {len(data.ids)}",
            found=found,
            wanted="2 of each at least",
            hint="more pairs, or other --validation and --held-out shares",
        )
