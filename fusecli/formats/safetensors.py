"""``.safetensors``: named arrays behind a JSON header.

The official library reads through a memory map, which counts every page of a large file as this process's
memory, and does not tell where a tensor lies. So the header is read here, under the official rules; the
tests hold both directions against the library.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

from fusecli.errors import FileError, UsageError
from fusecli.formats.source import Source, Stored, StreamSource, itemsize, read_bytes, require_sane

SUFFIXES = (".safetensors",)
#: The library's own limit for the header.
MAX_HEADER = 100_000_000
METADATA = "__metadata__"

NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
CODES = {name: code for code, name in NAMES.items()}
#: Bits of the types that are listed but hold no floats we can read.
OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64}


def read_header(source: Source) -> tuple[dict[str, Any], int]:
    """The JSON header, and the offset where the data begin.

    Raises:
        FileError: it is cut short, absurdly long or no JSON object.
    """
    start = read_bytes(source, 0, 8)
    if len(start) < 8:
        raise FileError("cut short in its header", where=source.name, found=f"{len(start)} bytes", wanted="at least 8")
    length: int = struct.unpack("<Q", start)[0]
    if length > MAX_HEADER:
        raise FileError("absurd header", where=source.name, found=f"{length} bytes", wanted=f"at most {MAX_HEADER}")
    text: bytes | str = read_bytes(source, 8, length)
    if len(text) < length:
        raise FileError("cut short in its header", where=source.name, found=f"{len(text)} bytes", wanted=f"{length}")
    kinds: dict[_Kind, _Kind] = {}
    try:
        text = cast(bytes, text).decode()  # in its own place: the header of many tensors takes megabytes
        header = json.loads(text, object_pairs_hook=lambda pairs: _compact(pairs, kinds))
        strings = header.get(METADATA, {}).values()
        if not all(isinstance(value, str) for value in strings):
            raise ValueError
    except (ValueError, RecursionError, AttributeError):
        raise FileError(
            "the header is no JSON object of tensors and strings", where=source.name, found=repr(text[:60])
        ) from None
    return header, 8 + length


_Kind: TypeAlias = "tuple[str, tuple[int, ...]]"


class _Entry(NamedTuple):
    """What the header says of one tensor; millions of them may be held."""

    kind: _Kind  # code of the dtype and shape: shared by tensors that have them in common
    first: int
    last: int


def _compact(pairs: list[tuple[str, Any]], kinds: dict[_Kind, _Kind]) -> Any:
    """A JSON object: a tensor's as `_Entry`, any other as the dictionary that it is."""
    found = dict(pairs)
    if len(found) == 3 and found.keys() == {"dtype", "shape", "data_offsets"}:
        try:
            code, shape, (first, last) = found["dtype"], found["shape"], found["data_offsets"]
            if type(code) is str and all(type(n) is int and n >= 0 for n in (*shape, first, last)):
                kind = (code, tuple(shape))
                return _Entry(kinds.setdefault(kind, kind), first, last)
        except (ValueError, TypeError):
            pass  # it is left as it is, and complained of where its name is known
    return found


def open_tensors(source: Source) -> dict[str, Stored]:
    """Every tensor of the file by name.

    Raises:
        FileError: the header or the data end early, or the header contradicts itself.
    """
    return {stored.name: stored for stored in scan(source)}


def scan(source: Source) -> Iterator[Stored]:
    """Every tensor of the file in the order of its data, one at a time: for files of very many.

    Raises:
        FileError: as `open_tensors`, before the first tensor is given.
    """
    header, begin = read_header(source)
    header.pop(METADATA, None)
    for name, entry in header.items():
        _check(source, name, entry)
    names = sorted(header, key=lambda name: (header[name].first, header[name].last))
    end = 0
    for name in names:
        entry = header[name]
        if entry.first != end:
            raise FileError(
                "data overlap or leave a hole",
                where=f"{source.name}[{name}]",
                found=f"offset {entry.first}",
                wanted=f"{end}",
            )
        end = entry.last
    size = source.load(begin + end) if isinstance(source, StreamSource) else source.size()
    if size is not None and size != begin + end:
        what = "cut short" if size < begin + end else "longer than its header says"
        raise FileError(what, where=source.name, found=f"{size - begin} bytes of data", wanted=f"{end}")
    return (_stored(source, name, header[name], begin) for name in names)


def _check(source: Source, name: str, entry: Any) -> None:
    where = f"{source.name}[{name}]"
    if not isinstance(entry, _Entry):
        raise FileError("the header makes no sense", where=where, found=repr(entry)[:80])
    (code, shape), first, last = entry
    require_sane(shape, where)
    bits = OTHER_BITS.get(code)
    wanted = last - first
    if code in NAMES:
        wanted = math.prod(shape) * itemsize(NAMES[code])
    elif bits:
        wanted = math.prod(shape) * bits // 8
    if last - first != wanted:
        raise FileError(
            "shape and size disagree",
            where=where,
            found=f"{last - first} bytes",
            wanted=f"{wanted} for {list(shape)} {code}",
        )


def _stored(source: Source, name: str, entry: _Entry, begin: int) -> Stored:
    code, shape = entry.kind
    # Codes are upper case, our names lower: an unknown code cannot pass for a dtype that is read.
    return Stored(source, name, shape, NAMES.get(code, code.upper()), begin + entry.first)


def metadata(source: Source) -> dict[str, str]:
    """The file's own strings, ``{}`` if it has none."""
    found: dict[str, str] = read_header(source)[0].get(METADATA, {})
    return found


def header(name: str, shape: tuple[int, ...], dtype: str, metadata: dict[str, str]) -> bytes:
    """What stands before the data of a file with one tensor.

    Raises:
        UsageError: the format has no name for ``dtype``.
    """
    return _framed([*_strings(metadata), _described(name, shape, dtype, 0)[0]])


def header_of_many(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> bytes:
    """What stands before the data of a file with many tensors ``(name, shape, dtype)``, in their order.

    Raises:
        UsageError: the format has no name for a dtype, or the header would be longer than the format allows.
    """
    parts = []
    at = 0
    for name, shape, dtype in tensors:
        part, at = _described(name, shape, dtype, at)
        parts.append(part)
    return _framed(parts)


def _described(name: str, shape: tuple[int, ...], dtype: str, at: int) -> tuple[str, int]:
    """A tensor's entry for data from ``at`` on, and where they end."""
    if dtype not in CODES:
        raise UsageError(
            f".safetensors cannot name {dtype}", found=f"dtype {dtype}", hint="write .npy, or pass --dtype float64"
        )
    end = at + math.prod(shape) * int(dtype[-2:]) // 8
    numbers = ",".join(map(str, shape))
    return f'{json.dumps(name)}:{{"dtype":"{CODES[dtype]}","shape":[{numbers}],"data_offsets":[{at},{end}]}}', end


def _strings(metadata: dict[str, str]) -> list[str]:
    return [f'"{METADATA}":{json.dumps(metadata, separators=(",", ":"))}'] if metadata else []


def _framed(entries: list[str]) -> bytes:
    text = ("{" + ",".join(entries) + "}").encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes, as the library has it
    if len(text) > MAX_HEADER:
        found, wanted = f"a header of {len(text)} bytes", f"at most {MAX_HEADER}"
        raise UsageError("too many tensors for one .safetensors", found=found, wanted=wanted, hint="write to a folder")
    return struct.pack("<Q", len(text)) + text
