"""Tables that name pairs: CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import json
import os
from typing import NamedTuple

from fusecli.collections import Place, key_for
from fusecli.errors import FileError


class Entry(NamedTuple):
    """One line of a manifest."""

    line: int
    id: str
    image: Place
    text: Place


COLUMNS = ("id", "image", "text")
KEYS = ("image_key", "text_key")


class Manifest:
    """Reads lines of CSV, TSV or JSON with ``id,image,text`` and, if need be, ``image_key,text_key``.

    Args:
        name: of the manifest, for messages.
        folder: what paths in it are relative to.
        image_key: the tensor to take from an image's ``.safetensors``, where a line names none.
        text_key: likewise.
    """

    def __init__(self, name: str, folder: str, image_key: str | None = None, text_key: str | None = None) -> None:
        self.name, self._folder, self._line = name, folder, 0
        self._keys = image_key, text_key
        self._columns: list[str] | None = None
        self._delimiter: str | None = None  # None: JSON
        self._in_quote = False  # a quote that an earlier line has opened, so that the rest of a value may come

    def read(self, text: str) -> Entry | None:
        """What one line says; None for a header or an empty line.

        Raises:
            FileError: nothing that names a pair.
        """
        self._line += 1
        text = text.strip("\r\n").removeprefix("\ufeff" if self._line == 1 else "")
        if not text.strip():
            return None
        if self._columns is None:
            if not text.lstrip().startswith("{"):
                self._read_header(text)
                return None
            self._columns = []
        record = self._record(text)
        found = [record.get(name) for name in (*COLUMNS, *KEYS)]
        id, image, text_path, image_key, text_key = (str(x) if type(x) in (str, int) else None for x in found)
        if not id or not image or not text_path:
            missing = [name for name, value in zip(COLUMNS, (id, image, text_path), strict=True) if not value]
            raise self._bad(text, f"a value for {', '.join(missing)}")
        try:
            os.fsencode(id + image + text_path)
        except UnicodeEncodeError:
            raise self._bad(text, "names that a file can have") from None
        keys = image_key or key_for(image, self._keys[0]), text_key or key_for(text_path, self._keys[1])
        return Entry(self._line, id, self._place(image, keys[0]), self._place(text_path, keys[1]))

    @property
    def headless(self) -> bool:
        """Whether no line has said yet what the columns are."""
        return self._columns is None

    @property
    def line(self) -> int:
        """The number of the line read last, from 1."""
        return self._line

    def _read_header(self, text: str) -> None:
        delimiter = "\t" if "\t" in text else ","
        try:
            columns = [name.strip() for name in next(csv.reader([text], delimiter=delimiter))]
        except csv.Error:
            columns = []
        used = [name for name in columns if name in (*COLUMNS, *KEYS)]
        twice = next((name for name in used if used.count(name) > 1), None)
        if twice:
            raise FileError("duplicate column", where=f"{self.name}, line {self._line}", found=twice)
        if not set(COLUMNS) <= set(used):
            raise self._bad(text, f"a header with {','.join(COLUMNS)}, or JSON lines")
        self._columns, self._delimiter = columns, delimiter

    def _record(self, text: str) -> dict[str, object]:
        if self._delimiter is None:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                raise self._bad(text, "a JSON object") from None
            if not isinstance(record, dict):
                raise self._bad(text, "a JSON object")
            return record
        assert self._columns is not None
        odd = text.count('"') % 2 == 1
        if self._in_quote and odd:
            self._in_quote = False
            raise self._bad(text, "a value in one line")
        try:
            values = next(csv.reader([text], delimiter=self._delimiter, strict=True))
        except csv.Error:
            self._in_quote = odd
            raise self._bad(text, "a line of CSV") from None
        if len(values) != len(self._columns):
            raise self._bad(text, f"{len(self._columns)} values")
        self._in_quote = False
        return dict(zip(self._columns, values, strict=True))

    def _place(self, path: str, key: str | None) -> Place:
        return Place(os.path.join(self._folder or ".", path) if path == "-" else os.path.join(self._folder, path), key)

    def _bad(self, text: str, wanted: str) -> FileError:
        return FileError("bad line", where=f"{self.name}, line {self._line}", found=repr(text[:80]), wanted=wanted)
