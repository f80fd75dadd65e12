"""What a GPU does: the numbers of the CPU, and of a pair always the same ones, in whatever company it comes.

The code is the same for torch on the CPU, so most of it is tested there too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import fusecli
from fusecli import ImageTextFusion, Weights, fuse
from fusecli.arrays import to_numpy
from fusecli.batch import together
from fusecli.batch.job import Job, Options, Task
from fusecli.batch.store import FolderStore
from fusecli.collections import Place
from fusecli.functional import SUM_CHUNK
from fusecli.fusion import fuse_together, pairs_together
from fusecli.one_row import single_rows
from fusecli.pairs import find_features
from fusecli.pipeline import Output, Pair, fuse_pair, to_file
from tests.batches import IDS, D, batch, expected, results
from tests.conftest import Run
from tests.oracle import article, assert_as_good, both_precisions, features, weights_of
from tests.oracle_methods import oracle
from tests.test_methods import EVERY

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])


def _move(device: str) -> Any:
    return lambda x: torch.from_numpy(np.array(x)).to(device)


@DEVICES
@EVERY
@pytest.mark.parametrize(("m", "n"), [(1, 4), (3, 1), (50, 7)])
def test_together_as_one_by_one(
    device: str, method: str, options: dict[str, Any], m: int, n: int, rng: np.random.Generator
) -> None:
    _, weights = oracle(method, 64, 4, 64, 80, m, **options)
    images, texts = rng.standard_normal((5, m, 80)), rng.standard_normal((5, n, 64))
    shown = weights.config.has_attention
    move = _move(device)
    result = fuse_together(weights, move(images), move(texts), "float64", need_weights=shown)
    for at in range(5):
        fused = fuse(weights, images[at], texts[at], need_weights=shown)
        np.testing.assert_allclose(to_numpy(result.fused[at]), fused[0] if shown else fused, atol=1e-9)
        if shown:
            attended: Any = result.attention
            np.testing.assert_allclose(to_numpy(attended[at]), fused[1], atol=1e-9)


@DEVICES
@EVERY
def test_company_changes_no_number(device: str, method: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    """Not where a pair stands, nor how many there are, nor that another needs float64 for its scores."""
    _, weights = oracle(method, 64, 4, 64, 80, 0, **options)
    images = rng.standard_normal((9, 7, 80)).astype(np.float32)
    texts = rng.standard_normal((9, 5, 64)).astype(np.float32)
    images[6] *= 1000
    texts[6] *= 1000
    shown, move = weights.config.has_attention, _move(device)

    def results_of(which: list[int]) -> Any:
        result = fuse_together(weights, move(images[which]), move(texts[which]), "float32", need_weights=shown)
        return [to_numpy(x) for x in result if x is not None]

    alone = [results_of([at]) for at in range(9)]
    for which in ([0, 1, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0], [6, 3]):
        for one, many in zip(zip(*(alone[at] for at in which), strict=True), results_of(which), strict=True):
            for at, x in enumerate(one):
                assert np.array_equal(x[0], many[at]), (which, at)


@DEVICES
def test_large_scores_are_computed_again(device: str, rng: np.random.Generator) -> None:
    module = article(64, 4)
    weights = weights_of(module)
    images = 300 * rng.standard_normal((3, 7, 64)).astype(np.float32)
    texts = 300 * rng.standard_normal((3, 5, 64)).astype(np.float32)
    result = fuse_together(weights, _move(device)(images), _move(device)(texts), "float32")
    for at in range(3):
        exact = fuse(weights, images[at].astype(np.float64), texts[at].astype(np.float64))
        np.testing.assert_allclose(to_numpy(result.fused[at]), exact, rtol=1e-4, atol=1e-3)


@DEVICES
def test_together_is_as_good_as_the_article_where_scores_are_large(device: str) -> None:
    for seed in range(60):
        module, rng = article(96, 1, 80, 112, seed=seed), np.random.default_rng(seed)
        image, text = (features(rng, rows, width, 20 + seed) for rows, width in ((50, 112), (7, 80)))
        (exact, _), (single, _) = both_precisions(module, image, text)
        move = _move(device)
        result = fuse_together(weights_of(module), move(image[None]), move(text[None]), "float32")
        assert_as_good(to_numpy(result.fused[0]), exact, single)


@DEVICES
@EVERY
def test_together_is_as_good_as_the_reference(device: str, method: str, options: dict[str, Any]) -> None:
    for seed in range(10):
        module, weights = oracle(method, 192, 1, 192, 112, seed, **options)
        rng = np.random.default_rng(seed)
        image, text = (_move(device)(features(rng, rows, width, 90)) for rows, width in ((2, 112), (8, 192)))
        single = module.to(device)(image, text)[0]
        exact = module.double()(image.double(), text.double())[0]
        ours = fuse_together(weights, image[None], text[None], "float32").fused[0]
        assert_as_good(to_numpy(ours), to_numpy(exact), to_numpy(single))


class _Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees how many products torch adds up for one number of a result, at most."""

    longest: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        multiplies = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        if multiplies and args[-1].dtype == torch.float32:  # not where maps are folded
            self.longest = max(self.longest, args[-2].shape[-1])
        return func(*args, **(kwargs or {}))


@EVERY
def test_sums_over_channels_are_taken_in_parts_for_pairs_together_on_a_gpu(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("functional", "methods"):
        monkeypatch.setattr(f"fusecli.{name}.is_on_gpu", lambda x: True)

    def longest(dim: int, together: bool = True, learned: bool = False) -> int:
        inside = {"dim_feedforward": dim} if method == "transformer" else {}
        module, weights = oracle(method, dim, 1, dim, dim, **{**options, **inside})
        tensors = {name: torch.from_numpy(x).requires_grad_(learned) for name, x in weights.tensors.items()}
        image, text = torch.randn(7, dim), torch.randn(5, dim)
        with _Sums() as sums:  # type: ignore[no-untyped-call]
            if together:
                made = fuse_together(Weights(weights.config, tensors), image[None], text[None], "float32").fused[0]
            else:
                made = fuse(Weights(weights.config, tensors), image, text)
        torch.testing.assert_close(made.detach(), module(image, text)[0], atol=1e-5, rtol=0)
        return int(sums.longest)

    assert longest(600) == SUM_CHUNK
    assert longest(100) == 50
    assert longest(600, learned=True) >= 600
    assert longest(600, together=False) >= 600


@DEVICES
def test_single_rows_are_the_same_in_any_company(device: str, rng: np.random.Generator) -> None:
    weights = weights_of(article(768, 8))
    images = rng.standard_normal((37, 768), np.float32)
    if device != "cpu":  # where NumPy computes; torch's library there was seen to round by the number of its threads
        images = _move(device)(images)
    together_ = to_numpy(single_rows(weights, images))
    for at in (0, 15, 16, 36):
        assert np.array_equal(to_numpy(single_rows(weights, images[at : at + 1]))[0], together_[at])


def test_large_pairs_go_alone() -> None:
    weights = weights_of(article(32, 4))
    assert pairs_together(weights, 77, 50) > 32
    assert pairs_together(weights, 2_000_000, 1) == 1
    assert pairs_together(weights, 4096, 4096) == 1


@pytest.fixture
def mixed(tmp_path: Path, rng: np.random.Generator) -> list[Task]:
    """Pairs of some shapes and dtypes, one of them bad on each side, as tasks."""
    tasks = []
    for k in range(24):
        image = rng.standard_normal((1 if k % 3 else 4, D)).astype((np.float32, np.float16, np.float64)[k % 5 % 3])
        text = rng.standard_normal((2 + k % 2, D)).astype(np.float32)
        if k == 7:
            image[0, 3] = np.nan
        np.save(tmp_path / f"i{k}.npy", image)
        np.save(tmp_path / f"t{k}.npy", text)
        tasks.append(Task(f"n/{k}", Place(f"{tmp_path}/i{k}.npy"), Place(f"{tmp_path}/t{k}.npy")))
    (tmp_path / "t11.npy").write_bytes(b"nothing")
    return tasks


def _job(weights: Weights, folder: Path, device: str) -> Job:
    fused = FolderStore(f"{folder}/out", ".npy", f"{folder}/tmp")
    attention = None
    if weights.config.has_attention:
        attention = FolderStore(f"{folder}/att", ".npy", f"{folder}/att-tmp")
        attention.begin()
    fused.begin()
    return Job(weights, Options(), fused, attention, _move(device))


@DEVICES
@EVERY
def test_an_item_gives_what_its_pairs_give(
    device: str, method: str, options: dict[str, Any], mixed: list[Task], tmp_path: Path
) -> None:
    _, weights = oracle(method, D, 4, D, D, 1, **options)
    job = _job(weights, tmp_path, device)
    outcomes = together.work(job, mixed)
    assert [outcome.id for outcome in outcomes] == [task.id for task in mixed]
    assert {outcome.id: outcome.facts["error"] for outcome in outcomes if outcome.status == "failed"}.keys() == {
        "n/7",
        "n/11",
    }
    for task in mixed:
        if task.id in ("n/7", "n/11"):
            assert not (tmp_path / "out" / f"{task.id}.npy").exists()
            continue
        image, text = find_features(task.image.path, "image"), find_features(task.text.path, "text")
        attention = to_file(f"{tmp_path}/a.npy", "attention") if job.attention else None
        fuse_pair(weights, Pair(image, text), Output(to_file(f"{tmp_path}/o.npy", "fused"), attention), _move(device))
        for one, folder in (("o.npy", "out"), ("a.npy", "att"))[: 1 + bool(attention)]:
            assert (tmp_path / one).read_bytes() == (tmp_path / folder / f"{task.id}.npy").read_bytes()
        on_cpu = fuse(weights, np.load(task.image.path), np.load(task.text.path))
        np.testing.assert_allclose(np.load(tmp_path / "o.npy"), on_cpu, atol=1e-5)


def test_memory_that_does_not_suffice_fails_its_pairs_alone(
    mixed: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    weights = weights_of(article(D, 4))
    monkeypatch.setattr("fusecli.pipeline.fuse_together", explode)
    outcomes = {outcome.id: outcome for outcome in together.work(_job(weights, tmp_path, "cpu"), mixed)}
    alone = [f"n/{k}" for k in range(24) if k % 3 and k not in (7, 11)]
    assert {outcomes[id].status for id in alone} == {"fused"}
    assert {outcomes[f"n/{k}"].facts.get("error") for k in (0, 3, 6)} == {"out of memory"}


@needs_cuda
@pytest.mark.slow
def test_batch_gives_what_fuse_gives(run: Run, many: Any, tmp_path: Path) -> None:
    batch(run, "img", "txt", "-o", "out", "-a", "att", "--device", "cuda")
    assert results(tmp_path / "out") == expected(run, tmp_path, IDS, "--device", "cuda")
    batch(run, "img", "txt", "-o", "cpu")
    for id in IDS:
        one, other = (np.load(tmp_path / folder / f"{id}.npy") for folder in ("out", "cpu"))
        np.testing.assert_allclose(one, other, atol=1e-5)
    batch(run, "img", "txt", "-o", "fused.safetensors", "--device", "cuda:0")
    packed = load_file(tmp_path / "fused.safetensors")
    assert all(np.array_equal(packed[id], np.load(tmp_path / "out" / f"{id}.npy")) for id in IDS)


@needs_cuda
def test_no_such_device(run: Run, pair: tuple[Any, Any]) -> None:
    stderr = run("fuse", "img.npy", "txt.npy", "-o", "out.npy", "--device", "cuda:99", code=1).stderr
    assert b"no such CUDA device" in stderr


@needs_cuda
@EVERY
def test_fuse_of_tensors_on_cuda(method: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    """`fuse` on tensors there: all orders of the products, with gradients and without."""
    _, weights = oracle(method, 64, 4, 64, 80, 2, **options)
    on_cuda = Weights(weights.config, {k: torch.from_numpy(np.array(v)).cuda() for k, v in weights.tensors.items()})
    for m, n in ((1, 3), (1, 500), (300, 2), (50, 77)):
        image = rng.standard_normal((m, 80)).astype(np.float32)
        text = rng.standard_normal((n, 64)).astype(np.float32)
        fused = fuse(on_cuda, torch.from_numpy(image).cuda(), torch.from_numpy(text).cuda())
        assert fused.is_cuda
        np.testing.assert_allclose(to_numpy(fused), fuse(weights, image, text), atol=2e-5)
        learned = Weights(weights.config, {k: v.requires_grad_() for k, v in on_cuda.tensors.items()})
        again = fuse(learned, torch.from_numpy(image).cuda(), torch.from_numpy(text).cuda())
        again.sum().backward()
        np.testing.assert_allclose(to_numpy(again.detach()), to_numpy(fused), atol=2e-5)
        for tensor in on_cuda.tensors.values():
            tensor.requires_grad_(False)


@needs_cuda
@pytest.mark.parametrize("m", [1, 7])
def test_the_module_on_cuda(m: int, rng: np.random.Generator) -> None:
    module = ImageTextFusion(64, 4)
    image = torch.from_numpy(rng.standard_normal((m, 64)).astype(np.float32))
    text = torch.from_numpy(rng.standard_normal((9, 64)).astype(np.float32))
    wanted = module(image, text)
    module.cuda()
    fused = module(image.cuda(), text.cuda())
    assert fused.is_cuda
    fused.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in module.parameters())
    torch.testing.assert_close(fused.cpu(), wanted, atol=2e-5, rtol=0)


@pytest.fixture
def lesson(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A small packed collection with labels."""
    images, texts, lines = {}, {}, ["id,label"]
    for k in range(120):
        images[f"{k:03}"] = (rng.standard_normal((2, D)) + k % 3).astype(np.float16)
        texts[f"{k:03}"] = rng.standard_normal((1 + k % 4, D)).astype(np.float32)
        lines.append(f"{k:03},{k % 3}")
    save_file(images, tmp_path / "i.safetensors")
    save_file(texts, tmp_path / "t.safetensors")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("method", ["gated", "transformer", "attention", "concat"])
def test_training_on_cuda(method: str, run: Run, lesson: Path) -> None:
    command = ["train", "i.safetensors", "t.safetensors", "--labels", "labels.csv", "--method", method]
    command += [] if method == "concat" else ["--num-heads", "4"]
    command += ["--lr", "1e-3", "--epochs", "4", "--patience", "4", "--device", "cuda", "--json"]
    facts = json.loads(run(*command, "-o", "f.safetensors").stdout)
    scores = {row["features"]: row["score"] for row in facts["table"]}
    assert scores["this fusion, trained"] >= scores["majority"]
    run(*command, "-o", "g.safetensors")
    assert (lesson / "f.safetensors").read_bytes() == (lesson / "g.safetensors").read_bytes()
    assert fusecli.load(lesson / "f.safetensors").config.method == method


@needs_cuda
@pytest.mark.slow
def test_matching_on_cuda(run: Run, lesson: Path) -> None:
    command = ["train", "i.safetensors", "t.safetensors", "--num-heads", "4", "--epochs", "2", "--device", "cuda"]
    facts = json.loads(run(*command, "--json", "-o", "f.safetensors").stdout)
    rows = {row["features"]: row for row in facts["table"]}
    assert "this fusion, trained" in rows
    assert all(row["low"] <= row["score"] <= row["high"] for row in rows.values())
