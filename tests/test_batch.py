"""``fusecli batch`` as a user runs it: every result is held against what ``fusecli fuse`` writes for that pair."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusecli import load
from fusecli.batch import worker
from fusecli.batch.job import Job, Options, Task
from fusecli.batch.store import FolderStore
from fusecli.batch.worker import LARGE
from fusecli.collections import Place
from fusecli.machine import alone_in, cores
from fusecli.pairs import find_features
from fusecli.pipeline import Output, Pair, fuse_pair, to_file
from tests.batches import IDS, D, as_npy, batch, expected, results, statuses
from tests.conftest import FUSECLI, Run


@pytest.mark.parametrize("workers", [1, 3])
def test_a_tree_of_files_gives_what_fuse_gives(run: Run, many: Any, tmp_path: Path, workers: int) -> None:
    batch(run, "img", "txt", "-o", "out", "-j", workers, "-a", "att")
    assert results(tmp_path / "out") == expected(run, tmp_path)
    run("fuse", "img/b.npy", "txt/b.npy", "-w", "w.safetensors", "-o", "one.npy", "-a", "a.npy", "-q")
    assert (tmp_path / "att" / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()
    assert not list((tmp_path / "out").rglob("*tmp*"))


@pytest.mark.slow
def test_large_texts_are_shared_by_threads_and_stay_the_same(
    run: Run, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["a", "b", "c"]
    for side in ("img", "txt"):
        (tmp_path / side).mkdir()
    for id in ids:  # longer than `LARGE`
        np.save(tmp_path / "img" / f"{id}.npy", rng.standard_normal((3, D), np.float32))
        np.save(tmp_path / "txt" / f"{id}.npy", rng.standard_normal((LARGE // (4 * D) + 1, D), np.float32))
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    batch(run, "img", "txt", "-o", "out", "-j", 2)
    assert results(tmp_path / "out") == expected(run, tmp_path, ids)
    image, text = (find_features(f"{tmp_path}/{side}/a.npy", "text") for side in ("img", "txt"))
    done = fuse_pair(
        load(tmp_path / "w.safetensors"), Pair(image, text), Output(to_file(f"{tmp_path}/one.npy", "fused"), threads=4)
    )
    assert min(done.seconds.read, done.seconds.fuse, done.seconds.write) > 0

    threads: list[int] = []
    monkeypatch.setattr(worker, "fuse_pair", lambda weights, pair, output, *rest: threads.append(output.threads))
    store = FolderStore(f"{tmp_path}/new", ".npy", f"{tmp_path}/new")
    job = Job(load(tmp_path / "w.safetensors"), Options(), store, None, folder=str(tmp_path), threads=2)
    task = Task("a", Place(f"{tmp_path}/img/a.npy"), Place(f"{tmp_path}/txt/a.npy"))
    with contextlib.suppress(IndexError):  # nothing has been written
        worker.work(job, [task])
    with alone_in(str(tmp_path)) as alone, contextlib.suppress(IndexError):
        assert alone
        worker.work(job, [task])
    assert threads == [2, 1]


@pytest.mark.parametrize(
    "options", [["--attention-mean"], ["--attention-dtype", "float16"], ["--residual"], ["--allow-nonfinite"]]
)
def test_options_do_what_they_do_in_fuse(run: Run, many: Any, tmp_path: Path, options: list[str]) -> None:
    text = np.load(tmp_path / "txt" / "b.npy")
    text[0, 3] = np.nan if "--allow-nonfinite" in options else 0
    np.save(tmp_path / "txt" / "b.npy", text)
    batch(run, "img", "txt", "-o", "out", "-a", "att", *options)
    assert results(tmp_path / "out") == expected(run, tmp_path, IDS, *options, "-a", "a.npy")
    assert (tmp_path / "a.npy").read_bytes() == results(tmp_path / "att")[IDS[-1]]


def test_only_the_cores_that_are_ours_are_counted() -> None:
    ours = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(ours)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, ours)
    assert cores() <= len(ours)


@pytest.mark.parametrize(("limit", "most"), [("50000 100000", 1), ("100001 100000", 2), ("max 100000", 99), ("?", 99)])
def test_a_container_may_have_a_share_of_the_cores(
    limit: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr("fusecli.machine.CPU_MAX", str(tmp_path / "cpu.max"))
    assert cores() == min(most, len(os.sched_getaffinity(0)))


def test_packed_and_stacked_sides_and_results(run: Run, many: Any, tmp_path: Path) -> None:
    save_file({id: image for id, (image, _) in many.items()}, tmp_path / "img.safetensors")
    save_file({id: text for id, (_, text) in many.items()}, tmp_path / "txt.safetensors")
    wanted = expected(run, tmp_path)
    batch(run, "img.safetensors", "txt", "-o", "one")
    assert results(tmp_path / "one") == wanted
    batch(run, "img", "txt.safetensors", "-o", "fused.safetensors", "-j", 2, "-a", "att.safetensors")
    packed = load_file(tmp_path / "fused.safetensors")
    assert {id: as_npy(array) for id, array in packed.items()} == wanted
    assert load_file(tmp_path / "att.safetensors")["b"].shape == (4, 3, 1)
    batch(run, "img.safetensors", "txt.safetensors", "-o", "st", "--suffix", ".safetensors")
    assert as_npy(load_file(tmp_path / "st" / "b.safetensors")["fused"]) == wanted["b"]


@pytest.mark.parametrize("extra", [[], ["--attention-mean", "--attention-dtype", "float16"]])
def test_packed_attention_has_the_gates_beside_it(run: Run, many: Any, tmp_path: Path, extra: list[str]) -> None:
    run("init", "-m", "gated", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    both = ["img", "txt", "-o", "fused.safetensors", "-a", "att.safetensors", *extra]
    batch(run, *both, "-j", 2, "--limit", 3)
    batch(run, *both)  # adds to what is there
    packed = load_file(tmp_path / "att.safetensors")
    assert len(packed) == 2 * len(IDS)
    for id in IDS:
        expected(run, tmp_path, [id], "-a", "a.safetensors", *extra)
        one = load_file(tmp_path / "a.safetensors")
        assert as_npy(packed[id]) == as_npy(one["attention"])
        assert as_npy(packed[f"{id}.gate"]) == as_npy(one["gate"])
        if id in IDS[:2]:  # several image rows, and one
            shown = [json.loads(run("show", "att.safetensors", "--json", "--id", id).stdout)["tokens"]]
            shown.append(json.loads(run("show", "a.safetensors", "--json").stdout)["tokens"])
            assert all("gate" in token for token in shown[0])
            assert shown[0] == shown[1]


def test_a_packed_dump_of_one_gated_pair_is_told_like_any_other(run: Run, many: Any, tmp_path: Path) -> None:
    run("init", "-m", "gated", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    batch(run, "img", "txt", "-o", "out", "-a", "att.safetensors", "--limit", 1)
    facts = json.loads(run("inspect", "att.safetensors", "--json").stdout)
    assert facts["heads"] == 4
    assert [facts["text_rows"], facts["image_rows"]] == facts["tensors"][0]["shape"][1:]


def test_an_id_cannot_be_the_name_of_a_gate(run: Run, many: Any, tmp_path: Path) -> None:
    run("init", "-m", "gated", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    for side in ("img", "txt"):
        (tmp_path / side / "b.npy").rename(tmp_path / side / "c.gate.npy")
    both = ["img", "txt", "-o", "out.safetensors"]
    batch(run, *both)
    told = batch(run, *both, "-a", "a.safetensors", "--overwrite", "--json", code=4).stdout
    assert b"ends like the name of a gate" in told
    assert "c.gate" not in load_file(tmp_path / "out.safetensors")


def test_stacks_match_by_row_number(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q")
    images, texts = rng.standard_normal((12, D), np.float32), rng.standard_normal((11, 3, D), np.float32)
    np.save(tmp_path / "i.npy", images)
    np.save(tmp_path / "t.npy", texts.astype(">f4"))
    done = batch(run, "i.npy", "t.npy", "-o", "out.npy", "-j", 2, "--json", code=4)  # image 11 has no text
    out = np.load(tmp_path / "out.npy")
    for side in ("img", "txt"):
        (tmp_path / side).mkdir()
    for row in (0, 10):
        np.save(tmp_path / "img" / f"{row}.npy", images[row])
        np.save(tmp_path / "txt" / f"{row}.npy", texts[row])
        assert expected(run, tmp_path, [str(row)])[str(row)] == as_npy(out[row])
    assert [json.loads(line)["id"] for line in done.stdout.splitlines() if b'"missing"' in line] == ["11"]
    batch(run, "i.npy", "txt", "-o", "mixed", code=4)
    assert results(tmp_path / "mixed").keys() == {"0", "10"}


def test_one_folder_with_patterns(run: Run, many: Any, tmp_path: Path) -> None:
    for id, (image, text) in many.items():
        (tmp_path / "both" / id).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "both" / f"{id}.image.npy", image)
        np.save(tmp_path / "both" / f"{id}.text.npy", text)
    batch(run, "both", "--image-pattern", "{id}.image.npy", "--text-pattern", "{id}.text.npy", "-o", "both/out")
    assert results(tmp_path / "both" / "out") == expected(run, tmp_path)
    batch(run, "both", "--image-pattern", "{id}.image.npy", "--text-pattern", "{id}.text.npy", "-o", "both/out")
    assert "out" not in {id.split("/")[0] for id in results(tmp_path / "both" / "out")}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_manifests(run: Run, many: Any, tmp_path: Path, form: str) -> None:
    rows = [{"id": f"x/{id}", "image": f"img/{id}.npy", "text": f"txt/{id}.npy"} for id in many]
    text = io.StringIO()
    if form == "jsonl":
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    else:
        writer = csv.DictWriter(text, ["text", "id", "image"], delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / f"m.{form}").write_text(text.getvalue())
    wanted = {f"x/{id}": data for id, data in expected(run, tmp_path).items()}
    batch(run, "--manifest", f"m.{form}", "-o", "file")
    assert results(tmp_path / "file") == wanted
    batch(run, "--manifest", "-", "-o", "stdin", "-j", 2, input=text.getvalue().encode())
    assert results(tmp_path / "stdin") == wanted


def test_a_bad_line_fails_alone_and_is_numbered(run: Run, many: Any, tmp_path: Path) -> None:
    lines = ["id,image,text", "b,img/b.npy,txt/b.npy", "nonsense", "b,img/b.npy,txt/b.npy", "q,img/b.npy,txt/none.npy"]
    done = batch(run, "--manifest", "-", "-o", "out", "--json", code=4, input="\n".join(lines).encode())
    told = {record["id"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert told["b"]["status"] == "fused"
    assert "line 3" in told["line 3"]["message"]
    assert "line 2" in told["line 4"]["message"]
    assert "no such file" in told["q"]["message"]
    assert results(tmp_path / "out").keys() == {"b"}
    assert run("batch", "--manifest", "-", "-o", "o2", code=3, input=b"a,b\n1,2\n").stdout == b""


def test_an_endless_manifest_and_a_listener_that_leaves(many: Any, tmp_path: Path) -> None:
    command = (
        'i=0; while :; do i=$((i+1)); echo \'{"id":"\'$i\'","image":"img/b.npy","text":"txt/b.npy"}\'; done'
        f" | {' '.join(FUSECLI)} batch --manifest - -o out -w w.safetensors --json -q | head -n 3"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == b""


def test_lines_are_fused_as_they_arrive(many: Any, tmp_path: Path) -> None:
    command = [*FUSECLI, "batch", "--manifest", "-", "-o", "out", "-w", "w.safetensors", "--json", "-q"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        for id in ("b", "animals/ant"):
            child.stdin.write(
                json.dumps({"id": id, "image": f"img/{id}.npy", "text": f"txt/{id}.npy"}).encode() + b"\n"
            )
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["id"] == id  # while the next line is not there yet
        child.stdin.close()
        assert child.wait(timeout=60) == 0


def test_shards_are_disjoint_and_a_plain_run_sees_them(run: Run, many: Any, tmp_path: Path) -> None:
    seen: list[str] = []
    for part in (1, 2, 3):
        done = batch(run, "img", "txt", "-o", "out", "--shard", f"{part}/3", "--json")
        seen += [json.loads(line)["id"] for line in done.stdout.splitlines()]
        batch(run, "img", "txt", "-o", "packed.safetensors", "--shard", f"{part}/3")
    assert sorted(seen) == sorted(IDS)
    wanted = expected(run, tmp_path)
    assert results(tmp_path / "out") == wanted
    told = batch(run, "img", "txt", "-o", "out", "--json").stdout.splitlines()
    assert {json.loads(line)["status"] for line in told} == {"skipped"}
    assert not (tmp_path / "packed.safetensors").exists()
    batch(run, "img", "txt", "-o", "packed.safetensors")
    packed = load_file(tmp_path / "packed.safetensors")
    assert {id: as_npy(array) for id, array in packed.items()} == wanted


# Faults


def _spoil(folder: Path, id: str, how: str) -> None:
    path = folder / "txt" / f"{id}.npy"
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
        path.symlink_to("nowhere")
    else:
        wide, nan = np.zeros((2, D + 1), np.float32), np.full((2, D), np.nan, np.float32)
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[:-5],
                "random": bytes(range(200)),
                "pickle": b"\x80\x04N.",
                "wide": as_npy(wide),
                "nan": as_npy(nan),
                "integers": as_npy(np.ones((2, D), np.int64)),
            }[how]
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_pairs_fail_alone(run: Run, many: Any, tmp_path: Path, workers: int) -> None:
    wanted = expected(run, tmp_path)
    ways = ["empty", "cut", "random", "pickle", "wide", "nan", "integers", "gone"]
    for id, how in zip(IDS, ways, strict=False):
        _spoil(tmp_path, id, how)
    done = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "-j", workers, "--json", code=4)
    told = {record["id"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert results(tmp_path / "out") == {"z.2": wanted["z.2"]}
    for id in IDS[:-1]:
        assert told[id]["status"] == "failed"
        assert f"txt/{id}.npy" in told[id]["message"]
        assert "cannot be opened" not in told[id]["message"]
    assert re.search(rb"failed +1  not finite: z\.0\n", done.stderr)


@pytest.mark.parametrize("id", ["../x", "/tmp/x", "a/../../x", "a//b", ".fusecli/x", "x" * 300, "a/", "."])
def test_an_id_cannot_leave_the_output(run: Run, many: Any, tmp_path: Path, id: str) -> None:
    rows = [{"id": name, "image": "img/b.npy", "text": "txt/b.npy"} for name in (id, "good")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    before = set(tmp_path.rglob("*"))
    done = batch(run, "--manifest", "-", "-o", "deep/out", "--json", code=4, input=lines.encode())
    assert statuses(done) == {id: "failed", "good": "fused"}
    new = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before}
    assert {path for path in new if ".fusecli" not in path} == {"deep", "deep/out", "deep/out/good.npy"}


def test_links_in_the_output_are_refused(run: Run, many: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "animals").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "b.npy").symlink_to(tmp_path / "victim")
    told = statuses(batch(run, "img", "txt", "-o", "out", "--json", code=4))
    assert {id for id, status in told.items() if status == "failed"} == {"b", "animals/ant", "animals/fish/seahorse"}
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "victim").exists()


def test_a_side_that_is_missing(run: Run, many: Any, tmp_path: Path) -> None:
    for id in IDS[3:]:
        (tmp_path / "img" / f"{id}.npy").unlink()
    done = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", code=4)
    assert b"no image" in done.stderr
    assert results(tmp_path / "out") == expected(run, tmp_path, IDS[:3])
    batch(run, "img", "txt", "-o", "out", "--allow-missing")
    ledger = (tmp_path / "out" / ".fusecli" / "ledger.jsonl").read_text()
    assert ledger.count('"missing": "') == len(IDS[3:])  # however often it is looked for
    nothing = batch(run, "img/animals", "txt", "-o", "o2", code=3).stderr.decode()
    assert "ant" in nothing
    assert "b" in nothing
    assert not (tmp_path / "o2").exists()


def test_a_dry_run_writes_nothing(run: Run, many: Any, tmp_path: Path) -> None:
    (tmp_path / "img" / "b.npy").unlink()
    done = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--dry-run")
    assert b"8 pairs: 0 done, 0 failed or incomplete before, 8 to do" in done.stderr
    assert b"no image for b" in done.stderr
    assert not (tmp_path / "out").exists()


def test_fail_fast_stops_and_says_why(run: Run, many: Any, tmp_path: Path) -> None:
    _spoil(tmp_path, "animals/ant", "cut")
    done = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "-j", 1, "--fail-fast", code=4)
    assert b"stopped at the first failure" in done.stderr
    assert len(results(tmp_path / "out")) < len(IDS) - 1


def test_the_output_cannot_be_written(run: Run, many: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert b"is a file" in batch(run, "img", "txt", "-o", "file", code=2).stderr
    assert b"also an input" in batch(run, "img", "txt", "-o", "txt", code=2).stderr
    assert b"error:" in batch(run, "img", "txt", "-o", "/proc/fused", code=1).stderr


def test_two_runs_at_once(run: Run, many: Any, tmp_path: Path) -> None:
    command = [*FUSECLI, "batch", "--manifest", "-", "-o", "out", "-w", "w.safetensors", "--json", "-q"]
    line = json.dumps({"id": "b", "image": "img/b.npy", "text": "txt/b.npy"}).encode() + b"\n"
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(line)
        child.stdin.flush()
        child.stdout.readline()
        assert b"another run is writing here" in batch(run, "--manifest", "-", "-o", "out", code=1, input=line).stderr
        child.stdin.close()
        assert child.wait(timeout=60) == 0
    batch(run, "--manifest", "-", "-o", "out", input=line)


def test_a_gpu_gets_whole_items_and_workers_get_equal_ones() -> None:
    from types import SimpleNamespace

    from fusecli import checkpoint
    from fusecli.batch.feed import Pairs
    from fusecli.batch.plan import ITEM_PAIRS
    from fusecli.batch.request import Request
    from fusecli.batch.run import _feed

    ids = [str(k) for k in range(1000)]
    unread: Any = SimpleNamespace(path="x", key=None)
    nothing: Any = SimpleNamespace(pieces=lambda _: None, undone=None)

    def first(**asked: Any) -> int:
        request = Request(checkpoint.init(8, 1), "out", workers=16, **asked)
        feed: Any = _feed(request, Pairs(ids, lambda _: (unread, unread)), nothing, nothing, nothing)
        return len(feed.take())

    assert first(device="cuda") == ITEM_PAIRS
    assert first() * 16 <= 1000
    assert first(limit=64) * 16 <= 64
