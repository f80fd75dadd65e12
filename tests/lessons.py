"""What the tests of training train on, and how."""

from __future__ import annotations

import json
from typing import Any

from fusecli.training.data import part_of
from tests.conftest import Run

#: Width of the features of the fixture `lesson`.
D = 16
QUICK = ("--num-heads", 2, "--batch-size", 16, "--lr", 1e-3, "--seed", 3)


def train(run: Run, *options: Any, code: int | None = 0, output: str = "f.safetensors") -> Any:
    done = run("train", "img", "txt", "-o", output, *QUICK, "--json", *options, code=code)
    return json.loads(done.stdout) if code == 0 else done.stderr.decode()


def is_held_out(id: str) -> bool:
    return part_of(id, 0.1, 0.2) == "held-out"


def scores_of(facts: dict[str, Any]) -> dict[str, float]:
    return {row["features"]: row["score"] for row in facts["table"]}
