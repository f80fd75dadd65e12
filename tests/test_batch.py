"""``fusecli batch`` as a user runs it: every result is held against what ``fusecli fuse`` writes for that pair."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusecli.formats import npy
from tests.conftest import FUSECLI, Run

D = 32
IDS = ["animals/fish/seahorse", "animals/ant", "b", "c d", "ünï", "z.0", "z.1", "z.10", "z.2"]


@pytest.fixture
def many(tmp_path: Path, rng: np.random.Generator, run: Run) -> dict[str, tuple[Any, Any]]:
    """Pairs by id, as two trees ``img/`` and ``txt/`` with weights ``w.safetensors`` beside them."""
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


def expected(run: Run, folder: Path, ids: Any = IDS, *options: Any) -> dict[str, bytes]:
    """What `fuse` writes for each pair."""
    results = {}
    for id in ids:
        run("fuse", f"img/{id}.npy", f"txt/{id}.npy", "-w", "w.safetensors", "-o", "one.npy", "-q", *options)
        results[id] = (folder / "one.npy").read_bytes()
    return results


def results(folder: Path) -> dict[str, bytes]:
    """What lies in an output folder, by id."""
    paths = [path for path in folder.rglob("*.npy") if ".fusecli" not in path.parts]
    return {str(path.relative_to(folder))[:-4]: path.read_bytes() for path in paths}


def as_npy(array: Any) -> bytes:
    return npy.header("", array.shape, str(array.dtype), {}) + np.ascontiguousarray(array).tobytes()


def batch(run: Run, *args: Any, code: int = 0, **options: Any) -> Any:
    return run("batch", *args, "-w", "w.safetensors", "-q", code=code, **options)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_tree_of_files_gives_what_fuse_gives(run: Run, many: Any, tmp_path: Path, workers: int) -> None:
    batch(run, "img", "txt", "-o", "out", "-j", workers, "-a", "att")
    assert results(tmp_path / "out") == expected(run, tmp_path)
    run("fuse", "img/b.npy", "txt/b.npy", "-w", "w.safetensors", "-o", "one.npy", "-a", "a.npy", "-q")
    assert (tmp_path / "att" / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()
    assert not list((tmp_path / "out").rglob("*tmp*"))


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


# Resuming


def statuses(done: Any) -> dict[str, str]:
    return {record["id"]: record["status"] for record in map(json.loads, done.stdout.splitlines())}


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


def test_other_weights_or_options_are_refused(run: Run, many: Any, tmp_path: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    before = results(tmp_path / "out")
    done = batch(run, "img", "txt", "-o", "out", "--dtype", "float16", code=2)
    assert b"dtype none, wanted dtype float16" in done.stderr
    assert b"--overwrite" in done.stderr
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "--seed", 5, "-q")
    assert b"weights" in batch(run, "img", "txt", "-o", "out", code=2).stderr
    assert results(tmp_path / "out") == before
    batch(run, "img", "txt", "-o", "out", "--overwrite")
    assert results(tmp_path / "out") == expected(run, tmp_path)


def test_retry_failed_takes_only_those(run: Run, many: Any, tmp_path: Path) -> None:
    good = (tmp_path / "txt" / "b.npy").read_bytes()
    (tmp_path / "txt" / "b.npy").write_bytes(good[:-3])
    batch(run, "img", "txt", "-o", "out", "--limit", 4, code=4)
    (tmp_path / "txt" / "b.npy").write_bytes(good)
    told = statuses(batch(run, "img", "txt", "-o", "out", "--retry-failed", "--json"))
    assert [id for id, status in told.items() if status == "fused"] == ["b"]
    assert len(results(tmp_path / "out")) == 4
    assert len(statuses(batch(run, "img", "txt", "-o", "out", "--json"))) == len(IDS)
    assert results(tmp_path / "out") == expected(run, tmp_path)


def test_a_cut_line_in_the_ledger_is_passed_over(run: Run, many: Any, tmp_path: Path) -> None:
    batch(run, "img", "txt", "-o", "out")
    ledger = tmp_path / "out" / ".fusecli" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    told = statuses(batch(run, "img", "txt", "-o", "out", "--json"))
    assert sorted(told.values()) == ["fused", *["skipped"] * (len(IDS) - 1)]
    assert set(statuses(batch(run, "img", "txt", "-o", "out", "--json")).values()) == {"skipped"}


# Faults


def _spoil(folder: Path, id: str, how: str) -> None:
    path = folder / "txt" / f"{id}.npy"
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
        path.symlink_to("nowhere")
    elif how == "folder":
        path.unlink()
        path.mkdir()
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
    assert b"not finite: z.0" in done.stderr or b"not finite: z.1" in done.stderr or b"not finite" in done.stderr


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
    nothing = batch(run, "img/animals", "txt", "-o", "o2", code=3).stderr.decode()
    assert "ant" in nothing
    assert "b" in nothing
    assert not (tmp_path / "o2").exists()


def test_a_dry_run_writes_nothing(run: Run, many: Any, tmp_path: Path) -> None:
    (tmp_path / "img" / "b.npy").unlink()
    done = run("batch", "img", "txt", "-o", "out", "-w", "w.safetensors", "--dry-run")
    assert b"8 pairs: 0 done, 0 failed before, 8 to do" in done.stderr
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


# Deaths


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
    for moment in np.random.default_rng(2).uniform(0.2, 0.6, 8):
        with subprocess.Popen(command, cwd=tmp_path) as child:
            time.sleep(moment)
            child.kill()
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
    from fusecli.batch.job import Outcome, Task
    from fusecli.batch.local import Pool, Stop
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
    from fusecli.batch.feed import ListFeed, from_collections
    from fusecli.batch.job import Job, Options
    from fusecli.batch.local import Stop
    from fusecli.batch.plan import match
    from fusecli.batch.store import FolderStore, PartStore
    from fusecli.collections import open_collection

    images, texts = open_collection(str(tmp_path / "img")), open_collection(str(tmp_path / "txt"))
    found = match(images, texts)
    feed = ListFeed(from_collections(images, texts, found), found.both, lambda _: None, 2, None)
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
            time.sleep(0.01)
        child.send_signal(number)
        told = child.stderr.read()
        assert child.wait(timeout=60) == 128 + number
    if number == signal.SIGINT:
        assert b"start the same command again" in told
    assert b"Traceback" not in told
    left = len(results(tmp_path / "out"))
    assert left < 2000
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
