"""Weights ``[N, M]`` as maps: how spread they are, which rows lead, and their shades and colours."""

from __future__ import annotations

import numpy as np

from fusecli.formats import NumpyArray
from fusecli.grid import Grid

#: What a shade is a share of, by scale.
FULL = {
    "token": "0 to the token's largest weight",
    "all": "0 to the largest weight of all tokens",
    "contrast": "the token's smallest to its largest weight",
}
#: 17 equally spaced colours of viridis (Smith and van der Walt, 2015, CC0), which stay apart in grey and to
#: colour-blind eyes.
VIRIDIS = (
    *("440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c", "1fa088", "28ae80"),
    *("3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"),
)
_STOPS = np.array([[int(stop[at : at + 2], 16) for at in (0, 2, 4)] for stop in VIRIDIS], np.float64)  # [17, 3]


def entropy(weights: NumpyArray) -> NumpyArray:
    """Bits ``[...]`` of distributions ``[..., M]`` (Shannon 1948): 0 on one row, ``log2(M)`` where all are equal."""
    positive = weights > 0
    logs = np.log2(weights, out=np.zeros_like(weights), where=positive)
    bits: NumpyArray = np.maximum(0.0, -(weights * logs).sum(-1)) + 0.0  # the larger of 0.0 and -0.0 may be either
    return bits


def strongest(weights: NumpyArray, count: int) -> NumpyArray:
    """Image rows ``[N, count]`` of the largest of weights ``[N, M]``, largest first, the earlier of equals first."""
    count = min(count, weights.shape[-1])
    if count * 8 < weights.shape[-1]:  # a sort of thousands of rows is not needed for three
        floor = -np.partition(-weights, count - 1, axis=-1)[..., count - 1 : count]
        weights = np.where(weights >= floor, weights, -1.0)
    rows: NumpyArray = np.argsort(-weights, axis=-1, kind="stable")[..., :count]
    return rows


def on_grid(weights: NumpyArray, grid: Grid) -> NumpyArray:
    """Maps ``[..., height, width]`` of weights ``[..., M]``; rows before the grid are left out."""
    return weights[..., grid.skip :].reshape(*weights.shape[:-1], grid.height, grid.width)


def shades(maps: NumpyArray, scale: str = "token", most: float = 0.0) -> NumpyArray:
    """Shares from 0 to 1 of maps ``[N, ...]``, see `FULL`; where all are equal they are all 1 (or 0, if they are).

    ``most`` is the largest weight of other tokens, for scale ``all``.
    """
    axes = tuple(range(1, maps.ndim))
    top = maps.max(axis=axes, keepdims=True)
    low = np.zeros_like(top)
    if scale == "all":
        top = np.broadcast_to(maps.max(initial=most), top.shape)
    elif scale == "contrast":
        low = maps.min(axis=axes, keepdims=True)
        low = np.where(low < top, low, 0.0)
    span = top - low
    shares: NumpyArray = np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0)
    return shares


def colours(shares: NumpyArray) -> NumpyArray:
    """Colours ``[..., 3]`` uint8 of shares ``[...]`` from 0 to 1, by viridis."""
    at = np.clip(shares, 0, 1) * (len(_STOPS) - 1)
    parts = [np.interp(at, np.arange(len(_STOPS)), stop) for stop in _STOPS.T]
    return np.stack(parts, -1).round().astype(np.uint8)


def pooled(maps: NumpyArray, most: tuple[int, int]) -> tuple[NumpyArray, tuple[int, int]]:
    """Maps ``[..., height, width]`` with at most so many cells each way, and how many patches a cell stands for.

    A cell is the largest of its patches, so that a single hot one is never lost.
    """
    height, width = maps.shape[-2:]
    steps = -(-height // most[0]), -(-width // most[1])
    if steps == (1, 1):
        return maps, steps
    rows, columns = np.arange(0, height, steps[0]), np.arange(0, width, steps[1])
    maps = np.maximum.reduceat(np.maximum.reduceat(maps, rows, axis=-2), columns, axis=-1)
    return maps, steps
