"""The picture under a map, as the encoder saw it."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from fusecli.errors import FileError, MissingPackageError
from fusecli.grid import Grid

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
#: Longer sides than this are made smaller for a page, in pixels.
LONGEST = 1280
#: Files of up to so many bytes go into a page as they are.
SMALL = 2**18
#: Formats that are read. Pillow knows more, some of which other programs would be started for.
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
#: Formats that every browser shows.
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


def need(package: str) -> MissingPackageError:
    """The error for a package of the extra that is not there."""
    return MissingPackageError("not installed, and needed for this", where=package, hint="pip install 'fusecli[plot]'")


def load_picture(path: str) -> Image.Image:
    """The picture in a file, upright, RGB; what is transparent becomes white.

    Raises:
        FileError: it cannot be read, or is no picture.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise need("Pillow") from None
    try:
        with open(path, "rb") as file, Image.open(file, formats=_formats()) as opened:
            opened.draft("RGB", (2 * LONGEST, 2 * LONGEST))  # JPEG can be read at a half, a quarter, an eighth
            if opened.mode == "F":
                raise ValueError("a picture of floats, whose range is unknown")
            opened.thumbnail((2 * LONGEST, 2 * LONGEST))
            return _upright(opened)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise FileError("not a readable picture", where=path, wanted="PNG, JPEG, WebP, …") from None
    except Exception as error:  # decoders raise whatever they stumble over
        found = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FileError("not a readable picture", where=path, found=found, wanted="PNG, JPEG, WebP, …") from None


def _formats() -> list[str]:
    """Those of `READ` that this Pillow has."""
    from PIL import Image

    Image.init()
    return [name for name in READ if name in Image.OPEN]


def _upright(picture: Image.Image) -> Image.Image:
    """As its camera was held, RGB, on white."""
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(picture)
    if turned.has_transparency_data:
        layer = turned.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        return white.convert("RGB")
    if turned.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        turned = turned.convert("I").point(lambda value: value / 256).convert("L")
    return turned.convert("RGB")


def panel_size(grid: Grid, picture: Image.Image | None, fit: str, longest: int) -> tuple[int, int]:
    """Width and height in pixels of the area that the grid covers, its longer side ``longest``.

    A stretched picture keeps its own shape, and the cells are stretched instead; else cells are squares. There is at
    least a pixel a cell.
    """
    width, height = picture.size if picture and fit == "stretch" else (grid.width, grid.height)
    by = longest / max(width, height)
    return max(round(width * by), grid.width, 24), max(round(height * by), grid.height, 24)


def fitted(picture: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The picture on an area of ``size`` (width, height) that the grid covers, as encoders do it.

    ``contain`` pads it on white, ``cover`` cuts its middle out, ``stretch`` changes its shape.
    """
    from PIL import Image, ImageOps

    best = Image.Resampling.LANCZOS
    if fit == "contain":
        return ImageOps.pad(picture, size, best, color="white")
    return ImageOps.fit(picture, size, best) if fit == "cover" else picture.resize(size, best)


def grey(picture: Image.Image) -> Image.Image:
    """The picture without its colours, so that what is coloured is the map."""
    return picture.convert("L").convert("RGB")


def for_page(path: str, picture: Image.Image) -> tuple[str, bytes]:
    """MIME type and bytes of a picture that is to be part of a page: the file itself if it is small and known."""
    from PIL import Image

    # A pipe has nothing more to give.
    if os.path.isfile(path) and os.path.getsize(path) <= SMALL and max(picture.size) <= LONGEST:
        with open(path, "rb") as file:
            raw = file.read()
        with Image.open(io.BytesIO(raw), formats=_formats()) as opened:
            mime, turned = MIME.get(opened.format or ""), opened.getexif().get(0x0112, 1) != 1
        if mime and not turned:
            return mime, raw
    small = picture.copy()
    small.thumbnail((LONGEST, LONGEST))
    return "image/jpeg", as_jpeg(small)


def as_jpeg(picture: Any, quality: int = 85) -> bytes:
    """The bytes of a JPEG file."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()
