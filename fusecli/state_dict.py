"""A ``state_dict`` of PyTorch: out of its file, and to the article's names."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from fusecli.arrays import FLOAT_NAMES, dtype_name, import_torch, to_numpy
from fusecli.errors import CheckpointError, FileError
from fusecli.formats import NumpyArray, Source, read_bytes

#: How PyTorch's files begin: a zip archive or, before PyTorch 1.6, a pickle.
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
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
    if len(marks) > 1:
        found = ", ".join(repr(mark) for mark in marks[:5])
        raise CheckpointError("more than one fusion, by prefix", found=found, wanted="one", hint="save one of them")
    prefix = marks[0] if marks else ""
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        twice = next(name for name in tensors if prefix + name in tensors)
        raise CheckpointError("two tensors of one name", where=twice, found=prefix + twice, wanted="one of them")
    thirds = [f"attention.{letter}_proj_weight" for letter in "qkv"]
    if all(name in named for name in thirds):
        parts = [named.pop(name) for name in thirds]
        if len({part.shape for part in parts}) > 1 or parts[0].ndim != 2:
            found = ", ".join(str(list(part.shape)) for part in parts)
            raise CheckpointError(
                "q, k and v have different shapes", where="attention", found=found, wanted="[D, D] each"
            )
        named["attention.in_proj_weight"] = np.concatenate(parts)
    for layers in (["text_proj."], ["image_proj."], ["attention.in_proj_", "attention.out_proj."]):
        if not any(f"{layer}bias" in named for layer in layers):
            for layer in layers:
                weight = named.get(f"{layer}weight")
                if weight is not None and weight.ndim == 2:
                    named[f"{layer}bias"] = np.zeros(len(weight), weight.dtype)
    return named


def is_pt(source: Source) -> bool:
    """Whether a file begins as those of `torch.save` do, and not as NumPy's archives."""
    start = read_bytes(source, 0, 256)
    if start[8:9] == b"{":  # the length of a header of .safetensors may look like either
        return False
    first = start[30 : 30 + int.from_bytes(start[26:28], "little")]  # the name of the first file in an archive
    return start.startswith(PICKLE) or (start.startswith(ZIP) and not first.endswith(b".npy"))


def read_pt(source: Source, path: str) -> dict[str, NumpyArray]:
    """The tensors of a file of `torch.save`, by name; wrappers around the ``state_dict`` go.

    Raises:
        FileError: it cannot be read, or holds anything else.
        CheckpointError: a tensor is no plain array of floats.
        MissingPackageError: torch is not installed.
    """
    import zipfile  # not needed to fuse

    torch = import_torch()
    data = read_bytes(source, 0, source.size() or 2**62)
    if data.startswith(ZIP) and not zipfile.is_zipfile(io.BytesIO(data)):
        raise FileError("cut short", where=path, found=f"{len(data)} bytes, no end of the archive")
    try:
        found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a bad file
        pickled = "Weights only load failed" in str(error)
        told = "objects other than tensors, which are never loaded" if pickled else str(error).split("\n")[0]
        hint = "torch.save(model.state_dict(), path)"
        raise FileError("not a PyTorch checkpoint of tensors", where=path, found=told, hint=hint) from None
    for _ in range(MAX_WRAPPERS):  # one may be in itself
        inner = [found[name] for name in WRAPPERS if isinstance(found, dict) and isinstance(found.get(name), dict)]
        found = inner[0] if inner else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise FileError("holds no state_dict", where=path, found=type(found).__name__, wanted="names and tensors")
    return {str(name): _plain(tensor, f"{path}[{name}]") for name, tensor in found.items()}


def _plain(tensor: Any, where: str) -> NumpyArray:
    """A stored tensor as an array.

    Sparse, quantised and other odd ones are refused, and so is a view that claims more than the file holds.
    """
    dtype = dtype_name(tensor)
    odd = tensor.is_nested or tensor.is_sparse or tensor.is_sparse_csr or tensor.is_quantized or tensor.is_meta
    if odd or dtype not in FLOAT_NAMES:
        raise CheckpointError("not a plain tensor of floats", where=where, found=f"{dtype}, {tensor.layout}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError("claims more numbers than the file holds", where=where, found=str(list(tensor.shape)))
    tensor = tensor.resolve_neg().detach()
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        array: NumpyArray = tensor.view(import_torch().int16).numpy().view(bfloat16)
        return array
    return cast(NumpyArray, to_numpy(tensor))
