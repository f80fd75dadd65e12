from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from fusecli.machine import have_threads_sleep

settings.register_profile("fusecli", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("fusecli")

# What a shell starts with & or nohup ignores these, and so would the commands that the tests start, as they should.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide what goes wrong as buffers are written at last
have_threads_sleep()  # or they would keep tests from each other's processors

Run = Callable[..., subprocess.CompletedProcess[bytes]]
#: With options, and the exit code that is expected; gives the facts, or what is said where the code is not 0.
Learn = Callable[..., Any]

FUSECLI = [sys.executable, "-W", "error", "-m", "fusecli"]


def loaded_by(folder: Path, *arguments: Any, code: int = 0) -> set[str]:
    """The modules that a command loads, run in ``folder``."""
    told = (
        "import sys; from fusecli.cli import main\ncode = 0\ntry: main()\nexcept SystemExit as end: code = end.code\n"
        "print(*sorted(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", told, *map(str, arguments)], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr.decode()
    return set(done.stdout.decode().splitlines()[-1].split())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in ``tmp_path``; without ``code`` any exit is accepted."""

    def call(*args: Any, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
        env = {key: value for key, value in os.environ.items() if key != "FUSECLI_WEIGHTS"} | options.pop("env", {})
        done = subprocess.run(
            [*FUSECLI, *map(str, args)],
            cwd=options.pop("cwd", tmp_path),
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


@pytest.fixture
def many(tmp_path: Path, rng: np.random.Generator, run: Run) -> dict[str, tuple[Any, Any]]:
    """Pairs by id, as two trees ``img/`` and ``txt/`` with weights ``w.safetensors`` beside them."""
    from tests.batches import IDS, D

    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    pairs = {}
    for k, id in enumerate(IDS):
        image = rng.standard_normal((1 if k % 3 else 2 + k, D)).astype(np.float16 if k % 2 else np.float32)
        text = rng.standard_normal((1 + k % 4, D)).astype(np.float32)
        pairs[id] = image, text
        for side, array in (("img", image), ("txt", text)):
            path = tmp_path / side / f"{id}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return pairs


@pytest.fixture
def few(tmp_path: Path, rng: np.random.Generator, run: Run) -> Path:
    """Six pairs of one shape in ``img/`` and ``txt/``, weights, and a manifest ``m.csv`` of them."""
    from tests.batches import FEW, D

    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    for side, rows in (("img", 2), ("txt", 3)):
        (tmp_path / side).mkdir()
        for id in FEW:
            np.save(tmp_path / side / f"{id}.npy", rng.standard_normal((rows, D), np.float32))
    lines = ["id,image,text", *(f"{id},img/{id}.npy,txt/{id}.npy" for id in FEW)]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def learn(tmp_path: Path) -> Learn:
    """Train in ``tmp_path`` as the command does, but in this process, where torch is loaded; see `Learn`."""
    import torch

    from fusecli.cli import _run
    from tests.lessons import QUICK, on_threads

    def call(*options: Any, code: int = 0, sides: tuple[str, ...] = ("img", "txt")) -> Any:
        command = ["fusecli", "train", *sides, "-o", "f.safetensors", *QUICK, "--json", *options]
        out, told = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(out),
            redirect_stderr(told),
            torch.random.fork_rng(),
            on_threads(torch.get_num_threads()),  # a training takes as many as there are
        ):
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", list(map(str, command)))
            ended = _run()
        assert "internal error" not in told.getvalue()
        assert (ended or 0) == code, told.getvalue()
        return told.getvalue() if code else json.loads(out.getvalue())

    return call


@pytest.fixture
def lesson(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """Pairs whose label, one of three, is that of the image row that the text asks for, and ``labels.csv``."""
    from tests.lessons import D

    centres = 3 * rng.standard_normal((3, D))
    questions = rng.standard_normal((2, D))
    ids = []
    lines = ["id,label,other,number"]
    for k in range(160):
        id = f"{'ab'[k % 2]}/{k:03}"
        label, asked, other = k % 3, k % 2, int(rng.integers(3))
        rows = np.stack([centres[label if row == asked else other] + 3 * questions[row] for row in (0, 1)])
        image = rows + 0.3 * rng.standard_normal((2, D))
        text = questions[asked] + 0.3 * rng.standard_normal((1 + k % 5, D))
        for side, array in (("img", image), ("txt", text)):
            path = tmp_path / side / f"{id}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array.astype(np.float16 if side == "txt" else np.float32))
        ids.append(id)
        lines.append(f"{id},{'xyz'[label]},{other},{label + 0.5}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return ids
