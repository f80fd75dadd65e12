"""Text rows, and what is computed from them alone: once, however many images they meet."""

from __future__ import annotations

from collections.abc import Callable

from fusecli.arrays import Array


class TextRows:
    """Text rows ``[n, Dt]`` (of a batch ``[B, N, Dt]``), and what is computed from them whatever the image is."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows
        self._made: dict[str, Array] = {}

    def made(self, what: str, make: Callable[[TextRows], Array]) -> Array:
        """What ``make`` gives for all rows, computed when the name ``what`` is first asked for; do not change it."""
        if what not in self._made:
            self._made[what] = make(self)
        return self._made[what]


class PickedRows(TextRows):
    """Rows picked from another, as often as one likes. What is computed from rows is computed before they are picked.

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
