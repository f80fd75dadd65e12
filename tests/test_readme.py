"""The README cannot lie: what it shows is run, and what it says comes out is compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusecli import ImageTextFusion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
#: (console or python, what is in it)
BLOCKS = re.findall(r"```(console|python)\n(.*?)```", README, re.DOTALL)


def _steps(session: str) -> list[tuple[str, str]]:
    """(command, what it prints) of one console block."""
    parts = re.split(r"^\$ (.*)\n", session, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _pattern(shown: str) -> str:
    """``...`` in the README stands for what differs from run to run."""
    lines = (re.escape(line.rstrip()).replace(r"\.\.\.", ".*") + r"\s*" for line in shown.splitlines())
    return "\n".join(lines)


def _bash(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key != "FUSECLI_WEIGHTS"} | {"PATH": path}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, text=True, timeout=60, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole README, as its reader has."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "sample_data", folder / "sample_data")
    return folder


def test_every_block_does_what_the_readme_shows(folder: Path) -> None:
    assert len(BLOCKS) >= 8
    for language, block in BLOCKS:
        if language == "python":
            subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=folder, check=True, timeout=60)
            continue
        for command, shown in _steps(block):
            printed = "\n".join(line.rstrip() for line in _bash(command, folder).splitlines())
            assert re.fullmatch(_pattern(shown), printed), f"$ {command}\n{printed}"


def test_the_articles_module_is_ours() -> None:
    code = next(block for _, block in BLOCKS if "class ArticleModule" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    article, ours = names["ArticleModule"](16, 4), ImageTextFusion(16, 4)
    ours.load_state_dict(article.state_dict())
    image, text = torch.randn(1, 16), torch.randn(5, 16)
    torch.testing.assert_close(ours(image, text), article(image, text))


def test_the_two_commands_are_targets_of_make() -> None:
    targets = re.findall(r"^make (\w+) ", README, re.MULTILINE)
    assert set(targets) >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_sample_data_are_small_and_whole() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "sample_data").rglob("*") if path.is_file()}
    assert sizes.pop("fusion.safetensors") <= 12 * 2**20
    assert sum(sizes.values()) <= 8 * 2**20
    for side in ("images", "texts"):
        assert len(list((ROOT / "sample_data" / "pairs" / side).glob("*.npy"))) == 24
