"""A text of 2,000,000 rows: time against ``cp``, and memory."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.cold import measure

ROWS = 2_000_000


def run(rounds: int = 3) -> None:
    """Print the ratio to ``cp`` and peak memory; needs 13 GB of disk."""
    fusecli = str(Path(sys.executable).with_name("fusecli"))
    print(f"large: text [{ROWS:,}, 768] float32")
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 2.2 * ROWS * 768 * 4:
            print("  skipped: not enough disk")
            return
        rng = np.random.default_rng(0)
        with open(f"{folder}/txt.npy", "wb") as file:  # no map: a child's peak counts its parent's pages
            header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, 768)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(0, ROWS, 10_000):
                file.write(rng.standard_normal((10_000, 768), np.float32).tobytes())
        for m in (1, 50):
            np.save(f"{folder}/img{m}.npy", rng.standard_normal((m, 768), np.float32))
        best: dict[str, tuple[float, int]] = {}
        for _ in range(rounds):
            for name, command in {
                "cp": ["cp", "txt.npy", "copy.npy"],
                "M = 1": [fusecli, "fuse", "img1.npy", "txt.npy", "-q", "-o", "out.npy"],
                "M = 50": [fusecli, "fuse", "img50.npy", "txt.npy", "-q", "-o", "out.npy"],
            }.items():
                best[name] = min(best.get(name, (1e9, 0)), measure(command, folder))
                for left in ("copy.npy", "out.npy"):
                    Path(folder, left).unlink(missing_ok=True)
                os.sync()
    for name, (seconds, peak) in best.items():
        ratio = f", {seconds / best['cp'][0]:.2f} times cp" if name != "cp" else ""
        print(f"  {name:7} {seconds:.1f} s, peak {peak} MiB{ratio}")


if __name__ == "__main__":
    run()
