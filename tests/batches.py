"""What the tests of many pairs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fusecli.formats import npy
from tests.conftest import Run

D = 32
IDS = ["animals/fish/seahorse", "animals/ant", "b", "c d", "ünï", "z.0", "z.1", "z.10", "z.2"]
#: Of `few` pairs.
FEW = ["a", "b", "c", "d", "e", "f"]


def expected(run: Run, folder: Path, ids: Any = IDS, *options: Any) -> dict[str, bytes]:
    """What `fuse` writes for each pair."""
    results = {}
    for id in ids:
        run("fuse", f"img/{id}.npy", f"txt/{id}.npy", "-w", "w.safetensors", "-o", "one.npy", "-q", *options)
        results[id] = (folder / "one.npy").read_bytes()
    return results


def results(folder: Path) -> dict[str, bytes]:
    """What lies in an output folder, by id."""
    paths = [path for path in folder.rglob("*.npy") if ".fusecli" not in path.parts]
    return {str(path.relative_to(folder))[:-4]: path.read_bytes() for path in paths}


def as_npy(array: Any) -> bytes:
    return npy.header([("", array.shape, str(array.dtype))]) + np.ascontiguousarray(array).tobytes()


def batch(run: Run, *args: Any, code: int = 0, **options: Any) -> Any:
    return run("batch", *args, "-w", "w.safetensors", "-q", code=code, **options)


def statuses(done: Any) -> dict[str, str]:
    return {record["id"]: record["status"] for record in map(json.loads, done.stdout.splitlines())}
