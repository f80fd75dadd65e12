"""The files of a training: what a run goes on with is what it has written, and labels are read as they are meant."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import fusecli
from fusecli.errors import FileError, InputError, UsageError
from fusecli.training.data import Rows
from fusecli.training.files import Begun, begun_with
from fusecli.training.keeper import FileKeeper
from fusecli.training.labels import read_labels
from fusecli.training.loop import TrainingState
from fusecli.training.represent import Fusion
from fusecli.training.run import _best
from fusecli.training.targets import numbers
from tests.conftest import Run


def _files(folder: Path) -> Any:
    objective: Any = SimpleNamespace(name="classify", facts=dict)
    return FileKeeper(str(folder / "f.safetensors"), objective, {"seed": 0})


def _fusion(seed: int) -> Fusion:
    return Fusion(fusecli.init(8, 2, seed=seed))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped after its second epoch, the best."""
    files = _files(tmp_path)
    files.begin(False)
    progress = TrainingState(epoch=2, best_epoch=2, best_loss=1.0, log=[{"epoch": 2}])
    files.best(_fusion(2), {"head.weight": nn.Parameter(torch.ones(2, 8))}, progress)
    files.state({"progress": vars(progress)})
    return tmp_path


SPOILT = ["other weights", "no weights", "other head", "cut head", "no head"]


def _spoil(folder: Path, how: str) -> None:
    weights, head = folder / "f.safetensors", folder / "f.head.safetensors"
    if how == "other weights":
        fusecli.save(fusecli.init(8, 2, seed=9), weights)
    elif how == "no weights":
        weights.unlink()
    elif how == "other head":
        save_file({"head.weight": np.ones((2, 8), np.float32)}, head)
    elif how == "cut head":
        head.write_bytes(head.read_bytes()[:50])
    else:
        head.unlink()


@pytest.mark.parametrize("how", SPOILT)
def test_a_run_goes_on_with_its_own_weights_alone(stopped: Path, how: str) -> None:
    assert _files(stopped).begin(True)["progress"]["best_epoch"] == 2
    _spoil(stopped, how)
    with pytest.raises(FileError, match="was changed since the run wrote it") as error:
        _files(stopped).begin(True)
    assert ("head" in str(error.value.where)) == ("head" in how)
    assert "--overwrite" in str(error.value.hint)


@pytest.mark.parametrize("how", SPOILT)
def test_a_run_ends_with_its_own_weights_alone(stopped: Path, how: str) -> None:
    files = _files(stopped)
    files.begin(True)
    weights, head = files.result("cpu")
    assert fusecli.fingerprint(weights) == fusecli.fingerprint(fusecli.init(8, 2, seed=2))
    assert head["head.weight"].shape == (2, 8)
    _spoil(stopped, how)
    with pytest.raises(FileError):
        files.result("cpu")


@pytest.mark.parametrize("killed", ["before the weights", "before the state"])
def test_a_run_killed_while_it_wrote_the_best_goes_on(stopped: Path, killed: str) -> None:
    before = (stopped / "f.safetensors").read_bytes()
    progress = TrainingState(epoch=3, best_epoch=3, best_loss=0.5)
    _files(stopped).best(_fusion(3), {"head.weight": nn.Parameter(torch.ones(2, 8))}, progress)
    if killed == "before the weights":
        (stopped / "f.safetensors").write_bytes(before)
    files = _files(stopped)
    progress = TrainingState(**files.begin(True)["progress"])
    assert (progress.epoch, progress.best_loss) == (2, math.inf)  # so what comes of epoch 3 now is kept in any case
    files.best(_fusion(3), {"head.weight": nn.Parameter(torch.ones(2, 8))}, progress)
    files.result("cpu")


def test_a_run_that_goes_on_does_not_choose_its_start_again(tmp_path: Path) -> None:
    class Start:
        @property
        def loss(self) -> float:
            raise AssertionError("judged again")

    starts: Any = [Start() for _ in range(3)]
    _files(tmp_path).begin(False, start=1)
    begun = begun_with(str(tmp_path / "f.safetensors"))
    assert begun == Begun(start=1, threads=torch.get_num_threads(), bfloat16=False)
    assert _best(starts, begun.start) == 1
    assert begun_with(str(tmp_path / "none.safetensors")) == Begun()
    assert _best(starts[:1], 1) == 0  # another command, as will be told: there is but one start now


def test_a_run_goes_on_in_the_precision_that_it_began_with(tmp_path: Path) -> None:
    objective: Any = SimpleNamespace(name="classify", facts=dict)
    facts: dict[str, Any]
    for facts, precision in (({}, False), ({"bfloat16": False}, False), ({"bfloat16": True}, True)):
        files = FileKeeper(str(tmp_path / "f.safetensors"), objective, facts)
        files.begin(False)
        files.state({"progress": vars(TrainingState(epoch=1))})
        begun = begun_with(str(tmp_path / "f.safetensors")).bfloat16
        assert begun is precision
        FileKeeper(str(tmp_path / "f.safetensors"), objective, {"bfloat16": begun}).begin(True)
        with pytest.raises(UsageError, match=f"found bfloat16 {precision}, wanted bfloat16 {not precision}"):
            FileKeeper(str(tmp_path / "f.safetensors"), objective, {"bfloat16": not precision}).begin(True)


def test_rows_that_belong_to_other_pairs_are_other_features(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    one, other = (Rows(lambda at=at: iter([x[:at], x[at:]]), str(tmp_path)) for at in (1, 2))  # type: ignore[misc]
    assert one.checksum != other.checksum


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("id,label\na,x\n", "label"),
        ("\ufeffid,label\r\na,x\r\n", "label"),
        ('"id"\t"the, label"\na\tx\n', "the, label"),
        ("id,a\tb,label\na,1,x\n", "label"),
        ("id,label\na,x,\n", "label"),
    ],
)
def test_labels_are_read_from_a_pipe_as_from_a_file(tmp_path: Path, text: str, column: str) -> None:
    (tmp_path / "labels").write_bytes(text.encode())
    assert read_labels(str(tmp_path / "labels"), column) == {"a": "x"}
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text.encode(),))
    writer.start()
    assert read_labels(str(tmp_path / "pipe"), column) == {"a": "x"}
    writer.join()


def test_a_run_that_fails_at_once_leaves_the_log_of_the_one_before(tmp_path: Path) -> None:
    log = tmp_path / "f.log.jsonl"
    log.write_text("before\n")
    files = _files(tmp_path)
    files.begin(False)
    assert log.read_text() != "before\n"
    files.give_up()
    assert log.read_text() == "before\n"


def test_a_comma_in_a_label_does_not_cut_it(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('id,label\na,"Travel, air"\nb,Travel, sea\n')
    with pytest.raises(FileError, match="line 3: more values"):
        read_labels(str(tmp_path / "labels.csv"))


def test_a_column_of_labels_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label,label\na,x,y\n")
    with pytest.raises(FileError, match="duplicate column"):
        read_labels(str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("line", ["b", ",x"])
def test_a_line_that_lacks_an_id_or_a_label_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "labels.csv").write_text(f"id,label\na,x\n{line}\n")
    with pytest.raises(FileError, match="line 3: an id or a label is missing"):
        read_labels(str(tmp_path / "labels.csv"))


def test_a_line_of_blanks_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\na,x\n   \n,,\n\nb,y\n")
    assert read_labels(str(tmp_path / "labels.csv")) == {"a": "x", "b": "y"}


def test_labels_that_are_no_text_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("id,label\na,x\n".encode("utf-16"))
    with pytest.raises(FileError, match="not text"):
        read_labels(str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("written", ["1_000", "nan", "inf", "", "1,5", "one"])
def test_what_is_no_number_is_called_so(written: str) -> None:
    data: Any = SimpleNamespace(ids=["a", "b"], parts={"train": [0, 1]})
    with pytest.raises(InputError, match="id b: not a number"):
        numbers({"a": "1e3", "b": written}, data, 0.0, "labels.csv")


def test_numbers_too_large_to_have_a_spread_are_called_so() -> None:
    data: Any = SimpleNamespace(ids=list("abcd"), parts={"train": [0, 1], "validation": [2, 3]})
    with pytest.raises(InputError, match="id a: a label is too large: found 1e\\+300"):
        numbers({"a": "1e300", "b": "-1e300", "c": "1", "d": "2"}, data, 0.0, "labels.csv")


@pytest.mark.parametrize(("scale", "last", "told"), [(1.0, "3e38", "id 69: a label far from"), (1e-170, "", "small")])
def test_numbers_whose_squares_are_none_are_told_of(scale: float, last: str, told: str) -> None:
    parts = {"train": list(range(51)), "validation": list(range(51, 60)), "held-out": list(range(60, 70))}
    data: Any = SimpleNamespace(ids=[str(k) for k in range(70)], parts=parts)
    labels = {str(k): str(k * scale) for k in range(70)}
    with pytest.raises(InputError, match=told):
        numbers(labels | ({"69": last} if last else {}), data, 0.0, "labels.csv")


@pytest.mark.parametrize("value", ["0.1", "0.7", "3"])
def test_numbers_that_are_all_the_same_are_nothing_to_learn(value: str) -> None:
    parts = {"train": list(range(51)), "validation": list(range(51, 60)), "held-out": list(range(60, 70))}
    data: Any = SimpleNamespace(ids=[str(k) for k in range(70)], parts=parts)
    with pytest.raises(InputError, match="are the same"):
        numbers({str(k): value for k in range(70)}, data, 0.0, "labels.csv")


def test_heads_of_a_bare_state_dict_can_be_given(run: Run, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", 16, "--num-heads", 2, "-q")
    save_file(load_file(tmp_path / "w.safetensors"), tmp_path / "bare.safetensors")
    for side in ("img", "txt"):
        save_file({str(k): np.ones((2, 16), np.float32) for k in range(3)}, tmp_path / f"{side}.safetensors")
    command = ("train", "img.safetensors", "txt.safetensors", "-o", "f.safetensors", "-w")
    assert "num_heads=5" in run(*command, "bare.safetensors", "--num-heads", 5, code=3).stderr.decode()
    told = run(*command, "w.safetensors", "--num-heads", 4, code=2).stderr.decode()
    assert "--num-heads contradicts" in told
    assert "assuming 8" in run(*command, "bare.safetensors", code=3).stderr.decode()


@pytest.mark.parametrize("lacking", ["progress", "facts", "epoch", "log"])
def test_a_state_that_lacks_something_is_damaged(stopped: Path, lacking: str) -> None:
    path = stopped / "f.state.pt"
    state = torch.load(path, weights_only=True)
    (state if lacking in state else state["progress"]).pop(lacking)
    torch.save(state, path)
    with pytest.raises(FileError, match="not the state"):
        _files(stopped).begin(True)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_state_in_which_one_bit_is_wrong_is_damaged(stopped: Path, part: float) -> None:
    path, files = stopped / "f.state.pt", _files(stopped)
    files.state({"progress": torch.load(path, weights_only=True)["progress"], "fusion": torch.ones(5000)})
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="not the state"):
        files.begin(True)


@pytest.mark.parametrize("epoch", ["x", -5, None])
def test_a_state_of_no_epoch_is_damaged(stopped: Path, epoch: Any) -> None:
    path = stopped / "f.state.pt"
    state = torch.load(path, weights_only=True)
    state["progress"]["epoch"] = epoch
    torch.save(state, path)
    with pytest.raises(FileError, match="not the state"):
        _files(stopped).begin(True)


def test_a_log_of_anything_says_nothing(stopped: Path) -> None:
    for junk in ("[" * 200_000, "[1]", "null", '{"run": 3}'):
        (stopped / "f.log.jsonl").write_text(junk)
        assert begun_with(str(stopped / "f.safetensors")) == Begun()
