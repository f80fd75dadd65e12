"""Dumps of attention where they lie, one pair of them at a time, checked as they are read."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fusecli.collections import Folder
from fusecli.dumps import GATE, About, Tokens, names_of, require_tokens
from fusecli.errors import FileError, ShapeError, ValuesError, listed
from fusecli.formats import NumpyArray, Stored, open_tensors
from fusecli.grid import Grid, grid_of
from fusecli.weights import are_of_weights

#: How far the sum of a row may be from 1: what rounding to that dtype can do, and a little more.
TOLERANCE = {"float16": 4e-3, "bfloat16": 2e-2}
#: What subword tokenizers put before or after the letters of a token.
MARKS = ("▁", "Ġ", "##", "</w>", "@@")
#: What they add around a text: <s>, [CLS], <|endoftext|>.
SPECIAL = re.compile(r"</?s>|<pad>|\[(CLS|SEP|PAD)\]|<\|(start|end)oftext\|>")


@dataclass(frozen=True)
class Wanted:
    """What a user says of dumps that they do not say themselves."""

    tokens: Tokens | None = None
    size: tuple[int, int] | None = None  # of the grid
    skip: int | None = None  # rows before it


@dataclass(frozen=True)
class Dump:
    """The attention of one pair."""

    id: str
    stored: Stored  # [H, N, M], or [N, M] where it is a mean over heads
    facts: dict[str, Any]  # of the weights, as far as they are known
    words: list[str] | None
    grid: Grid | None
    gate: NumpyArray | None  # [N]

    @property
    def num_heads(self) -> int | None:
        """``H``; None where the dump is a mean over heads."""
        return self.stored.shape[0] if len(self.stored.shape) == 3 else None

    @property
    def n(self) -> int:
        """Text rows."""
        return self.stored.shape[-2]

    @property
    def m(self) -> int:
        """Image rows."""
        return self.stored.shape[-1]

    @cached_property
    def tokens(self) -> list[str]:
        """The words of the text rows, their numbers where they are not known."""
        return self.words if self.words is not None else [str(at) for at in range(self.n)]

    @property
    def line(self) -> str:
        """Method and shape, for people."""
        rows = f"{self.n} text rows, {self.m} image rows"
        if self.grid:
            rows += f" ({self.grid}{f' after {self.grid.skip}' if self.grid.skip else ''})"
        return f"{self.facts['method']}, {rows}" if isinstance(self.facts.get("method"), str) else rows

    def head(self, head: int) -> NumpyArray:
        """Weights ``[N, M]`` float64 of one head, counted from 0.

        Raises:
            ShapeError: there is no such head.
            ValuesError: these are no weights that sum to 1.
        """
        if self.num_heads is None:
            hint = "fuse again without --attention-mean"
            raise ShapeError("is a mean over heads", where=self.stored.where, found=f"head {head} asked for", hint=hint)
        if not 0 <= head < self.num_heads:
            wanted = f"0 to {self.num_heads - 1}"
            hint = f"--head {self.num_heads - 1}, or --heads all"
            raise ShapeError("no such head", where=self.stored.where, found=f"head {head}", wanted=wanted, hint=hint)
        return self._checked(self.stored.read(slice(head, head + 1))[0], f", head {head}")

    def mean(self) -> NumpyArray:
        """Weights ``[N, M]`` float64, the mean over heads; raises as `head` does."""
        if self.num_heads is None:
            return self._checked(self.stored.read(), "")
        total = self.head(0)
        for head in range(1, self.num_heads):
            total += self.head(head)
        return total / self.num_heads

    def peak(self, weights: NumpyArray) -> float:
        """The largest of weights ``[N, M]``, rows before the grid left out."""
        return float(weights[:, self.grid.skip if self.grid else 0 :].max())

    def positions(self, token: str) -> list[int]:
        """The text rows that are ``token``, with or without a tokenizer's marks, or the row of that number.

        Raises:
            FileError: there is none.
        """
        exact = [at for at, word in enumerate(self.tokens) if word == token]
        found = exact or [at for at, word in enumerate(self.tokens) if _bare(word) == token]
        if not found and token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < self.n:
            found = [int(token)]
        if not found:
            from difflib import get_close_matches

            words = [_bare(word[:40]) for word in self.tokens]
            near = get_close_matches(token[:40], words, 3, 0.5) or words[:5]
            wanted = f"one of {', '.join(near)}" if self.words else f"0 to {self.n - 1}: no tokens are known"
            hint = None if self.words else "--tokens FILE"
            raise FileError("no such token", where=self.stored.where, found=repr(token[:40]), wanted=wanted, hint=hint)
        return found

    def _checked(self, block: NumpyArray, where: str) -> NumpyArray:
        where = f"{self.stored.where}{where}"
        rows = block.astype(np.float64)
        if not np.isfinite(rows).all():
            raise ValuesError("not finite", where=where, wanted="weights that sum to 1 in each row")
        sums = rows.sum(-1)
        off = np.abs(sums - 1) > TOLERANCE.get(self.stored.dtype, 1e-3)
        if (rows < 0).any():
            found = f"{list(self.stored.shape)} {self.stored.dtype} with negative numbers: features, by the look of it"
            raise _no_attention(where, found)
        if off.any():
            at = int(off.argmax())
            hint = "take the weights after the softmax and before any dropout, [H, N, M]"
            found = f"{sums[at]:.6g} in text row {at} ({int(off.sum())} of {len(off)} rows are off)"
            raise ValuesError(
                "rows do not sum to 1", where=where, found=found, wanted="1 over the M image rows", hint=hint
            )
        return rows


def _bare(word: str) -> str:
    for mark in MARKS:
        word = word.removeprefix(mark).removesuffix(mark)
    return word


def caption(words: list[str]) -> str:
    """Tokens as the text that they were made of, as far as their marks tell: without special ones, pieces joined."""
    plain = [word for word in words if not SPECIAL.fullmatch(word)]
    if any(word[:1] in ("▁", "Ġ") for word in plain):  # SentencePiece, byte-level BPE: a mark begins a word
        return re.sub("[▁Ġ]", " ", "".join(plain)).strip()
    if any(word.endswith("</w>") for word in plain):  # CLIP: a mark ends a word
        return "".join(plain).replace("</w>", " ").strip()
    return " ".join(plain).replace(" ##", "").replace("@@ ", "")


def _no_attention(where: str, found: str) -> ValuesError:
    wanted, hint = "weights [H, N, M] or [N, M]", "write them with fusecli fuse … --attention FILE"
    return ValuesError("not attention weights", where=where, found=found, wanted=wanted, hint=hint)


class _Found(NamedTuple):
    """What a file holds of a pair."""

    attention: Stored
    gate: Stored | None
    about: About


@dataclass(frozen=True)
class Dumps:
    """The dumps of one pair or of many."""

    path: str
    ids: list[str]
    many: bool
    _find: Callable[[str], _Found]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.ids)

    def open(self, id: str | None, wanted: Wanted) -> Dump:
        """The dump of a pair, of the only one without ``id``.

        Raises:
            FileError: there is no such pair, or more than one to choose from.
            ShapeError: what is wanted does not fit it.
            ValuesError: it is no attention.
        """
        if id is None and len(self.ids) > 1:
            found = f"{len(self.ids):,} pairs"
            hint = f"--id {shlex.quote(self.ids[0])}, or -o report/ for all of them"
            raise FileError("holds more than one pair", where=self.path, found=found, wanted="one", hint=hint)
        id = self.ids[0] if id is None else id
        if id not in self._known:
            raise FileError("no such pair", where=self.path, found=listed(self.ids), wanted=id)
        return _dump(id, self._find(id), wanted)


def _dump(id: str, found: _Found, wanted: Wanted) -> Dump:
    stored, gate, about = _as_weights(found.attention), found.gate, found.about
    n, m = stored.shape[-2:]
    if wanted.tokens:
        wanted.tokens.require(id)
    words = wanted.tokens.of(id) if wanted.tokens else about.words(id)
    require_tokens(words, n, wanted.tokens.path if wanted.tokens else stored.where)
    grid = grid_of(m, *_layout(wanted, about, m), stored.where) if m > 1 else None
    shares = gate.read() if gate is not None and gate.shape == (n,) else None
    if gate is not None and shares is not None and not np.isfinite(shares).all():
        raise ValuesError("not finite", where=gate.where, wanted="mean gates of tokens")
    return Dump(id, stored, about.facts, words, grid, shares)


def _layout(wanted: Wanted, about: About, m: int) -> tuple[tuple[int, int] | None, int | None]:
    """Size of the grid and rows before it: what the user says, and beside that what the dump says, where it fits."""
    size, skip = wanted.size, wanted.skip
    if size is None and about.grid is not None:
        rest, before = m - about.grid[0] * about.grid[1], about.skip if skip is None else skip
        fits = rest == before or (skip is None and rest in (0, 1))
        return (about.grid, before) if fits else (None, skip)
    if skip is None and (size is None or m - size[0] * size[1] == about.skip):
        skip = about.skip
    return size, skip


def _as_weights(stored: Stored) -> Stored:
    stored.require_float()
    shape = stored.shape[1:] if len(stored.shape) == 4 and stored.shape[0] == 1 else stored.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise _no_attention(stored.where, f"{list(stored.shape)} {stored.dtype}")
    return stored._replace(shape=shape)


def open_dumps(path: str, *, regular: bool = False) -> Dumps:
    """The dumps at ``path``: a file of one pair, a packed or stacked file of many, or a folder of files.

    ``regular`` as in `open_source`: pipes are refused, which might keep us waiting.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    if os.path.isdir(path):
        return _of_folder(path)
    tensors = open_tensors(path, regular=regular)
    first = next(iter(tensors.values()), None)
    if first is None:
        raise FileError("no tensors in it", where=path)
    if are_of_weights(tensors):
        raise _no_attention(path, "a checkpoint")
    if tensors.keys() == {"head.weight", "head.bias"}:
        raise _no_attention(path, "the head of a training")
    about = About.of(first.source)

    def find(name: str) -> _Found:
        beside = tensors.get("gate") if name == "attention" else None
        return _Found(tensors[name], tensors.get(name + GATE, beside), about)

    ids, many = names_of(tensors, about)
    if not many:
        [name] = ids
        if len(tensors[name].shape) == 4 and tensors[name].shape[0] > 1:
            return _of_stack(path, tensors[name], about)
        named = name if name not in ("", "attention") else os.path.splitext(os.path.basename(path))[0]
        return Dumps(path, about.ids if len(about.ids) == 1 else [named], False, lambda _: find(name))
    return Dumps(path, ids, True, find)


def _of_stack(path: str, stored: Stored, about: About) -> Dumps:
    """``[B, H, N, M]``: a pair a row."""
    if stored.fortran:
        raise FileError("a stack in Fortran order cannot be read by rows", where=path, wanted="C order")
    size = stored.nbytes // stored.shape[0]

    def row(id: str) -> _Found:
        one = stored._replace(name=id, shape=stored.shape[1:], offset=stored.offset + int(id) * size)
        return _Found(one, None, about)

    return Dumps(path, [str(at) for at in range(stored.shape[0])], True, row)


def _of_folder(path: str) -> Dumps:
    folder = Folder.open(path.rstrip("/") or "/")
    if not len(folder):
        raise FileError("no dumps in it", where=path, wanted=".npy or .safetensors files")

    def one(id: str) -> _Found:
        inside = open_dumps(folder.place(id).path, regular=True)
        if inside.many:
            raise FileError("holds more than one pair", where=inside.path, hint="show that file by itself")
        return inside._find(inside.ids[0])

    return Dumps(path, list(folder), True, one)
