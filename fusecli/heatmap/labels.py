"""Words on a figure, in whatever script: a font of this machine that has their letters, or their numbers in Unicode.

matplotlib draws outlines only. Emoji come as coloured bitmaps as a rule; such labels are drawn by Pillow and placed
as small pictures. In an ``.svg`` words stay words, and whoever shows it brings the fonts.
"""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from typing import Any

#: Drawn by nobody: joiners and selectors that only change their neighbours.
SILENT = {0x200D, 0xFE0E, 0xFE0F}
#: The one size that bitmaps of Noto Color Emoji come in, in pixels.
BITMAP = 109


class Labels:
    """Places words; knows beforehand all that will come.

    Args:
        words: all of them.
        as_text: words may stay words, whatever fonts there are.
    """

    def __init__(self, words: list[str], as_text: bool) -> None:
        from matplotlib.font_manager import fontManager

        self.as_text = as_text
        self._plain = _default_font()
        rest = {c for word in words for c in printed(word)} - _letters(self._plain)
        rest = {c for c in rest if ord(c) not in SILENT}
        self._paths = [self._plain]
        self._bitmaps: list[str] = []
        for path in _fonts() if rest else []:
            here = rest & _letters(path)
            if here:
                (self._bitmaps if _is_bitmap(path) else self._paths).append(path)
                rest -= here
            if not rest:
                break
        self._lost = rest
        for path in self._paths[1:]:
            fontManager.addfont(path)
        self._families = [_family(path) for path in self._paths]

    def missing(self) -> list[str]:
        """What to tell of letters that no font has; nothing where words stay words."""
        if self.as_text or not self._lost:
            return []
        shown = " ".join(sorted(self._lost)[:8])
        return [f"no font here has {shown}, so they are written as U+…; install fonts-noto-cjk, fonts-noto-color-emoji"]

    def put(self, axes: Any, x: float, y: float, text: str, width: float, weight: str) -> None:
        """Place ``text`` with its foot at ``y``, cut to ``width`` pixels."""
        text = printed(text)
        if not self.as_text:
            text = "".join(f"U+{ord(c):04X}" if c in self._lost else c for c in text)
            if self._bitmaps and any(c in _letters(path) for path in self._bitmaps for c in text if ord(c) > 127):
                self._paint(axes, x, y, text, width)
                return
        most = max(2, int(width / 6.5))
        text = _cut(text, most)
        axes.text(x, y, text, fontsize=9, fontweight=weight, fontfamily=self._families, clip_on=True)

    def _paint(self, axes: Any, x: float, y: float, text: str, width: float) -> None:
        """Drawn by Pillow at four times the size, so that it can be shown at less."""
        from PIL import Image, ImageDraw, ImageFont

        height = 64
        strip = Image.new("RGBA", (1, height), (255, 255, 255, 0))
        for path, run in self._runs(text):
            bitmap = path in self._bitmaps
            font = ImageFont.truetype(path, BITMAP if bitmap else 44)
            box = font.getbbox(run)
            piece = Image.new("RGBA", (max(1, round(box[2])), round(box[3]) + 8), (255, 255, 255, 0))
            ImageDraw.Draw(piece).text((0, 0), run, font=font, fill="black", embedded_color=bitmap)
            if bitmap:
                piece = piece.resize((max(1, round(piece.width * 52 / piece.height)), 52), Image.Resampling.LANCZOS)
            joined = Image.new("RGBA", (strip.width + piece.width, height), (255, 255, 255, 0))
            joined.paste(strip, (0, 0))
            joined.paste(piece, (strip.width, max(0, (height - piece.height) // 2)))
            strip = joined
        strip = strip.crop((0, 0, min(strip.width, round(width * 4)), height))
        extent = (x, x + strip.width / 4, y + 4, y + 4 - height / 4)
        axes.imshow(strip, extent=extent, aspect="auto", interpolation="antialiased", zorder=3)

    def _runs(self, text: str) -> list[tuple[str, str]]:
        """Stretches of ``text`` and the font that has all of each."""
        runs: list[tuple[str, str]] = []
        for c in text:
            fits = (path for path in [*self._bitmaps, *self._paths] if c in _letters(path) and ord(c) > 127)
            path = runs[-1][0] if ord(c) in SILENT and runs else next(fits, self._plain)
            if runs and runs[-1][0] == path:
                runs[-1] = path, runs[-1][1] + c
            else:
                runs.append((path, c))
        return runs


def printed(text: str) -> str:
    """``text`` as it can stand on a page: what would not be seen is spelled out."""
    if not text.strip():
        return repr(text)
    return "".join(c if c.isprintable() or ord(c) in SILENT else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, most: int) -> str:
    """At most so many narrow letters, where a wide one counts twice."""
    room = most
    for at, c in enumerate(text):
        room -= 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if room < 0:
            return text[: max(1, at - 1)] + "…"
    return text


def _default_font() -> str:
    from matplotlib import get_data_path

    return os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@lru_cache(maxsize=1)
def _fonts() -> list[str]:
    """Fonts of this machine, those for large scripts and emoji first, upright and regular before others."""
    from matplotlib.font_manager import findSystemFonts

    def rank(path: str) -> tuple[bool, bool, str]:
        name = os.path.basename(path).lower()
        odd = any(word in name for word in ("bold", "italic", "oblique", "light", "thin", "black", "medium", "mono"))
        return not any(word in name for word in ("cjk", "emoji", "wqy", "unifont", "symbola")), odd, path

    return sorted(findSystemFonts(), key=rank)


@lru_cache(maxsize=512)
def _letters(path: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (RuntimeError, OSError, ValueError):
        return frozenset()


@lru_cache(maxsize=512)
def _is_bitmap(path: str) -> bool:
    from matplotlib.ft2font import FT2Font

    return not FT2Font(path).scalable


def _family(path: str) -> str:
    from matplotlib.ft2font import FT2Font

    return FT2Font(path).family_name
