"""``python -m benchmarks [cold] [kernel] [large] [batch] [train] [cuda]``; all of them without a name."""

from __future__ import annotations

import subprocess
import sys

for name in sys.argv[1:] or ("cold", "kernel", "large", "batch", "train", "cuda"):
    # A process each: a child's peak memory counts what its parent held when it was forked.
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
