"""``fusecli train``: 20 epochs of gated, M = 16, over as many pairs as a small collection has."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

PAIRS, M, D, EPOCHS, SHARE = 1238, 16, 768, 20, 0.7


def flops_per_pair(n: float) -> float:
    """Forward and backward of gated; no gradient is taken of the features themselves."""
    square = 2.0 * D * D
    first = (n + M) * square  # text_proj, image_proj: forward, and the gradient of the weights
    rest = (n + 2 * M + n + 2 * n) * square  # query, key and value, out, gate: forward and both gradients
    return 2 * first + 3 * rest


def main() -> None:
    """Print seconds, and their ratio to the arithmetic alone."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 13, PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        for side, rows in (("i", [M] * PAIRS), ("t", lengths)):
            arrays = {f"{k:04}": rng.standard_normal((n, D)).astype(np.float16) for k, n in enumerate(rows)}
            save_file(arrays, f"{folder}/{side}.safetensors")
        labels = "".join(f"{k:04},{rng.integers(7)}\n" for k in range(PAIRS))
        Path(folder, "labels.csv").write_text("id,label\n" + labels)
        fusecli = str(Path(sys.executable).with_name("fusecli"))
        command = [fusecli, "train", "i.safetensors", "t.safetensors", "--labels", "labels.csv", "-o", "f.safetensors"]
        start = time.perf_counter()
        subprocess.run([*command, "--epochs", str(EPOCHS), "--patience", str(EPOCHS), "-q"], cwd=folder, check=True)
        seconds = time.perf_counter() - start
    a, b = torch.randn(512, D), torch.randn(D, D)
    start = time.perf_counter()
    for _ in range(100):
        a @ b
    rate = 100 * 2 * len(a) * D * D / (time.perf_counter() - start)
    floor = EPOCHS * SHARE * PAIRS * flops_per_pair(float(lengths.mean())) / rate
    print(f"{EPOCHS} epochs over {PAIRS} pairs: {seconds:.1f} s, {seconds / floor:.1f} x the arithmetic alone")
    print(f"({floor:.1f} s at {rate / 1e9:.0f} GFLOP/s); with start, reading, judging and the table")


if __name__ == "__main__":
    main()
