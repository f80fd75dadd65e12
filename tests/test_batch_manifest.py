"""Manifests, line by line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.batches import batch, statuses
from tests.conftest import FUSECLI, Run

PATHS = '"image": "img/a.npy", "text": "txt/a.npy"'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\ufeffid,image,text\na,img/a.npy,txt/a.npy\n", {"a": "fused"}),  # as Excel writes it
        ("id,image,text\na,img/a.npy,txt/a.npy,x\n", {"line 2": "failed"}),
        (f'{{"id": 7, {PATHS}}}\n', {"7": "fused"}),
        (f'{{"id": true, {PATHS}}}\n', {"line 1": "failed"}),
        ('id,image,text\nx"y,img/a.npy\nb,img/a.npy,txt/a.npy\n', {"line 2": "failed", "b": "fused"}),
    ],
)
def test_lines_are_taken_for_what_they_say(run: Run, few: Path, text: str, told: dict[str, str]) -> None:
    code = 4 if "failed" in told.values() else 0
    done = batch(run, "--manifest", "-", "-o", "out", "--json", code=code, input=text.encode())
    assert statuses(done) == told


def test_a_column_twice_is_refused(run: Run, few: Path) -> None:
    text = b"id,image,text,image\na,img/a.npy,txt/a.npy,img/b.npy\n"
    assert b"image" in batch(run, "--manifest", "-", "-o", "out", code=3, input=text).stderr


def test_a_bad_line_is_no_pair_that_is_called_so(run: Run, few: Path) -> None:
    def stream(text: str, code: int) -> list[Any]:
        done = batch(run, "--manifest", "-", "-o", "out", "--json", code=code, input=text.encode())
        return [(line["status"], line.get("line")) for line in map(json.loads, done.stdout.splitlines())]

    good = "id,image,text\nline 3,img/a.npy,txt/a.npy\n"
    assert stream(good, 0) == [("fused", None)]
    assert ("failed", 3) in stream(f"{good}nonsense\n", 4)
    assert stream(good, 0) == [("skipped", None)]


def test_a_stream_ends_with_the_last_pair_that_was_asked_for(few: Path) -> None:
    options = ["--manifest", "-", "-o", "out", "-w", "w.safetensors", "-q", "--limit", "1"]
    with subprocess.Popen([*FUSECLI, "batch", *options], cwd=few, stdin=subprocess.PIPE) as child:
        assert child.stdin
        child.stdin.write(f'{{"id": "a", {PATHS}}}\n'.encode())
        child.stdin.flush()
        try:
            assert child.wait(60) == 0  # though it could bring more
        finally:
            child.kill()


def test_a_bad_line_is_the_first_to_fail(run: Run, few: Path) -> None:
    with (few / "m.csv").open("a") as file:
        file.write("nonsense\n")
    batch(run, "--manifest", "m.csv", "-o", "out", "--fail-fast", code=4)
    assert not list((few / "out").glob("*.npy"))
