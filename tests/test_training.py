"""Training: what is read, what is learned and what is kept."""

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

import fusecli
from fusecli import checkpoint
from fusecli.training.recipe import FROM_NOTHING, SMOOTHING, WITH_LABELS, WITHOUT_LABELS, pace
from fusecli.training.represent import fast_in_bfloat16
from fusecli.training.start import ends_of, laid_apart
from tests.conftest import FUSECLI, Learn, Run, loaded_by
from tests.lessons import QUICK, D, is_held_out, scores_of


@pytest.mark.parametrize("method", ["gated", "transformer"])
def test_a_fusion_learns_what_neither_side_knows(method: str, learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    facts = learn("--labels", "labels.csv", "--method", method, "--epochs", 30, "--patience", 30)
    scores = scores_of(facts)
    assert scores["this fusion, trained"] > scores["both side by side"] + 0.1
    assert "beats side by side" in facts["verdict"]
    assert scores["text only"] < 0.6
    weights = fusecli.load(tmp_path / "f.safetensors")
    assert (weights.config.method, weights.config.layer_norm) == (method, True)
    assert fusecli.fingerprint(weights) == facts["fingerprint"]
    assert all(row["low"] <= row["score"] <= row["high"] for row in facts["table"])


def test_a_training_does_not_load_torchs_compiler(lesson: list[str], tmp_path: Path) -> None:
    options = ("--labels", "labels.csv", "--epochs", 1, "--json", *QUICK)
    loaded = loaded_by(tmp_path, "train", "img", "txt", "-o", "f.safetensors", *options)
    assert "torch.optim" in loaded
    assert "torch._dynamo" not in loaded


def test_few_held_out_pairs_are_told_of(run: Run, lesson: list[str]) -> None:
    options = ("--labels", "labels.csv", "--epochs", 1, "--json", *QUICK, "--held-out", 0.03)
    done = run("train", "img", "txt", "-o", "f.safetensors", *options)
    count = json.loads(done.stdout)["held_out"]
    assert f"only {count} held-out pairs: too few for a reliable table\n" in done.stderr.decode()


def test_what_is_trained_gives_the_same_numbers_everywhere(
    run: Run, learn: Learn, lesson: list[str], tmp_path: Path
) -> None:
    learn("--labels", "labels.csv", "--method", "attention", "--epochs", 2)
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


def test_weights_that_nobody_bettered_are_those_it_began_with(
    run: Run, learn: Learn, lesson: list[str], tmp_path: Path
) -> None:
    learn("--labels", "labels.csv", "--method", "attention", "--layer-norm", "--epochs", 1, "--lr", 0)
    run("init", "-o", "drawn.safetensors", "--layer-norm", "--feature-dim", D, "--num-heads", 2, "--seed", 3)
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
    data: Any = SimpleNamespace(texts=texts, images=images, parts={"train": list(range(200)), "validation": []})
    drawn = checkpoint.orthogonal(D, 2, **APART[method], layer_norm=layer_norm)
    [weights] = laid_apart(drawn, ends_of(drawn, data), [1.0])
    by_text = np.stack([fusecli.fuse(weights, images[0], text).mean(0) for text in texts[200:]])
    by_image = np.stack([fusecli.fuse(weights, image, texts[0]).mean(0) for image in images[200:]])
    by_text, by_image = by_text - by_text.mean(0), by_image - by_image.mean(0)
    overlap = np.linalg.norm(by_text @ by_image.T) / (np.linalg.norm(by_text) * np.linalg.norm(by_image))
    assert overlap < (0.12 if method == "transformer" or layer_norm else 1e-5)
    assert np.var(by_image) == pytest.approx(np.var(by_text), rel=0.5)


def test_attention_learns_the_same_in_any_unit(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    def losses() -> list[float]:
        learn("--labels", "labels.csv", "--method", "attention", "--epochs", 8, "--no-bfloat16")
        log = [json.loads(line) for line in (tmp_path / "f.log.jsonl").read_text().splitlines()]
        return [line["validation_loss"] for line in log if "validation_loss" in line]

    before, weights = losses(), fusecli.load(tmp_path / "f.safetensors")
    units = {"img": 2.0**-6, "txt": 2.0**5}
    for id in lesson:
        for side, unit in units.items():
            path = tmp_path / side / f"{id}.npy"
            np.save(path, unit * np.load(path).astype(np.float32))
    assert losses() == pytest.approx(before, rel=0.02)
    other = fusecli.load(tmp_path / "f.safetensors")
    for side, name in (("img", "image_proj.weight"), ("txt", "text_proj.weight")):
        np.testing.assert_allclose(units[side] * other.tensors[name], weights.tensors[name], atol=0.01)


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
    scores = scores_of(facts)
    assert facts["score"] == "recall@1"
    assert scores["this fusion, trained"] > 20 * scores["chance"]
    assert scores["text only"] == 0


def test_numbers_can_be_learned(learn: Learn, lesson: list[str]) -> None:
    options = ("--label-column", "number", "--task", "regression", "--epochs", 20, "--patience", 20)
    scores = scores_of(learn("--labels", "labels.csv", *options))
    assert scores["mean"] < 0.2 < scores["this fusion, trained"]


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("f.safetensors", "f.head.safetensors")]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_killed_or_not(run: Run, lesson: list[str], tmp_path: Path) -> None:
    command = ("train", "img", "txt", "-o", "f.safetensors", *map(str, QUICK))
    options = ("--labels", "labels.csv", "--method", "transformer", "--epochs", "12", "--patience", "12")
    begun = [*options, "--no-bfloat16" if fast_in_bfloat16("cpu") else "--bfloat16"]  # what goes on need not say it
    run(*command, *begun)
    whole = _bytes(tmp_path)
    run(*command, *options)
    assert _bytes(tmp_path) != whole  # the default is the other
    for epochs in (2, 6):
        again = "--resume" if (tmp_path / "f.state.pt").exists() else "--num-layers=1"  # as it is by default
        words = [*FUSECLI, *command, *(options if again == "--resume" else begun), again]
        with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            for line in process.stderr:
                if line.startswith("epoch") and int(line.split()[1]) >= epochs:
                    process.send_signal(signal.SIGKILL)
                    break
        assert (tmp_path / "f.state.pt").exists()
    assert b"--resume or --overwrite" in run(*command, *options, code=2).stderr
    other = run(*command, *options, "--resume", "--label-smoothing", 0.1, "--lr", 1e-2, code=2)
    assert b"lr 0.001" in other.stderr
    run(*command, *options, "--resume")
    assert _bytes(tmp_path) == whole
    log = [json.loads(line) for line in (tmp_path / "f.log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log if "epoch" in line] == list(range(1, 13))
    assert log[0]["run"]["bfloat16"] is not fast_in_bfloat16("cpu")
    assert not (tmp_path / "f.state.pt").exists()


def test_labels_held_out_reach_no_weights(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    wrote, scores = [], []
    head, *lines = (tmp_path / "labels.csv").read_text().splitlines()
    for new in (False, True):
        held = [line.replace(",", ",new", 1) if new and is_held_out(line.split(",")[0]) else line for line in lines]
        (tmp_path / "labels.csv").write_text("\n".join([head, *held]))
        facts = learn("--labels", "labels.csv", "--epochs", 2, "--class-weights", "balanced")
        scores.append(set(scores_of(facts).values()))
        wrote.append([(tmp_path / name).read_bytes() for name in ("f.safetensors", "f.head.safetensors")])
    assert wrote[0] == wrote[1]
    assert scores[0] != {0.0} == scores[1]  # what no pair to train on has, nothing can tell


def test_a_run_to_resume_that_is_not_there_begins(run: Run, lesson: list[str], tmp_path: Path) -> None:
    command = ("train", "img", "txt", "-o", "f.safetensors", *QUICK, "--labels", "labels.csv", "--epochs", 2)
    run(*command)
    whole = _bytes(tmp_path)
    again = run(*command, "--resume", "--json")  # what a scheduler starts once more
    assert "done before" in again.stderr.decode()
    assert scores_of(json.loads(again.stdout))["text only"] > 0
    assert "from the beginning" in run(*command[:-1], 1, "--resume").stderr.decode()  # other options
    run(*command, "--overwrite")
    assert _bytes(tmp_path) == whole
    fusecli.save(fusecli.init(D), tmp_path / "f.safetensors")  # and whoever put that there
    told = run(*command, "--resume").stderr.decode()
    assert "no unfinished run to resume: starting from the beginning" in told
    assert _bytes(tmp_path) == whole


def test_points_in_time_can_be_learned(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    tables = []
    for offset in (0, 1_700_000_000):
        lines = [f"{id},{offset + 20 * (k % 3)}" for k, id in enumerate(lesson)]
        (tmp_path / "labels.csv").write_text("id,label\n" + "\n".join(lines) + "\n")
        tables.append(scores_of(learn("--labels", "labels.csv", "--task", "regression", "--epochs", 1)))
    assert tables[0] == pytest.approx(tables[1], abs=1e-3)


def test_a_checkpoint_can_be_trained_further(run: Run, lesson: list[str], tmp_path: Path) -> None:
    run("init", "-o", "drawn.safetensors", "--method", "gated", "--feature-dim", D, "-q")
    run("convert", "drawn.safetensors", "-o", "w.safetensors", "--dtype", "bfloat16", "-q")
    given = ("-w", "w.safetensors", "--labels", "labels.csv", "--lr", 3e-3, "--json")
    facts = json.loads(run("train", "img", "txt", "-o", "f.safetensors", *given).stdout)
    assert facts["best_epoch"] > 0
    assert fusecli.load(tmp_path / "f.safetensors").config.method == "gated"
    assert facts["fingerprint"] != fusecli.fingerprint(fusecli.load(tmp_path / "w.safetensors"))


def test_a_manifest_class_weights_and_hidden_texts(learn: Learn, lesson: list[str], tmp_path: Path) -> None:
    lines = [f"{id},img/{id}.npy,txt/{id}.npy" for id in lesson]
    (tmp_path / "m.csv").write_text("\n".join(["id,image,text", *lines]) + "\n")
    common = ("--labels", "labels.csv", "--epochs", 2)
    others = ((), ("--class-weights", "balanced"), ("--text-dropout", 0.5))
    found = [learn("--manifest", "m.csv", *common, *options, sides=())["fingerprint"] for options in others]
    assert learn(*common)["fingerprint"] == found[0]
    assert len(set(found)) == 3
