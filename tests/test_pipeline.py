"""Reading, fusing and writing one pair: what goes wrong far inside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusecli import Weights, identity
from fusecli.errors import OutputError, ValuesError
from fusecli.formats import NumpyArray
from fusecli.pairs import find_features
from fusecli.pipeline import Output, Pair, fuse_pair, to_file


def _fuse(folder: Path, weights: Weights, image: NumpyArray, text: NumpyArray, dtype: str, threads: int = 1) -> None:
    np.save(folder / "i.npy", image)
    np.save(folder / "t.npy", text)
    pair = Pair(find_features(f"{folder}/i.npy", "image"), find_features(f"{folder}/t.npy", "text"))
    with np.errstate(over="ignore"):  # as the commands do
        fuse_pair(weights, pair, Output(to_file(f"{folder}/o.npy", "fused"), dtype=dtype, threads=threads))


def test_the_first_row_that_overflows_is_named_wherever_it_is(tmp_path: Path) -> None:
    text = np.ones((5, 8), np.float32)
    text[3:] = 1e5
    with pytest.raises(OutputError, match="in row 3, column 0"):
        _fuse(tmp_path, identity(8, residual=True), np.ones((2, 8), np.float32), text, "float16")
    assert not (tmp_path / "o.npy").exists()


def test_the_first_bad_row_is_named_whichever_thread_meets_one(tmp_path: Path) -> None:
    text = np.ones((9 * 2048, 8), np.float32)
    text[5 * 2048 + 1, 2] = text[7 * 2048, 0] = np.nan
    with pytest.raises(ValuesError, match="row 10241, column 2"):
        _fuse(tmp_path, identity(8), np.ones((3, 8), np.float32), text, "float32", threads=3)
    assert not (tmp_path / "o.npy").exists()
