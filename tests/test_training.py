"""Training: what is read, what is learned, what is kept, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fusecli
from fusecli import checkpoint
from fusecli.training.data import part_of
from fusecli.training.recipe import FROM_NOTHING, SMOOTHING, WITH_LABELS, WITHOUT_LABELS, pace
from fusecli.training.start import laid_apart
from tests.conftest import FUSECLI, Run

D = 16
PAIRS = 160


@pytest.fixture
def lesson(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """Pairs whose label, one of three, is that of the image row that the text asks for, and ``labels.csv``."""
    centres = 3 * rng.standard_normal((3, D))
    questions = rng.standard_normal((2, D))
    ids = []
    lines = ["id,label,other,number"]
    for k in range(PAIRS):
        id = f"{'ab'[k % 2]}/{k:03}"
        label, asked, other = k % 3, k % 2, int(rng.integers(3))
        rows = np.stack([centres[label if row == asked else other] + 3 * questions[row] for row in (0, 1)])
        image = rows + 0.3 * rng.standard_normal((2, D))
        text = questions[asked] + 0.3 * rng.standard_normal((1 + k % 5, D))
        for side, array in (("img", image), ("txt", text)):
            path = tmp_path / side / f"{id}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array.astype(np.float16 if side == "txt" else np.float32))
        ids.append(id)
        lines.append(f"{id},{'xyz'[label]},{other},{label + 0.5}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return ids


QUICK = ("--num-heads", 2, "--batch-size", 16, "--lr", 1e-3, "--seed", 3)


def _train(run: Run, *options: Any, code: int | None = 0, output: str = "f.safetensors") -> Any:
    done = run("train", "img", "txt", "-o", output, *QUICK, "--json", *options, code=code)
    return json.loads(done.stdout) if code == 0 else done.stderr.decode()


def _scores(facts: dict[str, Any]) -> dict[str, float]:
    return {row["features"]: row["score"] for row in facts["table"]}


@pytest.mark.parametrize("method", ["gated", "transformer"])
def test_a_fusion_learns_what_neither_side_knows(method: str, run: Run, lesson: list[str], tmp_path: Path) -> None:
    facts = _train(run, "--labels", "labels.csv", "--method", method, "--epochs", 30, "--patience", 30)
    scores = _scores(facts)
    assert scores["this fusion, trained"] > scores["both side by side"] + 0.1
    assert "beats side by side" in facts["verdict"]
    assert scores["text only"] < 0.6
    weights = fusecli.load(tmp_path / "f.safetensors")
    assert (weights.config.method, weights.config.layer_norm) == (method, True)
    assert fusecli.fingerprint(weights) == facts["fingerprint"]
    assert all(row["low"] <= row["score"] <= row["high"] for row in facts["table"])


def test_few_held_out_pairs_are_told_of(run: Run, lesson: list[str]) -> None:
    options = ("--labels", "labels.csv", "--epochs", 1, "--json", *QUICK, "--held-out", 0.03)
    done = run("train", "img", "txt", "-o", "f.safetensors", *options)
    count = json.loads(done.stdout)["held_out"]
    assert f"only {count} held-out pairs: too few for a reliable table\n" in done.stderr.decode()


def test_what_is_trained_gives_the_same_numbers_everywhere(run: Run, lesson: list[str], tmp_path: Path) -> None:
    _train(run, "--labels", "labels.csv", "--method", "attention", "--epochs", 2)
    weights = fusecli.load(tmp_path / "f.safetensors")
    run("batch", "img", "txt", "-w", "f.safetensors", "-o", "out", "-q")
    run("fuse", f"img/{lesson[0]}.npy", f"txt/{lesson[0]}.npy", "-w", "f.safetensors", "-o", "one.npy", "-q")
    module = fusecli.ImageTextFusion(D, 2)
    module.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.tensors.items()})
    image, text = (torch.from_numpy(np.load(tmp_path / side / f"{lesson[0]}.npy")).float() for side in ("img", "txt"))
    expected = module(image, text).detach().numpy()
    for path in ("one.npy", f"out/{lesson[0]}.npy"):
        np.testing.assert_allclose(np.load(tmp_path / path), expected, atol=2e-2, rtol=2e-3)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / f"out/{lesson[0]}.npy").read_bytes()


def test_weights_that_nobody_bettered_are_those_it_began_with(run: Run, lesson: list[str], tmp_path: Path) -> None:
    _train(run, "--labels", "labels.csv", "--method", "attention", "--epochs", 1, "--lr", 0)
    run("init", "-o", "drawn.safetensors", "--feature-dim", D, "--num-heads", 2, "--seed", 3)
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "drawn.safetensors").read_bytes()
    given = ("--labels", "labels.csv", "-w", "drawn.safetensors", "--epochs", 1, "--lr", 0)
    run("train", "img", "txt", "-o", "g.safetensors", *given)
    assert (tmp_path / "g.safetensors").read_bytes() == (tmp_path / "drawn.safetensors").read_bytes()


APART: dict[str, dict[str, Any]] = {
    "gated": {"method": "gated"},
    "tanh": {"method": "gated", "gate": "tanh"},
    "residual": {"method": "attention", "residual": True},
    "weighted-sum": {"method": "weighted-sum"},
    "concat": {"method": "concat"},
    "transformer": {"method": "transformer", "num_layers": 2},
}


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("method", APART)
def test_labels_are_learned_from_an_image_that_is_laid_apart_from_the_text(
    method: str, layer_norm: bool, rng: np.random.Generator
) -> None:
    def varied(pairs: int, rows: int, axes: int) -> Any:
        within = np.linalg.qr(rng.standard_normal((D, axes)))[0]
        return (rng.standard_normal((pairs, 1, axes)) @ within.T).repeat(rows, 1).astype(np.float32)

    texts, images = varied(300, 3, 6), 30 * varied(300, 2, 4)  # of 16 directions, 6 and 4
    data: Any = SimpleNamespace(texts=texts, images=images, parts={"train": list(range(200))})
    drawn = checkpoint.orthogonal(D, 2, **APART[method], layer_norm=layer_norm)
    [weights] = laid_apart(drawn, data, [1.0])
    by_text = np.stack([fusecli.fuse(weights, images[0], text).mean(0) for text in texts[200:]])
    by_image = np.stack([fusecli.fuse(weights, image, texts[0]).mean(0) for image in images[200:]])
    by_text, by_image = by_text - by_text.mean(0), by_image - by_image.mean(0)
    overlap = np.linalg.norm(by_text @ by_image.T) / (np.linalg.norm(by_text) * np.linalg.norm(by_image))
    assert overlap < (0.12 if method == "transformer" or layer_norm else 1e-5)
    assert np.var(by_image) == pytest.approx(np.var(by_text), rel=0.5)


def test_how_fast_it_learns_depends_on_what_is_learned_as_the_help_says(
    run: Run, lesson: list[str], tmp_path: Path
) -> None:
    options = ("--labels", "labels.csv", "-m", "attention", "--num-heads", 2, "--epochs", 1)
    run("train", "img", "txt", "-o", "f.safetensors", *options)
    assert json.loads((tmp_path / "f.log.jsonl").read_text().splitlines()[0])["run"]["lr"] == FROM_NOTHING.lr
    assert pace(True, {"method": "attention"}) == FROM_NOTHING
    assert pace(True, {"method": "attention", "residual": True}) == pace(True, {"method": "gated"}) == WITH_LABELS
    assert pace(True, {}) == WITH_LABELS  # a checkpoint is trained further
    assert pace(False, {"method": "attention"}) == WITHOUT_LABELS
    told = " ".join(run("train", "--help").stdout.decode().split())
    for default in (
        f"[default: {WITH_LABELS.epochs} with labels, else {WITHOUT_LABELS.epochs}]",
        f"[default: {WITH_LABELS.patience} with labels, else {WITHOUT_LABELS.patience}]",
        f"[default: {WITH_LABELS.lr}; with labels, for new attention without --residual: {FROM_NOTHING.lr}]",
        f"[default: {SMOOTHING}]",
    ):
        assert default in told


def test_without_labels_it_learns_which_image_belongs_to_a_text(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 1, D)).astype(np.float32)
    np.save(tmp_path / "img.npy", x @ rng.standard_normal((D, D)).astype(np.float32))
    np.save(tmp_path / "txt.npy", x + 0.1 * rng.standard_normal((300, 3, D)).astype(np.float32))
    options = ("--num-heads", 2, "--batch-size", 32, "--lr", 3e-3, "--epochs", 15, "--json")
    facts = json.loads(run("train", "img.npy", "txt.npy", "-o", "f.safetensors", *options).stdout)
    scores = _scores(facts)
    assert facts["score"] == "recall@1"
    assert scores["this fusion, trained"] > 20 * scores["chance"]
    assert scores["text only"] == 0


def test_numbers_can_be_learned(run: Run, lesson: list[str]) -> None:
    options = ("--label-column", "number", "--task", "regression", "--epochs", 20, "--patience", 20)
    scores = _scores(_train(run, "--labels", "labels.csv", *options))
    assert scores["mean"] < 0.2 < scores["this fusion, trained"]


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("f.safetensors", "f.head.safetensors")]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_killed_or_not(run: Run, lesson: list[str], tmp_path: Path) -> None:
    options = ("--labels", "labels.csv", "--method", "transformer", "--epochs", 20, "--patience", 20)
    _train(run, *options)
    whole = _bytes(tmp_path)
    _train(run, *options, "--num-layers", 1)
    assert _bytes(tmp_path) == whole
    for epochs in (3, 9):
        command = [*FUSECLI, "train", "img", "txt", "-o", "f.safetensors", *map(str, (*QUICK, *options))]
        again = ["--resume"] if (tmp_path / "f.state.pt").exists() else []
        with subprocess.Popen([*command, *again], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            for line in process.stderr:
                if line.startswith("epoch") and int(line.split()[1]) >= epochs:
                    process.send_signal(signal.SIGKILL)
                    break
        assert (tmp_path / "f.state.pt").exists()
    told = _train(run, *options, code=2)
    assert "--resume or --overwrite" in told
    other = _train(run, *options, "--resume", "--label-smoothing", 0.1, "--lr", 1e-2, code=2)
    assert "lr 0.001" in other
    _train(run, *options, "--resume")
    assert _bytes(tmp_path) == whole
    log = [json.loads(line) for line in (tmp_path / "f.log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log if "epoch" in line] == list(range(1, 21))
    assert not (tmp_path / "f.state.pt").exists()


def test_a_loss_that_diverges_stops_and_says_where(run: Run, lesson: list[str], tmp_path: Path) -> None:
    for norm in ("--no-layer-norm", "--layer-norm"):
        told = _train(run, "--labels", "labels.csv", "--lr", 1e30, norm, code=1)
        assert "step" in told
        assert "diverged; no epoch bettered the weights before it, so none are written" in told
        assert ("or --layer-norm" in told) == (norm == "--no-layer-norm")
        assert not (tmp_path / "f.state.pt").exists()
        assert not (tmp_path / "f.safetensors").exists()
    told = _train(run, "--labels", "labels.csv", "--weight-decay", 1e9, code=1)
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
    change: str, options: Any, told: str, run: Run, lesson: list[str], tmp_path: Path
) -> None:
    with (tmp_path / "labels.csv").open("a") as file:
        file.write(change)
    assert told in _train(run, "--labels", "labels.csv", *options, code=3)


def test_ids_without_label_are_listed_or_passed_over(run: Run, lesson: list[str], tmp_path: Path) -> None:
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(lines[:-7]) + "\n")
    (tmp_path / "txt" / f"{lesson[0]}.npy").unlink()
    told = _train(run, "--labels", "labels.csv", code=3)
    assert f"7 ids without label: {sorted(lesson[-7:])[0]}" in told
    assert f"1 id without text: {lesson[0]}" in told
    assert "labelled" not in told  # that one has been told of
    _train(run, "--labels", "labels.csv", "--allow-missing", "--epochs", 1)
    assert b"found the head of a training" in run("show", "f.head.safetensors", code=3).stderr


def test_labels_may_have_blanks_behind_commas(run: Run, lesson: list[str], tmp_path: Path) -> None:
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace(",", ", "))
    _train(run, "--labels", "labels.csv", "--epochs", 1)


def test_labels_of_other_ids_are_shown_beside_those_of_the_pairs(run: Run, lesson: list[str], tmp_path: Path) -> None:
    head, *lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([head, *(line.replace(",", ".npy,", 1) for line in lines)]))
    told = _train(run, "--labels", "labels.csv", code=3)
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


def test_one_class_only(run: Run, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{id},x\n" for id in lesson))
    assert "only one label" in _train(run, "--labels", "labels.csv", code=3)


def test_labels_held_out_reach_no_weights(run: Run, lesson: list[str], tmp_path: Path) -> None:
    wrote, scores = [], []
    head, *lines = (tmp_path / "labels.csv").read_text().splitlines()
    for new in (False, True):
        held = [line.replace(",", ",new", 1) if new and _held_out(line.split(",")[0]) else line for line in lines]
        (tmp_path / "labels.csv").write_text("\n".join([head, *held]))
        facts = _train(run, "--labels", "labels.csv", "--epochs", 2, "--class-weights", "balanced")
        scores.append(set(_scores(facts).values()))
        wrote.append([(tmp_path / name).read_bytes() for name in ("f.safetensors", "f.head.safetensors")])
    assert wrote[0] == wrote[1]
    assert scores[0] != {0.0} == scores[1]  # what no pair to train on has, nothing can tell


def _held_out(id: str) -> bool:
    return part_of(id, 0.1, 0.2) == "held-out"


def test_labels_that_no_two_pairs_have_are_no_classes(run: Run, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{id},{id}\n" for id in lesson))
    assert "are these classes, or numbers?" in _train(run, "--labels", "labels.csv", code=3)


@pytest.mark.parametrize("bad", [np.full((2, D), np.nan, np.float32), np.ones((2, D + 1), np.float32)])
def test_bad_features_are_named(bad: Any, run: Run, lesson: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "img" / f"{lesson[5]}.npy", bad)
    assert f"{lesson[5]}.npy" in _train(run, "--labels", "labels.csv", code=3)


def test_three_pairs_are_too_few(run: Run, lesson: list[str], tmp_path: Path) -> None:
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(lines[:4]) + "\n")
    assert "too few pairs" in _train(run, "--labels", "labels.csv", "--allow-missing", code=3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--labels", "labels.csv", "--objective", "match"), "--objective"),
        (("--manifest", "-"), "stdin"),
        (("--validation", 0.5, "--held-out", 0.5), "nothing is left"),
        (("--method", "concat", "--gate", "tanh"), "--gate: only for --method gated: found --method concat"),
        (("--resume",), "no unfinished run"),
        (("--labels", "f.log.jsonl"), "also an input"),
        (("--labels", ""), "--labels: is empty"),
        (("--task", "regression"), "there are no labels"),
        (("--label-smoothing", 0.2), "there are no labels"),
        (("--label-column", "other"), "there are no labels"),
        (("--text-dropout", 0.2), "there are no labels"),
        (("--labels", "labels.csv", "--task", "regression", "--label-smoothing", 0.2), "no classes"),
        (("--held-out", 0), "0.01"),
        (("--lr", "inf"), "--lr: is infinite"),
        (("--resume", "--overwrite"), "leave out either"),
        (("-w", "w.safetensors", "--no-layer-norm"), "the checkpoint brings its own"),
        (("-w", "w.safetensors", "--dropout", 0), "the checkpoint brings its own"),
        (("--num-heads", 5), "heads do not divide"),
    ],
)
def test_options_that_contradict_each_other(options: Any, told: str, run: Run, lesson: list[str]) -> None:
    sides = () if "--manifest" in options else ("img", "txt")
    assert told in run("train", *sides, "-o", "f.safetensors", *options, code=2).stderr.decode()


def test_an_output_that_is_an_input_behind_a_link_is_refused(run: Run, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / f"img/{lesson[0]}.npy").rename(tmp_path / "f.safetensors")
    (tmp_path / f"img/{lesson[0]}.npy").symlink_to(tmp_path / "f.safetensors")
    before = (tmp_path / "f.safetensors").read_bytes()
    assert "also an input" in run("train", "img", "txt", "-o", "f.safetensors", code=2).stderr.decode()
    assert (tmp_path / "f.safetensors").read_bytes() == before


def test_an_output_among_the_inputs_is_refused(run: Run, lesson: list[str]) -> None:
    told = run("train", "img", "txt", "-o", f"img/{lesson[0]}.safetensors", code=2).stderr.decode()
    assert "among the inputs" in told


def test_a_training_that_diverges_leaves_an_earlier_checkpoint(run: Run, lesson: list[str], tmp_path: Path) -> None:
    _train(run, "--labels", "labels.csv", "--epochs", 2)
    before = (tmp_path / "f.safetensors").read_bytes()
    _train(run, "--labels", "labels.csv", "--lr", 1e30, code=1)
    assert (tmp_path / "f.safetensors").read_bytes() == before


@pytest.mark.parametrize("other", ["classes", "labels", "features"])
def test_other_data_are_no_run_to_go_on_with(other: str, run: Run, lesson: list[str], tmp_path: Path) -> None:
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
    told = _train(run, "--labels", "labels.csv", "--epochs", 50, "--resume", code=2)
    assert "other data or options" in told
    assert {"classes": "found classes with ['x']", "labels": "labels ", "features": "features "}[other] in told


@pytest.mark.parametrize("size", [1e60, 3e38])
def test_numbers_too_large_are_no_perfect_match(size: float, run: Run, lesson: list[str], tmp_path: Path) -> None:
    for id in lesson:
        np.save(tmp_path / f"img/{id}.npy", np.full((2, D), size, np.float64 if size > 1e39 else np.float32))
    run("train", "img", "txt", "-o", "f.safetensors", *QUICK, code=3)
    told = _train(run, "--labels", "labels.csv", code=3)
    assert f"{lesson[0]}.npy: numbers too large to learn from: found {size:.3g}, wanted at most 1e+15" in told


def test_a_damaged_state_is_told_of(run: Run, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "f.state.pt").write_bytes(b"junk" * 99)
    told = _train(run, "--labels", "labels.csv", "--resume", code=3)
    assert "not the state of a training" in told
    assert "torch" not in told


def test_points_in_time_can_be_learned(run: Run, lesson: list[str], tmp_path: Path) -> None:
    tables = []
    for offset in (0, 1_700_000_000):
        lines = [f"{id},{offset + 20 * (k % 3)}" for k, id in enumerate(lesson)]
        (tmp_path / "labels.csv").write_text("id,label\n" + "\n".join(lines) + "\n")
        tables.append(_scores(_train(run, "--labels", "labels.csv", "--task", "regression", "--epochs", 1)))
    assert tables[0] == pytest.approx(tables[1], abs=1e-3)


def test_no_pair_is_left(run: Run, lesson: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\nnobody,x\n")
    assert "no label belongs to a pair" in _train(run, "--labels", "labels.csv", "--allow-missing", code=3)


def test_a_checkpoint_can_be_trained_further(run: Run, lesson: list[str], tmp_path: Path) -> None:
    run("init", "-o", "drawn.safetensors", "--method", "gated", "--feature-dim", D, "-q")
    run("convert", "drawn.safetensors", "-o", "w.safetensors", "--dtype", "bfloat16", "-q")
    given = ("-w", "w.safetensors", "--labels", "labels.csv", "--lr", 3e-3, "--json")
    facts = json.loads(run("train", "img", "txt", "-o", "f.safetensors", *given).stdout)
    assert facts["best_epoch"] > 0
    assert fusecli.load(tmp_path / "f.safetensors").config.method == "gated"
    assert facts["fingerprint"] != fusecli.fingerprint(fusecli.load(tmp_path / "w.safetensors"))


def test_a_manifest_class_weights_and_hidden_texts(run: Run, lesson: list[str], tmp_path: Path) -> None:
    lines = [f"{id},img/{id}.npy,txt/{id}.npy" for id in lesson]
    (tmp_path / "m.csv").write_text("\n".join(["id,image,text", *lines]) + "\n")
    common = ("--labels", "labels.csv", *QUICK, "--epochs", 2, "-o")
    fingerprints = []
    for k, options in enumerate([(), ("--class-weights", "balanced"), ("--text-dropout", 0.5)]):
        run("train", "--manifest", "m.csv", *common, f"{k}.safetensors", *options)
        fingerprints.append(fusecli.fingerprint(fusecli.load(tmp_path / f"{k}.safetensors")))
    run("train", "img", "txt", *common, "tree.safetensors")
    assert fusecli.fingerprint(fusecli.load(tmp_path / "tree.safetensors")) == fingerprints[0]
    assert len(set(fingerprints)) == 3
