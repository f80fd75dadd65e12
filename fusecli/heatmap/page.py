"""A dump as one ``.html`` that needs nothing else: picture, numbers and what draws them."""

from __future__ import annotations

import base64
import html
import json
import re
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from fusecli.errors import UsageError
from fusecli.formats import NumpyArray, write_whole
from fusecli.heatmap.dump import Dump, caption
from fusecli.heatmap.lettering import printed
from fusecli.heatmap.picture import for_page, load_picture
from fusecli.heatmap.shades import VIRIDIS, entropy
from fusecli.heatmap.view import HeatMaps, require_map

#: Numbers of all heads, and of their mean, that a page carries at most.
MOST_OF_HEADS, MOST = 2**24, 2**25


def write_page(view: HeatMaps, output: str, image: str | None, fit: str, scale: str) -> None:
    """Write the page of a view: its tokens, with all heads to choose from.

    Raises:
        FileError: the picture cannot be read.
        ShapeError, ValuesError: the image rows form no grid.
        MissingPackageError: there is a picture, and Pillow is not installed.
        UsageError: there is too much for one page.
    """
    rows = sorted({look.row for look in view.looks})
    if len(rows) * view.dump.m > MOST:
        found = f"{len(rows):,} tokens of {view.dump.m:,} image rows"
        raise UsageError("too much for one page", where=output, found=found, hint="choose some with --token")
    picture = for_page(image, load_picture(image)) if image else None
    first = view.heads if isinstance(view.heads, int) else -1
    mean, top = view.weights, view.top
    if view.heads != "mean":
        every = view.dump.mean()
        mean, top = every[rows], view.dump.peak(every)
    write_whole(output, page(view.dump, rows, mean, top, picture, fit, scale, first))


def page(
    dump: Dump,
    rows: list[int],
    mean: NumpyArray,
    top: float,
    picture: tuple[str, bytes] | None,
    fit: str,
    scale: str = "token",
    head: int = -1,
) -> bytes:
    """The bytes of a page.

    Args:
        dump: the attention.
        rows: text rows that are shown.
        mean: weights ``[rows, M]`` over heads.
        top: the largest of them on the grid, of tokens too that are not shown.
        picture: its MIME type and bytes.
        fit: how the picture lies under the map at first.
        scale: what a full colour is at first.
        head: the head at first, -1 for the mean.
    """
    grid = require_map(dump)
    heads = dump.num_heads or 0
    whole = heads * mean.size <= MOST_OF_HEADS
    tops, layers = [top], [mean]
    for at in range(heads if whole else 0):
        layer = dump.head(at)
        tops.append(dump.peak(layer))
        layers.append(layer[rows])
    grain = "Weights on the grid are exact to 1/65,535 of the largest there, those of a head to 1/255."
    if heads and not whole:
        grain = "The heads are left out: together they would be too large for a page."
    data: dict[str, Any] = {
        "title": printed(dump.id),
        "words": printed(caption(dump.words)) if dump.words else "",
        "line": dump.line,
        "tops": tops,
        "grain": grain,
        "tokens": [printed(dump.tokens[row]) for row in rows],
        "grid": [grid.height, grid.width],
        "skip": grid.skip,
        "m": dump.m,
        "heads": heads,
        "head": head if whole else -1,
        "scale": scale,
        "fit": fit,
        "colours": [f"#{stop}" for stop in VIRIDIS],
        "bits": [[round(float(bits), 4) for bits in entropy(layer)] for layer in layers],
        "gate": None if dump.gate is None else [round(float(dump.gate[row]), 4) for row in rows],
        "picture": None if picture is None else f"data:{picture[0]};base64,{base64.b64encode(picture[1]).decode()}",
        "nav": [],
        "mean": _packed(mean, grid.skip, "<u2"),
        "each": _packed(np.stack(layers[1:]), grid.skip, "u1") if layers[1:] else None,
    }
    return filled("page.html", {"title": html.escape(printed(dump.id)), "data": as_json(data)})


def with_links(whole: bytes, links: list[tuple[str, str]]) -> bytes:
    """A page with links, names and places, to others: which there are is known when those have been made."""
    return whole.replace(b'"nav":[]', f'"nav":{as_json(links)}'.encode(), 1)


def filled(template: str, values: dict[str, str]) -> bytes:
    """A template of this package with ``{{name}}`` replaced."""
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], _template(template))
    return text.encode("utf-8", "backslashreplace")


@lru_cache
def _template(name: str) -> str:
    return files("fusecli.heatmap").joinpath(name).read_text("utf-8")


def as_json(value: Any) -> str:
    """JSON that no HTML parser finds a tag in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


#: What a share of the largest is raised to before it is rounded: one byte has steps for small ones too.
GAMMA = {"<u2": 1.0, "u1": 0.5}


def _packed(weights: NumpyArray, skip: int, dtype: str) -> dict[str, str | list[float]]:
    """Weights ``[..., M]`` for the page, numbers in base64: of each row the largest on the grid, and shares of that.

    Those of the ``skip`` rows before the grid, which may be larger by far, are as they are, in float32.
    """
    before, cells = weights[..., :skip], weights[..., skip:]
    top = cells.max(-1, keepdims=True)
    shares = np.divide(cells, top, out=np.zeros_like(cells), where=top > 0) ** GAMMA[dtype]
    return {
        "before": _in_base64(before.astype("<f4")),
        "cells": _in_base64(np.rint(shares * np.iinfo(dtype).max).astype(dtype)),
        "most": [float(f"{value:.6g}") for value in top.ravel()],
    }


def _in_base64(numbers: NumpyArray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()
