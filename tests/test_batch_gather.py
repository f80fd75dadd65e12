"""Many results in one file: packed and stacked, added to, lost, and found again."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusecli.batch.gather import gather, gathered
from fusecli.batch.store import PartStore
from fusecli.formats import open_tensors
from tests.batches import FEW, D, as_npy, batch, expected, statuses
from tests.conftest import Run


def test_what_shards_add_is_gathered_by_the_next_plain_run(run: Run, few: Path) -> None:
    for id in FEW[3:]:
        (few / "img" / f"{id}.npy").rename(few / f"{id}.later")
    batch(run, "img", "txt", "-o", "out.safetensors", "--allow-missing")
    for id in FEW[3:]:
        (few / f"{id}.later").rename(few / "img" / f"{id}.npy")
    for part in (1, 2):
        batch(run, "img", "txt", "-o", "out.safetensors", "--shard", f"{part}/2")
    batch(run, "img", "txt", "-o", "out.safetensors")
    assert sorted(load_file(few / "out.safetensors")) == FEW


def test_a_second_stream_adds_to_what_the_first_has_made(run: Run, few: Path) -> None:
    lines = (few / "m.csv").read_bytes().splitlines(keepends=True)
    batch(run, "--manifest", "-", "-o", "out.safetensors", input=b"".join(lines[:4]))
    batch(run, "--manifest", "-", "-o", "out.safetensors", input=b"".join([lines[0], *lines[4:]]))
    assert {id: as_npy(x) for id, x in load_file(few / "out.safetensors").items()} == expected(run, few, FEW)


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


def test_names_that_a_format_cannot_have(run: Run, few: Path) -> None:
    for name in ("__metadata__", "x\udcff"):
        for side in ("img", "txt"):
            (few / side / f"{name}.npy").write_bytes((few / side / "a.npy").read_bytes())
    told = statuses(batch(run, "img", "txt", "-o", "out.safetensors", "--json", code=4))
    assert {id for id, status in told.items() if status == "failed"} == {"__metadata__", "x\udcff"}
    assert sorted(load_file(few / "out.safetensors")) == FEW


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
        assert sorted(load_file(f"{other}/o.safetensors")) == FEW
        assert sorted(os.listdir(other)) == ["a.npy", "a.npy.fusecli", "o.safetensors", "o.safetensors.fusecli"]


@pytest.mark.parametrize("gone", ["o.safetensors", "a.npy"])
def test_what_is_new_is_not_replaced_by_what_was_gathered(run: Run, few: Path, gone: str) -> None:
    place = ["img", "txt", "-o", "o.safetensors", "-a", "a.npy"]
    batch(run, *place)
    for id in FEW:  # the README: delete the results of inputs that have changed
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


def _gathered_in(order: str, folder: Path) -> PartStore:
    store, told = PartStore(str(folder / "o.npy"), str(folder), "fused"), []  # type: ignore[var-annotated]
    for id in order:
        with store.open(id, (1, 2), "float32", told) as (sink, at):
            sink.put(at, np.full((1, 2), ord(id), np.float32))
    gather(store, lambda: iter(list(zip(order, told, strict=True))))
    return store


def test_parts_stay_until_the_one_file_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        _gathered_in("ab", tmp_path)
    assert not (tmp_path / "o.npy").exists()
    [part] = tmp_path.glob("*.part")
    assert part.stat().st_size == 2 * 2 * 4


def test_stacks_of_one_header_in_two_orders_are_not_mixed_up(tmp_path: Path) -> None:
    index, file = tmp_path / "fused.index", tmp_path / "o.npy"
    _gathered_in("ab", tmp_path)
    old_index, old_file = index.read_bytes(), file.read_bytes()
    store = _gathered_in("ba", tmp_path)
    index.rename(tmp_path / "fused.new.index")  # a run was killed after it had moved the file to its place
    index.write_bytes(old_index)
    assert [id for id, _ in gathered(store)] == ["b", "a"]
    file.rename(tmp_path / "on-its-way")  # and before
    file.write_bytes(old_file)
    assert [id for id, _ in gathered(store)] == ["a", "b"]


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


def test_rows_of_a_stack_count_what_is_missing(run: Run, few: Path) -> None:
    (few / "txt" / "c.npy").unlink()
    batch(run, "img", "txt", "-o", "o.npy", "--allow-missing")
    assert np.isnan(np.load(few / "o.npy")).any((1, 2)).tolist() == [id == "c" for id in FEW]
    lines = (few / "m.csv").read_text().splitlines()
    lines.insert(2, "broken")
    for place in ("m.csv", "-"):
        text = "\n".join([*lines[:5], lines[1], lines[5]]) + "\n"
        (few / "m.csv").write_text(text)
        batch(run, "--manifest", place, "-o", f"{place}.npy", code=4, input=text.encode())
    rows = np.load(few / "m.csv.npy")
    assert np.isnan(rows).any((1, 2)).tolist() == [False, True, False, True, True, False]  # c fails: its text is gone
    np.testing.assert_array_equal(np.load(few / "-.npy"), rows)


def test_rows_of_a_stack_stay_where_a_later_stream_adds_to_it(run: Run, few: Path) -> None:
    def stream(*ids: str, code: int = 0, more: tuple[object, ...] = ()) -> None:
        lines = (id if id.startswith("{") else json.dumps(LINE | {"id": id}).replace("*", id) for id in ids)
        batch(run, "--manifest", "-", "-o", "o.npy", *more, code=code, input="\n".join(lines).encode())

    def holes() -> list[bool]:
        return np.isnan(np.load(few / "o.npy")).any((1, 2)).tolist()  # type: ignore[no-any-return]

    stream("a", "{bad", "x", "b", "c", code=4)
    assert holes() == [False, True, True, False, False]
    before = np.load(few / "o.npy")
    stream("a", "{bad", "x", "b", "c", code=4)
    stream("b", "d", "{bad", "c", code=4)  # a line that is none has no row here: nobody could tell which
    assert holes() == [False, True, True, False, False, False]
    np.testing.assert_array_equal(np.load(few / "o.npy")[:5], before)
    for side in ("img", "txt"):
        (few / side / "x.npy").write_bytes((few / side / "a.npy").read_bytes())
    stream("x", more=("--retry-failed",))
    assert holes() == [False, True, False, False, False, False]


LINE = {"image": "img/*.npy", "text": "txt/*.npy"}


def test_results_of_ids_that_come_back_stand_in_their_places(run: Run, few: Path) -> None:
    for id, there in (("f", False), ("a", False), ("f", True), ("a", True)):
        for path in (few / "img").glob(f"{id}.*"):
            path.rename(few / "img" / (f"{id}.npy" if there else f"{id}.away"))
        batch(run, "img", "txt", "-o", "o.safetensors", "--allow-missing")
    tensors = open_tensors(str(few / "o.safetensors"))
    assert sorted(tensors, key=lambda name: tensors[name].offset) == FEW


def test_a_stream_with_a_limit_has_rows_up_to_it(run: Run, few: Path) -> None:
    batch(run, "--manifest", "-", "-o", "o.npy", "--limit", 2, input=(few / "m.csv").read_bytes())
    assert np.load(few / "o.npy").shape == (2, 3, D)


@pytest.mark.parametrize("name", ["link.safetensors", "link.npy"])
def test_a_link_to_a_file_of_all_results_is_gone_on_with(run: Run, few: Path, name: str) -> None:
    (few / "far").mkdir()
    (few / name).symlink_to(f"far/{name}")
    batch(run, "img", "txt", "-o", name)
    whole = (few / name).read_bytes()
    assert set(statuses(batch(run, "img", "txt", "-o", name, "--limit", 1, "--json")).values()) == {"skipped"}
    assert (few / name).read_bytes() == whole
    assert (few / name).is_symlink()


def test_nothing_is_left_of_pairs_that_failed_half_way(run: Run, few: Path) -> None:
    for id in FEW:
        np.save(few / "txt" / f"{id}.npy", np.full((3, D), 1e30, np.float32))
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--num-heads", 4, "-q", "--residual")
    batch(run, "img", "txt", "-o", "o.safetensors", "--dtype", "float16", code=4)
    assert not list((few / "o.safetensors.fusecli").glob("*.part"))


@pytest.mark.parametrize("output", ["o.safetensors", "out"])
def test_results_that_are_written_anew_keep_their_mode(run: Run, few: Path, output: str) -> None:
    batch(run, "img", "txt", "-o", output, "--limit", 1)
    path = few / output if output != "out" else few / "out" / "a.npy"
    path.chmod(0o600)
    batch(run, "img", "txt", "-o", output, "--overwrite")
    assert path.stat().st_mode & 0o777 == 0o600


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


def test_results_of_another_dtype_do_not_stack(run: Run, few: Path) -> None:
    np.save(few / "txt" / "c.npy", np.load(few / "txt" / "c.npy").astype(np.float16))
    assert b"do not stack" in batch(run, "img", "txt", "-o", "o.npy", code=1).stderr


@pytest.mark.parametrize("name", ["o.npy", "o.safetensors"])
def test_a_gathered_file_that_was_spoiled_is_made_again(run: Run, few: Path, name: str) -> None:
    batch(run, "img", "txt", "-o", name)
    good = (few / name).read_bytes()
    for spoiled in (bytes(len(good)), good + bytes(64)):
        (few / name).write_bytes(spoiled)
        batch(run, "img", "txt", "-o", name)
        assert (few / name).read_bytes() == good


def test_what_shards_add_to_what_is_there_is_gathered(run: Run, few: Path) -> None:
    for options in (["--limit", 3], ["--shard", "1/2"], ["--shard", "2/2"], []):
        batch(run, "img", "txt", "-o", "o.safetensors", *options)
    assert sorted(load_file(few / "o.safetensors")) == FEW


@pytest.mark.parametrize("lost", [False, True])
def test_the_last_row_of_a_stack_is_there_whatever_became_of_it(run: Run, few: Path, lost: bool) -> None:
    last = few / "txt" / f"{FEW[-1]}.npy"
    if lost:
        last.unlink()
    else:
        last.write_bytes(b"nothing")
    batch(run, "img", "txt", "-o", "o.npy", code=4)
    assert len(np.load(few / "o.npy")) == len(FEW)
