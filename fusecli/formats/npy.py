"""``.npy``: one array. Versions 1 to 3 of the header (NumPy's NEP 1), never pickled objects."""

from __future__ import annotations

import ast
import io
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

from fusecli.arrays import spelled
from fusecli.errors import FileError, InputError, UsageError, ValuesError
from fusecli.formats.source import Source, Stored, read_bytes, read_header, require_sane

MAGIC = b"\x93NUMPY"
SUFFIXES = (".npy",)
#: NumPy's own limit: longer headers have been used to stall the parser.
MAX_HEADER = 10_000


def open_tensors(source: Source) -> dict[str, Stored]:
    """The one array of the file, under the name ``""``.

    Raises:
        FileError: the header or the data end early, or the header makes no sense.
        ValuesError: the array holds Python objects.
    """
    start = read_bytes(source, 0, 12)
    least = 12 if start[6:7] > b"\1" else 10
    if len(start) < least:
        found, wanted = f"{len(start)} bytes", f"at least {least}"
        raise FileError("cut short in its header", where=source.name, found=found, wanted=wanted)
    if start[6] not in (1, 2, 3):
        raise FileError("unknown .npy version", where=source.name, found=str(start[6]), wanted="1, 2 or 3")
    at = 10 if start[6] == 1 else 12
    length = int.from_bytes(start[8:at], "little")
    header = read_header(source, at, length, MAX_HEADER)
    try:
        shape, dtype, big_endian, fortran, nbytes = _parse(header, start[6] < 3)
    except InputError as error:
        raise type(error)(error.what, where=source.name, found=error.found, wanted=error.wanted) from None
    _check_length(source, at + length, shape, dtype, nbytes)
    return {"": Stored(source, "", shape, dtype, at + length, big_endian, fortran)}


@lru_cache(maxsize=256)  # the files of a collection differ in little but their numbers
def _parse(header: bytes, latin: bool) -> tuple[tuple[int, ...], str, bool, bool, int]:
    """Shape, name of the dtype, big-endian, Fortran order, bytes of the data."""
    text = header.decode("latin1" if latin else "utf8", "replace")
    try:
        fields = ast.literal_eval(text.strip())
        descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
        if len(fields) != 3 or type(fortran) is not bool or type(shape) is not tuple or type(descr) not in (str, list):
            raise ValueError
        dtype = np.dtype(descr)
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        wanted = "a dictionary of descr, fortran_order and shape"
        raise FileError("malformed header", found=repr(text[:80]), wanted=wanted) from None
    require_sane(shape, None)
    if dtype.hasobject:
        what = "holds pickled Python objects, which are never loaded"
        raise ValuesError(what, found="object dtype", wanted="a float dtype")
    return shape, spelled(dtype), dtype.byteorder == ">", fortran, math.prod(shape) * dtype.itemsize


def _check_length(source: Source, offset: int, shape: tuple[int, ...], dtype: str, nbytes: int) -> None:
    end = offset + nbytes
    size = source.size(end)
    if size != end:
        found, wanted = f"{size - offset} bytes of data", f"{nbytes} for {list(shape)} {dtype}"
        what, hint = ("cut short", None) if size < end else ("longer than its header says", "save one array a file")
        raise FileError(what, where=source.name, found=found, wanted=wanted, hint=hint)


def header(tensors: Iterable[tuple[str, tuple[int, ...], str]], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the data of one array ``(name, shape, dtype)``; this format has room for no name or metadata.

    Raises:
        UsageError: the dtype is bfloat16, which the format cannot name.
    """
    [(_, shape, dtype)] = tensors
    return _header(shape, dtype)


@lru_cache(maxsize=256)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    if dtype == "bfloat16":
        raise UsageError(
            ".npy cannot name bfloat16", found="dtype bfloat16", hint="write .safetensors, or pass --dtype float32"
        )
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()
