"""Products and formulas: what they come to, and that their bits depend on nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from fusecli.functional import dot, gelu, layer_norm, linear, multiplies_in_place, products_beside, rows_apart
from tests.oracle import on_one_thread


def test_a_product_is_one_however_many_rows_it_has(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((40, 24))
    for rows in range(1, 50):
        x = rng.standard_normal((rows, 24))
        np.testing.assert_allclose(dot(x, weight.T), np.einsum("nk,dk->nd", x, weight), rtol=1e-12, atol=1e-12)
        stack = np.stack([x, 2 * x, -x], 1)  # as many stacks as there were rows
        np.testing.assert_allclose(dot(stack, weight.T)[:, 2], -dot(x, weight.T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("most", "here"), [(12, nullcontext), (96, on_one_thread)])
def test_a_few_rows_come_to_the_same_bits_however_they_lie(most: int, here: Any, rng: np.random.Generator) -> None:
    # OpenBLAS would add up one by one what it takes across, and that rounds more.
    weight = rng.standard_normal((768, 768), np.float32)
    with here():
        for rows in range(2, most + 1):
            if rows > 12 and not multiplies_in_place():
                break
            x = rng.standard_normal((rows, 768), np.float32)
            np.testing.assert_array_equal(dot(np.asfortranarray(x), weight.T), dot(x, weight.T))


@pytest.mark.parametrize(("dim", "width"), [(1009, 216), (97, 5000), (13, 200_000), (768, 96), (300, 7)])
@pytest.mark.parametrize("n", [2, 12, 13, 50, 96, 97])
def test_tiles_cover_a_product(dim: int, width: int, n: int, rng: np.random.Generator) -> None:
    weights, columns = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, dim, width), (2, width, n)))
    exact = weights.astype(np.float64) @ columns
    bound = 1e-6 * width**0.5 * float(np.abs(weights).max() * np.abs(columns).max())
    with on_one_thread():
        np.testing.assert_allclose(dot(columns[0].T, weights[0].T), exact[0].T, rtol=0, atol=bound)
        beside = products_beside(weights, columns).reshape(dim, 2, n).swapaxes(0, 1)
        np.testing.assert_allclose(beside, exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("dim", "width"), [(768, 768), (1024, 512), (1536, 1000), (1009, 216), (64, 2048), (100, 33), (8, 1000)]
)
def test_a_row_comes_to_the_same_bits_wherever_it_stands(dim: int, width: int, dtype: str) -> None:
    rng = np.random.default_rng(dim)
    weight, row = rng.standard_normal((dim, width)).astype(dtype), rng.standard_normal(width).astype(dtype)
    alone = rows_apart(row[None], weight)[0]
    for count in (2, 15, 16, 17, 40):
        x = rng.standard_normal((count, width)).astype(dtype)
        for at in range(count):
            assert (rows_apart(np.concatenate([x[:at], row[None], x[at + 1 :]]), weight)[at] == alone).all()


@pytest.mark.parametrize("processor", ["SkylakeX", "Haswell", "Sandybridge"])
def test_rows_come_to_the_same_bits_on_other_processors(processor: str) -> None:
    # OpenBLAS chooses its code as it is loaded; what is no name of its own it ignores.
    code = f"""
import numpy as np
from fusecli.functional import rows_apart
for dim, width in {[(768, 1000), (184, 1000), (100, 1336), (131, 790), (1009, 216), (7, 40)]}:
    rng = np.random.default_rng(dim)
    weight, row = rng.standard_normal((dim, width), np.float32), rng.standard_normal(width, np.float32)
    rows = rows_apart(np.tile(row, (33, 1)), weight)
    assert (rows == rows[0]).all(), (dim, width)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OPENBLAS_CORETYPE": processor})
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"no instructions of {processor} here")
    assert done.returncode == 0


@pytest.mark.parametrize(("dim", "width"), [(1009, 216), (1009, 286), (768, 768), (301, 1000), (20, 4096), (64, 768)])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 12, 13, 77])
@pytest.mark.parametrize("here", [nullcontext, on_one_thread])
def test_long_sums_round_no_more_than_torchs(dim: int, width: int, rows: int, here: Any) -> None:
    ours, reference = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        weight, bias = rng.standard_normal((dim, width), np.float32), rng.standard_normal(dim, np.float32)
        x = rng.standard_normal((rows, width), np.float32)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        with here():
            ours.append(linear(x, weight, bias) - exact)
        single = torch.nn.functional.linear(*map(torch.from_numpy, (x, weight, bias)))
        reference.append(single.numpy() - exact)
    assert np.square(ours).mean() < 1.8 * np.square(reference).mean()


def test_the_formulas_of_arrays_are_torchs(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.standard_normal((7, 100)) * 4, [np.linspace(-30, 30, 100)]])
    for dtype, tolerance in ((np.float32, 2e-7), (np.float64, 1e-15)):
        exact = torch.nn.functional.gelu(torch.from_numpy(x.astype(dtype)).double()).numpy()
        assert (abs(gelu(x.astype(dtype)) - exact) <= tolerance * np.maximum(1, abs(exact))).all()
    wild = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
    with np.errstate(all="ignore"):
        assert gelu(wild)[[1, 3]].tolist() == wild[[1, 3]].tolist()
        assert np.isnan(gelu(wild)[0])
    weight, bias = rng.standard_normal((2, 100))
    ours, theirs = layer_norm(x, weight, bias), layer_norm(*map(torch.from_numpy, (x, weight, bias)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
