"""Where image rows lie in the picture: a grid of patches, row by row, and the rows before it."""

from __future__ import annotations

import math
from typing import NamedTuple

from fusecli.errors import ShapeError

#: Rows before the patches in models that are in use: none, a class row, a class row and four registers (DINOv3).
USUAL_SKIPS = (0, 1, 5)


class Grid(NamedTuple):
    """``height x width`` patches after ``skip`` rows of another kind (class row, registers)."""

    height: int
    width: int
    skip: int = 0

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def rows(self) -> int:
        """Image rows in all, ``M``."""
        return self.skip + self.height * self.width

    def cell(self, row: int) -> tuple[int, int] | None:
        """Line and column of an image row, both from 0; None for a row before the grid."""
        return divmod(row - self.skip, self.width) if row >= self.skip else None


def grid_of(
    m: int, size: tuple[int, int] | None = None, skip: int | None = None, where: str | None = None
) -> Grid | None:
    """The grid that ``m`` image rows form; None where there is none and none was asked for.

    Args:
        m: image rows.
        size: height and width; else a square with ``skip`` rows before it, else ``m = g²`` or ``m = g² + 1``
            (a class row), as vision transformers have them.
        skip: rows before the grid; else a class row where one is left over.
        where: what the rows are of, for the message.

    Raises:
        ShapeError: ``m`` rows are no such grid; the message says which would fit.
    """
    if size is not None:
        before = m - size[0] * size[1] if skip is None else skip
        grid = Grid(*size, before)
        if grid.rows == m and (skip is not None or before in (0, 1)):
            return grid
        wanted = f"{size[0]}x{size[1]}" + (f" after {skip} rows" if skip else "")
        likely = skip is None and 1 < before < size[0] * size[1]
        raise no_grid(m, where, wanted, skip, hint=f"--skip-rows {before}" if likely else None)
    for before in (0, 1) if skip is None else (skip,):
        side = math.isqrt(max(m - before, 0))
        if side > 1 and side * side == m - before:
            return Grid(side, side, before)
    if skip is not None:
        raise no_grid(m, where, f"a square after {skip} rows", skip)
    return None


def no_grid(
    m: int,
    where: str | None,
    wanted: str = "g² or g² + 1 rows, g from 2",
    skip: int | None = None,
    hint: str | None = None,
) -> ShapeError:
    """The error that says which grids ``m`` rows would fit, beside ``skip`` rows before it if that was given."""
    hint = hint or ", or ".join(fitting(m, skip))
    return ShapeError("the image rows do not form that grid", where=where, found=f"M = {m}", wanted=wanted, hint=hint)


def fitting(m: int, given: int | None = None, most: int = 4) -> list[str]:
    """Options that would make a grid of ``m`` rows, the squarest first, a line of cells at last.

    They say what else to skip than the rows that are ``given``, where no grid is left behind those.
    """
    for skips in (USUAL_SKIPS,) if given is None else ((given,), USUAL_SKIPS):
        sizes = sorted((rest, skip) for skip in skips for rest in _oblongs(m - skip))
        if sizes:
            break
    else:
        sizes = [((1.0, 1, m), 0)]
    unsaid = (0, 1) if given is None else (given,)
    return [
        f"--grid {height}x{width}" + ("" if skip in unsaid else f" --skip-rows {skip}")
        for (_, height, width), skip in sizes[:most]
    ]


def _oblongs(cells: int) -> list[tuple[float, int, int]]:
    """How long for its height, and height and width, of the grids of so many cells that are not too long."""
    heights = [height for height in range(2, math.isqrt(max(cells, 0)) + 1) if cells % height == 0]
    return [(cells / height**2, height, cells // height) for height in heights if cells <= 4 * height**2]


def parse_grid(text: str) -> tuple[int, int]:
    """Height and width from ``7x9``.

    Raises:
        ValueError: it is not like that.
    """
    height, mark, width = text.lower().partition("x")
    if not mark or not (height.isdecimal() and width.isdecimal()) or len(text) > 20 or not int(height) * int(width):
        raise ValueError(text)
    return int(height), int(width)
