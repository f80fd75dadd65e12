"""``.safetensors``: named arrays behind a JSON header.

The official library reads through a memory map, which counts every page of a large file as this process's
memory, and does not tell where a tensor lies. So the header is read here, under the official rules; the
tests hold both directions against the library.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from fusecli.errors import FileError, UsageError
from fusecli.formats.source import Source, Stored, StreamSource, read_bytes, require_sane

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
    text = read_bytes(source, 8, length)
    if len(text) < length:
        raise FileError("cut short in its header", where=source.name, found=f"{len(text)} bytes", wanted=f"{length}")
    try:
        header = json.loads(text.decode())
        strings = header.get(METADATA, {}).values()
        if not all(isinstance(value, str) for value in strings):
            raise ValueError
    except (ValueError, RecursionError, AttributeError):
        raise FileError(
            "the header is no JSON object of tensors and strings", where=source.name, found=repr(text[:60])
        ) from None
    return header, 8 + length


def open_tensors(source: Source) -> dict[str, Stored]:
    """Every tensor of the file by name.

    Raises:
        FileError: the header or the data end early, or the header contradicts itself.
    """
    header, begin = read_header(source)
    tensors = {}
    spans = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        tensors[name], span = _parse(source, name, entry, begin)
        spans.append((*span, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise FileError(
                "data overlap or leave a hole", where=f"{source.name}[{name}]", found=f"offset {first}", wanted=f"{end}"
            )
        end = last
    size = source.load(begin + end) if isinstance(source, StreamSource) else source.size()
    if size is not None and size != begin + end:
        what = "cut short" if size < begin + end else "longer than its header says"
        raise FileError(what, where=source.name, found=f"{size - begin} bytes of data", wanted=f"{end}")
    return tensors


def _parse(source: Source, name: str, entry: Any, begin: int) -> tuple[Stored, tuple[int, int]]:
    where = f"{source.name}[{name}]"
    try:
        code, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
        if len(entry) != 3 or type(code) is not str or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise FileError("the header makes no sense", where=where, found=repr(entry)[:80]) from None
    require_sane(shape, where)
    # Codes are upper case, our names lower: an unknown code cannot pass for a dtype that is read.
    stored = Stored(source, name, tuple(shape), NAMES.get(code, code.upper()), begin + first)
    bits = OTHER_BITS.get(code)
    wanted = math.prod(shape) * bits // 8 if bits else stored.nbytes if code in NAMES else last - first
    if last - first != wanted:
        raise FileError(
            "shape and size disagree", where=where, found=f"{last - first} bytes", wanted=f"{wanted} for {shape} {code}"
        )
    return stored, (first, last)


def metadata(source: Source) -> dict[str, str]:
    """The file's own strings, ``{}`` if it has none."""
    found: dict[str, str] = read_header(source)[0].get(METADATA, {})
    return found


def header(name: str, shape: tuple[int, ...], dtype: str, metadata: dict[str, str]) -> bytes:
    """What stands before the data of a file with one tensor.

    Raises:
        UsageError: the format has no name for ``dtype``.
    """
    if dtype not in CODES:
        raise UsageError(
            f".safetensors cannot name {dtype}", found=f"dtype {dtype}", hint="write .npy, or pass --dtype float64"
        )
    nbytes = math.prod(shape) * int(dtype[-2:]) // 8
    entry = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}
    text = json.dumps(({METADATA: metadata} if metadata else {}) | {name: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes, as the library has it
    return struct.pack("<Q", len(text)) + text
