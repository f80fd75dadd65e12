"""Maps on a terminal: tiles of coloured cells, or of characters where there are no colours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from fusecli.cli.console import printable

if TYPE_CHECKING:
    from rich.color import Color
    from rich.console import Console
    from rich.segment import Segment
    from rich.style import Style

    from fusecli.formats import NumpyArray
    from fusecli.grid import Grid
    from fusecli.heatmap.view import HeatMaps, Look

#: Columns and lines that a map may fill; cells of small grids grow until they do.
COLUMNS, LINES = 32, 16
WIDE = 16
#: Characters from nothing to the largest weight.
RAMP = " .:-=+*#%@"
#: Steps of colour: more cannot be told apart, and equal neighbours are drawn at once.
STEPS = 63
GAP = 2
#: Of each channel, in the 216 colours of a terminal that has 256 (xterm's).
LEVELS = (0, 95, 135, 175, 215, 255)


class Painter:
    """Draws the maps of a `fusecli.heatmap.view.HeatMaps` on a rich console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        colours = console.color_system in ("truecolor", "256") and not console.no_color
        self._coloured = colours and _is_unicode(console)
        self._cube = console.color_system == "256"

    def paint(self, view: HeatMaps, scale: str) -> None:
        """All maps, as tiles where the image rows form a grid, as a table of strips where they do not."""
        shares = view.shades(scale)
        if view.dump.grid:
            self._tiles(view, shares)
        else:
            self._strips(view, shares)

    def _tiles(self, view: HeatMaps, shares: NumpyArray) -> None:
        from fusecli.heatmap.shades import pooled

        cells, steps = pooled(shares, (COLUMNS, COLUMNS) if self._coloured else (LINES * 2, COLUMNS // 2))
        if steps != (1, 1):
            self._say(f"a cell is the largest of {steps[0]} x {steps[1]} patches")
        grow = max(1, WIDE // max(cells.shape[1:]))
        width = max(cells.shape[2] * (grow if self._coloured else 2 * _half(grow)), WIDE + 2)
        across = max(1, (self._console.width + GAP) // (width + GAP))
        for start in range(0, len(view.looks), across):
            looks = view.looks[start : start + across]
            tiles = [self._tile(look, cells[start + k], grow, width, view.dump.grid) for k, look in enumerate(looks)]
            self._beside(tiles, width)

    def _tile(self, look: Look, cells: NumpyArray, grow: int, width: int, grid: Grid | None) -> list[list[Segment]]:
        map = self._half_blocks(cells, grow) if self._coloured else self._characters(cells, grow)
        told = f"{look.bits:.2f} bits" if look.gate is None else f"{look.bits:.2f} b, gate {look.gate:.2f}"
        return [self._label(look.label, width), *map, self._words(told), self._words(_rows(look, width, grid))]

    def _half_blocks(self, cells: NumpyArray, grow: int) -> list[list[Segment]]:
        """Two cells a character: the upper half in the foreground, the lower in the background."""
        import numpy as np

        steps = np.rint(cells * STEPS).astype(int).repeat(grow, 0).repeat(grow, 1)
        if len(steps) % 2:
            steps = np.vstack([steps, np.full_like(steps[:1], -1)])
        return [
            _runs(list(zip(*pair, strict=True)), self._cube) for pair in steps.reshape(-1, 2, steps.shape[1]).tolist()
        ]

    def _characters(self, cells: NumpyArray, grow: int) -> list[list[Segment]]:
        grown = cells.repeat(_half(grow), 0).repeat(_half(grow), 1)
        return [self._words("".join(2 * _character(share) for share in line)) for line in grown.tolist()]

    def _strips(self, view: HeatMaps, shares: NumpyArray) -> None:
        from rich.cells import cell_len

        from fusecli.heatmap.shades import pooled

        most = max(cell_len(printable(look.label)) for look in view.looks)
        label = min(most, self._console.width // 4)
        rest = 24
        cells, steps = pooled(shares, (1, max(8, self._console.width - label - rest - 8 - 3 * GAP)))
        if steps[1] > 1:
            self._say(f"a cell is the largest of {steps[1]} image rows")
        width = cells.shape[2]
        for look, line in zip(view.looks, cells[:, 0].tolist(), strict=True):
            strip = _runs([(round(share * STEPS),) for share in line], self._cube) if self._coloured else None
            parts = [
                (self._label(look.label, label), label),
                (strip or self._words("".join(map(_character, line))), width),
                (self._words(f"{look.bits:.2f}"), 5),
                (self._words(_rows(look, rest)), 0),
            ]
            self._line(parts)

    def _beside(self, tiles: list[list[list[Segment]]], width: int) -> None:
        for lines in zip(*tiles, strict=True):
            self._line([(line, width) for line in lines])
        self._line([])

    def _line(self, parts: list[tuple[list[Segment], int]]) -> None:
        """Parts with their widths, one beside the other."""
        from rich.segment import Segment, Segments

        row: list[Segment] = []
        for at, (part, width) in enumerate(parts):
            row += part
            used = sum(segment.cell_length for segment in part)
            if at < len(parts) - 1:
                row.append(Segment(" " * (max(0, width - used) + GAP)))
        self._console.print(Segments([*row, Segment.line()]), end="", soft_wrap=True)

    def _label(self, text: str, width: int) -> list[Segment]:
        from rich.segment import Segment
        from rich.style import Style

        return [Segment(fitted(shown_on(self._console, text), width), Style(bold=True))]

    def _words(self, text: str) -> list[Segment]:
        from rich.segment import Segment

        return [Segment(text)]

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def _half(grow: int) -> int:
    return max(1, grow // 2)  # a character is as high as two of the cells that colours make


def shown_on(console: Console, text: str) -> str:
    """``text`` as the console can show it."""
    text = printable(text)
    return text if _is_unicode(console) else text.encode("ascii", "backslashreplace").decode()


def _is_unicode(console: Console) -> bool:
    return (console.encoding or "").lower().startswith("utf")


def fitted(text: str, width: int) -> str:
    """``text`` cut to ``width`` columns, with an ellipsis (or ``+``) where something is missing."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + ("+" if text.isascii() else "…")


def _rows(look: Look, width: int, grid: Grid | None = None) -> str:
    """``row:share`` of the strongest rows, as many as fit; on a grid ``line,column:share``."""
    text = ""
    for row, weight in look.top:
        cell = grid.cell(row) if grid else None
        name = f"{cell[0]},{cell[1]}" if cell else f"row {row}" if grid else str(row)
        more = f"{' ' if text else ''}{name}:{percent(weight)}"
        if len(text) + len(more) > width:
            break
        text += more
    return text


def percent(weight: float) -> str:
    """A weight in two digits or three: ``31%``, ``0.42%``."""
    share = 100 * weight
    digits = 0 if share >= 9.95 or share == 0 else 1 if share >= 0.95 else min(4, 1 - math.floor(math.log10(share)))
    return f"{share:.{digits}f}%"


def _character(share: float) -> str:
    return RAMP[min(len(RAMP) - 1, round(share * (len(RAMP) - 1)))]


def _runs(cells: list[tuple[int, ...]], cube: bool) -> list[Segment]:
    """Segments of equal neighbours; a cell is its step, or the upper and the lower one (-1: nothing there)."""
    from rich.segment import Segment

    drawn = ((cell, "▀" if len(cell) == 2 else " ", count) for cell, count in _counted(cells))
    return [Segment(mark * count, _style(cell, cube)) for cell, mark, count in drawn]


def _counted(cells: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], int]]:
    start = 0
    for at in range(1, len(cells) + 1):
        if at == len(cells) or cells[at] != cells[start]:
            yield cells[start], at - start
            start = at


@cache
def _style(cell: tuple[int, ...], cube: bool) -> Style:
    from rich.style import Style

    found = [_colour(step, cube) if step >= 0 else None for step in cell]
    return Style(color=found[0], bgcolor=found[1]) if len(found) == 2 else Style(bgcolor=found[0])


@cache
def _colour(step: int, cube: bool) -> Color:
    """The colour of a step: exact, or of the 6 x 6 x 6 colours among a terminal's 256.

    The nearest of all 256 would often be a grey, and neighbours of one ramp would have nothing in common.
    """
    import numpy as np
    from rich.color import Color

    from fusecli.heatmap.shades import colours

    channels = colours(np.array(step / STEPS)).tolist()
    if not cube:
        return Color.from_rgb(*channels)
    red, green, blue = (min(range(6), key=lambda at: abs(LEVELS[at] - channel)) for channel in channels)
    return Color.from_ansi(16 + 36 * red + 6 * green + blue)
