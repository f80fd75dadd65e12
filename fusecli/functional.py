"""What layers compute, on NumPy arrays as on torch tensors: products, norms, activations.

Named as in `torch.nn.functional` where that has the same. torch's own are used on tensors; on arrays OpenBLAS
does the products, and how it is called decides speed and last digits. So it does for many pairs on a GPU.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from fusecli.arrays import (
    Array,
    cast,
    contiguous,
    dtype_name,
    is_on_gpu,
    is_torch,
    namespace,
    needs_grad,
    ones,
    padded,
)
from fusecli.machine import BLAS_THREADS


def exp_and_sums(x: Array) -> tuple[Array, Array]:
    """``exp`` of ``x`` in its own memory, and its sums over the last axis, kept as an axis of 1.

    Overflow goes to infinity without a word. Autograd follows: the backward of ``exp`` needs only its result.
    """
    if is_torch(x):
        x = x.exp_()
        return x, x.sum(-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        np.exp(x, out=x)
        # Along contiguous memory BLAS sums in many lanes. Along any other axis NumPy adds one by one, and 577
        # such additions in float32 lose a digit; so they are taken 64 at a time.
        if x.strides[-1] == x.itemsize:
            return x, x @ ones((x.shape[-1], 1), x)
        return x, sum(x[..., at : at + 64].sum(-1, keepdims=True) for at in range(0, x.shape[-1], 64))


def range_of(x: Array) -> tuple[float, float]:
    """The smallest and the largest number in ``x``; NaN if there is one."""
    if is_torch(x):
        torch = sys.modules["torch"]
        both = torch.stack(torch.aminmax(x)).cpu()  # one wait for the device, not two
        return float(both[0]), float(both[1])
    return float(x.min()), float(x.max())


def largest(x: Array) -> float:
    """The largest absolute value in ``x``; NaN if there is one."""
    low, high = range_of(x)
    return max(high, -low)


def products_beside(a: Array, b: Array) -> Array:
    """Products of stacked matrices side by side: ``[H, rows, k] @ [H, k, n]`` as ``[rows, H*n]``."""
    if is_torch(a):
        return (a @ b).swapaxes(0, 1).reshape(a.shape[1], -1)
    beside = np.empty((a.shape[1], a.shape[0], b.shape[-1]), a.dtype)
    if _in_tiles(a, b):
        _tiles(a, b, beside.swapaxes(0, 1))
    else:
        np.matmul(a, b, out=beside.swapaxes(0, 1))
    return beside.reshape(a.shape[1], -1)


#: Up to so many multiplications OpenBLAS for AVX-512 multiplies matrices where they lie, without copying them first;
#: and up to so many numbers in the result, where both have the numbers of a sum one after the other. Those it then adds
#: in several lanes, which rounds less.
SMALL_PRODUCT, SMALL_RESULT = 10**6, 1200
#: Rows up to which a weight matrix taken in such tiles is faster than whole, on one thread or two.
THIN = 12
#: The same where one thread multiplies, on such processors alone.
WIDE = 96
#: OpenBLAS takes so many rows at once, and a rest by 8, 4, 2 and 1: 13 to 15 rows take longer than these.
STEP = 16
#: Rows that are multiplied together by `rows_apart`. Not any number will do: of 12, 24 or 32, OpenBLAS's AVX2 code
#: (`OPENBLAS_CORETYPE=Haswell`) adds up some in another order than the rest. Of 8 or 16 it does not.
ROWS_APART = 16
#: Products that are summed at once where sums are taken in parts.
SUM_CHUNK = 256


@lru_cache(maxsize=1)
def multiplies_in_place() -> bool:
    """Whether one thread multiplies, as in the command, and small matrices where they lie.

    That it sees by their bits: what is copied first comes to the same, however it lay.
    """
    if os.environ.get(BLAS_THREADS) != "1":
        return False
    a, b = 1 / np.arange(1, 2049, dtype=np.float32).reshape(2, 16, 64)
    return not np.array_equal(a @ b.T, a @ contiguous(b.T))


def _in_tiles(a: Array, b: Array) -> bool:
    """Whether ``a [..., D, K] @ b [..., K, n]`` is faster in tiles, of four rows or more; beyond `THIN` columns."""
    (dim, width), n = a.shape[-2:], b.shape[-1]
    fits = THIN < n <= min(WIDE, dim - 1) and 4 * width * n <= SMALL_PRODUCT < dim * width * n
    return fits and a.dtype == np.float32 and multiplies_in_place()


def _tiles(a: Array, b: Array, out: Array) -> None:
    """``a [..., D, K] @ b [..., K, n]`` into ``out [..., D, n]``, some rows of ``a`` at a time, taken in place."""
    (dim, width), n = a.shape[-2:], b.shape[-1]
    rows = min(dim, SMALL_PRODUCT // (width * n) or 1)
    if a.strides[-1] == b.strides[-2] == a.itemsize:
        rows = min(rows, SMALL_RESULT // n)
    rows = next((size for size in range(rows, rows // 2, -1) if dim % size == 0), rows)
    # A rest of one row would be a vector times a matrix, whose sums depend on where a column stands on old processors.
    while rows > 2 and dim % rows == 1:
        rows -= 1
    even = dim - dim % rows  # the rest is a product of its own

    def cut(x: Array) -> Array:
        return x[..., :even, :].reshape(*x.shape[:-2], even // rows, rows, x.shape[-1])

    np.matmul(cut(a), b[..., None, :, :], out=cut(out))
    if even < dim:
        np.matmul(a[..., even:, :], b, out=out[..., even:, :])


def _small_products(weight: Array, columns: Array) -> Array:
    """``weight [..., D, K] @ columns [..., K, n]`` as ``[..., D, n]``, in tiles."""
    out = np.empty((*columns.shape[:-2], weight.shape[-2], columns.shape[-1]), columns.dtype)
    _tiles(weight, columns, out)
    return out


def _sums_in_lanes(a: Array, b: Array) -> bool:
    """Whether more than `THIN` rows ``a`` meet a weight in tiles, whose numbers of a sum lie one after the other."""
    return b.strides[-2] == b.itemsize and _in_tiles(b.mT, a.mT)


def dot(a: Array, b: Array) -> Array:
    """``a @ b``, computed as ``(bᵀ aᵀ)ᵀ`` where the result is wider than high.

    OpenBLAS is up to three times as fast with the long side of the result first (the fewer the
    tokens, the more it matters), and the transposed result costs nothing: it is a view. torch's libraries
    round more that way round. For pairs together on a GPU sums are taken in parts, as `dot_by_parts` does for arrays.
    """
    if is_torch(a):
        return _sum_of_parts(a, b, namespace(a).matmul) if _together_on_gpu(a, b) else a @ b
    if a.shape[-2] >= b.shape[-1]:
        return a @ b
    thin = a.ndim == 2 and 1 < len(a) <= THIN and b.strides[-2] == b.itemsize
    if thin or _sums_in_lanes(a, b):
        # Of rows that do not lie one after the other, from 9 on, sums are taken one by one, which rounds more.
        return _small_products(b.mT, contiguous(a).mT).mT
    if a.ndim == 2 and THIN < len(a) < STEP:
        return (b.mT @ padded(a, STEP).mT).mT[: len(a)]
    return (b.mT @ a.mT).mT


def dot_by_parts(a: Array, b: Array) -> Array:
    """As `dot`, but of arrays the sums are taken in two halves, or `SUM_CHUNK` products at a time: that rounds less.

    OpenBLAS adds up one after the other where torch's libraries add in lanes or in parts. So the numbers of one pair in
    300 were over the bar where the text meets one matrix (folded maps make up for it). One row is added in lanes, and
    so are tiles.
    """
    whole = is_torch(a) or a.shape[-2] == 1 or _sums_in_lanes(a, b)
    return dot(a, b) if whole else _sum_of_parts(a, b, dot)


def _sum_of_parts(a: Array, b: Array, product: Callable[[Array, Array], Array]) -> Array:
    width = a.shape[-1]
    step = min(SUM_CHUNK, -(-width // 2))
    fused = product(a[..., :step], b[..., :step, :])
    for at in range(step, width, step):
        fused += product(a[..., at : at + step], b[..., at : at + step, :])
    return fused


def _together_on_gpu(a: Array, b: Array) -> bool:
    """Whether ``a [B, rows, K]`` or ``[B, H, rows, d]`` is of pairs together on a GPU, and not learned from.

    A GPU adds up one after the other too, but in parts for the few rows that the reference has of one pair. So one
    transformer in 30 was over the bar.
    """
    of_many = len(a.shape) == 4 or (len(a.shape) == 3 and len(b.shape) == 2)  # three twice are the heads of one pair
    return of_many and is_on_gpu(a) and dtype_name(a) == "float32" and not needs_grad(a, b)


def rows_apart(x: Array, weight: Array) -> Array:
    """``x [B, K] @ weightᵀ`` as ``[B, D]``, where the numbers of a row depend on no other row, nor on ``B``.

    A matrix product rounds differently for different numbers of rows. So there are products of one size only,
    `ROWS_APART` rows, of zeros if need be. Not for tensors on the CPU: MKL on many threads was seen to differ.
    """
    b, width = x.shape
    if is_torch(x):
        tiles = padded(x, -(-b // ROWS_APART) * ROWS_APART).split(ROWS_APART)
        return sys.modules["torch"].cat([tile @ weight.mT for tile in tiles])[:b]
    tiles = np.zeros((-(-b // ROWS_APART), ROWS_APART, width), x.dtype)
    tiles.reshape(-1, width)[:b] = x
    return _small_products(weight, tiles.mT).mT.reshape(-1, len(weight))[:b]  # [tiles, D, rows] -> [B, D]


def linear(x: Array, weight: Array, bias: Array, product: Callable[[Array, Array], Array] = dot_by_parts) -> Array:
    """``x [..., rows, K] @ weightᵀ + bias`` with ``weight [D, K]``: ``[..., rows, D]``, as `torch.nn.Linear`.

    ``product`` is how arrays, and pairs together on a GPU, are multiplied.
    """
    if is_torch(x) and not _together_on_gpu(x, weight):
        return namespace(x).nn.functional.linear(x, weight, bias)
    y = product(x, weight.mT)
    y += bias
    return y


def layer_norm(x: Array, weight: Array = None, bias: Array = None) -> Array:
    """``x`` with each row brought to mean 0 and variance 1, times ``weight``, plus ``bias``, if they are given.

    Ba, Kiros and Hinton 2016, equation 4; eps and the biased variance as in `torch.nn.LayerNorm`.
    """
    if is_torch(x):
        return namespace(x).nn.functional.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)
    y = x - x.mean(-1, keepdims=True)
    y /= np.sqrt(np.square(y).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    if weight is not None:
        y *= weight
        y += bias
    return y


LAYER_NORM_EPS = 1e-5


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))``."""
    if is_torch(x):
        return x.sigmoid()
    with np.errstate(over="ignore"):  # far below 0 the result is 0
        return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """``x Φ(x)``, Φ the standard normal distribution, exact (Hendrycks and Gimpel 2016, equation 1)."""
    if is_torch(x):
        return namespace(x).nn.functional.gelu(x)
    if x.dtype == np.float64:
        return x * (0.5 + 0.5 * np.frompyfunc(math.erf, 1, 1)(x * math.sqrt(0.5)).astype(np.float64))
    # NumPy has no erf, and calling Python's for each number takes longer than the matrix products around it. So
    # Φ is taken from a table, with its first two derivatives: the third is below 1, and the error below 2e-10.
    table = _normal_table()
    at = np.fmin(np.fmax(x, -GELU_END, dtype=np.float64), GELU_END)  # NaN too: below it meets x again
    node = np.rint(at * GELU_NODES)
    at -= node / GELU_NODES
    node = (node + GELU_END * GELU_NODES).astype(np.int32)
    phi = table[2].take(node)
    phi *= at
    phi += table[1].take(node)
    phi *= at
    phi += table[0].take(node)
    return (x * phi).astype(x.dtype)


#: Φ is 0 or 1 beyond this, in float32; and nodes of its table for each unit.
GELU_END, GELU_NODES = 6, 512


@lru_cache(maxsize=1)
def _normal_table() -> Array:
    """``Φ, Φ', Φ''/2`` at the nodes from ``-GELU_END`` to ``GELU_END``: ``[3, nodes]``."""
    x = np.arange(-GELU_END * GELU_NODES, GELU_END * GELU_NODES + 1) / GELU_NODES
    phi = 0.5 + 0.5 * np.array([math.erf(value) for value in x * math.sqrt(0.5)])
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return np.stack([phi, density, -0.5 * x * density])


def mean_row(x: Array, mask: Array = None) -> Array:
    """The mean over rows ``[..., M, width]``: ``[..., width]``; with ``mask [..., M]``, of the rows where it is true.

    Summed in float64: hundreds of rows added one by one in float32 lose a digit.
    """
    wide = cast(x, "float64")
    if mask is None:
        return cast(wide.mean(-2), dtype_name(x))
    return cast((wide * mask[..., None]).sum(-2) / mask.sum(-1)[..., None], dtype_name(x))
