"""One pair in one process: `fusecli.fuse`, on arrays and on tensors, against the article's module in torch."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.timing import side_by_side
from fusecli import Config, Weights, fuse
from fusecli.plans import flops

D, H = 768, 8
#: (M, N): times faster than the module, the mark to beat.
MARKS = {
    (1, 8): 4.2,
    (1, 77): 12.8,
    (16, 77): 3.0,
    (50, 8): 3.8,
    (50, 77): 1.6,
    (197, 8): 7.2,
    (197, 77): 1.5,
    (577, 8): 11.5,
    (577, 77): 1.8,
    (257, 257): 1.5,
    (50, 512): 2.3,
    (577, 577): 1.3,
}
GRID = [1, 4, 16, 50, 77, 197, 577]


class Module(nn.Module):
    """The article's module, with the image not repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.text_proj = nn.Linear(D, D)
        self.image_proj = nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, H)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Fuse one pair."""
        query, key = self.text_proj(text).unsqueeze(1), self.image_proj(image).unsqueeze(1)
        fused: torch.Tensor = self.attention(query, key, key)[0].squeeze(1)
        return fused


def _gemm_rate(rows: int) -> float:
    """GFLOP/s of one float32 product ``[rows, D] @ [D, D]``."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rows, D), np.float32), rng.standard_normal((D, D), np.float32)
    seconds = side_by_side({"gemm": lambda: a @ b})["gemm"]
    return 2 * rows * D * D / seconds / 1e9


def _operations(m: int, n: int) -> float:
    """How many times as many floating-point operations the module takes: the ratio if they all ran at one rate."""
    ours = 6 * D * D if m == 1 else flops(n, m, D, D, D, H)  # of one image row three products are left
    return (6 * (m + n) * D * D + 4 * m * n * D) / ours


def _one(m: int, n: int, module: Module, weights: Weights) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((m, D), np.float32), rng.standard_normal((n, D), np.float32)
    x, y = torch.from_numpy(image), torch.from_numpy(text)

    def theirs() -> Any:
        with torch.inference_mode():
            return module(x, y)

    ours = {"arrays": lambda: fuse(weights, image, text), "tensors": lambda: fuse(weights, x, y)}
    seconds = side_by_side({"theirs": theirs, **ours})
    return seconds["theirs"], seconds["arrays"], seconds["tensors"]


def run() -> None:
    """Print the table of marks, the grid, and the share of the machine's GEMM rate."""
    torch.manual_seed(0)
    module = Module().eval()
    weights = Weights(Config(num_heads=H), {k: v.numpy() for k, v in module.state_dict().items()})
    print(f"kernel: float32, D = {D}, H = {H}, {torch.get_num_threads()} threads; times faster than the module")
    worst = 1e9
    for m, n in [*MARKS, *sorted(set(product(GRID, GRID)) - set(MARKS))]:
        theirs, ours, tensors = _one(m, n, module, weights)
        mark = f"  mark {MARKS[m, n]:.1f}" if (m, n) in MARKS else ""
        figures = f"{theirs / ours:6.2f} tensors {theirs / tensors:6.2f} operations {_operations(m, n):6.2f}"
        print(f"  M {m:4} N {n:4}  {figures}{mark}  ({ours * 1e3:.3f} ms)", flush=True)
        worst = min(worst, theirs / ours, theirs / tensors)
    print(f"  least of all: {worst:.2f}")
    _, ours, _ = _one(577, 577, module, weights)
    reached = flops(577, 577, D, D, D, H) / ours / 1e9
    for rows in (577, 2048):
        rate = _gemm_rate(rows)
        print(f"  M = N = 577: {reached:.0f} GFLOP/s, {reached / rate:.0%} of one product of {rows} rows ({rate:.0f})")


if __name__ == "__main__":
    run()
