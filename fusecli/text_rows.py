"""Text rows on their way to images, and what has been made of them: once, however many images they meet."""

from __future__ import annotations

from collections.abc import Callable

from fusecli.arrays import Array


class TextRows:
    """Text rows ``[n, Dt]`` (of a batch ``[B, N, Dt]``), and what is made of them whatever the image: once for all."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows
        self._made: dict[str, Array] = {}

    def made(self, what: str, make: Callable[[TextRows], Array]) -> Array:
        """What ``make`` gives, a row for each, by a name; not to be changed."""
        if what not in self._made:
            self._made[what] = make(self)
        return self._made[what]


class PickedRows(TextRows):
    """Some of the rows of another, as often as one likes; what is made of them is made once, and then picked.

    Args:
        whole: what they are picked from.
        pick: picks, from rows of any width.
    """

    def __init__(self, whole: TextRows, pick: Callable[[Array], Array]) -> None:
        super().__init__(pick(whole.rows))
        self._whole, self._pick = whole, pick

    def made(self, what: str, make: Callable[[TextRows], Array]) -> Array:
        """See `TextRows`."""
        return super().made(what, lambda _: self._pick(self._whole.made(what, make)))
