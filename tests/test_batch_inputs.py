"""Where the pairs of a batch come from: odd places and manifests; and no result takes the place of an input."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusecli import load
from fusecli.batch.job import Job, Options, Task
from fusecli.batch.plan import Shard
from fusecli.batch.store import FolderStore
from fusecli.batch.worker import work
from fusecli.collections import Place, open_collection
from tests.batches import FEW, D, batch, expected, results, statuses
from tests.conftest import Run


@pytest.mark.parametrize(
    "places",
    [
        ["-o", "w.safetensors"],
        ["-o", "img/a.npy"],
        ["-o", "img"],
        ["-o", "out", "-a", "out/att"],
        ["-o", "out", "-a", "txt"],
        ["-o", "o.npy", "-a", "o.npy.fusecli"],
        ["-o", "o.npy.fusecli", "-a", "o.npy"],
        ["-o", "out", "--overwrite", "--retry-failed"],
        ["-o", "out", "--dtype", "bfloat16"],
        ["-o", "out", "--dry-run", "--device", "tpu"],
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
    assert b"would replace an input" in batch(run, "--manifest", "m.csv", *places, code=2).stderr
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
    save_file({id: np.load(few / "img" / f"{id}.npy") for id in FEW}, few / "i.safetensors")
    rows = [{"id": id, "image": "i.safetensors", "image_key": id, "text": f"txt/{id}.npy"} for id in FEW]
    (few / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch(run, "--manifest", "m.jsonl", "-o", "out")
    assert results(few / "out") == expected(run, few, FEW)


def _packed(few: Path, name: str, shift: float) -> str:
    save_file({id: np.load(few / "img" / f"{id}.npy") + np.float32(shift) for id in FEW}, few / name)
    os.utime(few / name, (shift, shift))
    return str(few / name)


@pytest.mark.parametrize("how", ["cut", "written again", "put in its place"])
def test_a_packed_file_that_is_another_gives_no_wrong_results(few: Path, how: str) -> None:
    path = _packed(few, "i.safetensors", 0.0)
    images, texts = open_collection(path), open_collection(str(few / "txt"))
    if how == "cut":
        os.truncate(path, os.path.getsize(path) - 4)
        os.utime(path, (0, 0))
    else:
        data = Path(_packed(few, "other.safetensors", 1.0)).read_bytes()
        if how == "written again":
            Path(path).write_bytes(data)
            os.utime(path, (1, 1))
        else:
            os.utime(few / "other.safetensors", (0, 0))
            os.replace(few / "other.safetensors", path)
    (few / "tmp").mkdir()
    job = Job(load(few / "w.safetensors"), Options(), FolderStore(str(few), ".npy", str(few / "tmp")), None)
    (outcome,) = work(job, [Task("f", images.place("f"), texts.place("f"))])
    assert (outcome.status, "changed" in outcome.facts["message"]) == ("failed", True)


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
        assert b"would replace an input" in batch(run, *options, *more, code=2).stderr
    after = {path: path.read_bytes() for path in few.rglob("*") if path.is_file() and ".fusecli" not in path.parts}
    assert after == before


def test_weights_among_the_results_are_not_replaced(run: Run, few: Path) -> None:
    (few / "out").mkdir()
    (few / "w.safetensors").rename(few / "out" / "b.safetensors")
    options = ("-w", "out/b.safetensors", "--suffix", ".safetensors")
    assert b"would replace an input" in run("batch", "img", "txt", "-o", "out", *options, code=2).stderr


def test_a_stream_does_not_end_in_a_file_that_it_was_read_from(run: Run, few: Path) -> None:
    (few / "x.npy").write_bytes((few / "txt" / "a.npy").read_bytes())
    (few / "link.npy").symlink_to("x.npy")
    lines = b"id,image,text\nc,img/c.npy,txt/c.npy\nb,img/b.npy,link.npy\n"
    told = batch(run, "--manifest", "-", "-o", "x.npy", "-j", 1, code=1, input=lines).stderr
    assert b"the result would replace an input" in told
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
        for id in FEW:
            (few / "all" / side / id).parent.mkdir(parents=True, exist_ok=True)
            (few / "all" / side / f"{id}.npy").write_bytes((few / side / f"{id}.npy").read_bytes())
    for status in ("fused", "skipped"):
        done = batch(run, "all/img", "all/txt", "-o", "all", "--json")
        assert statuses(done) == dict.fromkeys(FEW, status)


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


def test_features_of_many_pairs_do_not_come_on_stdin(run: Run, few: Path) -> None:
    for sides in (("-", "txt"), ("img", "-")):
        assert b"cannot come on stdin" in batch(run, *sides, "-o", "out", code=2, stdin=subprocess.DEVNULL).stderr


def test_two_files_for_one_id_are_both_named(run: Run, few: Path) -> None:
    (few / "img" / "a.NPY").write_bytes((few / "img" / "a.npy").read_bytes())
    done = batch(run, "img", "txt", "-o", "out", "--json", code=4)
    assert statuses(done) == dict.fromkeys(FEW, "fused") | {"a": "failed"}
    assert b"a.NPY and a.npy" in done.stdout


def test_keys_for_a_whole_folder_or_manifest(run: Run, few: Path) -> None:
    both = few / "both"
    both.mkdir()
    lines = ["id,image,text,image_key"]
    for id in FEW:
        sides = {name: np.load(few / folder / f"{id}.npy") for name, folder in (("mine", "img"), ("yours", "txt"))}
        save_file({**sides, "image": sides["yours"]}, both / f"{id}.safetensors")
        lines.append(f"{id},both/{id}.safetensors,both/{id}.safetensors,{'image' if id == 'f' else ''}")
    (few / "k.csv").write_text("\n".join(lines) + "\n")
    lines[1] = "a,both/a.safetensors,txt/a.npy,"  # which has no keys
    keys = ("--image-key", "mine", "--text-key", "yours")
    wanted = expected(run, few, FEW)
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
    assert {id: named[id] for id in FEW[:-1]} == {id: wanted[id] for id in FEW[:-1]}
    assert named["f"] != wanted["f"]  # the line's own key counts more
    batch(run, "--manifest", "-", "-o", "piped", *keys, input=(few / "k.csv").read_bytes())
    assert results(few / "piped") == named


def test_a_keyed_file_that_cannot_be_opened_fails_alone(run: Run, few: Path) -> None:
    (few / "knot.safetensors").symlink_to("knot.safetensors")
    lines = "id,image,text,image_key\na,knot.safetensors,txt/a.npy,k\nb,img/b.npy,txt/b.npy,\n"
    done = batch(run, "--manifest", "-", "-o", "out", "--json", code=4, input=lines.encode())
    assert statuses(done) == {"a": "failed", "b": "fused"}
    assert b"knot.safetensors: cannot be opened" in done.stdout


def test_a_lone_inch_mark_is_no_quote(run: Run, few: Path) -> None:
    rows = ["id,image,text", 'x 5" disk,img/a.npy,txt/a.npy', '"y,img/b.npy,txt/b.npy', "z,img/c.npy,txt/c.npy"]
    (few / "m.tsv").write_text("\n".join(rows).replace(",", "\t") + "\n")
    batch(run, "--manifest", "m.tsv", "-o", "out", code=4)
    assert sorted(results(few / "out")) == ['x 5" disk', "z"]


def test_a_value_of_two_lines_gives_no_pair_of_its_rest(run: Run, few: Path) -> None:
    (few / "m.csv").write_text('id,image,text\n"x\ny",img/a.npy,txt/a.npy\n"b",img/b.npy,txt/b.npy\n')
    done = batch(run, "--manifest", "m.csv", "-o", "out", "--json", code=4)
    assert list(results(few / "out")) == ["b"]
    assert done.stdout.count(b'"error": "bad line"') == 2


def test_hidden_files_are_no_features(run: Run, few: Path) -> None:
    for side in ("img", "txt"):
        np.save(few / side / ".x.npy", np.zeros((1, D), np.float32))
    assert sorted(statuses(batch(run, "img", "txt", "-o", "out", "--json"))) == FEW


def test_a_stack_in_fortran_order_is_refused(run: Run, few: Path, rng: np.random.Generator) -> None:
    np.save(few / "i.npy", np.asfortranarray(rng.standard_normal((4, D), np.float32)))
    np.save(few / "t.npy", rng.standard_normal((4, D), np.float32))
    assert b"Fortran" in batch(run, "i.npy", "t.npy", "-o", "out", code=3).stderr


def test_a_wider_text_is_fused_as_alone(run: Run, few: Path) -> None:
    np.save(few / "img" / "a.npy", np.load(few / "img" / "a.npy")[:1])
    np.save(few / "txt" / "a.npy", np.load(few / "txt" / "a.npy").astype(np.float64))
    batch(run, "img", "txt", "-o", "out")
    assert results(few / "out")["a"] == expected(run, few, ["a"])["a"]


def test_after_the_first_failure_an_item_is_over(few: Path) -> None:
    (few / "img" / "b.npy").write_bytes(b"nothing")
    store = FolderStore(str(few / "out"), ".npy", str(few / "tmp"))
    store.begin()
    job = Job(load(few / "w.safetensors"), Options(), store, None, fail_fast=True)
    outcomes = work(job, [Task(id, *(Place(f"{few}/{side}/{id}.npy") for side in ("img", "txt"))) for id in FEW])
    assert [(outcome.id, outcome.status) for outcome in outcomes] == [("a", "fused"), ("b", "failed")]
