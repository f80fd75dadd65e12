"""Words on a picture, in whatever script: fonts of this machine that have their letters, or their numbers in Unicode.

Emoji come as coloured bitmaps as a rule, which Pillow draws and matplotlib does not. In an ``.svg`` words stay
words, and whoever shows it brings the fonts.
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
#: Letters of a word that are looked at: no panel is wider.
LONGEST = 300


class Fonts:
    """Fonts that between them have all letters of some words."""

    def __init__(self, words: list[str]) -> None:
        self._plain = _own_font("DejaVuSans.ttf")
        rest = {c for word in words for c in printed(word)} - _letters(self._plain)
        rest = {c for c in rest if ord(c) not in SILENT}
        self._paths: list[str] = []
        for path in _fonts_here() if rest else []:
            here = rest & _letters(path)
            if here:
                self._paths.append(path)
                rest -= here
            if not rest:
                break
        self.lost = rest  # letters that no font has

    def missing(self) -> list[str]:
        """What to tell of letters that no font has."""
        if not self.lost:
            return []
        shown = " ".join(sorted(self.lost)[:8])
        return [f"no font here has {shown}, so they are written as U+…; install fonts-noto-cjk, fonts-noto-color-emoji"]

    def write(self, picture: Any, at: tuple[int, int], text: str, width: int, size: int, bold: bool, ink: str) -> None:
        """Draw ``text`` on a Pillow picture, its baseline beginning ``at``, within ``width`` pixels and one line."""
        from PIL import ImageDraw

        box = (at[0], at[1] - round(size * 1.2), at[0] + width, at[1] + round(size * 0.4))
        strip = picture.crop(box)  # what reaches out of it, a stack of accents, is cut off
        draw, x, base = ImageDraw.Draw(strip), 0, round(size * 1.2)
        for path, run in self._runs(self._spelled(text), bold):
            if _is_bitmap(path):
                piece = _emoji(path, run, size)
                strip.paste(piece, (x, base - round(size * 0.95)), piece)
                x += piece.width
            else:
                font = _font(path, size)
                shown = _within(run, font, width - x)
                draw.text((x, base), shown, font=font, fill=ink, anchor="ls")
                x += round(font.getlength(shown))
                if shown != run:
                    break
            if x > width:
                break
        picture.paste(strip, box[:2])

    def _spelled(self, text: str) -> str:
        return "".join(f"U+{ord(c):04X}" if c in self.lost else c for c in printed(text))

    def _runs(self, text: str, bold: bool) -> list[tuple[str, str]]:
        """Stretches of ``text`` and a font that has all of each."""
        plain = _own_font("DejaVuSans-Bold.ttf") if bold else self._plain
        runs: list[tuple[str, str]] = []
        for c in text:
            path = plain
            if ord(c) in SILENT and runs:
                path = runs[-1][0]
            elif c not in _letters(plain):
                path = next((other for other in self._paths if c in _letters(other)), plain)
            if runs and runs[-1][0] == path:
                runs[-1] = path, runs[-1][1] + c
            else:
                runs.append((path, c))
        return runs


def printed(text: str) -> str:
    """``text`` as it can stand on a page: what would not be seen is spelled out."""
    if not text.strip():
        return repr(text[:LONGEST])
    shown = text[:LONGEST] + ("…" if len(text) > LONGEST else "")
    return "".join(c if c.isprintable() or ord(c) in SILENT else c.encode("unicode_escape").decode() for c in shown)


def cut(text: str, most: int) -> str:
    """At most so many narrow letters, where a wide one counts twice; an ellipsis stands for the rest."""
    room = max(2, most)
    for at, c in enumerate(text):
        room -= 0 if ord(c) in SILENT else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if room < 0:
            return text[: max(1, at - 1)] + "…"
    return text


def _within(text: str, font: Any, width: int) -> str:
    """As much of ``text`` as fits, an ellipsis for the rest."""
    if font.getlength(text) <= width:
        return text
    short, long = 0, len(text)
    while short < long - 1:
        middle = (short + long) // 2
        if font.getlength(text[:middle] + "…") <= width:
            short = middle
        else:
            long = middle
    return text[:short] + "…"


def _emoji(path: str, run: str, size: int) -> Any:
    """Coloured bitmaps on nothing, as high as a line of ``size``."""
    from PIL import Image, ImageDraw

    font = _font(path, BITMAP)
    piece = Image.new("RGBA", (max(1, round(font.getlength(run))), round(BITMAP * 1.2)), (255, 255, 255, 0))
    ImageDraw.Draw(piece).text((0, 0), run, font=font, embedded_color=True)
    high = round(size * 1.2)
    return piece.resize((max(1, round(piece.width * high / piece.height)), high), Image.Resampling.LANCZOS)


@lru_cache(maxsize=64)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


def _own_font(name: str) -> str:
    """The path of a font that comes with matplotlib."""
    from matplotlib import get_data_path

    return os.path.join(get_data_path(), "fonts", "ttf", name)


@lru_cache(maxsize=1)
def _fonts_here() -> list[str]:
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
