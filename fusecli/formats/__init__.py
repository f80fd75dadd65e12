"""Bytes to arrays and back: one module a format, and the table that lists them.

A format is a module with ``SUFFIXES``, ``open_tensors(source)`` (the arrays of a file by name, none of them
read yet) and ``header(tensors, metadata)`` (the bytes before the data of a file with tensors ``(name, shape, dtype)``,
one where the format has no names).
Files are told apart by their first bytes when read, by their suffix when written.
"""

from __future__ import annotations

import os
from types import ModuleType

from fusecli.errors import STDIN, FileError, UsageError
from fusecli.formats import npy, safetensors
from fusecli.formats.sink import (
    FileSink,
    Replacing,
    Sink,
    is_stream,
    keep_mode,
    open_sink,
    require_folder,
    require_replaceable,
    write_whole,
)
from fusecli.formats.source import (
    FileSource,
    NumpyArray,
    Source,
    Stored,
    as_bytes,
    itemsize,
    open_source,
    read_bytes,
    reason,
)

__all__ = [
    "FORMATS",
    "FileSink",
    "FileSource",
    "NumpyArray",
    "Replacing",
    "Sink",
    "Source",
    "Stored",
    "as_bytes",
    "format_of",
    "has_names",
    "is_stream",
    "itemsize",
    "keep_mode",
    "npy",
    "open_sink",
    "open_source",
    "open_tensors",
    "read_bytes",
    "reason",
    "require_folder",
    "require_replaceable",
    "safetensors",
    "sniff",
    "tensors_of",
    "write_whole",
]

FORMATS: dict[str, ModuleType] = {"npy": npy, "safetensors": safetensors}


def sniff(source: Source, checkpoint: bool = False) -> str:
    """The format that the first bytes speak of: a name in `FORMATS`; messages say what is wanted, features or weights.

    Raises:
        FileError: the file is empty, or of no known format.
    """
    start = read_bytes(source, 0, 9)
    wanted = ".safetensors or a file of torch.save" if checkpoint else ".npy or .safetensors"
    if not start:
        what = "ended before an array arrived" if source.name == STDIN else "is empty"
        raise FileError(what, where=source.name, wanted=wanted)
    if npy.MAGIC.startswith(start[:6]):
        return "npy"
    # A header that could not be so long is some text, with a brace where it happens to be.
    headed = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= safetensors.MAX_HEADER
    if headed or source.name.endswith(safetensors.SUFFIXES):
        return "safetensors"
    found, hint = f"first bytes {start!r}", None
    if start.startswith(b"PK\x03\x04"):
        found, hint = "a zip archive (.npz or .pt)", "features: numpy.save; weights: fusecli convert"
    elif start[:1] == b"\x80":
        found, hint = "a pickle", "load it where it was made, and save the array with numpy.save"
    if checkpoint:
        hint = "torch.save(model.state_dict(), path)"
    what = "not a checkpoint" if checkpoint else "not a feature file"
    raise FileError(what, where=source.name, found=found, wanted=wanted, hint=hint)


def open_tensors(path: str, *, regular: bool = False, at_once: int = 0) -> dict[str, Stored]:
    """Every array in the file at ``path`` (``-`` is standard input), by name; ``""`` in a ``.npy``.

    ``regular`` and ``at_once`` as in `open_source`.

    Raises:
        FileError: it is missing, unreadable, empty, cut short or of no known format.
    """
    return tensors_of(open_source(path, regular=regular, at_once=at_once))


def tensors_of(source: Source) -> dict[str, Stored]:
    """The same for a file that is open."""
    tensors: dict[str, Stored] = FORMATS[sniff(source)].open_tensors(source)
    return tensors


def has_names(path_or_suffix: str) -> bool:
    """Whether a file called so has names for its arrays, and room for what it says of itself."""
    return path_or_suffix.lower().endswith(safetensors.SUFFIXES)


def format_of(path: str, wanted: str | None = None) -> ModuleType:
    """The format to write ``path`` in: ``wanted`` if given, else by its suffix, ``.npy`` for streams.

    Raises:
        UsageError: the suffix is unknown, or is that of another format than the one ``wanted``.
    """
    suffix = os.path.splitext(path)[1].lower()
    told = next((name for name, module in FORMATS.items() if suffix in module.SUFFIXES), None)
    if wanted and told and wanted != told:
        raise UsageError(
            "the name says another format",
            where=path,
            found=suffix,
            wanted=wanted,
            hint="leave out --format, which is of -o",
        )
    if name := wanted or told:
        return FORMATS[name]
    if is_stream(path):
        return npy
    raise UsageError(
        "cannot tell the format from the name", where=path, found=suffix or "no suffix", wanted=".npy or .safetensors"
    )
