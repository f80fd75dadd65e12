"""What people and machines do to a batch: damaged state, two runs at once, what a killed one leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fusecli.batch.job import Outcome, Stop, Task, failed, unfailing
from fusecli.batch.local import SMALL, Pool, _make_room
from fusecli.collections import Place
from fusecli.errors import FileError, FusecliError
from fusecli.formats import FileSink, open_source
from tests.batches import FEW, D, batch, results, statuses
from tests.conftest import FUSECLI, Run


def test_retrying_what_never_failed_does_nothing_and_says_so(run: Run, few: Path) -> None:
    told = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--retry-failed").stderr
    assert b"done before" not in told
    assert b"fused             0" in told


@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_attention_of_too_few_axes_is_none_of_ours(run: Run, few: Path, suffix: str) -> None:
    run("init", "-m", "gated", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    places = ["-o", f"o{suffix}", "-a", f"a{suffix}", "--suffix", ".safetensors"]
    batch(run, "img", "txt", *places)
    wanted = {path: path.read_bytes() for path in few.rglob("*.safetensors")}
    if suffix:
        index = few / "o.safetensors.fusecli" / "attention.index"
        first, second, *rest = index.read_text().splitlines()
        index.write_text("\n".join([first, json.dumps([json.loads(second)[0], [5], "float32", 0]), *rest]) + "\n")
    else:
        with (few / "o" / ".fusecli" / "ledger.jsonl").open("a") as file:
            file.write(
                '{"id":"a","status":"fused","shape":[3,32],"dtype":"float32",'
                '"attention":{"shape":[5],"dtype":"float32"}}\n'
            )
    batch(run, "img", "txt", *places)
    assert {path: path.read_bytes() for path in few.rglob("*.safetensors")} == wanted


def test_a_full_standard_output_is_named(run: Run, few: Path) -> None:
    with open("/dev/full", "wb") as full:
        told = batch(run, "img", "txt", "-o", "out", "--json", code=1, stdout=full).stderr
    assert b"<stdout>: cannot be written: found No space" in told


def test_a_pipe_has_room_for_what_is_sent_ahead() -> None:
    mine, theirs = Pipe()
    with socket.socket(fileno=os.dup(mine.fileno())) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as there may be
    _make_room(mine, theirs)
    os.set_blocking(mine.fileno(), False)
    mine.send_bytes(bytes(SMALL))
    mine.close()
    theirs.close()


def test_long_words_in_both_directions_do_not_block() -> None:
    def work(item: list[Task]) -> list[Outcome]:
        return [Outcome(task.id, "fused", {}) for task in item]

    class Feed:
        left = 6

        def take(self) -> list[Task] | None:
            self.left -= 1
            return [Task(f"{self.left}" * 2**20, Place(""), Place(""))] if self.left >= 0 else None

        def ended(self) -> bool:
            return self.left <= 0

        def fileno(self) -> int | None:
            return None

    pool = Pool(work, 1)
    assert sum(len(outcomes) for outcomes in pool.run(Feed(), Stop())) == 6
    pool.close()


def test_an_error_that_nobody_foresaw_fails_its_pair_alone() -> None:
    def work(item: list[Task]) -> list[Outcome]:
        if any(task.id == "b" for task in item):
            raise RuntimeError("unforeseen")
        return [Outcome(task.id, "fused", {}) for task in item]

    outcomes = unfailing(work)([Task(id, Place(""), Place("")) for id in "abc"])
    assert [outcome.status for outcome in outcomes] == ["fused", "failed", "fused"]
    assert "unforeseen" in outcomes[1].facts["message"]


def _lives(pid: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()  # not one that nobody has waited for yet
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_the_main_process(few: Path) -> None:
    command = [*FUSECLI, "batch", "--manifest", "-", "-o", "out", "-w", "w.safetensors", "--json", "-q", "-j", "2"]
    with subprocess.Popen(command, cwd=few, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"id,image,text\na,img/a.npy,txt/a.npy\n")
        child.stdin.flush()
        child.stdout.readline()
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(child.pid, signal.SIGKILL)
        child.wait(timeout=10)
    for _ in range(200):
        if not any(map(_lives, workers)):
            return
        time.sleep(0.05)
    pytest.fail("workers live on")


def test_links_lead_to_one_state(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "one.safetensors", "-a", "att.npy")
    (few / "att-link.npy").symlink_to("att.npy")
    told = batch(run, "img", "txt", "-o", "two.safetensors", "-a", "att-link.npy", code=2).stderr
    assert b"holds the attention of another output" in told
    run("init", "-o", "other.safetensors", "--feature-dim", D, "--num-heads", 4, "--seed", 1, "-q")
    (few / "link.safetensors").symlink_to("one.safetensors")
    told = run("batch", "img", "txt", "-o", "link.safetensors", "-w", "other.safetensors", "-q", code=2).stderr
    assert b"begun with other weights" in told
    (few / "dangling.npy").symlink_to("not/there/o.npy")
    batch(run, "img", "txt", "-o", "dangling.npy")
    assert np.load(few / "not" / "there" / "o.npy").shape == (6, 3, D)
    for name in ("out", "att"):
        (few / f"real-{name}").mkdir()
        (few / name).symlink_to(f"real-{name}")
    batch(run, "img", "txt", "-o", "out", "-a", "att")
    batch(run, "img", "txt", "-o", "real-out", "-a", "real-att")


def test_a_run_that_is_refused_claims_nothing(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "one", "-a", "att")
    batch(run, "img", "txt", "-o", "one", "-a", "new", code=2)
    batch(run, "img", "txt", "-o", "new")
    for places in (["-o", "att"], ["-o", "two", "-a", "att"]):
        told = batch(run, "img", "txt", *places, "--dry-run", code=2).stderr
        assert b"holds the attention of another output" in told


@pytest.mark.parametrize("attention", ["new/deep/a.npy", "new/deep/a"])
def test_folders_for_attention_are_made(run: Run, few: Path, attention: str) -> None:
    batch(run, "img", "txt", "-o", "out", "-a", attention)
    assert (few / attention).exists()


@pytest.mark.parametrize("attention", ["att", "att.safetensors"])
def test_attention_belongs_to_one_output(run: Run, few: Path, attention: str) -> None:
    one = ["img", "txt", "-o", "one", "-a", attention]
    other = ["img", "txt", "-o", "other", "-a", attention]
    batch(run, *one)
    told = batch(run, *other, code=2).stderr
    assert b"holds the attention of another output" in told
    assert b"one/.fusecli" in told
    batch(run, "img", "txt", "-o", attention, code=2)
    batch(run, "img", "txt", "-o", "third", "-a", "one", code=2)
    batch(run, *one)
    batch(run, *other, "--overwrite")
    batch(run, *one, code=2)
    shutil.rmtree(few / "other")
    batch(run, *one)


def test_runs_with_one_file_of_attention_exclude_each_other(run: Run, few: Path) -> None:
    (few / "a.npy.fusecli").mkdir()
    with open(few / "a.npy.fusecli" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = batch(run, "img", "txt", "-o", "out", "-a", "a.npy", code=1).stderr
    assert b"another run is writing here" in told


def test_what_killed_runs_left_goes_with_the_next(run: Run, few: Path) -> None:
    place = ["img", "txt", "-o", "o.npy", "-a", "att"]
    batch(run, *place)
    left = [few / name for name in ("o.npy.fusecli-tmp", "o.npy.fusecli/.fusecli-1.tmp", "att/.fusecli/.fusecli-2.tmp")]
    for path in left:
        path.touch()
    batch(run, *place)
    assert not any(path.exists() for path in left)


def test_a_stream_tried_again_passes_over_what_never_failed(run: Run, few: Path) -> None:
    lines = (few / "m.csv").read_bytes()
    done = batch(run, "--manifest", "-", "-o", "new", "--json", "--retry-failed", input=lines)
    assert done.stdout == b""
    assert not results(few / "new")


def test_a_dry_run_looks_at_files(run: Run, few: Path) -> None:
    plan = ["batch", "img", "txt", "-w", "w.safetensors", "--dry-run", "-o"]
    for output, lost, count in (("out", "out/a.npy", 1), ("o.npy", "o.npy", 6)):
        batch(run, "img", "txt", "-o", output)
        assert b"6 done" in run(*plan, output).stderr
        (few / lost).unlink()
        assert f"{count} to do".encode() in run(*plan, output).stderr


def test_a_folder_where_a_result_should_go_leaves_no_attention_either(run: Run, few: Path) -> None:
    (few / "out" / "a.npy" / "z").mkdir(parents=True)
    batch(run, "img", "txt", "-o", "out", "-a", "att", code=4)
    assert sorted(results(few / "att")) == FEW[1:]


def test_a_folder_called_like_a_file_is_in_nobodys_way(run: Run, few: Path) -> None:
    (few / "x.npy").mkdir()
    batch(run, "img", "txt", "-o", "out")


@pytest.mark.parametrize("how", ["pipe", "<(...)"])
def test_paths_in_a_manifest_that_is_a_pipe(run: Run, few: Path, how: str) -> None:
    lines = (few / "m.csv").read_text()
    if how == "pipe":  # as of any manifest, from where it lies
        (few / "sub").mkdir()
        os.mkfifo(few / "sub" / "m.csv")
        command = [*FUSECLI, "batch", "--manifest", "sub/m.csv", "-o", "out", "-w", "w.safetensors", "-q"]
        with subprocess.Popen(command, cwd=few) as child:
            (few / "sub" / "m.csv").write_text(lines.replace("img/", "../img/").replace("txt/", "../txt/"))
            assert child.wait(60) == 0
    else:
        line = f"{shlex.join(FUSECLI)} batch --manifest <(cat m.csv) -o out -w w.safetensors -q"
        subprocess.run(["bash", "-c", line], cwd=few, check=True, timeout=60)
    assert len(results(few / "out")) == 6


def test_a_stream_does_not_write_over_the_weights(run: Run, few: Path) -> None:
    (few / "ow").mkdir()
    (few / "ow" / "a.safetensors").write_bytes((few / "w.safetensors").read_bytes())
    lines = (few / "m.csv").read_bytes().splitlines(keepends=True)
    place = ["--manifest", "-", "-w", "ow/a.safetensors", "-o", "ow", "--suffix", ".safetensors", "--json"]
    done = run("batch", *place, code=4, input=b"".join(lines[:3]))
    assert statuses(done) == {"a": "failed", "b": "fused"}
    assert (few / "ow" / "a.safetensors").read_bytes() == (few / "w.safetensors").read_bytes()


def test_a_part_of_a_stream_may_be_empty(run: Run, few: Path) -> None:
    lines = (few / "m.csv").read_bytes().splitlines(keepends=True)
    for part in (1, 2, 3):
        batch(run, "--manifest", "-", "-o", "out", "--shard", f"{part}/3", input=b"".join(lines[:2]))
    batch(run, "--manifest", "-", "-o", "other", "--limit", 0, input=b"".join(lines))
    assert b"no pairs" in batch(run, "--manifest", "-", "-o", "other", code=3, input=lines[0]).stderr


@pytest.mark.parametrize(("number", "stop"), [(errno.EMFILE, True), (errno.EIO, False)])
def test_what_every_pair_would_run_into_stops_the_run(
    number: int, stop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError) as caught:
        open_source(str(tmp_path / "x.npy"))
    monkeypatch.undo()
    assert failed("x", caught.value).stop is stop


def test_no_room_for_another_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(FusecliError, match="cannot start another process"):
        Pool(lambda item: [], 2)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="the output") as caught:
        FileSink("the output", full.fileno()).put(0, b"x" * 99)
    assert caught.value.filename == "the output"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no folder in memory")
def test_a_manifest_in_memory_is_a_file_like_any_other(run: Run, few: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for side in ("img", "txt"):
            shutil.copytree(few / side, f"{folder}/{side}")
        shutil.copy(few / "m.csv", folder)
        batch(run, "--manifest", f"{folder}/m.csv", "-o", "out")


def test_why_pairs_failed_is_told_with_what_to_do(run: Run, few: Path) -> None:
    save_file({"x": np.zeros((2, D), ml_dtypes.bfloat16)}, few / "txt" / "a.safetensors")
    (few / "txt" / "a.npy").unlink()
    told = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", code=4).stderr.decode()
    assert "failed            1  .npy cannot name bfloat16: a\n" in told
    assert "found dtype bfloat16\n" in told
    assert "hint: write .safetensors" in told
