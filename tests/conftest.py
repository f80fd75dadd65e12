from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("fusecli", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("fusecli")

Run = Callable[..., subprocess.CompletedProcess[bytes]]

FUSECLI = [sys.executable, "-W", "error", "-m", "fusecli"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in ``tmp_path``; without ``code`` any exit is accepted."""

    def call(*args: Any, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
        env = {key: value for key, value in os.environ.items() if key != "FUSECLI_WEIGHTS"}
        done = subprocess.run(
            [*FUSECLI, *map(str, args)],
            cwd=tmp_path,
            env=env,
            check=False,
            timeout=120,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        for word in (b"Traceback", b"internal error"):
            assert word not in done.stderr, done.stderr.decode()
        assert code is None or done.returncode == code, done.stderr.decode()
        return done

    return call


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> tuple[Any, Any]:
    """``img.npy [1, 768]``, ``regions.npy [16, 768]`` and ``txt.npy [5, 768]`` in ``tmp_path``; regions and text."""
    for name, rows in (("img", 1), ("regions", 16), ("txt", 5)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((rows, 768), dtype=np.float32))
    return np.load(tmp_path / "regions.npy"), np.load(tmp_path / "txt.npy")
