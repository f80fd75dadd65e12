"""Training: what is refused, and what is said of it."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusecli.cli.train import train as command
from fusecli.errors import UsageError
from tests.conftest import FUSECLI, Learn, Run, loaded_by
from tests.lessons import QUICK, D, is_held_out


def test_a_loss_that_diverges_stops_and_says_where(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    for norm in ("--no-layer-norm", "--layer-norm"):
        told = learn("--labels", "labels.csv", "--lr", 1e30, norm, code=1)
        assert "step" in told
        assert "diverged; no epoch bettered the weights before it, so none are written" in told
        assert "hint: a lower --lr than 1e+30" in told
        assert ("or --layer-norm" in told) == (norm == "--no-layer-norm")
        assert not (tmp_path / "f.state.pt").exists()
        assert not (tmp_path / "f.safetensors").exists()
    told = learn("--labels", "labels.csv", "--weight-decay", 1e9, code=1)
    assert "hint: a lower --weight-decay than 1e+09" in told


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ("a/000,x,0,1\n", (), "duplicate id"),
        ("nowhere,x,0,1\n", (), "1 labelled, without a pair"),
        ("", ("--label-column", "kind"), "no such column"),
        ("", ("--task", "regression"), "not a number"),
    ],
)
def test_bad_labels_are_told_of(
    change: str, options: Any, told: str, learn: Learn, lesson: list[str], tmp_path: Path
) -> None:
    with (tmp_path / "labels.csv").open("a") as file:
        file.write(change)
    assert told in learn("--labels", "labels.csv", *options, code=3)


def test_ids_without_label_are_listed_or_passed_over(run: Run, learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(lines[:-7]) + "\n")
    (tmp_path / "txt" / f"{lesson[0]}.npy").unlink()
    told = learn("--labels", "labels.csv", code=3)
    assert f"7 ids without label: {sorted(lesson[-7:])[0]}" in told
    assert f"1 id without text: {lesson[0]}" in told
    assert "labelled" not in told  # that one has been told of
    (tmp_path / "labels.csv").write_text("\n".join([*lines[:-7], *(f"{id},,," for id in lesson[-7:])]))
    assert "7 ids without label" in learn("--labels", "labels.csv", code=3)
    learn("--labels", "labels.csv", "--allow-missing", "--epochs", 1)
    assert b"found the head of a training" in run("show", "f.head.safetensors", code=3).stderr


def test_labels_may_have_blanks_behind_commas(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace(",", ", "))
    learn("--labels", "labels.csv", "--epochs", 1)


def test_labels_of_other_ids_are_shown_beside_those_of_the_pairs(
    learn: Learn, lesson: list[str], tmp_path: Path
) -> None:
    head, *lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([head, *(line.replace(",", ".npy,", 1) for line in lines)]))
    told = learn("--labels", "labels.csv", code=3)
    assert "no label belongs to a pair" in told
    assert ".npy' among the labels" in told


def test_one_image_row_that_forgets_the_text_is_told_of(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side, rows in (("img", 1), ("txt", 2)):
        pairs = {str(k): rng.standard_normal((rows, 8), np.float32) for k in range(100)}
        save_file(pairs, tmp_path / f"{side}.safetensors")
    options = ("-m", "attention", "--num-heads", 2, "--epochs", 1, "-o", "f.safetensors")
    told = run("train", "img.safetensors", "txt.safetensors", *options).stderr
    assert b"100 of the pairs: one image row" in told


def test_one_class_only(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{id},x\n" for id in lesson))
    assert "only one label" in learn("--labels", "labels.csv", code=3)


def test_labels_that_no_two_pairs_have_are_no_classes(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{id},{id}\n" for id in lesson))
    assert "are these classes, or numbers?" in learn("--labels", "labels.csv", code=3)


@pytest.mark.parametrize("bad", [np.full((2, D), np.nan, np.float32), np.ones((2, D + 1), np.float32)])
def test_bad_features_are_named(bad: Any, learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "img" / f"{lesson[5]}.npy", bad)
    assert f"{lesson[5]}.npy" in learn("--labels", "labels.csv", code=3)


def test_three_pairs_are_too_few(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(lines[:4]) + "\n")
    assert "too few pairs" in learn("--labels", "labels.csv", "--allow-missing", code=3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--labels", "labels.csv", "--objective", "match"), "--objective"),
        (("--manifest", "-"), "stdin"),
        (("--validation", 0.5, "--held-out", 0.5), "nothing is left"),
        (("--method", "concat", "--gate", "tanh"), "--gate: only for --method gated: found --method concat"),
        (("--labels", "f.log.jsonl"), "also an input"),
        (("--labels", ""), "--labels: is empty"),
        (("--task", "regression"), "there are no labels"),
        (("--label-smoothing", 0.2), "there are no labels"),
        (("--label-column", "other"), "there are no labels"),
        (("--text-dropout", 0.2), "there are no labels"),
        (("--labels", "labels.csv", "--task", "regression", "--label-smoothing", 0.2), "no classes"),
        (("--held-out", 0), "0.01"),
        (("--lr", "inf"), "--lr: is infinite"),
        (("--resume", "--overwrite"), "leave one of them out"),
        (("-w", "w.safetensors", "--no-layer-norm"), "the checkpoint brings its own"),
        (("-w", "w.safetensors", "--dropout", 0), "the checkpoint brings its own"),
        (("--num-heads", 5), "heads do not divide"),
    ],
)
def test_options_that_contradict_each_other(options: Any, told: str, run: Run, lesson: list[str]) -> None:
    sides = () if "--manifest" in options else ("img", "txt")
    assert told in run("train", *sides, "-o", "f.safetensors", *options, code=2).stderr.decode()


@pytest.mark.parametrize(
    ("options", "code"),
    [(("--objective", "match"), 2), (("--label-column", "kind"), 3), (("--resume", "--overwrite"), 2), ((), 2)],
)
def test_what_is_wrong_is_told_before_torch_is_loaded(
    options: Any, code: int, lesson: list[str], tmp_path: Path
) -> None:
    (tmp_path / "f.state.pt").touch()  # an unfinished run
    command = ("train", "img", "txt", "-o", "f.safetensors", "--labels", "labels.csv", *options)
    assert "torch" not in loaded_by(tmp_path, *command, code=code)


def test_an_output_that_is_an_input_behind_a_link_is_refused(run: Run, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / f"img/{lesson[0]}.npy").rename(tmp_path / "f.safetensors")
    (tmp_path / f"img/{lesson[0]}.npy").symlink_to(tmp_path / "f.safetensors")
    before = (tmp_path / "f.safetensors").read_bytes()
    assert "also an input" in run("train", "img", "txt", "-o", "f.safetensors", code=2).stderr.decode()
    assert (tmp_path / "f.safetensors").read_bytes() == before


def test_an_output_among_the_inputs_is_refused(run: Run, lesson: list[str]) -> None:
    told = run("train", "img", "txt", "-o", f"img/{lesson[0]}.safetensors", code=2).stderr.decode()
    assert "among the inputs" in told
    told = run("train", "img", "txt", "-o", "none/f.safetensors", code=1).stderr.decode()
    assert "no such folder" in told
    assert "hint: mkdir -p" in told


def test_labels_that_no_pair_to_train_on_has_are_told_of(run: Run, lesson: list[str], tmp_path: Path) -> None:
    held = next(id for id in lesson if is_held_out(id))
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace(f"{held},", f"{held},new"))
    options = ("-o", "f.safetensors", *QUICK, "--labels", "labels.csv", "--epochs", 1)
    told = run("train", "img", "txt", *options).stderr.decode()
    assert "1 of the pairs held out or for validation have a label that none to train on has" in told


def test_a_training_that_diverges_leaves_an_earlier_checkpoint(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    learn("--labels", "labels.csv", "--epochs", 2)
    before = (tmp_path / "f.safetensors").read_bytes()
    learn("--labels", "labels.csv", "--lr", 1e30, code=1)
    assert (tmp_path / "f.safetensors").read_bytes() == before


@pytest.mark.parametrize("other", ["classes", "labels", "features"])
def test_other_data_are_no_run_to_go_on_with(other: str, learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    command = [*FUSECLI, "train", "img", "txt", "-o", "f.safetensors", *map(str, QUICK), "--labels", "labels.csv"]
    with subprocess.Popen([*command, "--epochs", "50"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "--resume" in process.stderr.read()
    assert process.returncode == 130
    text = (tmp_path / "labels.csv").read_text()
    if other == "classes":
        (tmp_path / "labels.csv").write_text(text.replace(",x,", ",w,"))
    elif other == "labels":
        (tmp_path / "labels.csv").write_text(text.replace(",x,", ",w,").replace(",y,", ",x,").replace(",w,", ",y,"))
    else:
        np.save(tmp_path / f"img/{lesson[0]}.npy", np.ones((2, D), np.float32))
    told = learn("--labels", "labels.csv", "--epochs", 50, "--resume", code=2)
    assert "other data or options" in told
    assert {"classes": "found classes with x, ", "labels": "labels ", "features": "features "}[other] in told


def test_a_run_that_an_error_stops_says_what_is_kept(
    lesson: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusecli.training.run.compare", no_memory)
    with pytest.raises(MemoryError):
        command("img", "txt", "f.safetensors", epochs=1)
    assert "run the same command with --resume to continue" in capsys.readouterr().err
    with pytest.raises(UsageError, match="there is an unfinished run"):
        command("img", "txt", "f.safetensors", epochs=1)
    assert "to continue" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [1e60, 3e38])
def test_numbers_too_large_are_no_perfect_match(
    size: float, run: Run, learn: Learn, lesson: list[str], tmp_path: Path
) -> None:
    for id in lesson:
        np.save(tmp_path / f"img/{id}.npy", np.full((2, D), size, np.float64 if size > 1e39 else np.float32))
    run("train", "img", "txt", "-o", "f.safetensors", *QUICK, code=3)
    told = learn("--labels", "labels.csv", code=3)
    assert f"{lesson[0]}.npy: numbers too large to learn from: found {size:.3g}, wanted at most 1e+15" in told


def test_a_damaged_state_is_told_of(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "f.state.pt").write_bytes(b"junk" * 99)
    told = learn("--labels", "labels.csv", "--resume", code=3)
    assert "not the state of a training" in told
    assert "torch" not in told


def test_no_pair_is_left(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\nnobody,x\n")
    assert "no label belongs to a pair" in learn("--labels", "labels.csv", "--allow-missing", code=3)
