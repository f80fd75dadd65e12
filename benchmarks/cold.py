"""Whole commands from a cold process: start-up, one small pair, peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

PLAIN = """\
import sys, numpy as np, torch
from safetensors.torch import load_file
state = load_file(sys.argv[3])
image, text = (torch.from_numpy(np.load(path)) for path in sys.argv[1:3])
attention = torch.nn.MultiheadAttention(768, 8)
attention.load_state_dict({k[10:]: v for k, v in state.items() if k.startswith("attention.")})
project = lambda x, name: torch.nn.functional.linear(x, state[name + ".weight"], state[name + ".bias"]).unsqueeze(1)
with torch.inference_mode():
    key = project(image.repeat(len(text), 1), "image_proj")
    np.save(sys.argv[4], attention(project(text, "text_proj"), key, key)[0].squeeze(1).numpy())
"""


def measure(command: list[str], folder: str) -> tuple[float, int]:
    """Seconds and peak MiB of one run."""
    start = os.times().elapsed
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    return os.times().elapsed - start, usage.ru_maxrss // 1024


def run(runs: int = 10) -> None:
    """Print medians, and the ratios that count."""
    python, fusecli = sys.executable, str(Path(sys.executable).with_name("fusecli"))
    fuse = [fusecli, "fuse", "img.npy", "txt.npy", "-w", "w.safetensors", "-q", "-o", "out.npy"]
    commands = {
        "import numpy, typer": [python, "-c", "import numpy, typer"],
        "import typer": [python, "-c", "import typer"],
        "fusecli fuse": fuse,
        "fusecli --help": [fusecli, "--help"],
        "plain torch script": [python, "-c", PLAIN, "img.npy", "txt.npy", "w.safetensors", "plain.npy"],
    }
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name, rows in (("img", 1), ("txt", 77)):
            np.save(f"{folder}/{name}.npy", rng.standard_normal((rows, 768), np.float32))
        subprocess.run([fusecli, "init", "-q", "-o", "w.safetensors"], cwd=folder, check=True)
        taken: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                taken[name].append(measure(command, folder))
        difference = abs(np.load(f"{folder}/out.npy") - np.load(f"{folder}/plain.npy")).max()
    seconds = {name: median(run[0] for run in runs) for name, runs in taken.items()}
    print(f"cold: M = 1, N = 77, checkpoint of 14 MB, median of {runs}; results differ by {difference:.1e}")
    for name, runs_of in taken.items():
        print(f"  {name:20} {seconds[name]:.3f} s, peak {max(run[1] for run in runs_of)} MiB")
    ours = seconds["fusecli fuse"]
    print(f"  fuse / import numpy, typer: {ours / seconds['import numpy, typer']:.2f}  (at most 2.0)")
    print(f"  fuse / plain torch script:  {ours / seconds['plain torch script']:.3f}  (at most 0.16)")
    print(f"  --help / import typer:      {seconds['fusecli --help'] / seconds['import typer']:.2f}  (at most 2.5)")


if __name__ == "__main__":
    run()
