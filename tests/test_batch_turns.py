"""Short pairs of an item are computed in turn: nothing of them changes by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusecli.batch import worker
from fusecli.batch.job import Job, Options, Outcome, Task
from fusecli.batch.store import FolderStore
from fusecli.collections import Place
from fusecli.fusion import NUMBERS_IN_TURN, PAIRS_IN_TURN, fuse_in_turn, numbers_in_turn
from fusecli.weights import Weights
from tests.oracle_methods import oracle
from tests.test_methods import EVERY

D = 16
#: Image and text rows of the pairs; in one item the short ones stand between ones that are not.
SHAPES = [(5, 3), (16, 14), (1, 4), (2, 1), (3, 3_000), (30, 30), (1, 1), (9, 13), (40, 7)]
WIDER = 6  # the number of a pair with one image row, whose text is wider than it
BAD = len(SHAPES)  # and of one with a NaN


@pytest.fixture
def tasks(tmp_path: Path, rng: np.random.Generator) -> list[Task]:
    """Pairs of `SHAPES`, some of other dtypes, and a bad one behind the third."""
    made = []
    for k, (m, n) in enumerate([*SHAPES, (3, 3)]):
        sides = []
        for side, rows in (("image", m), ("text", n)):
            dtype = "float64" if k == WIDER and side == "text" else ["float32", "float16", "float64"][k % 3]
            array = rng.standard_normal((rows, D)).astype(dtype)
            array[-1, -1] = np.nan if k == BAD and side == "text" else 1
            np.save(tmp_path / f"{k}.{side}.npy", array)
            sides.append(Place(f"{tmp_path}/{k}.{side}.npy"))
        made.append(Task(str(k), *sides))
    return [*made[:3], made[BAD], *made[3:BAD]]


def _job(weights: Weights, folder: Path) -> Job:
    fused = FolderStore(f"{folder}/out", ".npy", f"{folder}/tmp-out")
    gate = weights.config.method == "gated"
    attention = FolderStore(f"{folder}/att", ".safetensors", f"{folder}/tmp-att", "attention", gate)
    for store in (fused, attention):
        store.begin()
    return Job(weights, Options(), fused, attention if weights.config.has_attention else None)


def _written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _said(outcomes: list[Outcome]) -> list[Any]:
    return [(x.id, x.status, {**x.facts, "seconds": 0}, x.nbytes) for x in outcomes]


@EVERY
def test_pairs_in_turn_are_those_alone(
    method: str, options: dict[str, Any], tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = oracle(method, D, 4, D, D, layer_norm=True, **options)[1]
    groups: list[int] = []

    def watched(weights: Weights, pairs: Any, **named: Any) -> Any:
        groups.append(len(pairs))
        return fuse_in_turn(weights, pairs, **named)

    monkeypatch.setattr(worker, "fuse_in_turn", watched)
    alone, together = _job(weights, tmp_path / "alone"), _job(weights, tmp_path / "together")
    one_by_one = [outcome for task in tasks for outcome in worker.work(alone, [task])]
    assert not groups
    assert _said(worker.work(together, tasks)) == _said(one_by_one)
    assert _written(tmp_path / "together") == _written(tmp_path / "alone")
    assert len(groups) == 2 + (method == "attention")  # what is long, or only copied, parts them
    assert {outcome.status for outcome in one_by_one} == {"fused", "failed"}


def test_each_pair_has_its_own_try_where_memory_is_short(
    tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(worker, "fuse_in_turn", full)
    outcomes = worker.work(_job(oracle("gated", D, 4, D, D)[1], tmp_path), tasks)
    assert [outcome.status for outcome in outcomes].count("fused") == len(SHAPES)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (50, 77), (197, 77), (600, 600)])
def test_pairs_in_turn_are_as_many_as_memory_allows(m: int, n: int) -> None:
    weights = oracle("gated", 768, 8, 768, 768)[1]
    none: Any = ()
    job, pair = Job(weights, Options(), none, None), worker.Underway(none, np.empty((m, 1)), np.empty((n, 1)), none)
    sizes = [len(some) for some in worker._short_together(job, iter([pair] * 64))]
    assert sum(sizes) == 64
    fitting = NUMBERS_IN_TURN // numbers_in_turn(weights, n, m)
    assert max(sizes) == max(1, min(PAIRS_IN_TURN, fitting))
