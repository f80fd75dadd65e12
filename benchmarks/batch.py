"""Many pairs, the whole command: against a loop that only moves the bytes, against torch, against the GEMM rate."""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the command has it, for the rate to compare with; before NumPy is loaded

import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path

import numpy as np

from benchmarks.timing import side_by_side
from fusecli.machine import cores
from fusecli.plans import flops

D = 768
PAIRS = 10_000
PLAIN_PAIRS = 500
PLAIN = """\
import os, sys, time, numpy as np, torch
from benchmarks.kernel import Module
module = Module().eval()
root, out = sys.argv[1:3]
names = sorted(os.listdir(root + "/img"))[: int(sys.argv[3])]
os.makedirs(out)
start = time.perf_counter()
with torch.inference_mode():
    for name in names:
        image, text = (torch.from_numpy(np.load(f"{root}/{side}/{name}")) for side in ("img", "txt"))
        if len(image) == 1:
            image = image.repeat(len(text), 1)  # as the article has it
        np.save(f"{out}/{name}", module(image, text).numpy())
print(len(names) / (time.perf_counter() - start))
"""


def _make(root: str, pairs: int, m: int, n: int) -> None:
    rng = np.random.default_rng(0)
    for side, rows in (("img", m), ("txt", n)):
        os.makedirs(f"{root}/{side}")
        drawn = rng.standard_normal((64, rows, D), np.float32)
        for k in range(pairs):
            np.save(f"{root}/{side}/{k:06d}.npy", drawn[k % 64])


def _move(root: str, out: str, names: list[str]) -> None:
    for name in names:
        with open(f"{root}/img/{name}", "rb") as file:
            file.read()
        with open(f"{root}/txt/{name}", "rb") as file:
            data = file.read()
        with open(f"{out}/.{name}", "wb") as file:
            file.write(data)
        os.rename(f"{out}/.{name}", f"{out}/{name}")


def _bare(root: str, out: str, processes: int) -> float:
    start = time.perf_counter()
    os.makedirs(out)
    names = sorted(os.listdir(f"{root}/img"))
    movers = [Process(target=_move, args=(root, out, names[at::processes])) for at in range(processes)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()
    return len(names) / (time.perf_counter() - start)


def _ours(root: str, out: str, weights: str, *options: str) -> float:
    command = [str(Path(sys.executable).with_name("fusecli")), "batch", f"{root}/img", f"{root}/txt", "-o", out]
    start = time.perf_counter()
    subprocess.run([*command, "-w", weights, "-q", *options], check=True)
    return len(os.listdir(f"{root}/img")) / (time.perf_counter() - start)


def _small_pairs(folder: str, weights: str, pairs: int, rounds: int) -> None:
    root, processes = f"{folder}/small", cores()
    _make(root, pairs, 1, 16)
    print(f"batch: {pairs:,} pairs of [1, {D}] and [16, {D}] float32 in files, {processes} processes, whole command")
    for k in range(rounds):  # nothing is removed in between: making files is slow for minutes after that
        bare, ours = _bare(root, f"{folder}/bare{k}", processes), _ours(root, f"{folder}/ours{k}", weights)
        print(f"  {ours:6.0f} pairs/s; a loop that only moves the bytes {bare:6.0f}: {ours / bare:.2f}")
    again = pairs / _ours(root, f"{folder}/ours0", weights)
    print(f"  started again when all is done: {again:.2f} s, {again * 1e5 / pairs:.1f} s per 100,000")
    command = [sys.executable, "-c", PLAIN, root, f"{folder}/plain", str(PLAIN_PAIRS)]
    plain = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"  one torch process over the article's module: {plain:.0f} pairs/s, {ours / plain:.0f} times slower")


def _large_pairs(folder: str, weights: str) -> None:
    m, n, pairs = 50, 77, 1000
    root = f"{folder}/large"
    _make(root, pairs, m, n)
    rate = _ours(root, f"{folder}/one", weights, "-j", "1")
    a, b = (np.random.default_rng(0).standard_normal((2048, width), np.float32) for width in (D, D))
    gemm = 2 * 2048 * 2048 * D / side_by_side({"gemm": lambda: a @ b.T})["gemm"]
    reached = rate * flops(n, m, D, D, D, 8)
    print(f"batch: M = {m}, N = {n}, {pairs:,} pairs, one worker, whole command")
    print(f"  {rate:.0f} pairs/s, {reached / 1e9:.0f} GFLOP/s, {reached / gemm:.0%} of one product of 2048 rows")


def run(pairs: int = PAIRS, rounds: int = 3) -> None:
    """Print ratios; needs 2 GB of disk for 10,000 pairs."""
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/w.safetensors"
        subprocess.run([str(Path(sys.executable).with_name("fusecli")), "init", "-q", "-o", weights], check=True)
        _large_pairs(folder, weights)
        _small_pairs(folder, weights, pairs, rounds)


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
