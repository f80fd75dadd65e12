"""Maps as one picture, ``.png`` or ``.svg``: a panel a token, drawn with matplotlib."""

from __future__ import annotations

import io
import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecli.errors import UsageError
from fusecli.formats import NumpyArray, open_sink
from fusecli.heatmap.maps import colours
from fusecli.heatmap.picture import as_png, fitted, grey, load_picture, need, panel_size
from fusecli.heatmap.view import View, require_map

#: Pixels of all panels together that are aimed at, and that are refused.
AIM, MOST = 8_000_000, 200_000_000
#: Longer side of a panel, in pixels, and the width from which there is room for numbers below it.
SMALLEST, LARGEST, ROOMY = 48, 256, 90
LABEL, TOLD, GAP, TITLE, LEGEND = 22, 18, 12, 34, 34
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


def write_figure(view: View, output: str, image: str | None, fit: str, scale: str) -> list[str]:
    """Draw all maps of a view into a ``.png`` or ``.svg``; returns what the user should know.

    Raises:
        FileError: the picture cannot be read.
        ShapeError, ValuesError: the image rows form no grid.
        MissingPackageError: matplotlib or Pillow is not installed.
        UsageError: there are too many maps for one picture.
    """
    _require_matplotlib()
    from fusecli.heatmap.labels import Labels

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
    words = [view.title, view.dump.id, *(look.label for look in view.looks)]
    labels = Labels(words, as_text=output.lower().endswith(".svg"))
    write_whole(output, _drawn(view, layout, labels, _composed(view.shades(scale), layout, under), scale))
    return labels.missing()


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise need("matplotlib") from None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # which font it takes instead is no news


def _drawn(view: View, layout: _Layout, labels: Any, pixels: NumpyArray, scale: str) -> bytes:
    """The file: ``pixels`` with words on them."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "fusecli", "font.size": 9, "text.parse_math": False}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that no font has: `Labels` knows of them
        figure = Figure(figsize=(layout.size[0] / 100, layout.size[1] / 100), dpi=100, facecolor="none")
        canvas: Any = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, layout.size[0])
        axes.set_ylim(layout.size[1], 0)
        _annotate(axes, view, layout, labels, scale)
        if not labels.as_text:
            canvas.draw()
            return as_png(_over(pixels, np.asarray(canvas.buffer_rgba())))
        axes.imshow(pixels, extent=(0, layout.size[0], layout.size[1], 0), interpolation="none", aspect="auto")
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()


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
    whole[height - LEGEND + 8 : height - LEGEND + 18, GAP : GAP + 100] = colours(np.arange(100) / 99)
    return whole


def _annotate(axes: Any, view: View, layout: _Layout, labels: Any, scale: str) -> None:
    labels.put(axes, GAP, TITLE - 12, f"{view.dump.id}: {view.title}", layout.size[0] - 2 * GAP, "normal")
    for at, look in enumerate(view.looks):
        left, top = layout.corner(at)
        labels.put(axes, left, top - 6, look.label, layout.width, "bold")
        if layout.width >= ROOMY:
            told = f"{look.bits:.2f} bits" + (f" · gate {look.gate:.2f}" if look.gate is not None else "")
            axes.text(left, top + layout.height + 12, told, fontsize=7, color="#555555")
    ends = {"token": "the token's largest weight", "all": "the largest weight of all"}
    full = f"0 to {ends[scale]}" if scale in ends else "the token's smallest to its largest weight"
    axes.text(GAP + 108, layout.size[1] - LEGEND + 17, full, fontsize=7, color="#555555", clip_on=True)


def _over(under: NumpyArray, above: NumpyArray) -> NumpyArray:
    """Words ``[height, width, 4]`` laid over pixels ``[height, width, 3]``, where there are any.

    matplotlib could place the pixels itself, and takes seconds to resample millions of them one to one.
    """
    lines, columns = np.nonzero(above[..., 3])
    words = above[lines, columns].astype(np.float32)
    cover = words[:, 3:] / 255
    under[lines, columns] = np.rint(words[:, :3] * cover + under[lines, columns] * (1 - cover))
    return under


def write_whole(output: str, data: bytes) -> None:
    """Write a file, all of it or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    with open_sink(output) as sink:
        sink.put(0, np.frombuffer(data, np.uint8))
