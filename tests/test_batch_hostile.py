"""What people and machines do to a batch: odd places, damaged state, names that trick."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusecli.batch.job import Outcome, Task
from fusecli.batch.local import Pool, Stop
from fusecli.collections import Place
from tests.batches import D, as_npy, batch, expected, results, statuses
from tests.conftest import FUSECLI, Run

IDS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture
def few(tmp_path: Path, rng: np.random.Generator, run: Run) -> Path:
    """Six pairs of one shape in ``img/`` and ``txt/``, weights, and a manifest ``m.csv`` of them."""
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    for side, rows in (("img", 2), ("txt", 3)):
        (tmp_path / side).mkdir()
        for id in IDS:
            np.save(tmp_path / side / f"{id}.npy", rng.standard_normal((rows, D), np.float32))
    lines = ["id,image,text", *(f"{id},img/{id}.npy,txt/{id}.npy" for id in IDS)]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_what_shards_add_is_gathered_by_the_next_plain_run(run: Run, few: Path) -> None:
    for id in IDS[3:]:
        (few / "img" / f"{id}.npy").rename(few / f"{id}.later")
    batch(run, "img", "txt", "-o", "out.safetensors", "--allow-missing")
    for id in IDS[3:]:
        (few / f"{id}.later").rename(few / "img" / f"{id}.npy")
    for part in (1, 2):
        batch(run, "img", "txt", "-o", "out.safetensors", "--shard", f"{part}/2")
    batch(run, "img", "txt", "-o", "out.safetensors")
    assert sorted(load_file(few / "out.safetensors")) == IDS


def test_a_second_stream_adds_to_what_the_first_has_made(run: Run, few: Path) -> None:
    lines = (few / "m.csv").read_bytes().splitlines(keepends=True)
    batch(run, "--manifest", "-", "-o", "out.safetensors", input=b"".join(lines[:4]))
    batch(run, "--manifest", "-", "-o", "out.safetensors", input=b"".join([lines[0], *lines[4:]]))
    assert {id: as_npy(x) for id, x in load_file(few / "out.safetensors").items()} == expected(run, few, IDS)


def test_rows_of_a_stack_keep_their_numbers(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    np.save(tmp_path / "i.npy", rng.standard_normal((40, D), np.float32))
    np.save(tmp_path / "t.npy", rng.standard_normal((40, D), np.float32))
    batch(run, "i.npy", "t.npy", "-o", "all.npy")
    batch(run, "i.npy", "t.npy", "-o", "some.npy", "--shard", "2/2")
    batch(run, "i.npy", "t.npy", "-o", "some.npy", "--limit", 3)
    whole, some = np.load(tmp_path / "all.npy"), np.load(tmp_path / "some.npy")
    done = ~np.isnan(some).any((1, 2))
    assert 3 < done.sum() < 40
    np.testing.assert_array_equal(some[done], whole[: len(some)][done])


@pytest.mark.parametrize(
    "places",
    [
        ["-o", "w.safetensors"],
        ["-o", "img/a.npy"],
        ["-o", "img"],
        ["-o", "out", "-a", "out/att"],
        ["-o", "out", "-a", "txt"],
        ["-o", "out", "--overwrite", "--retry-failed"],
        ["-o", "out", "--dtype", "bfloat16"],
        ["-o", "out", "--shard", "1/" + "9" * 5000],
        ["-o", "pipe.npy"],
    ],
)
def test_places_and_options_that_would_do_harm(run: Run, few: Path, places: list[str]) -> None:
    os.mkfifo(few / "pipe.npy")
    before = {path: path.read_bytes() for path in few.rglob("*") if path.is_file()}
    batch(run, "img", "txt", *places, code=2)
    assert {path: path.read_bytes() for path in few.rglob("*") if path.is_file()} == before


def test_a_manifest_cannot_write_over_its_inputs(run: Run, few: Path) -> None:
    before = (few / "img" / "a.npy").read_bytes()
    batch(run, "--manifest", "m.csv", "-o", "img", code=4)
    assert (few / "img" / "a.npy").read_bytes() == before


def test_results_among_the_images_are_no_images(run: Run, few: Path) -> None:
    for _ in range(2):
        batch(run, "img", "txt", "-o", "img/out", "-a", "img/att")


def test_names_that_a_format_cannot_have(run: Run, few: Path) -> None:
    for name in ("__metadata__", "x\udcff"):
        for side in ("img", "txt"):
            (few / side / f"{name}.npy").write_bytes((few / side / "a.npy").read_bytes())
    told = statuses(batch(run, "img", "txt", "-o", "out.safetensors", "--json", code=4))
    assert {id for id, status in told.items() if status == "failed"} == {"__metadata__", "x\udcff"}
    assert sorted(load_file(few / "out.safetensors")) == IDS


def test_retrying_what_never_failed_does_nothing_and_says_so(run: Run, few: Path) -> None:
    told = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--retry-failed").stderr
    assert b"done before" not in told
    assert b"fused             0" in told


def test_pipes_and_knots_among_the_files_fail_alone(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    (few / "out" / "b.npy").unlink()
    os.mkfifo(few / "out" / "b.npy")
    for name in ("a", "c"):
        (few / "img" / f"{name}.npy").unlink()
        (few / "out" / f"{name}.npy").unlink()
    os.mkfifo(few / "img" / "a.npy")
    (few / "img" / "c.npy").symlink_to("c.npy")
    told = statuses(batch(run, "img", "txt", "-o", "out", "--json", code=4, stdin=subprocess.DEVNULL))
    assert told == dict.fromkeys("ac", "failed") | {"b": "fused"} | dict.fromkeys("def", "skipped")


DAMAGE = [
    '{"run": 5}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"float33"}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"bfloat16"}',
    '{"id":"a","status":"fused","shape":[-3,-32],"dtype":"float32","part":"whole"}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"float32","part":"../img/a.npy"}',
    '{"id":"a","status":"fused","shape":[3,32],"dtype":"float32","part":"x","at":99999999999999999999999}',
    '{"id":["a"],"status":"failed"}',
    "[" * 5000,
]


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_a_damaged_ledger_costs_work_and_nothing_else(run: Run, few: Path, output: str) -> None:
    batch(run, "img", "txt", "-o", output)
    state = few / (f"{output}/.fusecli" if output == "out" else f"{output}.fusecli")
    with open(state / "ledger.jsonl", "a") as file:
        file.write("\n".join(DAMAGE) + "\n")
    for index in ("5", '["a",5,"float32",0]', '["a",[3,32],"float32","x"]', '["a",[3,32],"float33",0]', ""):
        if output != "out":
            first, *_ = (state / "fused.index").read_text().splitlines()
            (state / "fused.index").write_text(f"{first}\n{index}\n")
        batch(run, "img", "txt", "-o", output)
    if output == "out":
        assert results(few / output) == expected(run, few, IDS)
    else:
        assert {id: as_npy(x) for id, x in load_file(few / output).items()} == expected(run, few, IDS)


def test_a_ledger_that_does_not_say_its_weights_is_refused(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    ledger = few / "out" / ".fusecli" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().partition("\n")[2])
    assert b"--overwrite" in batch(run, "img", "txt", "-o", "out", code=2).stderr


@pytest.mark.parametrize("text", ["", "id,image,text\n", "a,b\n1,2\n", "id,image,text\ra,x,y\r", "x" * 200_000])
def test_manifests_that_name_nothing(run: Run, few: Path, text: str) -> None:
    (few / "none.csv").write_text(text)
    batch(run, "--manifest", "none.csv", "-o", "out", code=3)
    batch(run, "--manifest", "-", "-o", "out", code=3, input=text.encode())


def test_a_dash_in_a_manifest_is_a_file_name(run: Run, few: Path) -> None:
    lines = "id,image,text\nx,-,txt/a.npy\na,img/a.npy,txt/a.npy\nb,img/b.npy,txt/b.npy\n"
    told = statuses(batch(run, "--manifest", "-", "-o", "out", "--json", code=4, input=lines.encode()))
    assert told == {"x": "failed", "a": "fused", "b": "fused"}


def test_one_packed_file_named_line_by_line(run: Run, few: Path) -> None:
    save_file({id: np.load(few / "img" / f"{id}.npy") for id in IDS}, few / "i.safetensors")
    rows = [{"id": id, "image": "i.safetensors", "image_key": id, "text": f"txt/{id}.npy"} for id in IDS]
    (few / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch(run, "--manifest", "m.jsonl", "-o", "out")
    assert results(few / "out") == expected(run, few, IDS)


def test_a_packed_file_that_is_replaced_gives_no_wrong_results(few: Path) -> None:
    from fusecli import load
    from fusecli.batch.job import Job, Options
    from fusecli.batch.store import FolderStore
    from fusecli.batch.worker import work
    from fusecli.collections import open_collection

    for shift in (0.0, 1.0):
        path = str(few / "i.safetensors")
        save_file({id: np.load(few / "img" / f"{id}.npy") + np.float32(shift) for id in IDS[: 6 - int(shift)]}, path)
        if not shift:
            images, texts = open_collection(path), open_collection(str(few / "txt"))
    (few / "tmp").mkdir()
    job = Job(load(few / "w.safetensors"), Options(), FolderStore(str(few), ".npy", str(few / "tmp")), None)
    (outcome,) = work(job, [Task("f", images.place("f"), texts.place("f"))])
    assert (outcome.status, "changed" in outcome.facts["message"]) == ("failed", True)


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
        if not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
            return
        time.sleep(0.05)
    pytest.fail("workers live on")
