"""Ledgers and locks: what a run leaves for the next, and what others may have done to it."""

from __future__ import annotations

import builtins
import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fusecli import checkpoint
from fusecli.batch import run as run_module
from fusecli.batch.job import Outcome
from fusecli.batch.ledger import History, Ledger
from fusecli.batch.lock import Lock
from fusecli.batch.plan import Shard
from fusecli.batch.request import Request
from fusecli.batch.store import STATE, FolderStore
from fusecli.errors import OutputError, UsageError
from tests.batches import FEW, as_npy, batch, expected, results, statuses
from tests.conftest import Run

DAMAGE = [
    '{"run": 5}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"float33"}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"bfloat16"}',
    '{"id":"a","status":"fused","shape":[-3,-32],"dtype":"float32","part":"whole"}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"float32","part":"../img/a.npy"}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"float32","part":"x","at":99999999999999999999999}',
    '{"id":["a"],"status":"failed"}',
    "[" * 50_000,
]


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_a_damaged_ledger_costs_work_and_nothing_else(run: Run, few: Path, output: str) -> None:
    batch(run, "img", "txt", "-o", output)
    state = few / (f"{output}/.fusecli" if output == "out" else f"{output}.fusecli")
    with open(state / "ledger.jsonl", "a") as file:
        file.write("\n".join(DAMAGE) + "\n")
    for index in (
        "5",
        "[" * 50_000,
        '["a",5,"float32",0]',
        '["a",[3,32],"float32","x"]',
        '["a",[3,32],"float33",0]',
        "",
    ):
        if output != "out":
            first, *_ = (state / "fused.index").read_text().splitlines()
            (state / "fused.index").write_text(f"{first}\n{index}\n")
        batch(run, "img", "txt", "-o", output)
    if output == "out":
        assert results(few / output) == expected(run, few, FEW)
    else:
        assert {id: as_npy(x) for id, x in load_file(few / output).items()} == expected(run, few, FEW)


def test_a_ledger_that_does_not_say_its_weights_is_refused(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    ledger = few / "out" / ".fusecli" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().partition("\n")[2])
    assert b"--overwrite" in batch(run, "img", "txt", "-o", "out", code=2).stderr


@pytest.mark.parametrize("began", ["9999999999", "NaN", "1e999", '"x"'])
def test_a_clock_that_was_wrong_does_not_make_old_words_the_last(run: Run, few: Path, began: str) -> None:
    good = (few / "img" / "a.npy").read_bytes()
    (few / "img" / "a.npy").write_bytes(b"junk")
    batch(run, "img", "txt", "-o", "o.npy", code=4)
    ledger = few / "o.npy.fusecli" / "ledger.jsonl"
    ledger.write_text(re.sub('(?<="began": )[^,]+', began, ledger.read_text()))
    (few / "img" / "a.npy").write_bytes(good)
    batch(run, "img", "txt", "-o", "o.npy")
    assert np.isfinite(np.load(few / "o.npy")).all()
    assert statuses(batch(run, "img", "txt", "-o", "o.npy", "--json")) == dict.fromkeys(FEW, "skipped")
    assert (
        b"6 to do"
        in run("batch", "img", "txt", "-o", "o.npy", "-w", "w.safetensors", "--dry-run", "--overwrite").stderr
    )


@pytest.mark.parametrize("ahead", [0, 3600], ids="clock ahead by {} s".format)
def test_the_last_word_on_a_pair_is_that_of_the_last_run(run: Run, few: Path, ahead: int) -> None:
    good = (few / "img" / "a.npy").read_bytes()
    (few / "img" / "a.npy").write_bytes(b"junk")
    shard = next(part for part in ("1/2", "2/2") if Shard(int(part[0]), 2).has("a"))
    batch(run, "img", "txt", "-o", "out", "--shard", shard, code=4)
    [ledger] = (few / "out" / ".fusecli").glob("ledger-*.jsonl")
    ledger.write_text(re.sub('(?<="began": )[^,]+', lambda told: str(float(told[0]) + ahead), ledger.read_text()))
    (few / "img" / "a.npy").write_bytes(good)
    batch(run, "img", "txt", "-o", "out")
    again = batch(run, "img", "txt", "-o", "out", "--shard", shard, "--json")
    assert set(statuses(again).values()) == {"skipped"}  # its ledger has the older word, and is the newer file
    told = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--dry-run").stderr
    assert b"6 done, 0 failed or incomplete before, 0 to do" in told


def test_a_run_of_which_nothing_came_does_not_count(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "out", "--limit", 2)
    ledger = (few / "out" / ".fusecli" / "ledger.jsonl").read_text().splitlines()[0]
    (few / "out" / ".fusecli" / "ledger-2-of-2.jsonl").write_text(
        re.sub('"weights": "[^"]*"', '"weights": "x"', ledger) + "\n"
    )
    for part in (["--shard", "1/2"], ["--shard", "2/2"], []):
        batch(run, "img", "txt", "-o", "out", *part)
    assert len(results(few / "out")) == 6


def test_parts_that_begin_at_once_with_other_weights_do_not_mix(tmp_path: Path) -> None:
    weights = [checkpoint.init(8, 1, seed=seed) for seed in (0, 1)]
    shards = Shard(1, 2), Shard(2, 2)
    one, other = (Request(w, str(tmp_path), shard=shard) for w, shard in zip(weights, shards, strict=True))
    state, lock = tmp_path / STATE, Lock()
    state.mkdir()
    mine, theirs = (Ledger(str(state), str(shard)) for shard in shards)
    lock.take(str(state), str(shards[1]))
    theirs.begin(other.run_facts(), 0)  # after `one` has looked what there is
    with pytest.raises(UsageError, match="other weights"):
        run_module._begin(mine, one, 0)
    assert (state / "ledger-1-of-2.jsonl").read_bytes() == b""
    lock.release()  # it was killed before anything came of it
    run_module._begin(mine, one, 0)


def _refuse(real: Any, *what: str) -> Any:
    def refuse(path: Any, *args: Any, **named: Any) -> Any:
        if str(path).endswith(what) and not (args and type(args[0]) is int and args[0] & os.O_ACCMODE == os.O_RDONLY):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **named)

    return refuse


def test_a_lock_of_somebody_else_is_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    monkeypatch.setattr(os, "open", _refuse(os.open, "lock"))  # but for reading
    mine, other = Lock(), Lock()
    mine.take(str(tmp_path), None)
    with pytest.raises(OutputError, match="another run"):
        other.take(str(tmp_path), None)
    mine.release()
    other.take(str(tmp_path), None)
    other.release()


def test_no_lock_can_be_made_and_none_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", _refuse(os.open, "lock"))
    with pytest.raises(PermissionError):
        Lock().take(str(tmp_path), None)


def test_a_result_whose_mode_cannot_be_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(str(tmp_path / "out"), ".npy", str(tmp_path / "tmp"))
    store.begin()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.npy").touch(0o600)
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: os.stat("/none"))
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(OSError, match=r"out/a\.npy"), store.open("a", (1, 2), "float32", []):
        pass
    assert len(os.listdir("/dev/fd")) == before
    assert not os.listdir(tmp_path / "tmp" / str(os.getpid()))


@pytest.mark.parametrize("what", ["", "ledger.jsonl"])
def test_a_state_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (tmp_path / "ledger.jsonl").touch()
    name, module = ("listdir", os) if not what else ("open", builtins)
    monkeypatch.setattr(module, name, _refuse(getattr(module, name), f"{tmp_path}/{what}".rstrip("/")))
    with pytest.raises(OutputError, match="cannot be read: found Permission denied"):
        History.read(str(tmp_path))


def test_no_room_for_what_is_on_its_way_is_known_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", _refuse(os.mkdir, f"/{os.getpid()}"))
    with pytest.raises(PermissionError):
        FolderStore(str(tmp_path), ".npy", str(tmp_path / STATE / "tmp")).begin()


def test_parts_of_a_run_may_run_at_once_and_nothing_else(tmp_path: Path) -> None:
    one, other, whole = Lock(), Lock(), Lock()
    one.take(str(tmp_path), "1-of-2")
    other.take(str(tmp_path), "2-of-2")
    with pytest.raises(OutputError, match="another run"):
        whole.take(str(tmp_path), None)
    one.release()
    other.release()


def test_a_ledger_whose_first_line_was_cut_is_gone_on_with(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    ledger = few / "out" / STATE / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:20])
    for _ in range(2):
        batch(run, "img", "txt", "-o", "out")


def test_a_ledger_is_written_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    ledger = Ledger(str(tmp_path), None)
    ledger.begin({}, 0.0)
    ledger.add(Outcome(id, "failed", {}) for id in FEW)
    ledger.close()
    assert History.read(str(tmp_path)).failed == set(FEW)


def test_an_id_belongs_to_the_same_part_for_ever() -> None:
    parts = [[number for number in (1, 2, 3) if Shard(number, 3).has(id)] for id in "abc"]
    assert parts == [[1], [3], [1]]
