"""A batch that is started again, killed, interrupted, out of space: nothing is lost, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.batches import IDS, D, as_npy, batch, expected, results, statuses
from tests.conftest import FUSECLI, Run


def test_what_is_lost_or_cut_is_done_again(run: Run, many: Any, tmp_path: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    wanted = results(tmp_path / "out")
    (tmp_path / "out" / "b.npy").unlink()
    cut = tmp_path / "out" / "c d.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    zeroed = tmp_path / "out" / "z.0.npy"
    zeroed.write_bytes(bytes(zeroed.stat().st_size))
    told = statuses(batch(run, "img", "txt", "-o", "out", "--json"))
    assert {id for id, status in told.items() if status == "fused"} == {"b", "c d", "z.0"}
    assert results(tmp_path / "out") == wanted


@pytest.mark.parametrize("kind", ["packed.safetensors", "stack.npy"])
def test_one_file_grows_when_there_is_more(run: Run, many: Any, tmp_path: Path, kind: str) -> None:
    for id in IDS:
        np.save(tmp_path / "txt" / f"{id}.npy", many[id][1][:1])
    late = tmp_path / "img" / "b.npy"
    late.rename(tmp_path / "late")
    batch(run, "img", "txt", "-o", kind, code=4)
    first = (tmp_path / kind).read_bytes()
    assert batch(run, "img", "txt", "-o", kind, "--json", code=4).stdout.count(b"skipped") == len(IDS) - 1
    assert (tmp_path / kind).read_bytes() == first
    (tmp_path / "late").rename(late)
    assert statuses(batch(run, "img", "txt", "-o", kind, "--json"))["b"] == "fused"
    wanted = expected(run, tmp_path)
    if kind == "stack.npy":
        rows = np.load(tmp_path / kind)
        assert [as_npy(row) for row in rows] == [wanted[id] for id in sorted(IDS)]
    else:
        assert {id: as_npy(x) for id, x in load_file(tmp_path / kind).items()} == wanted
    (tmp_path / kind).write_bytes(first[:-1])  # the file is cut, and the parts are gone: all is done again
    assert set(statuses(batch(run, "img", "txt", "-o", kind, "--json")).values()) == {"fused"}


def test_failed_pairs_of_a_stack_are_rows_of_nan(run: Run, many: Any, tmp_path: Path) -> None:
    for id in IDS:
        np.save(tmp_path / "txt" / f"{id}.npy", many[id][1][:1])
    np.save(tmp_path / "txt" / "b.npy", np.full((1, D), np.inf, np.float32))
    batch(run, "img", "txt", "-o", "out.npy", code=4)
    bad = np.isnan(np.load(tmp_path / "out.npy")).all((1, 2))
    assert [id for id, is_bad in zip(sorted(IDS), bad, strict=True) if is_bad] == ["b"]


def test_results_of_different_shapes_do_not_stack(run: Run, many: Any, tmp_path: Path) -> None:
    done = run("batch", "img", "txt", "-o", "out.npy", "-w", "w.safetensors", code=1)
    assert b"do not stack" in done.stderr
    assert not (tmp_path / "out.npy").exists()


def test_what_does_not_stack_is_told_before_all_is_done(run: Run, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "txt").mkdir()
    for id in range(40):
        np.save(tmp_path / "img" / f"{id:02}.npy", np.ones((2, D), np.float32))
        np.save(tmp_path / "txt" / f"{id:02}.npy", np.ones((3 if id == 1 else 2, D), np.float32))
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    args = "batch", "img", "txt", "-o", "out.npy", "-w", "w.safetensors", "-j", 1
    assert b"found [3, 32] float32 for 01" in run(*args, code=1).stderr
    assert len((tmp_path / "out.npy.fusecli/ledger.jsonl").read_text().splitlines()) < 40
    assert b"for 01" in run(*args, code=1).stderr  # what is there already counts too


def test_other_weights_or_options_are_refused(run: Run, many: Any, tmp_path: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    before = results(tmp_path / "out")
    done = batch(run, "img", "txt", "-o", "out", "--dtype", "float16", code=2)
    assert b"weights or options: dtype not set -> float16\n" in done.stderr
    assert b"--overwrite" in done.stderr
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "--seed", 5, "-q")
    assert b"weights or options: weights " in batch(run, "img", "txt", "-o", "out", code=2).stderr
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "--method", "gated", "-q")
    told = batch(run, "img", "txt", "-o", "out", code=2).stderr
    assert b"weights or options: method attention -> gated, weights " in told
    assert b"residual" not in told
    assert b"gate " not in told
    assert results(tmp_path / "out") == before
    batch(run, "img", "txt", "-o", "out", "--overwrite")
    assert results(tmp_path / "out") == expected(run, tmp_path)


def test_retry_failed_takes_only_those(run: Run, many: Any, tmp_path: Path) -> None:
    good = (tmp_path / "txt" / "b.npy").read_bytes()
    (tmp_path / "txt" / "b.npy").write_bytes(good[:-3])
    gone = tmp_path / "txt" / f"{IDS[-1]}.npy"
    gone.rename(tmp_path / "away")
    batch(run, "img", "txt", "-o", "out", "--limit", 4, code=4)
    (tmp_path / "txt" / "b.npy").write_bytes(good)
    (tmp_path / "away").rename(gone)
    told = statuses(batch(run, "img", "txt", "-o", "out", "--retry-failed", "--json"))
    assert sorted(id for id, status in told.items() if status == "fused") == sorted(["b", IDS[-1]])
    assert len(results(tmp_path / "out")) == 5
    assert len(statuses(batch(run, "img", "txt", "-o", "out", "--json"))) == len(IDS)
    assert results(tmp_path / "out") == expected(run, tmp_path)


def test_a_cut_line_in_the_ledger_is_passed_over(run: Run, many: Any, tmp_path: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    ledger = tmp_path / "out" / ".fusecli" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    told = statuses(batch(run, "img", "txt", "-o", "out", "--json"))
    assert sorted(told.values()) == ["fused", *["skipped"] * (len(IDS) - 1)]
    assert set(statuses(batch(run, "img", "txt", "-o", "out", "--json")).values()) == {"skipped"}


def _enlarge(folder: Path, pairs: int) -> None:
    """Many small pairs in ``img/`` and ``txt/``, so that a run takes a while."""
    rng = np.random.default_rng(1)
    for side, rows in (("img", 1), ("txt", 3)):
        (folder / side).mkdir(exist_ok=True)
        for k in range(pairs):
            np.save(folder / side / f"{k:05d}.npy", rng.standard_normal((rows, D), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_killed_again_and_again_nothing_is_lost(run: Run, tmp_path: Path, output: str) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    _enlarge(tmp_path, 1500)
    batch(run, "img", "txt", "-o", f"clean/{output}")
    command = [*FUSECLI, "batch", "img", "txt", "-o", output, "-w", "w.safetensors", "-q", "-j", "2"]
    ledger = tmp_path / f"{output}{'/' if output == 'out' else ''}.fusecli" / "ledger.jsonl"

    def written() -> int:
        return ledger.stat().st_size if ledger.exists() else 0

    left = []  # bytes of the ledger at each death
    for more in (0, *np.random.default_rng(2).integers(1, 40_000, 8)):
        wanted = written() + more
        with subprocess.Popen(command, cwd=tmp_path) as child:
            while child.poll() is None and written() < wanted:
                time.sleep(0.002)
            child.kill()
        left.append(written())
    assert len(set(left)) > 6
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    if output == "out":
        assert results(tmp_path / "out") == results(tmp_path / "clean" / "out")
        assert not list((tmp_path / "out" / ".fusecli").rglob("tmp/*"))
    else:
        assert (tmp_path / output).read_bytes() == (tmp_path / "clean" / output).read_bytes()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_worker_that_dies_costs_nothing(run: Run, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    _enlarge(tmp_path, 3000)
    command = [*FUSECLI, "batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "-q", "-j", "2"]
    killed = 0
    with subprocess.Popen(command, cwd=tmp_path) as child:
        while child.poll() is None and killed < 2:
            for pid in _children(child.pid)[:1]:
                if list((tmp_path / "out").glob("*.npy")):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                    time.sleep(0.3)  # what is tried again alone is not hit again
        assert child.wait(timeout=120) == 0
    assert killed
    assert len(results(tmp_path / "out")) == 3000


def test_a_pair_that_kills_its_worker_fails_alone(tmp_path: Path) -> None:
    from fusecli.batch.job import Outcome, Stop, Task
    from fusecli.batch.local import Pool
    from fusecli.collections import Place

    def work(item: list[Task]) -> list[Outcome]:
        if any(task.id == "poison" for task in item):
            os.kill(os.getpid(), signal.SIGKILL)
        return [Outcome(task.id, "fused", {}) for task in item]

    class Feed:
        def __init__(self, *items: list[str]) -> None:
            self.items = [[Task(id, Place(""), Place("")) for id in ids] for ids in items]

        def take(self) -> list[Task] | None:
            return self.items.pop(0) if self.items else None

        def ended(self) -> bool:
            return not self.items

        def fileno(self) -> int | None:
            return None

    pool = Pool(work, 2)
    told = [
        outcome for outcomes in pool.run(Feed(["a", "poison", "b"], ["c"], ["d", "e"]), Stop()) for outcome in outcomes
    ]
    pool.close()
    assert {outcome.id: outcome.status for outcome in told} == dict.fromkeys("abcde", "fused") | {"poison": "failed"}
    assert len(told) == 6


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_the_runner_for_a_gpu_gives_the_same_on_a_cpu(run: Run, many: Any, tmp_path: Path, output: str) -> None:
    from functools import partial

    from fusecli import load
    from fusecli.batch import inline, worker
    from fusecli.batch.apart import Inputs
    from fusecli.batch.feed import ListFeed, from_collections
    from fusecli.batch.job import Job, Options, Stop
    from fusecli.batch.plan import match
    from fusecli.batch.store import FolderStore, PartStore
    from fusecli.collections import open_collection

    images, texts = open_collection(str(tmp_path / "img")), open_collection(str(tmp_path / "txt"))
    found = match(images, texts)
    feed = ListFeed(from_collections(images, texts, found, Inputs(())), found.both, lambda _: None, 5, None)
    (tmp_path / "tmp").mkdir()
    folder = FolderStore(str(tmp_path / output), ".npy", str(tmp_path / "tmp"))
    parts = PartStore(str(tmp_path / output), str(tmp_path), "fused")
    store = folder if output == "out" else parts
    job = Job(load(tmp_path / "w.safetensors"), Options(), store, None)
    told = [outcome for outcomes in inline.run(partial(worker.work, job), feed, Stop()) for outcome in outcomes]
    assert [outcome.id for outcome in told] == sorted(IDS)
    wanted = expected(run, tmp_path)
    for outcome in told:
        shape, facts = outcome.facts["shape"], outcome.facts
        nbytes = 4 * shape[0] * shape[1]
        if output == "out":
            got = (tmp_path / output / f"{outcome.id}.npy").read_bytes()
        else:
            got = (tmp_path / facts["part"]).read_bytes()[facts["at"] :][:nbytes]
        assert got[-nbytes:] == wanted[outcome.id][-nbytes:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(run: Run, tmp_path: Path, number: int) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    _enlarge(tmp_path, 2000)
    command = [*FUSECLI, "batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "-j", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as child:
        assert child.stderr
        while not list((tmp_path / "out").glob("*.npy")):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        told = child.stderr.read()
        assert child.wait(timeout=60) == 128 + number
    if number == signal.SIGINT:
        assert b"run the same command again" in told
    assert b"Traceback" not in told
    batch(run, "img", "txt", "-o", "out")
    assert len(results(tmp_path / "out")) == 2000


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(run: Run, many: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        rows = [{"id": str(k), "image": "img/b.npy", "text": "big.npy"} for k in range(20)]
        np.save(tmp_path / "big.npy", np.ones((100, D), np.float32))
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = batch(run, "--manifest", "m.jsonl", "-o", "disk/out", code=1)
        assert b"No space left" in done.stderr
        whole = results(disk / "out")
        assert len({len(data) for data in whole.values()}) == 1
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        batch(run, "--manifest", "m.jsonl", "-o", "disk/out")
        assert len(results(disk / "out")) == 20
        assert len(set(results(disk / "out").values())) == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_attention_that_was_lost_is_made_again(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "out", "-a", "att")
    (few / "att" / "a.npy").unlink()
    batch(run, "img", "txt", "-o", "out", "-a", "att")
    assert (few / "att" / "a.npy").exists()


def test_a_dry_run_keeps_to_what_is_asked_for(run: Run, few: Path) -> None:
    (few / "img" / "a.npy").write_bytes(b"nothing")
    batch(run, "img", "txt", "-o", "out", "--limit", 3, code=4)
    for options, told in (([], b"4 to do"), (["--limit", 2], b"2 to do"), (["--retry-failed"], b"1 to do")):
        assert told in run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--dry-run", *options).stderr


def test_ctrl_c_before_the_first_line_of_a_stream(run: Run, many: Any, tmp_path: Path) -> None:
    command = [*FUSECLI, "batch", "--manifest", "-", "-o", "out", "-w", "w.safetensors", "-j", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while not list(tmp_path.glob("out/.fusecli/ledger*")):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130
        assert child.stderr
        assert b"no pairs" not in child.stderr.read()


def test_shards_start_over_as_the_hint_says(run: Run, few: Path) -> None:
    command = ("img", "txt", "-o", "o.safetensors", "--shard", "1/2")
    batch(run, *command)
    hint = batch(run, *command, "--overwrite", code=2).stderr.decode().rpartition("hint: ")[2].partition(",")[0]
    subprocess.run(hint, shell=True, check=True, cwd=few)
    assert b"skipped" not in batch(run, *command).stderr
