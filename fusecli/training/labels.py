"""Labels of pairs: a table with ``id`` and ``label``."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from fusecli.errors import FileError, InputError
from fusecli.training.data import Data
from fusecli.training.match import Match
from fusecli.training.objective import UNKNOWN, Classes, Numbers, Objective

#: Parts of the data, as they are called to users.
NAMED = {"train": "training", "validation": "validation", "held-out": "the table at the end"}
#: How little labels may spread, and how far out one may lie, in units of that: squares stay numbers.
SMALLEST, FARTHEST = 1e-150, 1e12


def read_labels(path: str, column: str = "label") -> dict[str, str]:
    """The labels by id, from CSV, or from TSV if tabs set ``id`` apart in its first line; ``-`` is standard input.

    Raises:
        FileError: it cannot be read, lacks a column or has it twice, or has an id twice.
    """
    labels: dict[str, str] = {}
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = iter(file)
            head = next(lines, "")
            tabs = "id" in (name.strip('"') for name in head.rstrip("\r\n").split("\t"))
            reader = csv.DictReader(
                chain([head], lines), delimiter="\t" if tabs else ",", strict=True, skipinitialspace=not tabs
            )
            columns = reader.fieldnames or []
            if "\0" in head:
                raise FileError("not text", where=path, wanted="CSV with id,label, in UTF-8")
            _require_columns(columns, column, path)
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                _require_no_more(record, len(columns), where)
                id, label = record["id"], record[column]
                if not any(str(record[name] or "").strip() for name in columns):
                    continue  # spreadsheets leave such lines behind
                if not id or label is None:
                    raise FileError("an id or a label is missing", where=where)
                if id in labels:
                    raise FileError("duplicate id", where=where, found=id)
                if label:  # an empty one is as good as no line
                    labels[id] = label
    except FileNotFoundError:
        raise FileError("no such file", where=path) from None
    except OSError as error:
        raise FileError("cannot be read", where=path, found=error.strerror) from None
    except csv.Error as error:
        raise FileError("not a table", where=path, found=str(error), wanted="CSV with id,label") from None
    return labels


def _require_columns(columns: Sequence[str], column: str, path: str) -> None:
    found = ", ".join(map(str, columns))[:200] or "nothing in the first line"
    for wanted in ("id", column):
        hint = "columns are set apart by commas or tabs, in UTF-8"
        if wanted == column and len(columns) > 1:
            hint = "name the column with --label-column"
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


def objective(
    labels: dict[str, str] | None,
    data: Data,
    *,
    where: str | None,
    task: str,
    text_dropout: float,
    smoothing: float,
    balanced: bool,
) -> Objective:
    """What there is to learn: the labels as classes or numbers, or without any, which image belongs to a text."""
    if labels is None or where is None:
        return Match(data.texts.width)
    if task == "regression":
        return numbers(labels, data, text_dropout, where)
    return classes(labels, data, text_dropout, smoothing, balanced, where)


def classes(
    labels: dict[str, str], data: Data, text_dropout: float, smoothing: float, balanced: bool, where: str
) -> Classes:
    """The objective to tell the labels that the pairs to train on have; any other is `UNKNOWN`, and never told.

    Args:
        labels: by id; every pair has one.
        data: the pairs.
        text_dropout: share of the pairs whose text is hidden in a step.
        smoothing: of the labels in the loss.
        balanced: whether rare labels count as much as frequent ones.
        where: the file, for messages.

    Raises:
        InputError: there is but one label among the pairs to train on, or none of theirs among those for validation.
    """
    counts = Counter(labels[data.ids[at]] for at in data.parts["train"])
    names = sorted(counts)
    numbered = {name: at for at, name in enumerate(names)}
    targets = torch.tensor([numbered.get(labels[id], UNKNOWN) for id in data.ids])
    if len(names) < 2:
        found = f"{names[0]!r} for all pairs to train on"
        raise InputError("only one label, so there is nothing to tell apart", where=where, found=found, wanted="two")
    if (targets[data.parts["validation"]] == UNKNOWN).all():
        what, hint = "no pair for validation has a label of a pair to train on", "are these classes, or numbers?"
        raise InputError(what, where=where, found=f"{len(names)} labels to train on", hint=hint)
    weights = None
    if balanced:
        total = len(data.parts["train"]) / len(names)
        weights = torch.tensor([total / counts[name] for name in names])
    return Classes(targets, names, text_dropout, smoothing, weights)


def numbers(labels: dict[str, str], data: Data, text_dropout: float, where: str) -> Numbers:
    """The objective to tell numbers.

    Raises:
        InputError: a label is no number, or all are the same.
    """
    values = []
    for id in data.ids:
        try:
            value = float(labels[id].replace("_", "x"))  # Python's own way to write long numbers
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError("not a number", where=f"{where}, id {id}", found=labels[id][:80], wanted="a finite number")
        values.append(value)
    targets = torch.tensor(values, dtype=torch.float64)
    for part, which in data.parts.items():
        if not math.isfinite(float(targets[which].std())):
            at = int(targets.abs().argmax())
            raise InputError(
                "a label is too large",
                where=f"{where}, id {data.ids[at]}",
                found=f"{targets[at]:g}",
                hint="scale the labels down, or leave the pair out",
            )
        if targets[which].min() == targets[which].max():  # their spread may be rounding alone
            what = f"all labels of the pairs for {NAMED[part]} are the same"
            raise InputError(what, where=where, found=f"{targets[which][0]:g}")
    mean, std = targets[data.parts["train"]].mean(), targets[data.parts["train"]].std()
    if std < SMALLEST:
        raise InputError("the labels are too small", where=where, hint="scale them up")
    far = (targets - mean).abs() / std
    if far.max() > FARTHEST:
        at = int(far.argmax())
        id, found = data.ids[at], f"{targets[at]:g}, where the others are about {mean:g}"
        raise InputError(
            "a label far from all others", where=f"{where}, id {id}", found=found, hint="leave the pair out"
        )
    return Numbers(targets, data.parts["train"], text_dropout)
