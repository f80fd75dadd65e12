from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fusecli import fuse, init, load
from tests.conftest import FUSECLI, Run, loaded_by
from tests.oracle import article, features


def test_one_pair(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    image, text = pair
    done = run("fuse", "regions.npy", "txt.npy", "-o", "out.npy", "-a", "att.safetensors", "--json")
    fused, attended = fuse(init(), image, text, need_weights=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), fused)
    np.testing.assert_array_equal(load_file(tmp_path / "att.safetensors")["attention"], attended)
    told = json.loads(done.stdout)
    assert told["shape"] == [5, 768]
    assert (told["image"], told["text"], told["num_heads"]) == ([16, 768], [5, 768], 8)
    assert b"untrained" in done.stderr


def test_what_the_user_should_know_is_said_and_quiet_is_quiet(run: Run, pair: tuple[Any, Any]) -> None:
    loud = run("fuse", "img.npy", "txt.npy", "-o", "out.npy")
    assert b"one image row" in loud.stderr
    assert b"untrained weights" in loud.stderr
    assert run("fuse", "img.npy", "txt.npy", "-o", "out.npy", "-q").stderr == b""
    assert loud.stdout == b""


@pytest.mark.parametrize("mean", [True, False])
def test_attention_in_blocks_and_as_a_mean(
    run: Run, pair: tuple[Any, Any], tmp_path: Path, rng: np.random.Generator, mean: bool
) -> None:
    text = rng.standard_normal((20_000, 768), dtype=np.float32)
    np.save(tmp_path / "long.npy", text)
    flags = ["--attention-mean"] if mean else []
    run("fuse", "regions.npy", "long.npy", "-o", "out.npy", "-a", "att.npy", *flags)
    fused, attended = fuse(init(), pair[0], text, need_weights=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), fused, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "att.npy"), attended.mean(0) if mean else attended, atol=1e-6)


@pytest.mark.parametrize("stored", ["float16", "float32", "float64", "bfloat16"])
def test_the_output_is_stored_as_the_text_is(run: Run, pair: tuple[Any, Any], tmp_path: Path, stored: str) -> None:
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored)
    save_file({"text": pair[1].astype(dtype), "image": pair[0], "other": pair[0][:2]}, tmp_path / "pair.safetensors")
    run("fuse", "pair.safetensors", "pair.safetensors", "-o", "out.safetensors")
    run("fuse", "pair.safetensors", "pair.safetensors", "-o", "out.npy", "--dtype", "float64", "--text-key", "text")
    assert load_file(tmp_path / "out.safetensors")["fused"].dtype == dtype
    assert np.load(tmp_path / "out.npy").dtype == np.float64


def test_a_torch_checkpoint_goes_through_convert(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    module = article(48, 4, text_dim=40, image_dim=56)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    image, text = features(rng, 6, 56), features(rng, 9, 40)
    np.save(tmp_path / "i.npy", image)
    np.save(tmp_path / "t.npy", text)
    run("convert", "model.pt", "-o", "w.safetensors", "--num-heads", 4)
    run("fuse", "i.npy", "t.npy", "-o", "out.npy", "-w", "w.safetensors")
    expected = module(torch.from_numpy(image), torch.from_numpy(text))[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_init_writes_the_same_bytes_and_weights_come_from_the_environment(
    run: Run, pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        told = json.loads(run("init", "-o", f"{name}.safetensors", "--seed", 9, "--num-heads", 12, "--json").stdout)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert told["parameters"] == load(tmp_path / "a.safetensors").num_parameters
    env = {**os.environ, "FUSECLI_WEIGHTS": "a.safetensors"}
    subprocess.run([*FUSECLI, "fuse", "regions.npy", "txt.npy", "-o", "o.npy"], cwd=tmp_path, env=env, check=True)
    run("fuse", "regions.npy", "txt.npy", "-o", "p.npy", "-w", "b.safetensors")
    assert (tmp_path / "o.npy").read_bytes() == (tmp_path / "p.npy").read_bytes()
    # Not equal: here OpenBLAS may take several threads, and rounds differently.
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), fuse(init(768, 12, seed=9), *pair), atol=1e-6)


def test_inspect_says_what_files_are(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--identity")
    run("fuse", "regions.npy", "txt.npy", "-w", "w.safetensors", "-o", "o.npy", "-a", "att.npy", "-q")
    bad = pair[1].copy()
    bad[2, 3] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    lines = run("inspect", "w.safetensors", "att.npy", "bad.npy", "--json").stdout.splitlines()
    weights, attention, features = map(json.loads, lines)
    assert (weights["kind"], weights["num_heads"], weights["parameters"]) == ("checkpoint", 1, 3_543_552)
    assert (attention["kind"], attention["heads"], attention["image_rows"]) == ("attention", 1, 16)
    assert features["tensors"][0]["nonfinite"] == 1
    norms = np.linalg.norm(np.delete(pair[1], 2, axis=0), axis=1)
    assert features["tensors"][0]["norms"]["max"] == pytest.approx(norms.max())
    shown = run("inspect", "w.safetensors", "regions.npy").stdout.decode()
    assert "text_proj.weight" in shown
    assert "[16, 768]" in shown


# Errors


BAD: dict[str, Callable[[Path, Any], Any]] = {
    "missing": lambda path, x: None,
    "empty": lambda path, x: path.write_bytes(b""),
    "directory": lambda path, x: path.mkdir(),
    "cut": lambda path, x: path.write_bytes(_saved(x)[:400]),
    "random": lambda path, x: path.write_bytes(bytes(range(256)) * 9),
    "integers": lambda path, x: np.save(path, x.astype(np.int64)),
    "complex": lambda path, x: np.save(path, x.astype(np.complex64)),
    "objects": lambda path, x: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "strings": lambda path, x: np.save(path, np.array(["a"])),
    "records": lambda path, x: np.save(path, np.zeros(3, [("a", "<f4")])),
    "nan": lambda path, x: np.save(path, np.where(x == x[0, 0], np.nan, x)),
    "inf": lambda path, x: np.save(path, np.where(x == x[0, 0], np.inf, x)),
    "narrow": lambda path, x: np.save(path, x[:, :-1]),
    "no rows": lambda path, x: np.save(path, x[:0]),
    "no axes": lambda path, x: np.save(path, np.float32(3)),
    "4-D": lambda path, x: np.save(path, x[None, None]),
    "two texts": lambda path, x: np.save(path, np.stack([x, x])),
}


def _saved(x: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_and_nothing_is_written(run: Run, pair: tuple[Any, Any], tmp_path: Path, kind: str) -> None:
    BAD[kind](tmp_path / "bad.npy", pair[1])
    for image, text in (("bad.npy", "txt.npy"), ("regions.npy", "bad.npy")):
        done = run("fuse", image, text, "-o", "out.npy", "-q", code=3)
        assert done.stderr.startswith(b"error: bad.npy")
        assert len(done.stderr.splitlines()) <= 2
    assert not list(tmp_path.glob("*out.npy*"))


def test_nonfinite_features_pass_when_asked_for(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    BAD["nan"](tmp_path / "bad.npy", pair[1])
    run("fuse", "regions.npy", "bad.npy", "-o", "out.npy", "--allow-nonfinite")
    assert np.isnan(np.load(tmp_path / "out.npy")[0]).all()
    assert np.isfinite(np.load(tmp_path / "out.npy")[1:]).all()


def test_tensors_are_chosen_by_name_and_doubt_is_an_error(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    save_file({"a": pair[0], "b": pair[1]}, tmp_path / "x.safetensors")
    run("fuse", "x.safetensors", "x.safetensors", "--image-key", "a", "--text-key", "b", "-o", "out.npy", "-q")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), fuse(init(), *pair))
    for flags, words in (([], b"--image-key"), (["--image-key", "c"], b"x.safetensors[c]")):
        assert words in run("fuse", "x.safetensors", "txt.npy", *flags, "-o", "out.npy", code=3).stderr
    run("init", "-o", "w.safetensors", "-q")
    for command in (["fuse"], ["fuse", "--image-key", "image"], ["batch"]):
        told = run(*command, "w.safetensors", "txt.npy", "-o", "out.npy", code=3).stderr
        assert b"a checkpoint is given by -w" in told
    told = run("fuse", "regions.npy", "txt.npy", "-w", "x.safetensors", "-o", "out.npy", code=3).stderr
    assert b"x.safetensors[text_proj.weight]: tensor is missing: found a, b" in told
    assert b"assuming" not in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["regions.npy", "txt.npy"],
        ["regions.npy", "txt.npy", "-o", "txt.npy"],
        ["regions.npy", "txt.npy", "-o", "linked.npy"],
        ["regions.npy", "txt.npy", "-o", "hard.npy"],
        ["regions.npy", "txt.npy", "-o", "out.npy", "-a", "out.npy"],
        ["regions.npy", "txt.npy", "-o", "out.txt"],
        ["regions.npy", "txt.npy", "-o", "-", "--json"],
        ["regions.npy", "txt.npy", "-o", "out.npy", "--dtype", "bfloat16"],
        ["regions.npy", "txt.npy", "-o", "out.npy", "--device", "tpu"],
        ["regions.npy", "txt.npy", "-o", "out.npy", "--num-heads", "0"],
    ],
)
def test_usage_errors(run: Run, pair: tuple[Any, Any], tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "linked.npy").symlink_to("txt.npy")
    os.link(tmp_path / "txt.npy", tmp_path / "hard.npy")
    before = (tmp_path / "txt.npy").read_bytes()
    run("fuse", *arguments, code=2)
    assert (tmp_path / "txt.npy").read_bytes() == before


def test_what_cannot_be_written(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    assert b"mkdir -p" in run("fuse", "img.npy", "txt.npy", "-o", "no/out.npy", code=1).stderr
    assert b"No space" in run("fuse", "img.npy", "txt.npy", "-o", "/dev/full", "-q", code=1).stderr
    run("fuse", "img.npy", "txt.npy", "-o", "/dev/null", "-q")
    huge = np.full((1, 768), 1e20, np.float32)
    np.save(tmp_path / "huge.npy", huge)
    assert b"--dtype" in run("fuse", "huge.npy", "txt.npy", "-o", "o.npy", "--dtype", "float16", code=1).stderr
    assert not (tmp_path / "o.npy").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there(run: Run, pair: tuple[Any, Any]) -> None:
    assert b"CUDA" in run("fuse", "img.npy", "txt.npy", "-o", "out.npy", "--device", "cuda", code=1).stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_cuda_gives_the_cpus_numbers(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    run("fuse", "regions.npy", "txt.npy", "-o", "out.npy", "--device", "cuda:0")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), fuse(init(), *pair), atol=1e-5)


# Start-up and memory: what can be counted, not timed


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "img.npy", "txt.npy", "-qo", "o.npy", "-w", "w.safetensors"],
        ["fuse", "img.npy", "txt.npy", "-qo", "o.npy", "-w", "w.safetensors", "--num-heads", "8", "--dtype", "float16"],
        ["--help"],
    ],
)
def test_a_small_run_imports_nothing_heavy(
    run: Run, pair: tuple[Any, Any], tmp_path: Path, arguments: list[str]
) -> None:
    run("init", "-o", "w.safetensors", "-q")
    loaded = loaded_by(tmp_path, *arguments)
    assert "typer" in loaded
    assert not loaded & {"torch", "rich", "pydantic", "safetensors", "ml_dtypes", "hashlib"}


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_threads_sleep_soon_unless_told_otherwise(given: dict[str, str], spins: str | None) -> None:
    code = "import os; from fusecli.cli import main\ntry: main()\nfinally: print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code, "--version"], env=env | given, capture_output=True, check=True)
    assert done.stdout.decode().splitlines()[-1] == str(spins)


@pytest.mark.slow
@pytest.mark.parametrize(("image", "limit"), [("img.npy", 64), ("regions.npy", 300)])
def test_memory_stays_flat_in_the_text(pair: tuple[Any, Any], tmp_path: Path, image: str, limit: int) -> None:
    shape = (300_000, 768)  # 0.9 GB
    text = np.lib.format.open_memmap(tmp_path / "long.npy", "w+", np.float32, shape)
    text[:] = 1
    del text
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", code, *FUSECLI, "fuse", image, "long.npy", "-qo", "out.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=300)
    assert int(done.stdout) <= limit
    assert np.load(tmp_path / "out.npy", mmap_mode="r").shape == shape


# What went wrong once


def test_results_that_overflow_are_an_error(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    for rows in (1, 16):
        np.save(tmp_path / "huge.npy", np.sign(pair[0][:rows]) * np.float32(3e38))
        done = run("fuse", "huge.npy", "txt.npy", "-o", "out.npy", "-q", code=1)
        assert b"does not fit" in done.stderr
        assert not (tmp_path / "out.npy").exists()


def test_an_empty_name_of_weights_is_no_wish_for_untrained_ones(run: Run, pair: tuple[Any, Any]) -> None:
    assert b"--weights" in run("fuse", "img.npy", "txt.npy", "-o", "out.npy", "-w", "", code=2).stderr


def test_inspect_of_anything_readable(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "columns.npy", np.asfortranarray(np.ones((900, 50, 100), np.float32)))
    save_file({"\x1b[31mred": np.ones((2, 3), np.float32), "ids": np.arange(3)}, tmp_path / "x.safetensors")
    assert b"[900, 50, 100]" in run("inspect", "columns.npy").stdout
    shown = run("inspect", "x.safetensors").stdout
    assert b"\x1b" not in shown
    assert b"I64" in shown
    with open("/dev/full", "wb") as full:
        assert b"No space" in run("inspect", "x.safetensors", code=1, stdout=full).stderr


def test_debug_shows_the_traceback(pair: tuple[Any, Any], tmp_path: Path) -> None:
    command = [*FUSECLI, "fuse", "none.npy", "txt.npy", "-o", "out.npy", "--debug"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert b"Traceback" in done.stderr
    assert done.returncode == 3


def test_inspect_of_what_can_be_read_once(run: Run, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", 16, "-q")
    data = (tmp_path / "w.safetensors").read_bytes()
    piped = json.loads(run("inspect", "-", "--json", input=data).stdout)
    assert piped | {"file": "w.safetensors"} == json.loads(run("inspect", "w.safetensors", "--json").stdout)


def test_inspect_says_that_heads_are_assumed(run: Run, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", 24, "--num-heads", 12, "-q")
    save_file(load_file(tmp_path / "w.safetensors"), tmp_path / "bare.safetensors")
    assert b"assuming 8" in run("inspect", "bare.safetensors").stderr
    assert run("inspect", "bare.safetensors", "--num-heads", 12).stderr == b""


def test_inspect_shows_what_is_there_not_what_it_means_to_a_terminal(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / ":smile:.npy", np.zeros((2, 2), "M8[s]"))
    shown = run("inspect", ":smile:.npy").stdout
    assert b":smile:" in shown
    assert b"datetime64[s]" in shown
    header = json.dumps({"[/a]": {"dtype": "[/b]\x1b", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    shown = run("inspect", "x.safetensors").stdout
    assert b"[/a]" in shown
    assert b"\x1b" not in shown


def test_inspect_reads_a_block_at_a_time_whatever_the_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusecli import describe
    from fusecli.formats import Stored

    read, sizes = Stored.read, []

    def counting(stored: Stored, rows: slice | None = None) -> Any:
        block = read(stored, rows)
        sizes.append(block.nbytes)
        return block

    monkeypatch.setattr(describe, "BLOCK", 256)
    monkeypatch.setattr(Stored, "read", counting)
    x = np.random.default_rng(0).standard_normal((2, 40, 8), np.float32)
    for name, array in (("a", x), ("b", x.reshape(-1, 8))):
        np.save(tmp_path / f"{name}.npy", array)
    one, other = (describe.describe(str(tmp_path / f"{name}.npy"))["tensors"][0] for name in "ab")
    assert one["norms"] == other["norms"]
    assert max(sizes) == 256


def test_inspect_tells_norms_whose_squares_do_not_fit(tmp_path: Path) -> None:
    from fusecli.describe import describe

    for scale in (1e200, 1e-200, 1.0):
        np.save(tmp_path / "x.npy", scale * np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]]))
        [told] = describe(str(tmp_path / "x.npy"))["tensors"]
        assert told["norms"] == pytest.approx({"min": 0, "max": 10 * scale, "mean": 5 * scale}, rel=1e-12)


def test_inspect_knows_a_stack_of_attention(tmp_path: Path) -> None:
    from fusecli.describe import describe

    np.save(tmp_path / "x.npy", np.full((7, 2, 3, 4), 0.25))
    told = describe(str(tmp_path / "x.npy"))
    assert (told["pairs"], told["heads"], told["text_rows"], told["image_rows"]) == (7, 2, 3, 4)


@pytest.mark.parametrize("outputs", [("-o", "{}"), ("-o", "out.npy", "-a", "{}")])
def test_a_terminal_gets_no_binary_data_by_any_name(
    outputs: tuple[str, ...], run: Run, pair: Any, tmp_path: Path
) -> None:
    ours, theirs = os.openpty()
    try:
        named = [name.format(os.ttyname(theirs)) for name in outputs]
        assert b"binary data on a terminal" in run("fuse", "img.npy", "txt.npy", *named, "-q", code=2).stderr
    finally:
        os.close(ours)
        os.close(theirs)
    assert not (tmp_path / "out.npy").exists()


def test_an_empty_name_is_no_file(run: Run, pair: Any) -> None:
    for option, rest in (("-a", ()), ("--tokens", ("-a", "a.safetensors"))):
        for command in (("fuse", "regions.npy", "txt.npy", "-o", "o.npy"), ("batch", "img", "txt", "-o", "out")):
            told = run(*command, option, "", *rest, code=2).stderr
            assert b"--attention: " in told if option == "-a" else b"--tokens: " in told
    assert b"--output: is empty" in run("fuse", "regions.npy", "txt.npy", "-o", "", code=2).stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("fuse", "img.npy", "txt.npy", "-o", "."), "is a directory"),
        (("init", "-o", "x.pt"), "hint: -o x.safetensors"),
        (("init", "-o", "-"), "hint: -o fusion.safetensors"),
        (("fuse", "brain.npy", "txt.npy", "-o", "o.npy"), "hint: .npy cannot name bfloat16 and lost it"),
        (("convert", "junk.pt", "-o", "w.safetensors"), "hint: torch.save(model.state_dict(), path)"),
    ],
)
def test_the_way_out_is_told(run: Run, tmp_path: Path, pair: Any, command: tuple[str, ...], told: str) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk, and no weights")
    np.save(tmp_path / "brain.npy", np.ones((1, 768), ml_dtypes.bfloat16))
    assert told in run(*command, code=None).stderr.decode()


def test_a_file_without_a_name_is_called_so(run: Run, pair: Any) -> None:
    for command in (("inspect", ""), ("fuse", "regions.npy", "", "-o", "o.npy")):
        assert b"empty file name" in run(*command, code=3).stderr


def test_a_suffix_may_be_written_large(run: Run, pair: Any, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--method", "gated", "-q")
    for name in ("a.safetensors", "A.SAFETENSORS"):
        run("fuse", "regions.npy", "txt.npy", "-w", "w.safetensors", "-o", "o.npy", "-a", name, "--grid", "4x4", "-q")
    assert (tmp_path / "A.SAFETENSORS").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_no_folder_is_proposed_where_a_file_is(run: Run, pair: Any, tmp_path: Path) -> None:
    assert b"mkdir" in run("fuse", "regions.npy", "txt.npy", "-o", "new/o.npy", code=1).stderr
    assert b"mkdir" not in run("fuse", "regions.npy", "txt.npy", "-o", "img.npy/o.npy", code=1).stderr


def test_a_seed_is_of_no_use_to_what_is_not_drawn(run: Run, tmp_path: Path) -> None:
    assert b"nothing is drawn" in run("init", "-o", "w.safetensors", "--identity", "--seed", 1, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_the_command_can_be_called_twice_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusecli.cli import _app

    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    for _ in range(2):
        _app("inspect")(["inspect", str(tmp_path / "a.npy")], standalone_mode=False)
    assert capsys.readouterr().out.count("features") == 2


def test_features_of_other_widths_are_told_with_weights_that_would_fit(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", np.ones((2, 24), np.float32))
    np.save(tmp_path / "t.npy", np.ones((3, 5), np.float32))
    told = run("fuse", "i.npy", "t.npy", "-o", "o.npy", code=3).stderr.decode()
    hint = told.splitlines()[-1].removeprefix("hint: fusecli ")
    run(*hint.split())
    run("fuse", "i.npy", "t.npy", "-o", "o.npy", "-w", "other.safetensors")
    assert np.load(tmp_path / "o.npy").shape == (3, 5)
    run("init", "-o", "gated.safetensors", "--method", "gated", "--layer-norm", "--feature-dim", 15, "--num-heads", 3)
    told = run("fuse", "i.npy", "t.npy", "-o", "o.npy", "-w", "gated.safetensors", code=3).stderr.decode()
    run(*told.splitlines()[-1].removeprefix("hint: fusecli ").split())
    other = load(tmp_path / "other.safetensors")
    assert (other.config.method, other.config.layer_norm, other.dim) == ("gated", True, 5)
    assert b"swapped" in run("fuse", "t.npy", "i.npy", "-o", "o.npy", "-w", "other.safetensors", code=3).stderr


def test_no_rows_before_the_grid_is_something_said(run: Run, pair: Any) -> None:
    command = ("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "--skip-rows", 0)
    assert b"add --attention" in run(*command, code=2).stderr
    assert b"only .safetensors" in run(*command, "-a", "a.npy", code=2).stderr
    run(*command, "-a", "a.safetensors")


def test_a_format_that_the_name_denies_is_refused(run: Run, pair: Any) -> None:
    command = ("fuse", "img.npy", "txt.npy", "-o")
    assert b"another format" in run(*command, "o.npy", "--format", "safetensors", code=2).stderr
    run(*command, "o.npy", "--format", "npy")
