"""What there is to learn from pairs and their labels."""

from __future__ import annotations

import math
from collections import Counter

import torch

from fusecli.errors import InputError
from fusecli.training.data import Data
from fusecli.training.match import Match
from fusecli.training.objective import UNKNOWN, Classes, Numbers, Objective

#: Parts of the data, as they are called to users.
NAMED = {"train": "training", "validation": "validation", "held-out": "the table at the end"}
#: How little labels may spread, and how far out one may lie, in units of that: squares stay numbers.
SMALLEST, FARTHEST = 1e-150, 1e12


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
