"""No result over an input: what is read is compared with what will be written, before anything is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from fusecli.batch.store import STATE
from fusecli.collections import Collection, Folder
from fusecli.errors import UsageError


class Inputs:
    """Inputs that lie in an output, so that a result might take their place; links count as what they lead to.

    Where an output holds nothing yet, there is nothing to look for.
    """

    def __init__(self, outputs: Iterable[str]) -> None:
        held = (os.path.realpath(output).rstrip("/") for output in outputs if _holds_something(output))
        self._below = tuple(f"{output}/" for output in held)
        self.found: set[str] = set()
        self._look_into = lru_cache(maxsize=4096)(_look_into)

    def see(self, path: str) -> None:
        """A file is read."""
        if not self._below:
            return
        folder, slash, name = path.rpartition("/")
        real, links = self._look_into(folder + slash or ".")
        try:
            whole = os.path.realpath(path) if name in links else f"{real}/{name}"
        except ValueError:  # no path at all, and so no file
            return
        if f"{whole}/".startswith(self._below):
            self.found.add(whole)

    def see_all(self, collection: Collection) -> None:
        """The files of a collection are read, of ids without a partner too."""
        if not self._below:
            return
        paths = collection.paths()
        if isinstance(collection, Folder) and not self._has(collection.root):  # so only links can lead into an output
            paths = collection.links()
        for path in paths:
            self.see(path)

    def _has(self, folder: str) -> bool:
        return f"{os.path.realpath(folder)}/".startswith(self._below)


def _holds_something(output: str) -> bool:
    try:
        with os.scandir(output) as entries:
            return any(entry.name != STATE for entry in entries)
    except NotADirectoryError:
        return True
    except OSError:
        return False


def _look_into(folder: str) -> tuple[str, frozenset[str]]:
    """The real path of a folder, without a slash at its end, and the names of the links in it."""
    links: frozenset[str] = frozenset()
    try:
        real = os.path.realpath(folder).rstrip("/")
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            links = frozenset(entry.name for entry in entries if entry.is_symlink())
    except ValueError:  # no path at all
        return folder, links
    return real, links


def require_apart(ids: Sequence[str], inputs: set[str], targets: Iterable[tuple[str, str | None]]) -> None:
    """Raise `UsageError` if the result of one of ``ids`` would take the place of one of ``inputs``.

    ``targets`` are outputs: folders with the suffix of what is written there, or files of all results with None.
    """
    for output, suffix in targets if inputs else ():
        for target in [os.path.realpath(output)] if suffix is None else _files(ids, output, suffix):
            if target in inputs:
                hint = "write to another place"
                raise UsageError("a result would replace an input", where=target, hint=hint)


def _files(ids: Sequence[str], output: str, suffix: str) -> Iterator[str]:
    """The real paths of results in a folder; one whose id is no path will fail by itself."""
    resolved = lru_cache(maxsize=4096)(os.path.realpath)
    for id in ids:
        folder, _, name = f"{output}/{id}{suffix}".rpartition("/")
        with contextlib.suppress(ValueError):
            yield f"{resolved(folder).rstrip('/')}/{name}"
