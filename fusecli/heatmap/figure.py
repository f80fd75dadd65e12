"""Maps as one picture, ``.png`` or ``.svg``: a panel a token, drawn with matplotlib."""

from __future__ import annotations

import html
import io
import logging
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecli.errors import UsageError
from fusecli.formats import NumpyArray, write_whole
from fusecli.heatmap.lettering import Fonts, cut, printed
from fusecli.heatmap.picture import fitted, grey, load_picture, need, panel_size
from fusecli.heatmap.shades import FULL, colours
from fusecli.heatmap.view import HeatMaps, require_map

#: Pixels of all panels together that are aimed at, and that are refused.
AIM, MOST = 8_000_000, 200_000_000
#: Longer side of a panel, in pixels, and the width from which there is room for numbers below it.
SMALLEST, LARGEST, ROOMY = 48, 256, 90
#: Heights of what stands around panels, and the room between them, in pixels.
LABEL = 22
TOLD = 18
GAP = 12
TITLE = 34
LEGEND = 34
#: How much a map covers the picture under it.
OPACITY = 0.6


@dataclass(frozen=True)
class _Layout:
    """Pixels: a table of panels, each with its label above it and its numbers below."""

    count: int
    width: int  # of a panel
    height: int
    columns: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole."""
        rows = -(-self.count // self.columns)
        across = GAP + self.columns * (self.width + GAP)
        return max(across, 240), TITLE + rows * (LABEL + self.height + TOLD + GAP) + LEGEND

    def corner(self, at: int) -> tuple[int, int]:
        """Left and upper edge of a panel."""
        row, column = divmod(at, self.columns)
        return GAP + column * (self.width + GAP), TITLE + row * (LABEL + self.height + TOLD + GAP) + LABEL


def write_figure(view: HeatMaps, output: str, image: str | None, fit: str, scale: str) -> list[str]:
    """Draw all maps of a view into a ``.png`` or ``.svg``; returns what the user should know.

    Raises:
        FileError: the picture cannot be read.
        ShapeError, ValuesError: the image rows form no grid.
        MissingPackageError: matplotlib or Pillow is not installed.
        UsageError: there are too many maps for one picture.
    """
    _require_matplotlib()
    grid = require_map(view.dump)
    picture = load_picture(image) if image else None
    count = len(view.looks)
    longest = min(LARGEST, max(SMALLEST, int(math.sqrt(AIM / count))))
    width, height = panel_size(grid, picture, fit, longest)
    layout = _Layout(count, width, height, _columns(count, width + GAP, height + LABEL + TOLD + GAP))
    if math.prod(layout.size) > MOST:
        found = f"{count:,} maps of {grid}"
        raise UsageError("too much for one picture", where=output, found=found, hint="--token TOKEN, or -o map.html")
    under = np.asarray(grey(fitted(picture, (width, height), fit))) if picture else None
    pixels = _composed(view.shades(scale), layout, under)
    words = _words(view, layout, scale)
    if output.lower().endswith(".svg"):
        write_whole(output, _svg(layout.size, pixels, words))
        return []
    fonts = Fonts([word.text for word in words])
    write_whole(output, _png(pixels, words, fonts))
    return fonts.missing()


def _require_matplotlib() -> None:
    # Which font it takes instead, and where it keeps its cache, is no news.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise need("matplotlib") from None


@dataclass(frozen=True)
class _Word:
    """What is written somewhere: its left end and baseline, and the room that it has, in pixels."""

    x: int
    y: int
    text: str
    width: int
    size: int = 12
    bold: bool = False
    ink: str = "#000000"


def _words(view: HeatMaps, layout: _Layout, scale: str) -> list[_Word]:
    width, height = layout.size
    words = [_Word(GAP, TITLE - 12, f"{view.dump.id}: {view.title}", width - 2 * GAP)]
    for at, look in enumerate(view.looks):
        left, top = layout.corner(at)
        words.append(_Word(left, top - 6, look.label, layout.width, bold=True))
        if layout.width >= ROOMY:
            told = f"{look.bits:.2f} bits" + (f", gate {look.gate:.2f}" if look.gate is not None else "")
            words.append(_Word(left, top + layout.height + 12, told, layout.width, 10, ink="#555555"))
    return [*words, _Word(GAP + 108, height - LEGEND + 17, FULL[scale], width - GAP - 108, 10, ink="#555555")]


def _png(pixels: NumpyArray, words: list[_Word], fonts: Fonts) -> bytes:
    from PIL import Image

    picture = Image.fromarray(pixels)
    for word in words:
        fonts.write(picture, (word.x, word.y), word.text, word.width, word.size, word.bold, word.ink)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _svg(size: tuple[int, int], pixels: NumpyArray, words: list[_Word]) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, TransformedBbox

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "fusecli", "text.parse_math": False}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that no font here has: who shows it may have one
        figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, size[0])
        axes.set_ylim(size[1], 0)
        axes.imshow(pixels, extent=(0, size[0], size[1], 0), interpolation="none", aspect="auto")
        for word in words:
            text = cut(printed(word.text), round(word.width / word.size * 1.6))
            points, weight = word.size * 0.72, "bold" if word.bold else "normal"  # 72 points are 100 pixels here
            drawn = axes.text(word.x, word.y, text, fontsize=points, fontweight=weight, color=word.ink)
            room = Bbox([[word.x, word.y - word.size * 1.2], [word.x + word.width, word.y + word.size * 0.4]])
            drawn.set_clip_box(TransformedBbox(room, axes.transData))
            drawn.set_clip_on(True)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    named = f"<title>{html.escape(printed(words[0].text))}</title>".encode()
    return re.sub(rb"(<svg [^>]*)>", lambda found: found[1] + b' role="img">' + named, out.getvalue(), count=1)


def _columns(count: int, width: int, height: int) -> int:
    """As many as make the whole about a third wider than high."""
    return max(1, min(count, round(math.sqrt(count * height / width * 4 / 3))))


def _composed(shares: NumpyArray, layout: _Layout, under: NumpyArray | None) -> NumpyArray:
    """All panels ``[height, width, 3]`` uint8 on white, and the bar of colours below them."""
    width, height = layout.size
    whole = np.full((height, width, 3), 255, np.uint8)
    lines = np.arange(layout.height) * shares.shape[1] // layout.height
    columns = np.arange(layout.width) * shares.shape[2] // layout.width
    for at, cells in enumerate(shares):
        left, top = layout.corner(at)
        panel = colours(cells)[lines][:, columns]
        if under is not None:
            panel = (OPACITY * panel + (1 - OPACITY) * under).round().astype(np.uint8)
        whole[top : top + layout.height, left : left + layout.width] = panel
    bar = np.broadcast_to(colours(np.arange(100) / 99), (10, 100, 3))
    if under is not None:  # as they are over white and over black: what lies under them is seen through
        ground = np.repeat([255, 0], 5)[:, None, None]
        bar = (OPACITY * bar + (1 - OPACITY) * ground).round().astype(np.uint8)
    whole[height - LEGEND + 8 : height - LEGEND + 18, GAP : GAP + 100] = bar
    return whole
