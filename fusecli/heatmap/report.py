"""A report of many pairs: a folder with an index of thumbnails, and a page for each pair."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from fusecli.errors import FileError, InputError, OneRowError, UsageError, unwritable
from fusecli.formats import NumpyArray
from fusecli.heatmap.dump import Dump, Dumps, Wanted, caption
from fusecli.heatmap.figure import OPACITY
from fusecli.heatmap.lettering import printed
from fusecli.heatmap.page import as_json, filled, page, with_links
from fusecli.heatmap.picture import SUFFIXES, as_jpeg, fitted, for_page, grey, load_picture, need, panel_size
from fusecli.heatmap.shades import colours, entropy, on_grid, shades
from fusecli.heatmap.view import look_at, require_map
from fusecli.machine import alone_in, undisturbed

#: What tells a report of ours from other folders, in its index.
MARK = b'content="fusecli report"'
#: Longer side of a thumbnail, in pixels.
THUMB = 128
#: Letters of a caption that are kept for the index.
CAPTION = 80


#: What the index has of a pair: id, caption, mean entropy of its tokens in bits and as a share of the most, file.
Listed: TypeAlias = tuple[str, str, float, float, str]


@dataclass
class Done:
    """What became of the pairs."""

    pages: int = 0
    bare: int = 0  # without a picture
    single: int = 0  # passed over: one image row, nothing to see
    failed: list[str] = field(default_factory=list)  # messages


def write_report(
    dumps: Dumps,
    output: str,
    wanted: Wanted,
    images: str | None,
    fit: str,
    scale: str = "token",
    overwrite: bool = False,
    counted: Callable[[list[str]], Iterable[str]] = iter,
) -> Done:
    """Write a report into the folder ``output``, which appears when it is whole.

    Args:
        dumps: the attention of the pairs.
        output: a folder that is not there, or is empty.
        wanted: what the dumps do not say themselves.
        images: a folder of pictures, each named by its id.
        fit: how the encoder fitted them.
        scale: what a full colour is.
        overwrite: an earlier report may be replaced.
        counted: passes ids on, and tells the user how far it is.

    Raises:
        InputError: no pair can be shown.
        OutputError: the folder cannot be written.
        UsageError: there is something in it.
    """
    output = output.rstrip("/") or "/"
    target = os.path.realpath(output)
    _require_free(output, overwrite)
    for path in (dumps.path, images, os.curdir):
        if path and f"{os.path.realpath(path)}/".startswith(f"{target}/"):
            what = "would take the place of " + ("the folder you are in" if path == os.curdir else "what is read")
            raise UsageError(what, where=output, hint="write to another folder")
    pictures = _pictures(images) if images else {}
    hidden = f"{os.path.dirname(target)}/.{os.path.basename(target)}.fusecli-"
    building = f"{hidden}{os.urandom(6).hex()}"  # containers give the same number to processes of many runs
    try:
        os.mkdir(building)
        with alone_in(building):  # so that no other report takes it for litter
            for name in ("/pairs", "/thumbs"):
                os.mkdir(building + name)
            done = _write_all(dumps, building, wanted, pictures, (fit, scale), counted)
            _require_free(output, overwrite)  # that was minutes ago, perhaps
            _put_in_place(building, target)
    except OSError as error:
        raise unwritable(output, error) from error
    finally:
        with undisturbed():  # by a second Ctrl-C
            for left in (building, _old(building)):
                shutil.rmtree(left, ignore_errors=True)
    _remove_litter(hidden)
    return done


def _remove_litter(hidden: str) -> None:
    """Remove what killed runs have left of reports in this place; their folders' names begin with ``hidden``."""
    for left in glob.glob(f"{glob.escape(hidden)}*"):
        with contextlib.suppress(OSError), alone_in(left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)


def _write_all(
    dumps: Dumps,
    folder: str,
    wanted: Wanted,
    pictures: dict[str, str],
    style: tuple[str, str],
    counted: Callable[[list[str]], Iterable[str]],
) -> Done:
    done = Done()
    listed: list[Listed] = []
    held = b""  # the page before this one, until it is known which is the next
    first: InputError | None = None
    single: InputError | None = None
    digits = len(str(len(dumps.ids)))
    for at, id in enumerate(counted(dumps.ids), 1):
        name = f"{at:0{digits}}"
        try:
            dump = dumps.open(id, wanted)
            line, thumb, whole = _make(dump, id, name, pictures.get(id), style)
        except OneRowError as error:
            single = error
            done.single += 1
            continue
        except InputError as error:
            first = first or error
            done.failed.append(f"{id}: {error}")
            continue
        _write(f"{folder}/thumbs/{name}.jpg", thumb)
        _write_page(folder, listed, held, name)
        listed.append(line)
        held = whole
        done.bare += id not in pictures
    if not listed:
        raise first or single or FileError("no dumps in it", where=dumps.path)
    _write_page(folder, listed, held, None)
    _write(f"{folder}/index.html", filled("index.html", {"data": as_json(listed)}))
    done.pages = len(listed)
    return done


def _write_page(folder: str, listed: list[Listed], whole: bytes, following: str | None) -> None:
    """Write the page of the pair that was listed last, if there is one, with links to those beside it."""
    if not listed:
        return
    links = [("all pairs", "../index.html")]
    links += [("previous", f"{listed[-2][-1]}.html")] if len(listed) > 1 else []
    links += [("next", f"{following}.html")] if following else []
    _write(f"{folder}/pairs/{listed[-1][-1]}.html", with_links(whole, links))


def _make(dump: Dump, id: str, name: str, image: str | None, style: tuple[str, str]) -> tuple[Listed, bytes, bytes]:
    """What the index has of a pair, its thumbnail and its page."""
    fit, scale = style
    view = look_at(dump)
    grid = require_map(dump)
    picture = load_picture(image) if image else None
    embedded = for_page(image, picture) if image and picture else None
    whole = page(dump, list(range(dump.n)), view.weights, view.top, embedded, fit, scale)
    size = panel_size(grid, picture, fit, THUMB)
    under = np.asarray(grey(fitted(picture, size, fit))) if picture else None
    mean = shades(on_grid(view.weights.mean(0, keepdims=True), grid), scale)[0]
    text = printed(caption(dump.words)) if dump.words else ""
    bits = float(entropy(view.weights).mean())
    shortened = text[:CAPTION] + ("…" if len(text) > CAPTION else "")
    line = (printed(id), shortened, round(bits, 4), round(bits / math.log2(dump.m), 5), name)
    return line, _thumbnail(mean, size, under), whole


def _thumbnail(cells: NumpyArray, size: tuple[int, int], under: NumpyArray | None) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        raise need("Pillow") from None

    map = Image.fromarray(colours(cells)).resize(size, Image.Resampling.NEAREST)
    drawn = map if under is None else Image.blend(Image.fromarray(under), map, OPACITY)
    drawn.thumbnail((THUMB, THUMB))
    return as_jpeg(drawn, 80)


def _pictures(folder: str) -> dict[str, str]:
    """Paths of pictures by id: the path below the folder without its suffix; hidden ones are passed over."""
    if not os.path.isdir(folder):
        raise FileError("no such folder", where=folder, wanted="pictures by id, in a folder")
    found: dict[str, str] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            path = os.path.join(root, name)
            stem, suffix = os.path.splitext(os.path.relpath(path, folder))
            if suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            if stem in found:
                both = f"{os.path.relpath(found[stem], folder)} and {os.path.relpath(path, folder)}"
                raise FileError("two pictures for one id", where=folder, found=both, wanted="one of them")
            found[stem] = path
    return found


def _require_free(output: str, overwrite: bool) -> None:
    if not os.path.lexists(output) or (os.path.isdir(output) and not os.listdir(output)):
        return
    if not os.path.isdir(output):
        raise UsageError("is no folder, and is left as it is", where=output, hint="write to a new folder")
    if not _is_report(output):
        raise UsageError("holds more than a report, and is left as it is", where=output, hint="write to a new folder")
    if not overwrite:
        raise UsageError("there is a report already", where=output, hint="--overwrite, or write to a new folder")


def _is_report(folder: str) -> bool:
    """Whether a report of ours is there, and nothing else."""
    try:
        with open(f"{folder}/index.html", "rb") as file:
            ours = MARK in file.read(2048)
        stems = [_files(f"{folder}/{name}", suffix) for name, suffix in (("pairs", ".html"), ("thumbs", ".jpg"))]
        return ours and set(os.listdir(folder)) == {"index.html", "pairs", "thumbs"} and stems[0] == stems[1]
    except OSError:
        return False


def _files(folder: str, suffix: str) -> set[str]:
    """Names without their suffix, numbers all of them.

    Raises:
        FileNotFoundError: something else is there as well.
    """
    found = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.removesuffix(suffix)
            if not (stem.isdecimal() and stem + suffix == entry.name and entry.is_file(follow_symlinks=False)):
                raise FileNotFoundError(entry.path)
            found.add(stem)
    return found


def _old(building: str) -> str:
    return f"{building}-old"


def _put_in_place(building: str, target: str) -> None:
    """What was there before is gone when the new one is there, not earlier."""
    old = _old(building)
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(building, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
