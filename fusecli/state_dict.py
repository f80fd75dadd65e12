"""A ``state_dict`` of PyTorch: out of its file, and to the article's names."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from fusecli import arrays
from fusecli.arrays import FLOAT_NAMES, compute_dtype, dtype_name, import_torch, to_numpy
from fusecli.errors import CheckpointError, FileError, is_out_of_memory, listed
from fusecli.formats import NumpyArray, Source, read_bytes

#: How PyTorch's files begin: a zip archive or, before PyTorch 1.6, a pickle; and the number that comes first in that.
ZIP, PICKLE, MAGIC = b"PK\x03\x04", b"\x80\x02", b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
#: Bytes that no file has.
EVERYTHING = 2**62
#: Dictionaries around a ``state_dict``, by the names that training loops give them, and how many are looked through.
WRAPPERS, MAX_WRAPPERS = ("state_dict", "model_state_dict", "model"), 8


def article_names(tensors: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    """A ``state_dict`` under the article's names.

    The prefix of ``text_proj.weight`` goes from all names; ``q/k/v_proj_weight`` (separate in
    `torch.nn.MultiheadAttention` when it is built with ``kdim`` or ``vdim``) are stacked; layers built with
    ``bias=False`` get zeros.
    """
    names = list(tensors)
    marks = [name.removesuffix("text_proj.weight") for name in names if name.endswith("text_proj.weight")]
    marks = [mark for mark in marks if not mark or mark.endswith(".")] or marks  # context_proj is another layer
    if len(marks) > 1:
        found = ", ".join(repr(mark) for mark in marks[:5])
        raise CheckpointError("more than one fusion, by prefix", found=found, wanted="one", hint="save one of them")
    prefix = marks[0] if marks else ""
    others = [name for name in names if not name.startswith(prefix)]
    if others:
        found, hint = listed(others), f"torch.save(model.{prefix.rstrip('.')}.state_dict(), path)"
        raise CheckpointError(
            "holds more than the fusion", found=found, wanted=f"only tensors below {prefix}", hint=hint
        )
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    _stack_thirds(named)
    for layers in (["text_proj."], ["image_proj."], ["attention.in_proj_", "attention.out_proj."]):
        if not any(f"{layer}bias" in named for layer in layers):
            for layer in layers:
                weight = named.get(f"{layer}weight")
                if weight is not None and weight.ndim == 2:
                    named[f"{layer}bias"] = np.zeros(len(weight), weight.dtype)
    return named


def _stack_thirds(named: dict[str, NumpyArray]) -> None:
    """Put separate weights of query, key and value in one, as they are when their widths are equal."""
    thirds = [f"attention.{letter}_proj_weight" for letter in "qkv"]
    if not all(name in named for name in thirds):
        return
    if "attention.in_proj_weight" in named:
        found = "in_proj_weight and q/k/v_proj_weight"
        raise CheckpointError("query, key and value given twice", where="attention", found=found, wanted="one of them")
    parts = [named.pop(name) for name in thirds]
    if len({part.shape for part in parts}) > 1 or parts[0].ndim != 2:
        found = ", ".join(str(list(part.shape)) for part in parts)
        raise CheckpointError("q, k and v have different shapes", where="attention", found=found, wanted="[D, D] each")
    if len({part.dtype for part in parts}) > 1:
        parts = [arrays.cast(part, compute_dtype(*map(dtype_name, parts))) for part in parts]
    named["attention.in_proj_weight"] = np.concatenate(parts)


def is_pt(source: Source) -> bool:
    """Whether a file begins as those of `torch.save` do, and not as NumPy's archives."""
    start = read_bytes(source, 0, 256)
    if start[8:9] == b"{":  # the length of a header of .safetensors may look like either
        return False
    first = start[30 : 30 + int.from_bytes(start[26:28], "little")]  # the name of the first file in an archive
    pickled = start.startswith(PICKLE) or (start.startswith(PICKLE[:1]) and MAGIC in start)
    return pickled or (start.startswith(ZIP) and not first.endswith(b".npy"))


def read_pt(source: Source) -> dict[str, NumpyArray]:
    """The tensors of a file of `torch.save`, by name; wrappers around the ``state_dict`` go.

    Raises:
        FileError: it cannot be read, or holds anything else.
        CheckpointError: a tensor is no plain array of floats.
        MissingPackageError: torch is not installed.
    """
    torch = import_torch()
    data = read_bytes(source, 0, EVERYTHING)
    if data.startswith(ZIP) and not _has_end(data):
        raise FileError("cut short", where=source.name, found=f"{len(data)} bytes, no end of the archive")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what may fail, and then does
            found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a bad file
        asked = re.search(r"allocate (\d+) bytes", str(error))
        if is_out_of_memory(error) and not (asked and int(asked[1]) > len(data)):  # a damaged one may ask for anything
            raise
        found, hint = "a damaged file", "torch.save(model.state_dict(), path)"
        if "TorchScript" in str(error):
            found = "a TorchScript archive"
        elif "Unsupported operand" in str(error):
            found, hint = "a pickle protocol that is not loaded safely", f"{hint}, without pickle_protocol"
        elif "Weights only load failed" in str(error):
            found = "objects other than tensors, which are never loaded"
        raise FileError("not a PyTorch checkpoint of tensors", where=source.name, found=found, hint=hint) from error
    for _ in range(MAX_WRAPPERS):  # one may be in itself
        inner = [found[name] for name in WRAPPERS if isinstance(found, dict) and isinstance(found.get(name), dict)]
        found = inner[0] if inner else found
    others = _no_tensors(found)
    if others:
        raise FileError("holds no state_dict", where=source.name, found=others, wanted="names and tensors")
    return {str(name): _plain(tensor, f"{source.name}[{name}]") for name, tensor in found.items()}


def _no_tensors(found: Any) -> str:
    """What is in the way of a ``state_dict``; nothing if it is one."""
    if not isinstance(found, dict):
        return type(found).__name__
    tensor = import_torch().Tensor
    others = ((name, value) for name, value in found.items() if not isinstance(value, tensor))
    return listed(f"{name!r} ({type(value).__name__})" for name, value in others)


def _has_end(data: bytes) -> bool:
    import zipfile  # not needed to fuse

    try:
        return zipfile.is_zipfile(io.BytesIO(data))
    except zipfile.BadZipFile:  # there is one, and it is damaged
        return False


def _plain(tensor: Any, where: str) -> NumpyArray:
    """A stored tensor as an array.

    Sparse, quantised and other odd ones are refused, and so is a view that claims more than the file holds.
    """
    dtype = dtype_name(tensor)
    strided = tensor.layout is import_torch().strided
    if not strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta or dtype not in FLOAT_NAMES:
        found = f"{dtype} on meta" if tensor.is_meta else dtype if strided else f"{dtype}, {tensor.layout}"
        raise CheckpointError("not a plain floating-point tensor", where=where, found=found)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError("claims more numbers than the file holds", where=where, found=str(list(tensor.shape)))
    tensor = tensor.resolve_neg().detach()
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        array: NumpyArray = tensor.view(import_torch().int16).numpy().view(bfloat16)
        return array
    return cast(NumpyArray, to_numpy(tensor))
