"""Labels of pairs: a table with ``id`` and ``label``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import chain
from typing import Any

from fusecli.errors import STDIN, FileError


def read_labels(path: str, column: str = "label") -> dict[str, str]:
    """The labels by id, from CSV, or from TSV if tabs set ``id`` apart in its first line; ``-`` is standard input.

    Raises:
        FileError: it cannot be read, lacks a column or has it twice, or has an id twice.
    """
    labels: dict[str, str] = {}
    name = STDIN if path == "-" else path
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = iter(file)
            head = next(lines, "")
            tabs = "id" in (title.strip('"') for title in head.rstrip("\r\n").split("\t"))
            reader = csv.DictReader(
                chain([head], lines), delimiter="\t" if tabs else ",", strict=True, skipinitialspace=not tabs
            )
            columns = reader.fieldnames or []
            if "\0" in head:
                raise FileError("not text", where=name, wanted="CSV with id,label, in UTF-8")
            _require_columns(columns, column, name)
            for record in reader:
                where = f"{name}, line {reader.line_num}"
                _require_no_more(record, len(columns), where)
                id, label = record["id"], record[column]
                if not any(str(record[title] or "").strip() for title in columns):
                    continue  # spreadsheets leave such lines behind
                if not id or label is None:
                    raise FileError("an id or a label is missing", where=where)
                if id in labels:
                    raise FileError("duplicate id", where=where, found=id)
                if label:  # an empty one is as good as no line
                    labels[id] = label
    except FileNotFoundError:
        raise FileError("no such file", where=name) from None
    except OSError as error:
        raise FileError("cannot be read", where=name, found=error.strerror) from None
    except csv.Error as error:
        raise FileError("not a table", where=name, found=str(error), wanted="CSV with id,label") from None
    return labels


def _require_columns(columns: Sequence[str], column: str, path: str) -> None:
    found = ", ".join(map(str, columns))[:200] or "nothing in the first line"
    for wanted in ("id", column):
        hint = "columns are set apart by commas or tabs, in UTF-8"
        if wanted == column and len(columns) > 1:
            hint = "name one of these with --label-column"
        if wanted not in columns:
            raise FileError("no such column", where=path, found=found, wanted=wanted, hint=hint)
        if columns.count(wanted) > 1:
            raise FileError("duplicate column", where=path, found=found, wanted=f"one column {wanted}")


def _require_no_more(record: dict[Any, Any], columns: int, where: str) -> None:
    """Raise `FileError` if a line has values that stand in no column."""
    if any(record.get(None) or ()):
        found, wanted = f"{columns + len(record[None])} values", str(columns)
        hint = "a label with a comma in it stands in quotes"
        raise FileError("more values than columns", where=where, found=found, wanted=wanted, hint=hint)
