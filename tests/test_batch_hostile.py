"""What people and machines do to a batch: odd places, damaged state, names that trick."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusecli.batch.gather import gather, gathered
from fusecli.batch.job import Outcome, Stop, Task
from fusecli.batch.local import Pool
from fusecli.batch.plan import Shard
from fusecli.batch.store import PartStore
from fusecli.collections import Place
from fusecli.formats import FileSink
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
        ["-o", "o.npy", "-a", "o.npy.fusecli"],
        ["-o", "out", "--overwrite", "--retry-failed"],
        ["-o", "out", "--dtype", "bfloat16"],
        ["-o", "out.npz"],
        ["-o", "out", "-a", "att.SAFETENSORS"],
        ["-o", "out", "--shard", "1/" + "9" * 5000],
        ["-o", "pipe.npy"],
    ],
)
def test_places_and_options_that_would_do_harm(run: Run, few: Path, places: list[str]) -> None:
    os.mkfifo(few / "pipe.npy")
    before = {path: path.read_bytes() for path in few.rglob("*") if path.is_file()}
    batch(run, "img", "txt", *places, code=2)
    assert {path: path.read_bytes() for path in few.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("manifest", "places"),
    [
        (["a,img/a.npy,txt/a.npy"], ["-o", "img"]),
        (["a,img/b.npy,txt/a.npy", "b,img/c.npy,txt/b.npy"], ["-o", "img"]),
        (["a,txt/b.npy,txt/c.npy", "b,txt/a.npy,txt/c.npy"], ["-o", "out", "-a", "img/../txt"]),
        (["a,both.safetensors,txt/a.npy,k"], ["-o", "both.safetensors"]),
        (["a,both.safetensors,txt/a.npy,k"], ["-o", "out", "-a", "both.safetensors"]),
    ],
)
def test_a_manifest_cannot_write_over_its_inputs(run: Run, few: Path, manifest: list[str], places: list[str]) -> None:
    save_file({"k": np.load(few / "img" / "a.npy")}, few / "both.safetensors")
    lines = ["id,image,text,image_key", *(line if line.count(",") > 2 else f"{line}," for line in manifest)]
    (few / "m.csv").write_text("\n".join(lines) + "\n")
    before = {path: path.read_bytes() for path in few.rglob("*") if path.is_file()}
    assert b"would replace what is read" in batch(run, "--manifest", "m.csv", *places, code=2).stderr
    if len(manifest) == 1:  # of a stream nothing is known ahead
        code = 1 if "both.safetensors" in places else 4  # one file for all: then nothing can be finished
        batch(run, "--manifest", "-", *places, code=code, input="\n".join(lines).encode())
    after = {path: path.read_bytes() for path in few.rglob("*") if path.is_file()}
    assert before.items() <= after.items()


def test_a_tree_cannot_write_over_its_own_branches(run: Run, few: Path) -> None:
    (few / "all" / "x" / "x").mkdir(parents=True)
    for name in ("x/a.npy", "x/x/a.npy"):  # ids a and x/a below all/x: the result of the second is all/x/a.npy
        (few / "all" / name).write_bytes((few / "img" / "a.npy").read_bytes())
    (few / "txt" / "x").mkdir()
    (few / "txt" / "b.npy").rename(few / "txt" / "x" / "a.npy")
    assert b"would replace" in batch(run, "all/x", "txt", "-o", "all", code=2).stderr


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


def _into(few: Path, way: str) -> list[str]:
    """Lay an input where a result goes, and give the options that would put it there."""
    out, image = few / "out", (few / "img" / "c.npy").read_bytes()
    out.mkdir()
    (out / "b.npy").write_bytes(image)
    if way == "a link":
        (few / "img" / "a.npy").unlink()
        (few / "img" / "a.npy").symlink_to("../out/b.npy")
    elif way == "a link in a manifest":
        (few / "link.npy").symlink_to("out/b.npy")
        (few / "m.csv").write_text("id,image,text\na,link.npy,txt/a.npy\nb,img/b.npy,txt/b.npy\n")
    elif way == "a linked folder":
        (out / "other").mkdir()
        (out / "b.npy").rename(out / "other" / "b.npy")
        (out / "sub").symlink_to("other")
        (few / "m.csv").write_text("id,image,text\na,out/other/b.npy,txt/a.npy\nsub/b,img/b.npy,txt/b.npy\n")
    elif way == "another part":
        (few / "m.csv").write_text("id,image,text\na,out/b.npy,txt/a.npy\nb,img/b.npy,txt/b.npy\n")
        return [
            "--manifest",
            "m.csv",
            "-o",
            "out",
            "--shard",
            next(f"{k}/9" for k in range(1, 10) if Shard(k, 9).has("b")),
        ]
    elif way == "an image without a text":
        (out / "img" / "x").mkdir(parents=True)
        for name in ("img/b.npy", "img/x/b.npy"):
            (out / name).write_bytes(image)
        (out / "txt" / "x").mkdir(parents=True)
        (out / "txt" / "x" / "b.npy").write_bytes(image)
        (out / "x").symlink_to("img")
        return ["out/img", "out/txt", "-o", "out", "--allow-missing"]
    elif way == "one file":
        (few / "m.csv").write_text("id,image,text\na,link.npy,txt/a.npy\n")
        (few / "link.npy").symlink_to("out/b.npy")
        return ["--manifest", "m.csv", "-o", "out/b.npy"]
    return ["img", "txt", "-o", "out"] if way == "a link" else ["--manifest", "m.csv", "-o", "out"]


WAYS = ["a link", "a link in a manifest", "a linked folder", "another part", "an image without a text", "one file"]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_way_leads_to_an_input_it_stays(run: Run, few: Path, way: str) -> None:
    options = _into(few, way)
    before = {path: path.read_bytes() for path in few.rglob("*") if path.is_file()}
    for more in ([], ["--dry-run"]):
        assert b"would replace what is read" in batch(run, *options, *more, code=2).stderr
    after = {path: path.read_bytes() for path in few.rglob("*") if path.is_file() and ".fusecli" not in path.parts}
    assert after == before


def test_weights_among_the_results_are_not_replaced(run: Run, few: Path) -> None:
    (few / "out").mkdir()
    (few / "w.safetensors").rename(few / "out" / "b.safetensors")
    options = ("-w", "out/b.safetensors", "--suffix", ".safetensors")
    assert b"would replace what is read" in run("batch", "img", "txt", "-o", "out", *options, code=2).stderr


def test_a_stream_does_not_end_in_a_file_that_it_was_read_from(run: Run, few: Path) -> None:
    (few / "x.npy").write_bytes((few / "txt" / "a.npy").read_bytes())
    (few / "link.npy").symlink_to("x.npy")
    lines = b"id,image,text\nc,img/c.npy,txt/c.npy\nb,img/b.npy,link.npy\n"
    told = batch(run, "--manifest", "-", "-o", "x.npy", "-j", 1, code=1, input=lines).stderr
    assert b"would replace what it is made from" in told
    assert (few / "x.npy").read_bytes() == (few / "txt" / "a.npy").read_bytes()


@pytest.mark.parametrize("bad", ["x\0/y", "x/\0"])
def test_a_name_that_no_file_can_have_fails_alone(run: Run, few: Path, bad: str) -> None:
    (few / "out").mkdir()
    (few / "out" / "input.npy").write_bytes((few / "img" / "a.npy").read_bytes())
    rows = [
        {"id": bad, "image": "img/a.npy", "text": "txt/a.npy"},
        {"id": "a", "image": bad, "text": "txt/a.npy"},
        {"id": "b", "image": "out/input.npy", "text": "txt/b.npy"},
    ]
    (few / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = batch(run, "--manifest", "m.jsonl", "-o", "out", "--json", code=4)
    assert statuses(done) == {bad: "failed", "a": "failed", "b": "fused"}


def test_inputs_and_results_may_share_a_folder(run: Run, few: Path) -> None:
    for side in ("img", "txt"):
        for id in IDS:
            (few / "all" / side / id).parent.mkdir(parents=True, exist_ok=True)
            (few / "all" / side / f"{id}.npy").write_bytes((few / side / f"{id}.npy").read_bytes())
    for status in ("fused", "skipped"):
        done = batch(run, "all/img", "all/txt", "-o", "all", "--json")
        assert statuses(done) == dict.fromkeys(IDS, status)


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
    assert statuses(batch(run, "img", "txt", "-o", "o.npy", "--json")) == dict.fromkeys(IDS, "skipped")
    assert (
        b"6 to do"
        in run("batch", "img", "txt", "-o", "o.npy", "-w", "w.safetensors", "--dry-run", "--overwrite").stderr
    )


@pytest.mark.parametrize("empty", [["img", ""], ["", "txt"], ["img", "txt", "--image-pattern", ""], ["--manifest", ""]])
def test_an_empty_name_is_no_place(run: Run, few: Path, empty: list[str]) -> None:
    assert b"is empty" in batch(run, *empty, "-o", "out", code=2).stderr


@pytest.mark.parametrize(
    "options",
    [
        ["i.safetensors", "--image-key", "a", "--text-key", "b"],
        ["i.safetensors", "txt", "--image-key", "a"],
        ["img", "stack.npy", "--text-key", "b"],
        ["stack.npy", "--image-pattern", "{id}.i", "--text-pattern", "{id}.t"],
        ["--manifest", "m.csv", "--image-pattern", "{id}.npy"],
    ],
)
def test_what_would_say_nothing_is_refused(run: Run, few: Path, options: list[str]) -> None:
    save_file({id: np.ones((2, D), np.float32) for id in "ab"}, few / "i.safetensors")
    np.save(few / "stack.npy", np.ones((2, D), np.float32))
    told = batch(run, *options, "-o", "out", code=2).stderr
    assert b"leave" in told
    assert not (few / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["img", "img"],
        ["img", "./img/"],
        ["img"],
        ["img", "img", "--image-pattern", "{id}.npy", "--text-pattern", "{id}.npy"],
        ["i.safetensors", "i.safetensors"],
        ["i.safetensors", "--image-key", "a", "--text-key", "a"],
    ],
)
def test_nothing_is_fused_with_itself(run: Run, few: Path, options: list[str]) -> None:
    save_file({id: np.ones((2, D), np.float32) for id in "ab"}, few / "i.safetensors")
    assert b"nothing to distinguish them" in batch(run, *options, "-o", "out", code=2).stderr
    assert not (few / "out").exists()


def test_two_files_for_one_id_are_both_named(run: Run, few: Path) -> None:
    (few / "img" / "a.NPY").write_bytes((few / "img" / "a.npy").read_bytes())
    done = batch(run, "img", "txt", "-o", "out", "--json", code=4)
    assert statuses(done) == dict.fromkeys(IDS, "fused") | {"a": "failed"}
    assert b"a.NPY and a.npy" in done.stdout


def test_keys_for_a_whole_folder_or_manifest(run: Run, few: Path) -> None:
    both = few / "both"
    both.mkdir()
    lines = ["id,image,text,image_key"]
    for id in IDS:
        sides = {name: np.load(few / folder / f"{id}.npy") for name, folder in (("mine", "img"), ("yours", "txt"))}
        save_file({**sides, "image": sides["yours"]}, both / f"{id}.safetensors")
        lines.append(f"{id},both/{id}.safetensors,both/{id}.safetensors,{'image' if id == 'f' else ''}")
    (few / "k.csv").write_text("\n".join(lines) + "\n")
    lines[1] = "a,both/a.safetensors,txt/a.npy,"  # which has no keys
    keys = ("--image-key", "mine", "--text-key", "yours")
    wanted = expected(run, few, IDS)
    batch(run, "both", "-o", "out", *keys)
    assert results(few / "out") == wanted
    (few / "txt" / "b.npy").unlink()
    (both / "b.safetensors").rename(few / "txt" / "b.safetensors")
    save_file({"mine": np.load(few / "img" / "b.npy")}, both / "b.safetensors")
    batch(run, "both", "txt", "-o", "mixed", *keys)
    assert results(few / "mixed") == wanted
    (few / "txt" / "b.safetensors").rename(both / "b.safetensors")
    batch(run, "--manifest", "k.csv", "-o", "named", *keys)
    named = results(few / "named")
    assert {id: named[id] for id in IDS[:-1]} == {id: wanted[id] for id in IDS[:-1]}
    assert named["f"] != wanted["f"]  # the line's own key counts more
    batch(run, "--manifest", "-", "-o", "piped", *keys, input=(few / "k.csv").read_bytes())
    assert results(few / "piped") == named


def test_a_keyed_file_that_cannot_be_opened_fails_alone(run: Run, few: Path) -> None:
    (few / "knot.safetensors").symlink_to("knot.safetensors")
    lines = "id,image,text,image_key\na,knot.safetensors,txt/a.npy,k\nb,img/b.npy,txt/b.npy,\n"
    done = batch(run, "--manifest", "-", "-o", "out", "--json", code=4, input=lines.encode())
    assert statuses(done) == {"a": "failed", "b": "fused"}
    assert b"knot.safetensors: cannot be opened" in done.stdout


def test_the_last_word_on_a_pair_is_that_of_the_last_run(run: Run, few: Path) -> None:
    good = (few / "img" / "a.npy").read_bytes()
    (few / "img" / "a.npy").write_bytes(b"junk")
    shard = next(part for part in ("1/2", "2/2") if Shard(int(part[0]), 2).has("a"))
    batch(run, "img", "txt", "-o", "out", "--shard", shard, code=4)
    (few / "img" / "a.npy").write_bytes(good)
    batch(run, "img", "txt", "-o", "out")
    batch(run, "img", "txt", "-o", "out", "--shard", shard)  # its ledger has the older word, and is the newer file
    told = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--dry-run").stderr
    assert b"6 done, 0 failed or incomplete before, 0 to do" in told


def test_a_file_of_all_results_is_left_as_it_is_where_nothing_is_new(run: Run, few: Path) -> None:
    (few / "img" / "a.npy").write_bytes(b"junk")
    files = []
    for _ in range(2):
        batch(run, "img", "txt", "-o", "out.safetensors", code=4)
        files.append((few / "out.safetensors").stat().st_ino)
    assert files[0] == files[1]


LOST = ["the file", "its index", "both", "its bytes"]


def _lose(output: Path, what: str) -> None:
    if what == "its bytes":
        output.write_bytes(b"junk")
    if what in ("the file", "both"):
        output.unlink()
    if what in ("its index", "both"):
        (output.parent / f"{output.name}.fusecli" / "fused.index").unlink()


@pytest.mark.parametrize("what", LOST)
def test_results_that_are_lost_do_not_stand_in_the_way(run: Run, few: Path, what: str) -> None:
    lines = (few / "m.csv").read_bytes().splitlines(keepends=True)
    batch(run, "--manifest", "-", "-o", "o.safetensors", input=b"".join(lines[:3]))
    _lose(few / "o.safetensors", what)
    batch(run, "--manifest", "-", "-o", "o.safetensors", input=lines[0] + lines[3])
    assert list(load_file(few / "o.safetensors")) == ["c"]
    batch(run, "img", "txt", "-o", "p.npy")
    _lose(few / "p.npy", what)
    batch(run, "img", "txt", "-o", "p.npy", "--limit", 2)
    assert np.load(few / "p.npy").shape == (2, 3, D)


def test_a_run_killed_between_file_and_index_loses_nothing(
    run: Run, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (few / "m.csv").read_bytes().splitlines(keepends=True)
    batch(run, "--manifest", "-", "-o", "o.safetensors", input=b"".join(lines[:3]))
    state = few / "o.safetensors.fusecli"
    before = (state / "fused.index").read_bytes()
    batch(run, "--manifest", "-", "-o", "o.safetensors", input=lines[0] + lines[3])
    (state / "fused.index").rename(state / "fused.new.index")
    (state / "fused.index").write_bytes(before)
    batch(run, "--manifest", "-", "-o", "o.safetensors", input=lines[0] + lines[4])
    assert list(load_file(few / "o.safetensors")) == ["a", "b", "c", "d"]


def test_a_file_of_all_results_may_be_a_link_to_another_disk(run: Run, few: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        for name in ("o.safetensors", "a.npy"):
            (few / name).symlink_to(f"{other}/{name}")
        batch(run, "img", "txt", "-o", "o.safetensors", "-a", "a.npy")
        assert sorted(load_file(f"{other}/o.safetensors")) == IDS
        assert sorted(os.listdir(other)) == ["a.npy", "a.npy.fusecli", "o.safetensors", "o.safetensors.fusecli"]


@pytest.mark.parametrize("gone", ["o.safetensors", "a.npy"])
def test_what_is_new_is_not_replaced_by_what_was_gathered(run: Run, few: Path, gone: str) -> None:
    place = ["img", "txt", "-o", "o.safetensors", "-a", "a.npy"]
    batch(run, *place)
    for id in IDS:  # the README: delete the results of inputs that have changed
        np.save(few / "img" / f"{id}.npy", -np.load(few / "img" / f"{id}.npy"))
    (few / gone).unlink()
    batch(run, *place)
    batch(run, "img", "txt", "-o", "fresh.safetensors", "-a", "fresh.npy")
    assert (few / "o.safetensors").read_bytes() == (few / "fresh.safetensors").read_bytes()
    assert (few / "a.npy").read_bytes() == (few / "fresh.npy").read_bytes()


def test_without_a_ledger_gathered_results_count_for_nothing(run: Run, few: Path) -> None:
    run("init", "-o", "other.safetensors", "--feature-dim", D, "--num-heads", 4, "--seed", 1, "-q")
    batch(run, "img", "txt", "-o", "o.npy")
    old = np.load(few / "o.npy")
    (few / "o.npy.fusecli" / "ledger.jsonl").unlink()
    run("batch", "img", "txt", "-o", "o.npy", "-w", "other.safetensors", "-q")
    assert (np.load(few / "o.npy") != old).any()


def test_stacks_of_one_header_in_two_orders_are_not_mixed_up(tmp_path: Path) -> None:
    def gather_in(order: str) -> PartStore:
        store, told = PartStore(str(tmp_path / "o.npy"), str(tmp_path), "fused"), []  # type: ignore[var-annotated]
        for id in order:
            with store.open(id, "fused", (1, 2), "float32", told) as (sink, at):
                sink.put(at, np.full((1, 2), ord(id), np.float32))
        gather(store, lambda: iter(list(zip(order, told, strict=True))))
        return store

    index, file = tmp_path / "fused.index", tmp_path / "o.npy"
    gather_in("ab")
    old_index, old_file = index.read_bytes(), file.read_bytes()
    store = gather_in("ba")
    index.rename(tmp_path / "fused.new.index")  # a run was killed after it had moved the file to its place
    index.write_bytes(old_index)
    assert [id for id, _ in gathered(store)] == ["b", "a"]
    file.rename(tmp_path / "on-its-way")  # and before
    file.write_bytes(old_file)
    assert [id for id, _ in gathered(store)] == ["a", "b"]


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


def test_a_stack_does_not_lose_the_rows_of_other_ids(run: Run, few: Path) -> None:
    lines = (few / "m.csv").read_text().splitlines()
    batch(run, "img", "txt", "-o", "o.npy")
    (few / "m.csv").write_text("\n".join(lines[:3]) + "\n")
    for more in ([], ["--dry-run"]):
        told = batch(run, "--manifest", "m.csv", "-o", "o.npy", *more, code=2).stderr
        assert b"other weights or options" in told  # another place to read from
    (few / "img" / "a.npy").unlink()
    for more in ([], ["--dry-run"]):
        assert b"holds results of other pairs: found a" in batch(run, "img", "txt", "-o", "o.npy", *more, code=2).stderr
    assert np.load(few / "o.npy").shape == (6, 3, D)
    batch(run, "img", "txt", "-o", "o.npy", "--overwrite", "--allow-missing")
    assert np.load(few / "o.npy").shape == (5, 3, D)


def test_a_run_that_is_refused_claims_nothing(run: Run, few: Path) -> None:
    batch(run, "img", "txt", "-o", "one", "-a", "att")
    batch(run, "img", "txt", "-o", "one", "-a", "new", code=2)
    batch(run, "img", "txt", "-o", "new")
    for places in (["-o", "att"], ["-o", "two", "-a", "att"]):
        told = batch(run, "img", "txt", *places, "--dry-run", code=2).stderr
        assert b"holds the attention of another output" in told


def test_a_lone_inch_mark_is_no_quote(run: Run, few: Path) -> None:
    rows = ["id,image,text", 'x 5" disk,img/a.npy,txt/a.npy', '"y,img/b.npy,txt/b.npy', "z,img/c.npy,txt/c.npy"]
    (few / "m.tsv").write_text("\n".join(rows).replace(",", "\t") + "\n")
    batch(run, "--manifest", "m.tsv", "-o", "out", code=4)
    assert sorted(results(few / "out")) == ['x 5" disk', "z"]


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


def test_rows_of_a_stack_count_what_is_missing(run: Run, few: Path) -> None:
    (few / "txt" / "c.npy").unlink()
    batch(run, "img", "txt", "-o", "o.npy", "--allow-missing")
    assert np.isnan(np.load(few / "o.npy")).any((1, 2)).tolist() == [id == "c" for id in IDS]
    lines = (few / "m.csv").read_text().splitlines()
    lines.insert(2, "broken")
    for place in ("m.csv", "-"):
        text = "\n".join([*lines[:5], lines[1], lines[5]]) + "\n"
        (few / "m.csv").write_text(text)
        batch(run, "--manifest", place, "-o", f"{place}.npy", code=4, input=text.encode())
    rows = np.load(few / "m.csv.npy")
    assert np.isnan(rows).any((1, 2)).tolist() == [False, True, False, True, True, False]  # c fails: its text is gone
    assert len(np.load(few / "-.npy")) == 4


def test_rows_of_a_stack_come_and_go_without_results(run: Run, few: Path) -> None:
    place = ["img", "txt", "-o", "o.npy", "-a", "a.npy", "--allow-missing"]

    def holes(name: str) -> list[bool]:
        rows = np.load(few / name)
        return [bool(np.isnan(row).any()) for row in rows]

    batch(run, *place)
    (few / "img" / "aa.npy").write_bytes((few / "img" / "a.npy").read_bytes())  # it has no text
    batch(run, *place)
    assert holes("o.npy") == holes("a.npy") == [False, True, False, False, False, False, False]
    (few / "img" / "aa.npy").unlink()
    batch(run, *place)
    assert holes("o.npy") == holes("a.npy") == [False] * 6


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
    assert sorted(results(few / "att")) == IDS[1:]


def test_a_value_of_two_lines_gives_no_pair_of_its_rest(run: Run, few: Path) -> None:
    (few / "m.csv").write_text('id,image,text\n"x\ny",img/a.npy,txt/a.npy\n"b",img/b.npy,txt/b.npy\n')
    done = batch(run, "--manifest", "m.csv", "-o", "out", "--json", code=4)
    assert list(results(few / "out")) == ["b"]
    assert done.stdout.count(b'"error": "bad line"') == 2


def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="the output") as caught:
        FileSink("the output", full.fileno()).put(0, b"x" * 99)
    assert caught.value.filename == "the output"


def test_names_that_no_stack_has_and_no_text_can_hold(run: Run, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    np.save(tmp_path / "stack.npy", np.ones((2, D), np.float32))
    save_file({"1": np.ones((2, D), np.float32), "1" * 5000: np.ones((2, D), np.float32)}, tmp_path / "t.safetensors")
    run("batch", "stack.npy", "t.safetensors", "-o", "out", "-w", "w.safetensors", "--allow-missing")
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["1.npy"]
    header = b'{"\\ud800":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
    (tmp_path / "s.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for command in (("batch", "s.safetensors", "t.safetensors"), ("train", "s.safetensors", "t.safetensors")):
        assert b"s.safetensors" in run(*command, "-o", "f.safetensors", code=3).stderr
