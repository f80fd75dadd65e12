"""Dumps of attention say what they are; tokens and grids that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from fusecli.cli.paths import pair_id
from fusecli.errors import FileError, ShapeError
from fusecli.grid import Grid, fitting, grid_of, parse_grid
from tests.batches import IDS, batch
from tests.conftest import Run


def about(path: Path) -> Any:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["fusecli"])


def tokens_file(folder: Path, many: dict[str, tuple[Any, Any]]) -> Path:
    path = folder / "tokens.jsonl"
    lines = [json.dumps({"id": id, "tokens": [f"<{k}>" for k in range(len(text))]}) for id, (_, text) in many.items()]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "tokens", ['["<s>", "é", "\\ud800", "金", "</s>"]', "<s>\né\n\n金\n</s>\n", "<s>\r\né\r\n\r\n金\r\n</s>"]
)
def test_a_dump_of_one_pair_tells_method_heads_grid_tokens_and_weights(
    run: Run, tmp_path: Path, pair: Any, tokens: str
) -> None:
    run("init", "-o", "w.safetensors", "-q")
    (tmp_path / "tokens").write_text(tokens)
    run(
        "fuse",
        "regions.npy",
        "txt.npy",
        "-w",
        "w.safetensors",
        "-o",
        "o.npy",
        "-a",
        "a.safetensors",
        "--tokens",
        "tokens",
    )
    told = about(tmp_path / "a.safetensors")
    fingerprint = json.loads(run("inspect", "--json", "w.safetensors").stdout)["fingerprint"]
    assert (told["method"], told["num_heads"], told["weights"], told["mean"]) == ("attention", 8, fingerprint, False)
    assert (told["ids"], told["grid"], told["skip_rows"]) == (["regions + txt"], [4, 4], 0)
    assert told["tokens"][0] == ["<s>", "é", "\ud800" if tokens[0] == "[" else "", "金", "</s>"]


@pytest.mark.parametrize(
    ("image", "text", "id"),
    [
        ("img/animals/ant.npy", "txt/animals/ant.safetensors", "animals/ant"),
        ("img.npy", "txt.npy", "img + txt"),
        ("a/b.npy", "a/b.safetensors", "b"),
        ("-", "-", "stdin"),
        ("-", "txt.npy", "stdin + txt"),
    ],
)
def test_a_pair_is_called_as_in_a_batch(image: str, text: str, id: str) -> None:
    assert pair_id(image, text) == id


def test_each_dump_of_a_batch_tells_of_its_pair(run: Run, tmp_path: Path, many: dict[str, tuple[Any, Any]]) -> None:
    path = tokens_file(tmp_path, many)
    batch(run, "img", "txt", "-o", "out", "--suffix", ".safetensors", "-a", "att", "--tokens", path)
    for id, (image, text) in many.items():
        told = about(tmp_path / "att" / f"{id}.safetensors")
        assert told["ids"] == [id]
        assert told["tokens"] == [[f"<{k}>" for k in range(len(text))]]
        assert told.get("grid") == {4: [2, 2], 5: [2, 2]}.get(len(image))
    batch(run, "img", "txt", "-o", "out", "--suffix", ".safetensors", "-a", "att", "--tokens", path)  # all there


def test_a_packed_dump_tells_of_all_its_pairs(run: Run, tmp_path: Path, many: dict[str, tuple[Any, Any]]) -> None:
    path = tokens_file(tmp_path, many)
    batch(run, "img", "txt", "-o", "out.safetensors", "-a", "att.safetensors", "--tokens", path)
    told = about(tmp_path / "att.safetensors")
    shown = json.loads(run("inspect", "att.safetensors", "--json").stdout)
    assert (shown["kind"], shown["pairs"], shown["weights"]) == ("attention", len(IDS), told["weights"])
    assert dict(zip(told["ids"], map(len, told["tokens"]), strict=True)) == {id: len(many[id][1]) for id in IDS}
    with safe_open(tmp_path / "att.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(told["ids"])


def test_rows_before_the_grid_are_kept_in_dumps(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "txt").mkdir()
    for side, rows in (("img", 21), ("txt", 3)):  # five rows of another kind, and 4x4
        np.save(tmp_path / side / "a.npy", rng.standard_normal((rows, 768), np.float32))
    options = ["-q", "--skip-rows", "5"]
    run("fuse", "img/a.npy", "txt/a.npy", "-o", "o.npy", "-a", "one.safetensors", *options)
    run("batch", "img", "txt", "-o", "out", "-a", "all.safetensors", *options)
    for dump in ("one.safetensors", "all.safetensors"):
        shown = json.loads(run("show", dump, "--json").stdout)
        assert (shown["grid"], shown["skip_rows"]) == ([4, 4], 5)
    shown = json.loads(run("show", "all.safetensors", "--grid", "2x8", "--json").stdout)
    assert (shown["grid"], shown["skip_rows"]) == ([2, 8], 5)


FOLDERS = ["out", "--suffix", ".safetensors", "-a", "att"]


@pytest.mark.parametrize("place", [FOLDERS, ["out.safetensors", "-a", "att.safetensors"]])
def test_one_bad_list_of_tokens_fails_its_pair_alone(
    run: Run, tmp_path: Path, many: dict[str, tuple[Any, Any]], place: list[str]
) -> None:
    path = tokens_file(tmp_path, many | {"b": (None, [1] * 9)})
    done = batch(run, "img", "txt", "-o", *place, "--tokens", path, "--json", code=4)
    failed = [record for record in map(json.loads, done.stdout.splitlines()) if record["status"] == "failed"]
    assert [record["id"] for record in failed] == ["b"]
    assert "9 tokens" in failed[0]["message"]
    if place == FOLDERS:
        assert not (tmp_path / "out" / "b.safetensors").exists()
    else:
        with safe_open(tmp_path / "out.safetensors", "np") as file:
            assert sorted([*file.keys(), "b"]) == sorted(IDS)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_has_the_dtype_asked_for(run: Run, tmp_path: Path, pair: Any, dtype: str) -> None:
    run("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "-a", "a.npy", "-q")
    run("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "-a", "b.npy", "--attention-dtype", dtype, "-q")
    wanted = np.load(tmp_path / "a.npy").astype(dtype)
    assert np.array_equal(np.load(tmp_path / "b.npy"), wanted)
    assert np.load(tmp_path / "b.npy").dtype == dtype


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tokens", "four"], 3, "4 tokens"),
        (["--tokens", "other.jsonl"], 3, "no tokens for this pair"),
        (["--tokens", "empty"], 3, "no tokens"),
        (["--tokens", "latin"], 3, "not valid UTF-8"),
        (["--tokens", "broken.jsonl"], 3, "line 2"),
        (["--tokens", "absent"], 3, "absent"),
        (["--grid", "3x4"], 3, "--skip-rows 4"),
        (["--grid", "3x6"], 3, "--grid 4x4"),
        (["--grid", "1x6"], 3, "--grid 4x4"),
        (["--skip-rows", "5"], 3, "--grid 4x4"),
        (["--skip-rows", "5", "-a", "a.npy"], 2, "fusecli show"),
        (["--grid", "4"], 2, "7x9"),
        (["--tokens", "four", "-a", "a.npy"], 2, "fusecli show"),
        (["--attention-dtype", "bfloat16", "-a", "a.npy"], 2, "float16"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, pair: Any, options: list[str], code: int, words: str
) -> None:
    (tmp_path / "four").write_text("a\nb\nc\nd")
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "other.jsonl").write_text('{"id": "x", "tokens": ["a"]}')
    (tmp_path / "broken.jsonl").write_text('{"id": "x", "tokens": ["a"]}\n{"id": "y"}')
    done = run("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "-a", "a.safetensors", *options, "-q", code=code)
    assert words in done.stderr.decode()
    assert not {"o.npy", "a.npy", "a.safetensors"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("m", "size", "skip", "grid"),
    [
        (49, None, None, Grid(7, 7, 0)),
        (50, None, None, Grid(7, 7, 1)),
        (63, (7, 9), None, Grid(7, 9, 0)),
        (64, (7, 9), None, Grid(7, 9, 1)),
        (261, None, 5, Grid(16, 16, 5)),
        (261, (16, 16), 5, Grid(16, 16, 5)),
        (1, None, None, None),
        (2, None, None, None),
        (63, None, None, None),
    ],
)
def test_image_rows_form_the_grid_that_encoders_make(m: int, size: Any, skip: int | None, grid: Grid | None) -> None:
    assert grid_of(m, size, skip) == grid


@pytest.mark.parametrize(
    ("m", "size", "skip"), [(63, (7, 8), None), (49, (7, 7), 1), (63, None, 1), (261, (16, 16), 4)]
)
def test_what_is_no_grid_is_told_with_those_that_fit(m: int, size: Any, skip: int | None) -> None:
    with pytest.raises(ShapeError, match=f"M = {m}") as error:
        grid_of(m, size, skip)
    for option in str(error.value.hint).split(", or "):
        words = option.split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        wanted = parse_grid(given["--grid"]) if "--grid" in given else size
        assert grid_of(m, wanted, int(given["--skip-rows"]) if "--skip-rows" in given else skip)


def test_the_squarest_grids_come_first() -> None:
    assert fitting(63)[0] == "--grid 7x9"
    assert "--grid 16x16 --skip-rows 5" in fitting(261)
    assert fitting(67) == ["--grid 6x11"]  # a class row; else a prime
    assert fitting(3) == ["--grid 1x3"]


def test_a_file_of_tokens_says_each_id_once(tmp_path: Path) -> None:
    from fusecli.dumps import read_tokens

    (tmp_path / "t").write_text('{"id": 1, "tokens": ["a"]}\n\n{"id": "1", "tokens": ["b"]}')
    with pytest.raises(FileError, match="line 3"):
        read_tokens(str(tmp_path / "t"))


@pytest.mark.parametrize("tokens", [["{", "b", "}"], ["[", '"', "]"], ["<s>"]])
def test_a_token_may_be_a_brace(tmp_path: Path, tokens: list[str]) -> None:
    from fusecli.dumps import read_tokens

    (tmp_path / "t").write_text("\n".join(tokens) + "\n")
    assert read_tokens(str(tmp_path / "t")).one == tokens


def test_an_object_of_several_lines_is_no_list_of_tokens(tmp_path: Path) -> None:
    from fusecli.dumps import read_tokens

    (tmp_path / "t").write_text('{\n "id": "x",\n "tokens": ["a", "b"]\n}\n')
    with pytest.raises(FileError, match="not a list of tokens"):
        read_tokens(str(tmp_path / "t"))
