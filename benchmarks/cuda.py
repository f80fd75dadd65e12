"""A GPU: one pair against the article's module there, and whole commands against the same ones on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.batch import _make
from benchmarks.kernel import MARKS, D, H, Module
from benchmarks.timing import side_by_side
from fusecli import Config, Weights, fuse
from fusecli.fusion import fuse_together, pairs_together
from fusecli.machine import cores

FUSECLI = [sys.executable, "-m", "fusecli"]


def _waited(job: Any) -> Any:
    def run() -> None:
        with torch.inference_mode():
            job()
        torch.cuda.synchronize()

    return run


def _kernel() -> None:
    torch.manual_seed(0)
    module = Module().eval().cuda()
    weights = Weights(Config(num_heads=H), {name: tensor.cpu().numpy() for name, tensor in module.state_dict().items()})
    print("one pair on the device, float32: times faster than the module; together: a pair of a batch of B")
    for m, n in MARKS:
        x, y = torch.randn(m, D, device="cuda"), torch.randn(n, D, device="cuda")
        size = pairs_together(weights, n, m)
        many = x.expand(size, -1, -1).contiguous(), y.expand(size, -1, -1).contiguous()
        jobs = {
            "theirs": lambda: module(x, y),  # noqa: B023
            "ours": lambda: fuse(weights, x, y),  # noqa: B023
            "together": lambda: fuse_together(weights, *many, "float32"),  # noqa: B023
        }
        seconds = side_by_side({name: _waited(job) for name, job in jobs.items()}, calls=20)
        with torch.inference_mode():
            apart = float((module(x, y) - fuse(weights, x, y)).abs().max())
        theirs, ours, together = seconds["theirs"], seconds["ours"], seconds["together"] / size
        figures = f"{theirs / ours:5.2f} together {theirs / together:6.1f} (B {size:2})"
        print(f"  M {m:4} N {n:4}  {figures}  ({ours * 1e6:.0f} us, {together * 1e6:.1f} us; {apart:.0e} apart)")


def _timed(*options: str) -> float:
    start = time.perf_counter()
    subprocess.run([*FUSECLI, *options, "-q"], check=True)
    return time.perf_counter() - start


def _batch(folder: str) -> None:
    for m, n, pairs in ((1, 16, 10_000), (16, 8, 10_000), (50, 77, 4000), (577, 77, 1000)):
        root = f"{folder}/{m}-{n}"
        _make(root, pairs, m, n)
        print(f"batch: M = {m}, N = {n}, {pairs:,} pairs, whole command, pairs/s")
        for name, options in {
            "cuda": ("--device", "cuda"),
            "one worker": ("-j", "1"),
            f"{cores()} workers": ("-j", str(cores())),
        }.items():
            out = f"{root}/{name.replace(' ', '-')}"
            seconds = _timed("batch", f"{root}/img", f"{root}/txt", "-o", out, *options)
            print(f"  {name:12} {pairs / seconds:7.0f}  ({seconds:.1f} s)")
        ledger = Path(root, "cuda", ".fusecli", "ledger.jsonl")
        spent = [json.loads(line).get("seconds", 0) for line in ledger.read_text().splitlines()]
        print(f"  cuda, {1e6 * sum(spent) / pairs:.0f} us a pair in its two threads together")


def _train(folder: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 13, 1238)
    for side, rows in (("i", [16] * len(lengths)), ("t", lengths)):
        arrays = {f"{k:04}": rng.standard_normal((n, D)).astype(np.float16) for k, n in enumerate(rows)}
        save_file(arrays, f"{folder}/{side}.safetensors")
    lines = "".join(f"{k:04},{rng.integers(7)}\n" for k in range(len(lengths)))
    Path(folder, "labels.csv").write_text("id,label\n" + lines)
    print("train: 20 epochs of gated, M = 16, 1,238 pairs, whole command")
    for device in ("cuda", "cpu"):
        data = [f"{folder}/i.safetensors", f"{folder}/t.safetensors", "--labels", f"{folder}/labels.csv"]
        output = f"{folder}/{device}.safetensors"
        options = ["--epochs", "20", "--patience", "20", "--device", device]
        seconds = _timed("train", *data, "-o", output, *options)
        log = [json.loads(line) for line in Path(output.replace(".safetensors", ".log.jsonl")).read_text().splitlines()]
        epochs = [record["seconds"] for record in log if "seconds" in record]
        print(f"  {device:5} {seconds:.1f} s, an epoch {np.median(epochs):.2f} s")


def run() -> None:
    """Print ratios and rates; says so where there is no GPU."""
    if not torch.cuda.is_available():
        print("cuda: no GPU here")
        return
    print(f"cuda: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    _kernel()
    with tempfile.TemporaryDirectory() as folder:
        _batch(folder)
        _train(folder)


if __name__ == "__main__":
    run()
