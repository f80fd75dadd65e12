"""Weights to begin with, drawn as PyTorch draws them, without PyTorch: the same bytes on every machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from fusecli.formats import NumpyArray

#: Where a number alone starts.
CONSTANTS = {"alpha": 0.5, "gamma": 0.0}
#: γ of a tanh gate that is half open, as a sigmoid is by itself.
HALF_OPEN = math.atanh(0.5)
#: Numbers that are drawn together: on the way they are 64 bits wide, and a matrix of them would be the most
#: memory that a small fusion takes.
DRAWN_AT_ONCE = 2**16


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, NumpyArray]:
    """Float32 tensors of ``shapes`` by name, as ``torch.manual_seed(seed)`` and the layers' constructors make them."""
    bits = np.random.MT19937()
    # torch seeds its generator likewise
    bits.state = cast(Any, np.random.RandomState(seed).get_state(legacy=False))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name in _in_order_of_drawing(shapes):
        tensors[name] = _one(bits, name, shapes)
    return tensors


def _in_order_of_drawing(names: Iterable[str]) -> Iterator[str]:
    """As `torch.nn.MultiheadAttention` does it: its ``out_proj`` comes first."""
    inner = ""
    for name in names:
        if name.endswith("in_proj_weight"):
            inner = name
            continue
        yield name
        if name.endswith("out_proj.bias"):
            yield inner


def _one(bits: np.random.MT19937, name: str, shapes: Mapping[str, tuple[int, ...]]) -> NumpyArray:
    shape = shapes[name]
    if name in CONSTANTS or name.endswith("in_proj_bias"):
        return np.full(shape, CONSTANTS.get(name, 0.0), np.float32)
    if "norm" in name:
        return np.full(shape, name.endswith("weight"), np.float32)
    if name.endswith("in_proj_weight"):  # Xavier-uniform
        return _uniform(bits, shape, np.sqrt(6 / (shape[0] + shape[1])))
    # torch.nn.Linear: U(±1/sqrt(fan_in)) for weight and bias. MultiheadAttention then sets the bias of its
    # out_proj to zero.
    layer = _uniform(bits, shape, 1 / np.sqrt(shapes[name.replace("bias", "weight")][1]))
    return np.zeros_like(layer) if name.endswith("out_proj.bias") else layer


def _uniform(bits: np.random.MT19937, shape: tuple[int, ...], bound: float) -> NumpyArray:
    # at::uniform_real_distribution<float>: the low 24 bits of each draw, as a multiple of 2**-24, times the
    # width, plus the lower end, rounded once (a fused multiply-add; float64 holds the product exactly).
    low, high = np.float32(-bound), np.float32(bound)
    numbers = np.empty(int(np.prod(shape)), np.float32)
    for part in np.split(numbers, range(DRAWN_AT_ONCE, numbers.size, DRAWN_AT_ONCE)):
        raw = bits.random_raw(part.size) & np.uint64(2**24 - 1)
        part[:] = raw * 2.0**-24 * np.float64(high - low) + np.float64(low)
    return numbers.reshape(shape)


def turned(name: str, tensor: NumpyArray) -> NumpyArray:
    """A drawn tensor made to keep lengths and angles: see `fusecli.checkpoint.orthogonal`."""
    if name in CONSTANTS or name.endswith("norm.weight") or ".norm" in name or ".linear1" in name:
        return tensor
    if name.endswith("bias") or ".linear2" in name or name.startswith("gate_proj"):
        return np.zeros_like(tensor)
    rows = tensor.shape[0] // 3 if name.endswith("in_proj_weight") else tensor.shape[0]
    if rows == tensor.shape[1] and name != "image_proj.weight":
        return np.tile(np.eye(rows, dtype=np.float32), (tensor.shape[0] // rows, 1))
    u, _, vt = np.linalg.svd(tensor, full_matrices=False)  # the nearest with orthonormal rows or columns
    nearest: NumpyArray = u @ vt
    return nearest
