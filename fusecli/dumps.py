"""What a dump of attention says of itself: metadata of a ``.safetensors``, one key ``fusecli`` with JSON.

::

    {"format": 1, "kind": "attention", "method": "gated", "num_heads": 8, "mean": false, "weights": "0f3a…",
     "grid": [16, 16], "skip_rows": 0, "ids": ["1f947"], "tokens": [["<s>", "1st", "place", "medal", "</s>"]]}

``ids`` are the pairs in it and ``tokens`` the words of each, null where they are not known; a dump of one pair is a
list of one. ``grid`` is there where it is known, or where ``M`` is ``g²`` or ``g² + 1``. What is not known is left out.
The tensor ``attention`` of one pair may have a tensor ``gate`` beside it; of many, that of ``<id>`` is ``<id>.gate``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusecli.errors import FileError, ShapeError, listed
from fusecli.formats import Source, Stored, open_source, read_bytes, safetensors, sniff
from fusecli.grid import Grid, grid_of

#: Version of what the metadata of a dump say.
FORMAT = 1
#: What the gates of a pair are called in a file of many: the id, and this.
GATE = ".gate"
#: What is told of the weights, and as what.
FACTS = {"method": str, "num_heads": int, "weights": str, "mean": bool}
#: A file of tokens that is longer was not meant.
MAX_BYTES = 2**28


def is_gate(name: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether a tensor holds the gates of a pair among the others of a file of many."""
    return name.endswith(GATE) and name.removesuffix(GATE) in tensors and len(tensors[name].shape) == 1


@dataclass(frozen=True)
class Tokens:
    """The words of text rows: of one pair, or of many by id."""

    path: str
    one: list[str] | None = None
    many: Mapping[str, list[str]] = field(default_factory=dict)

    def of(self, id: str) -> list[str] | None:
        """The words of a pair, None where the file has none for it."""
        return self.one if self.one is not None else self.many.get(id)

    def require_many(self) -> None:
        """Raise `FileError` if these are the words of one pair, which would stand beside every pair."""
        if self.one is not None:
            wanted = 'JSON lines {"id": "…", "tokens": ["…"]}'
            raise FileError("tokens of one pair, while there are many", where=self.path, wanted=wanted)

    def require(self, id: str) -> None:
        """Raise `FileError` where the file has no words for a pair."""
        if self.of(id) is None:
            raise FileError("no tokens for this pair", where=self.path, found=listed(self.many), wanted=id)


def read_tokens(path: str) -> Tokens:
    """Tokens from a file: a JSON list, one token a line, or JSON lines ``{"id": …, "tokens": […]}`` for many pairs.

    Raises:
        FileError: it cannot be read, or is none of these.
    """
    source = open_source(path)
    binary = b"\0" in read_bytes(source, 0, 4096)
    raw = b"" if binary else read_bytes(source, 0, MAX_BYTES)
    if not raw or len(raw) == MAX_BYTES:
        found = "more than 256 MB" if raw else "bytes that are not UTF-8 text" if binary else None
        raise FileError("no tokens in it", where=source.name, found=found, wanted="a JSON list, or one token a line")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(
            "not valid UTF-8", where=source.name, found=f"byte {error.start}", wanted="tokens as text"
        ) from None
    first = text.strip().split("\n", 1)[0]
    # A token may be a brace or a bracket: what begins a line of JSON, or a list, has a quote behind it.
    if re.match(r'\{\s*"', first) or isinstance(_json_of(first), dict):
        return Tokens(source.name, many=_by_id(text, source.name))
    value = _json_of(text)
    if isinstance(value, dict) and value:
        wanted = 'a JSON list of strings, or a line {"id": "…", "tokens": ["…"]} for each pair'
        raise FileError("not a list of tokens", where=source.name, found=repr(text[:60]), wanted=wanted)
    if isinstance(value, list) or re.match(r'\s*\[\s*"[^\n]', text):
        if not _are_tokens(value):
            found = repr(text[:60])
            raise FileError("not a list of tokens", where=source.name, found=found, wanted="a JSON list of strings")
        return Tokens(source.name, one=value)
    return Tokens(source.name, one=[line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")])


def _json_of(text: str) -> Any:
    """What JSON it is; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _by_id(text: str, where: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = _json_of(line)
        record = record if isinstance(record, dict) else {}
        if type(record.get("id")) not in (str, int) or not _are_tokens(record.get("tokens")):
            wanted = '{"id": "…", "tokens": ["…"]}'
            raise FileError("bad line", where=f"{where}, line {number}", found=repr(line[:80]), wanted=wanted)
        id = str(record["id"])
        if id in found:
            raise FileError("duplicate id", where=f"{where}, line {number}", found=repr(id))
        found[id] = record["tokens"]
    return found


def _is_sane(value: Any, kind: type) -> bool:
    return type(value) is kind and len(str(value)) <= 40


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, str) for token in value)


def require_tokens(tokens: list[str] | None, n: int, where: str) -> None:
    """Raise `ShapeError` if there are tokens, and not one for each of ``n`` text rows."""
    if tokens is not None and len(tokens) != n:
        found, wanted = f"{len(tokens)} token{'s' * (len(tokens) != 1)}", f"{n}, one for each text row"
        hint = "the tokenizer's own tokens, with those it adds at the ends"
        raise ShapeError("tokens do not match the text", where=where, found=found, wanted=wanted, hint=hint)


@dataclass(frozen=True)
class DumpMetadata:
    """What is to be written into dumps.

    ``facts`` are those of the weights (``method``, ``num_heads``, ``weights``) and ``mean``.
    """

    facts: Mapping[str, Any]
    tokens: Tokens | None = None
    grid: tuple[int, int] | None = None
    skip: int | None = None  # rows before the grid

    def check(self, id: str, shape: tuple[int, ...]) -> Grid | None:
        """The grid of one pair's attention of ``shape [..., N, M]``, if it has one.

        Raises:
            ShapeError: the tokens are not ``N``, or the grid is not of ``M`` rows.
        """
        n, m = shape[-2:]
        if self.tokens:
            require_tokens(self.tokens.of(id), n, f"{self.tokens.path}, {id}")
        return grid_of(m, self.grid, self.skip, where=id)

    def of_one(self, id: str, shape: tuple[int, ...]) -> dict[str, str]:
        """Metadata of one pair's attention of ``shape [..., N, M]``; raises as `check` does."""
        grid = self.check(id, shape)
        placed = {"grid": [grid.height, grid.width], "skip_rows": grid.skip} if grid else {}
        return self._metadata(placed | {"ids": [id]}, [self.tokens.of(id) if self.tokens else None])

    def of_many(self, ids: Iterable[str]) -> dict[str, str]:
        """Metadata of a packed file of these pairs."""
        ids = list(ids)
        known = {"grid": self.grid and list(self.grid), "skip_rows": self.skip}
        placed = {name: value for name, value in known.items() if value is not None}
        words = [self.tokens.of(id) if self.tokens else None for id in ids]
        return self._metadata(placed | {"ids": ids}, words)

    def _metadata(self, more: dict[str, Any], words: list[list[str] | None]) -> dict[str, str]:
        told = {"tokens": words} if any(words) else {}
        value = {"format": FORMAT, "kind": "attention", **self.facts, **more, **told}
        return {safetensors.OURS: json.dumps(value, separators=(",", ":"))}


@dataclass(frozen=True)
class About:
    """What a dump says of itself, as far as it does."""

    facts: dict[str, Any] = field(default_factory=dict)  # method, num_heads, weights, mean
    grid: tuple[int, int] | None = None
    skip: int | None = None
    tokens: Mapping[str, list[str]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    def words(self, id: str) -> list[str] | None:
        """The tokens of a pair; those of the only one, whatever its file is called now."""
        return self.tokens.get(self.ids[0] if len(self.ids) == 1 else id)

    @classmethod
    def of(cls, source: Source) -> About:
        """From a file; of one that says nothing, or nonsense, nothing is known.

        Raises:
            FileError: it cannot be read.
        """
        if sniff(source) != "safetensors":
            return cls()
        try:
            value = json.loads(safetensors.metadata(source).get(safetensors.OURS, ""))
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(value, dict) or value.get("kind") != "attention":
            return cls()
        return cls._from(value)

    @classmethod
    def _from(cls, value: dict[str, Any]) -> About:
        size, skip, ids, words = (value.get(name) for name in ("grid", "skip_rows", "ids", "tokens"))
        sane = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        ids = ids if isinstance(ids, list) and all(isinstance(id, str) for id in ids) else []
        words = words if isinstance(words, list) and len(words) == len(ids) else [None] * len(ids)
        return cls(
            {name: value[name] for name, kind in FACTS.items() if _is_sane(value.get(name), kind)},
            (size[0], size[1]) if sane and isinstance(size, list) else None,
            skip if type(skip) is int and skip >= 0 else None,
            {id: told for id, told in zip(ids, words, strict=True) if _are_tokens(told)},
            ids,
        )


def names_of(tensors: Mapping[str, Stored], about: About) -> tuple[list[str], bool]:
    """The tensors that are attention, and whether they are that of many pairs, each called by its id.

    A tensor called ``attention`` is that of the only pair, unless the file tells of many: one may be called so.
    """
    names = sorted(name for name in tensors if not is_gate(name, tensors))
    if len(names) > 1 and "attention" in tensors and len(about.ids) < 2:
        names = ["attention"]
    return names, len(names) > 1
