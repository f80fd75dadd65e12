"""What is looked at: some tokens of a dump, over one head, all of them or their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecli.errors import OneRowError
from fusecli.formats import NumpyArray
from fusecli.grid import Grid, no_grid
from fusecli.heatmap.dump import Dump
from fusecli.heatmap.shades import entropy, on_grid, shades, strongest

#: Image rows that are named for each token.
TOP = 3
ONE_ROW = (
    "one image row, so there is nothing to see: each weight is 1, whatever the token says",
    "fuse with regions or patches of the picture, [M, Di] with M > 1",
)


@dataclass(frozen=True)
class Look:
    """One map: a token, and the head whose weights these are (None: the mean)."""

    row: int  # of the text
    token: str
    head: int | None
    bits: float
    top: list[tuple[int, float]]  # image row and weight, largest first
    gate: float | None

    @property
    def label(self) -> str:
        """For people."""
        token = self.token if self.token.strip() else repr(self.token)
        return token if self.head is None else f"{token}, head {self.head}"


@dataclass(frozen=True)
class HeatMaps:
    """Maps of a dump, in order, and their weights ``[K, M]``."""

    dump: Dump
    heads: int | str  # a head's number, "all" or "mean"
    looks: list[Look]
    weights: NumpyArray
    top: float  # the largest on the grid of all tokens, of those too that are not shown

    def shades(self, scale: str) -> NumpyArray:
        """Shares ``[K, height, width]`` from 0 to 1, on the grid; ``[K, 1, M]`` where there is none."""
        maps = on_grid(self.weights, self.dump.grid) if self.dump.grid else self.weights[:, None, :]
        return shades(maps, scale, self.top)

    @property
    def title(self) -> str:
        """What it shows, in one line."""
        over = {"mean": "mean of heads", "all": "all heads"}.get(str(self.heads), f"head {self.heads}")
        if self.heads == "mean" and self.dump.num_heads:
            over = f"mean of {self.dump.num_heads} heads" if self.dump.num_heads > 1 else "one head"
        return f"{self.dump.line}, {over}"

    def facts(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        dump, grid = self.dump, self.dump.grid
        return {
            "file": dump.stored.source.name,
            "id": dump.id,
            **dump.facts,
            "heads": self.heads,
            "text_rows": dump.n,
            "image_rows": dump.m,
            "grid": [grid.height, grid.width] if grid else None,
            "skip_rows": grid.skip if grid else 0,
            "tokens": [_facts(look, grid) for look in self.looks],
        }


def _facts(look: Look, grid: Grid | None) -> dict[str, Any]:
    rows = [{"row": row, "weight": weight, "cell": grid.cell(row) if grid else None} for row, weight in look.top]
    shown = {"row": look.row, "token": look.token, "head": look.head, "entropy": look.bits, "strongest": rows}
    return shown | ({"gate": look.gate} if look.gate is not None else {})


def look_at(dump: Dump, head: int | None = None, every: bool = False, tokens: list[str] | None = None) -> HeatMaps:
    """The maps of a dump.

    Args:
        dump: from `fusecli.heatmap.dump`.
        head: this head alone; else their mean.
        every: each head by itself, one after the other for each token.
        tokens: these alone.

    Raises:
        ShapeError: there is no such head.
        ValuesError: there is one image row, or these are no weights.
        FileError: there is no such token.
    """
    at = sorted({row for token in tokens for row in dump.positions(token)}) if tokens else list(range(dump.n))
    heads = list(range(dump.num_heads or 0)) if every else [head]
    if every and not heads:
        dump.head(0)  # says that there are none
    layers, top_of_all = [], 0.0
    for number in heads:
        layer = dump.mean() if number is None else dump.head(number)  # [N, M]
        top_of_all = max(top_of_all, dump.peak(layer))
        layers.append(layer[at])
    weights = np.stack(layers, 1).reshape(-1, dump.m)  # [K, M]
    labels = [(row, number) for row in at for number in heads]
    bits, top = entropy(weights), strongest(weights, TOP)
    looks = [
        Look(
            row,
            dump.tokens[row],
            number,
            float(bits[k]),
            [(int(j), float(weights[k, j])) for j in top[k]],
            float(dump.gate[row]) if dump.gate is not None else None,
        )
        for k, (row, number) in enumerate(labels)
    ]
    shown: int | str = "all" if every else "mean" if head is None else head
    return HeatMaps(dump, shown, looks, weights, top_of_all)


def require_map(dump: Dump) -> Grid:
    """The grid of a dump that is to be a picture.

    Raises:
        OneRowError: there is one image row.
        ShapeError: its image rows form no grid.
    """
    if dump.m == 1:
        raise OneRowError(ONE_ROW[0], where=dump.stored.where, hint=ONE_ROW[1])
    if dump.grid is None:
        raise no_grid(dump.m, dump.stored.where)
    return dump.grid
