"""Dumps with one hot patch a token, and how to find it again in what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

#: Width and height of pictures, and where in them a black dot is painted, as shares of each.
PICTURES = {"square": (120, 120), "wide": (240, 120), "tall": (120, 240)}
FITS = ("contain", "cover", "stretch")
#: Inside the middle square of every picture, so that no fit cuts it off.
DOT = (0.6, 0.43)


def plant(path: Path, hot: Any, m: int, heads: int = 2) -> None:
    """Attention ``[H, N, M]`` where token ``i`` gives half its weight to image row ``hot[i]``."""
    weights = np.full((heads, len(hot), m), 0.5 / (m - 1), np.float32)
    for token, row in enumerate(hot):
        weights[:, token, row] = 0.5
    np.save(path, weights)


def paint(path: Path, size: tuple[int, int], dot: tuple[float, float] = DOT) -> None:
    """A light picture with a black dot of 6 x 6 pixels."""
    from PIL import Image

    pixels = np.full((size[1], size[0], 3), 235, np.uint8)
    x, y = int(dot[0] * size[0]), int(dot[1] * size[1])
    pixels[y - 3 : y + 3, x - 3 : x + 3] = 0
    Image.fromarray(pixels).save(path)


def place_of(dot: tuple[float, float], size: tuple[int, int], grid: tuple[int, int], fit: str) -> tuple[float, float]:
    """Line and column, in cells, of a point of the picture: what each fit means, worked out by hand."""
    across, down = grid[1] / size[0], grid[0] / size[1]
    if fit != "stretch":
        across = down = (min if fit == "contain" else max)(across, down)
    left, top = (grid[1] - size[0] * across) / 2, (grid[0] - size[1] * down) / 2
    return top + dot[1] * size[1] * down, left + dot[0] * size[0] * across


def hot_box(pixels: Any) -> tuple[int, int, int, int]:
    """Top, left, bottom and right edge of what is yellow in ``[height, width, 3]``, the hot end of viridis."""
    red, _, blue = np.moveaxis(np.asarray(pixels, int), -1, 0)
    lines, columns = np.nonzero(red - blue > 60)
    return lines.min(), columns.min(), lines.max() + 1, columns.max() + 1


def require_dot_in_hot_cell(
    panel: Any, cell: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], fit: str
) -> None:
    """The hot area of a panel is that cell of the grid, and the black dot of the picture is seen in it."""
    height, width = panel.shape[:2]
    wide, high = size if fit == "stretch" else grid[::-1]
    np.testing.assert_allclose(width / height, wide / high, rtol=0.02)
    top, left, bottom, right = hot_box(panel)
    wanted = [cell[0] / grid[0], cell[1] / grid[1], (cell[0] + 1) / grid[0], (cell[1] + 1) / grid[1]]
    found = [top / height, left / width, bottom / height, right / width]
    np.testing.assert_allclose(found, wanted, atol=0.02)
    inside = np.asarray(panel[top:bottom, left:right], int).sum(-1)
    assert inside.min() < 0.75 * np.median(inside)


def terminal_cells(text: str) -> list[list[tuple[int, int, int]]]:
    """Colours of a truecolour map, line by line, two lines of cells for each line of half blocks."""
    import re

    cells: list[list[tuple[int, int, int]]] = []
    for line in text.splitlines():
        upper: list[Any] = []
        lower: list[Any] = []
        for codes, blocks in re.findall(r"\x1b\[([\d;]+)m(▀+)", line):
            found = re.findall(r"[34]8;2;(\d+);(\d+);(\d+)", codes)
            colours = [tuple(map(int, colour)) for colour in found]
            upper += [colours[0]] * len(blocks)
            lower += [colours[-1] if len(colours) == 2 else None] * len(blocks)
        if upper:
            cells += [upper, lower] if None not in lower else [upper]
    return cells
