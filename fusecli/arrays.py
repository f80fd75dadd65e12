"""The one seam between NumPy and torch.

The mathematics is written once, over what both kinds of array share: ``@``, ``.mT``, ``reshape``, ``swapaxes``,
slices. What they do not share is here. Nothing but `import_torch` imports torch: a tensor can only come from a program
that has imported it already.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from fusecli.errors import DeviceError, MissingPackageError, ShapeError, UsageError, ValuesError

#: A ``numpy.ndarray`` or a ``torch.Tensor``. No static type covers the operations they share.
Array: TypeAlias = Any

FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64", "longdouble")
#: Dtypes that torch cannot take from NumPy, and the closest one that it can.
TORCHLESS = {"bfloat16": "float32", "longdouble": "float64"}
#: Those that do not fit into 32 bits: one of them, and a pair is computed in float64.
WIDE = ("float64", "longdouble")


def is_torch(x: Array) -> bool:
    """True for a torch tensor (parameters included), False for anything else."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_on_gpu(x: Array) -> bool:
    """True for a tensor that lies elsewhere than in the memory of the CPU."""
    return is_torch(x) and x.device.type != "cpu"


def namespace(x: Array) -> ModuleType:
    """The module whose functions work on ``x``: ``torch`` for tensors, else ``numpy``."""
    return sys.modules["torch"] if is_torch(x) else np


def dtype_name(x: Array) -> str:
    """The dtype of ``x`` by the name that NumPy and torch share, e.g. ``"float32"``."""
    return spelled(x.dtype)


@lru_cache(maxsize=64)  # NumPy takes microseconds to spell a dtype, and a small fusion asks several times
def spelled(dtype: Any) -> str:
    """A dtype of NumPy or torch, of any byte order, by the name that both share."""
    if not isinstance(dtype, np.dtype):
        return str(dtype).removeprefix("torch.")
    native = dtype.newbyteorder("=")
    return "longdouble" if native == np.longdouble and native.name not in FLOAT_NAMES else native.name


@lru_cache(maxsize=64)  # asked several times for each pair of a batch
def compute_dtype(*dtypes: str) -> str:
    """What arrays of ``dtypes`` are computed in: ``"float64"`` if one is wider than 32 bits, else ``"float32"``."""
    return "float64" if any(name in WIDE for name in dtypes) else "float32"


def cast(x: Array, dtype: str) -> Array:
    """``x`` as ``dtype`` (a name), itself when it already is."""
    if is_torch(x):
        return x.to(getattr(sys.modules["torch"], dtype))
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16  # 15 ms that most runs do not need

        return x.astype(bfloat16, copy=False)
    return x.astype(np.dtype(dtype), copy=False)


def like(x: Array, template: Array) -> Array:
    """``x`` as the kind of array that ``template`` is, on its device; the dtype stays."""
    if is_torch(template):
        torch = sys.modules["torch"]
        if is_torch(x):
            return x.to(template.device)
        if dtype_name(x) in TORCHLESS:
            x = x.astype(TORCHLESS[dtype_name(x)])
        return torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="C")).to(template.device)
    return to_numpy(x)


def to_numpy(x: Array) -> Array:
    """``x`` as a NumPy array (bfloat16 tensors as float32, which holds them exactly)."""
    if not is_torch(x):
        return x
    return (x.float() if dtype_name(x) == "bfloat16" else x).numpy(force=True)


def is_masked(x: Array) -> bool:
    """Whether an array has a mask, which would be lost."""
    return getattr(x, "mask", None) is not None


def plain(x: Array, what: str) -> Array:
    """``x`` as a tensor or an array and no kind of its own, such as a matrix, whose operators mean something else.

    Raises:
        ValuesError: it has a mask, which would be lost; it is a sparse or nested tensor, or no array; the message calls
            it ``what``.
    """
    if is_masked(x):
        hint = "leave out those rows, or x.filled(0)"
        raise ValuesError("masked arrays are not supported", where=what, wanted="an array of numbers", hint=hint)
    if is_torch(x):
        if x.is_nested:
            raise ValuesError("nested tensors are not supported", where=what, hint="fuse pair by pair")
        if x.layout != sys.modules["torch"].strided:
            found = str(x.layout).removeprefix("torch.")
            raise ValuesError("not a dense tensor", where=what, found=found, hint="x.to_dense()")
        return x
    try:
        return np.asarray(x)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths; tensors in a list, with gradients
        found, wanted = type(x).__name__, "an array or a tensor, [rows, width]"
        raise ValuesError("not an array", where=what, found=found, wanted=wanted) from None


def numpy_can_have(*arrays: Array) -> bool:
    """Whether NumPy may compute for these tensors: no autograd, tracing or dispatch mode is active.

    Nor may one be of a kind of its own, or without memory of its own (sparse, or wrapped by `torch.func`).
    """
    tensors = [x for x in arrays if is_torch(x)]
    if needs_grad(*tensors):
        return False
    torch = sys.modules["torch"]
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    mode = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode", object)  # without it, torch computes
    if mode() is not None:  # somebody wants to see every operation
        return False
    return all(map(_is_plain, tensors))


def unwarned(x: Array) -> AbstractContextManager[object]:
    """Here NumPy says nothing of overflow or NaN if it computes for a tensor: torch would not either."""
    return np.errstate(all="ignore") if is_torch(x) else nullcontext()


@contextmanager
def lasting(x: Array) -> Iterator[None]:
    """Leaves modes of torch's that are the caller's own, so that what is kept from here on is good for others too.

    Inference mode forbids gradients later, and autocast rounds products.
    """
    if not is_torch(x):
        yield
        return
    torch = sys.modules["torch"]
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        modes.enter_context(torch.autocast(x.device.type, enabled=False))
        yield


def _is_plain(x: Array) -> bool:
    torch = sys.modules["torch"]
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    try:
        memory = x.data_ptr()
    except RuntimeError:  # it stands for others, in torch.func, or is sparse
        return False
    return (memory != 0 or x.numel() == 0) and torch.autograd.forward_ad.unpack_dual(x).tangent is None


def import_torch() -> Any:
    """torch: a second and 200 MB, so it is imported only where it is asked for.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingPackageError("torch is needed for this and not installed", hint="pip install torch") from None
    return torch


def cuda_number(name: str) -> int:
    """The number of the device ``name``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: no device is called that.
    """
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdecimal() and len(number) < 5)):
        raise UsageError("unknown device", where="--device", found=name, wanted="cpu, cuda or cuda:N")
    return int(number or 0)


def to_device(name: str) -> Callable[[Array], Array]:
    """A function that moves NumPy arrays to the torch device ``name``, e.g. ``cuda:1``.

    Raises:
        UsageError: no device is called that.
        DeviceError: it is not there.
    """
    number, torch = cuda_number(name), import_torch()
    if not torch.cuda.is_available():
        raise DeviceError("no CUDA here", where="--device", found=name, hint="leave it out to compute on the CPU")
    if number >= torch.cuda.device_count():
        wanted = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        raise DeviceError("no such CUDA device", where="--device", found=name, wanted=wanted)
    return lambda x: torch.from_numpy(x if x.flags.writeable else x.copy()).to(name)


def kind_and_device(x: Array) -> tuple[str, str]:
    """What tells apart arrays that cannot meet in one operation: kind and device."""
    return ("torch", str(x.device)) if is_torch(x) else ("numpy", "cpu")


def rows_of(shape: Sequence[int], where: str) -> tuple[int, int]:
    """``shape`` seen as ``[rows, width]``: one vector is one row, a leading axis of 1 goes.

    Raises:
        ShapeError: other axes, or no rows; the message names ``where``.
    """
    axes = tuple(shape[1:] if len(shape) == 3 and shape[0] == 1 else shape)
    axes = (1, *axes) if len(axes) == 1 else axes
    if len(axes) != 2:
        hint = "many pairs in one file are for fusecli batch" if len(axes) == 3 else None
        raise ShapeError("wrong number of axes", where=where, found=str(list(shape)), wanted="[rows, width]", hint=hint)
    if 0 in axes:
        raise ShapeError("nothing in it", where=where, found=str(list(shape)), wanted="at least [1, 1]")
    return axes


def filled(shape: tuple[int, ...], value: Array) -> Array:
    """An array of ``shape`` with ``value`` in it, broadcast: kind, device and dtype of ``value``."""
    if is_torch(value):
        return value.expand(shape).clone()
    x = np.empty(shape, value.dtype)
    x[...] = value
    return x


def joined(parts: list[Array], axis: int) -> Array:
    """The parts one after the other along ``axis``; one alone is not copied."""
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concatenate(parts, axis=axis)


def padded(x: Array, count: int) -> Array:
    """``x [B, ...]`` with zeros behind it, up to ``count`` along the first axis."""
    rest = (count - len(x), *x.shape[1:])
    return joined([x, x.new_zeros(rest) if is_torch(x) else np.zeros(rest, x.dtype)] if rest[0] else [x], 0)


def ones(shape: tuple[int, ...], template: Array) -> Array:
    """An array of ones: kind, device and dtype of ``template``."""
    return template.new_ones(shape) if is_torch(template) else np.ones(shape, template.dtype)


def contiguous(x: Array) -> Array:
    """``x`` in C order, itself when it already is."""
    return x.contiguous() if is_torch(x) else np.ascontiguousarray(x)


def cut(x: Array, at: int, axis: int = 0) -> tuple[Array, Array]:
    """The first ``at`` and the rest along ``axis``, as views.

    Slices of a tensor would each have a gradient as large as the whole, mostly zeros.
    """
    first, rest = x.split_with_sizes([at, x.shape[axis] - at], axis) if is_torch(x) else np.split(x, [at], axis)
    return first, rest


def needs_grad(*arrays: Array) -> bool:
    """True if torch would record operations on one of ``arrays``."""
    tensors = [x for x in arrays if is_torch(x)]
    return bool(tensors) and sys.modules["torch"].is_grad_enabled() and any(x.requires_grad for x in tensors)


def first_nonfinite(x: Array) -> tuple[int, ...] | None:
    """Index of the first NaN or Inf in a NumPy array, None if there is none."""
    if x.dtype in (np.float32, np.float64):
        # Squares are finite only if all numbers are: one pass at memory speed. They may also overflow, so
        # anything else is looked at again.
        flat = x.reshape(-1)
        if math.isfinite(np.vdot(flat, flat)):  # unlike dot, it does not warn of overflow
            return None
    bad = ~np.isfinite(x)
    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), x.shape)) if bad.any() else None
