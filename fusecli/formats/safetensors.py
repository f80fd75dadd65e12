"""``.safetensors``: named arrays behind a JSON header.

The official library reads through a memory map, which counts every page of a large file as this process's
memory, and does not tell where a tensor lies. So the header is read here, under the official rules; the
tests hold both directions against the library.
"""

from __future__ import annotations

import json
import math
import re
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from fusecli.errors import FileError, UsageError
from fusecli.formats.source import Source, Stored, itemsize, read_bytes, read_header, require_sane

SUFFIXES = (".safetensors",)
#: The library's own limit for the header.
MAX_HEADER = 100_000_000
METADATA = "__metadata__"
#: The one key of our own among them.
OURS = "fusecli"

NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
CODES = {name: code for code, name in NAMES.items()}
#: Bits of the types that are listed but hold no floats we can read.
OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64}


Kind: TypeAlias = "tuple[str, tuple[int, ...]]"
_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(slots=True)
class Index:
    """The header, in a few bytes a tensor: files may hold hundreds of thousands."""

    begin: int  # where the data begin
    names: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)  # dtype and shape, shared by tensors that have them in common
    firsts: array[int] = field(default_factory=lambda: array("q"))  # offsets from ``begin``
    lasts: array[int] = field(default_factory=lambda: array("q"))
    metadata: dict[str, str] = field(default_factory=dict)

    def stored(self, source: Source, at: int) -> Stored:
        """The ``at``-th tensor."""
        dtype, shape = self.kinds[at]
        return Stored(source, self.names[at], shape, dtype, self.begin + self.firsts[at])


def read_index(source: Source) -> Index:
    """The header, checked against itself and the size of the file.

    Raises:
        FileError: the header or the data end early, or the header contradicts itself.
    """
    text, begin = _header_text(source)
    index = Index(begin)
    kinds: dict[Kind, Kind] = {}
    try:
        for name, value in _members(text):
            if name == METADATA:
                if not all(isinstance(string, str) for string in value.values()):
                    raise ValueError
                index.metadata = value
            else:
                name.encode()  # a ValueError where it is no UTF-8
                kind, first, last = _entry(source, name, value)
                index.names.append(name)
                index.kinds.append(kinds.setdefault(kind, kind))
                index.firsts.append(first)
                index.lasts.append(last)
    except (ValueError, RecursionError, AttributeError) as error:
        if isinstance(error, FileError):
            raise
        wanted = "a JSON object of tensors and strings"
        raise FileError("malformed header", where=source.name, found=repr(text[:60]), wanted=wanted) from None
    _check_layout(source, index)
    return index


def _header_text(source: Source) -> tuple[str, int]:
    start = read_bytes(source, 0, 8)
    if len(start) < 8:
        raise FileError("cut short in its header", where=source.name, found=f"{len(start)} bytes", wanted="at least 8")
    length: int = struct.unpack("<Q", start)[0]
    data = read_header(source, 8, length, MAX_HEADER)
    try:
        return data.decode(), 8 + length
    except ValueError:
        raise FileError("malformed header", where=source.name, found=repr(data[:60]), wanted="UTF-8") from None


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """The members of a JSON object one by one, so that only one of them is held.

    Raises:
        ValueError: it is none.
    """

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]

    at = skip(0)
    if text[at : at + 1] != "{":
        raise ValueError(text[:60])
    at = skip(at + 1)
    while text[at : at + 1] != "}":
        name, at = _decode(text, at)
        at = skip(at)
        if type(name) is not str or text[at : at + 1] != ":":
            raise ValueError(name)
        value, at = _decode(text, skip(at + 1))
        yield name, value
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "}":
                raise ValueError(name)
        elif text[at : at + 1] != "}":
            raise ValueError(name)
    if skip(at + 1) != len(text):
        raise ValueError(text[at:])


def _entry(source: Source, name: str, value: Any) -> tuple[Kind, int, int]:
    where = f"{source.name}[{name}]"
    try:
        code, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        if len(value) != 3 or type(code) is not str:
            raise ValueError
        if not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, first, last)):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        wanted = "dtype, shape and data_offsets"
        raise FileError("malformed header", where=where, found=repr(value)[:80], wanted=wanted) from None
    require_sane(shape, where)
    bits = OTHER_BITS.get(code)
    wanted = last - first
    if code in NAMES:
        wanted = math.prod(shape) * itemsize(NAMES[code])
    elif bits:
        wanted = math.prod(shape) * bits // 8
    if last - first != wanted:
        raise FileError(
            "shape and size disagree", where=where, found=f"{last - first} bytes", wanted=f"{wanted} for {shape} {code}"
        )
    # Codes are upper case, our names lower: an unknown code cannot pass for a dtype that is read.
    return (NAMES.get(code, code.upper()), tuple(shape)), first, last


def _check_layout(source: Source, index: Index) -> None:
    if len(set(index.names)) < len(index.names):
        twice = Counter(index.names).most_common(1)[0][0]
        raise FileError("the header names a tensor twice", where=source.name, found=twice, wanted="once")
    end = 0
    order: Iterable[int] = range(len(index.names))
    if any(one > later for one, later in pairwise(zip(index.firsts, index.lasts, strict=True))):
        order = sorted(order, key=lambda at: (index.firsts[at], index.lasts[at]))
    for at in order:
        if index.firsts[at] != end:
            raise FileError(
                "data overlap or leave a hole",
                where=f"{source.name}[{index.names[at]}]",
                found=f"offset {index.firsts[at]}",
                wanted=f"{end}",
            )
        end = index.lasts[at]
    size = source.size(index.begin + end)
    if size != index.begin + end:
        what = "cut short" if size < index.begin + end else "longer than its header says"
        raise FileError(what, where=source.name, found=f"{size - index.begin} bytes of data", wanted=f"{end}")


def open_tensors(source: Source) -> dict[str, Stored]:
    """Every tensor of the file by name.

    Raises:
        FileError: the header or the data end early, or the header contradicts itself.
    """
    index = read_index(source)
    return {name: index.stored(source, at) for at, name in enumerate(index.names)}


def metadata(source: Source) -> dict[str, str]:
    """The file's own strings, ``{}`` if it has none."""
    return read_index(source).metadata


def header(tensors: Iterable[tuple[str, tuple[int, ...], str]], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the data of tensors ``(name, shape, dtype)``, in their order.

    Raises:
        UsageError: the format has no name for a dtype, or the header would be longer than the format allows.
    """
    text = bytearray(_strings(metadata or {}).encode())
    at = 0
    for name, shape, dtype in tensors:
        entry, at = _described(name, shape, dtype, at)
        text += entry.encode()
        text += b","
    del text[-1:]
    return _framed(text)


def _strings(metadata: Mapping[str, str]) -> str:
    """The file's own strings, as the first member of its header."""
    return f'"{METADATA}":{json.dumps(dict(metadata), separators=(",", ":"))},' if metadata else ""


def _described(name: str, shape: tuple[int, ...], dtype: str, at: int) -> tuple[str, int]:
    """A tensor's entry for data from ``at`` on, and where they end."""
    if dtype not in CODES:
        raise UsageError(
            f".safetensors cannot name {dtype}", found=f"dtype {dtype}", hint="write .npy, or pass --dtype float64"
        )
    end = at + math.prod(shape) * int(dtype[-2:]) // 8
    numbers = ",".join(map(str, shape))
    return f'{json.dumps(name)}:{{"dtype":"{CODES[dtype]}","shape":[{numbers}],"data_offsets":[{at},{end}]}}', end


def _framed(members: bytearray) -> bytes:
    length = len(members) + 2
    padding = -length % 8  # data aligned to 8 bytes, as the library has it
    if length > MAX_HEADER:
        found, wanted = f"a header of {length} bytes", f"at most {MAX_HEADER}"
        raise UsageError("too many tensors for one .safetensors", found=found, wanted=wanted, hint="write to a folder")
    return b"".join((struct.pack("<Q", length + padding), b"{", members, b"}", b" " * padding))
