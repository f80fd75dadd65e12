"""What a training is made of: features and batches, heads, schedule, intervals."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fusecli
from fusecli import checkpoint
from fusecli.errors import TrainingError
from fusecli.training import loop, recipe
from fusecli.training.data import MOST_LEARNED, MOST_MET, batches, part_of, read
from fusecli.training.loop import _rate
from fusecli.training.match import Match, Moments, _heads, _moments, _side, canonical
from fusecli.training.objective import Classes, Evaluation, Numbers
from fusecli.training.represent import Fusion, Means
from fusecli.training.start import PARTS, SHARES, aligned, ends_of, laid_apart
from tests.lessons import on_threads

D = 16


def _drawn(tmp_path: Path, pairs: int = 500) -> Any:
    from fusecli.collections import open_collection

    rng = np.random.default_rng(1)
    from safetensors.numpy import save_file

    for side, most in (("i", 300), ("t", 60)):
        rows = rng.integers(1, most, pairs)
        save_file(
            {f"{k}": rng.standard_normal((n, 8)).astype(np.float16) for k, n in enumerate(rows)},
            tmp_path / f"{side}.safetensors",
        )
    images, texts = (open_collection(str(tmp_path / f"{side}.safetensors")) for side in "it")
    return read(list(images), lambda name: (images.place(name), texts.place(name)), str(tmp_path), 0.1, 0.2), images


def test_features_are_read_as_they_are_and_padded_with_zeros(tmp_path: Path) -> None:
    data, images = _drawn(tmp_path, 20)
    from fusecli.places import features_at

    for at, id in enumerate(data.ids):
        assert (data.images[at] == features_at(images.place(id), "image").read()).all()
    block, mask = data.images.padded([0, 3])
    assert (block[~mask] == 0).all()
    assert mask.sum(1).tolist() == [data.images.length(0), data.images.length(3)]
    np.testing.assert_allclose(data.texts.means()[2], data.texts[2].astype(np.float64).mean(0), rtol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["i.safetensors", "t.safetensors"]


def _padding(data: Any, made: list[list[int]]) -> float:
    real = full = 0
    for batch in made:
        for side in (data.images, data.texts):
            lengths = [side.length(at) for at in batch]
            real += sum(lengths)
            full += max(lengths) * len(lengths)
    return 1 - real / full


@pytest.mark.parametrize("count", [2, 8, 9, 10, 17, 65, 321])  # of nine, one would be alone
def test_batches_hold_every_pair_once_and_none_alone(tmp_path: Path, count: int) -> None:
    data, _ = _drawn(tmp_path)
    train = data.parts["train"][:count]
    made = batches(data, train, 8, torch.Generator().manual_seed(0))
    assert sorted(at for batch in made for at in batch) == train
    assert min(map(len, made)) > 1


def test_long_pairs_are_judged_in_small_batches() -> None:
    lengths = [4] * 300 + [3000, 5000, 20_000]
    rows: Any = SimpleNamespace(length=lambda at: lengths[at])
    data: Any = SimpleNamespace(images=rows, texts=SimpleNamespace(length=lambda at: 2), cost=lambda at: lengths[at])
    made = batches(data, range(303), 256, None)
    assert sum(made, []) == list(range(303))  # noqa: RUF017
    assert [len(batch) for batch in made] == [256, 44, 2, 1]


def _batches_of(lengths: list[tuple[int, int]], texts: int, self_attention: bool = False) -> list[list[int]]:
    rows: Any = [SimpleNamespace(length=lambda at, side=side: lengths[at][side]) for side in (0, 1)]
    data: Any = SimpleNamespace(images=rows[0], texts=rows[1], cost=lambda at: lengths[at])
    made = batches(data, range(len(lengths)), 64, torch.Generator().manual_seed(0), texts, self_attention)
    assert sorted(sum(made, [])) == list(range(len(lengths)))  # noqa: RUF017
    return made


@pytest.mark.parametrize("texts", [1, 16])
def test_long_pairs_are_learned_in_small_batches(texts: int) -> None:
    lengths = [(4, 2)] * 300 + [(2, 1000)] * 20 + [(2, 5000), (2, 20_000)]
    for batch in _batches_of(lengths, texts):
        m, n = (max(lengths[at][side] for at in batch) for side in (0, 1))
        most = MOST_LEARNED if texts == 1 else MOST_MET
        assert len(batch) * (m + min(texts, len(batch)) * n) <= most or len(batch) == 2
        assert len(batch) > 1  # alone it has nothing to be told from


@pytest.mark.parametrize("texts", [1, 16])
def test_pairs_that_are_long_on_both_sides_are_learned_a_few_at_a_time(texts: int) -> None:
    counts = [len(_batches_of([(rows, rows)] * 40, texts)) for rows in (3000, 1000)]
    assert counts == ([39, 5] if texts == 1 else [20, 8])  # the last pair alone joins the one before it
    assert len(_batches_of([(16, 1000)] * 40, texts)) == (1 if texts == 1 else 4)
    assert len(_batches_of([(16, 1000)] * 40, texts, self_attention=True)) == (5 if texts == 1 else 8)


@pytest.mark.parametrize(("m", "n", "texts"), [(577, 77, 1), (16, 512, 1), (16, 77, 16), (256, 77, 16), (577, 20, 16)])
def test_batches_of_usual_features_are_full(m: int, n: int, texts: int) -> None:
    assert [len(batch) for batch in _batches_of([(m, n)] * 256, texts)] == [64] * 4


def test_batches_are_drawn_with_little_padding(tmp_path: Path) -> None:
    data, _ = _drawn(tmp_path)
    train = data.parts["train"]
    made = batches(data, train, 8, torch.Generator().manual_seed(0))
    assert _padding(data, made) < 0.15
    assert made != batches(data, train, 8, torch.Generator().manual_seed(1))


def test_parts_are_by_id_alone() -> None:
    ids = [f"folder/{k}" for k in range(5000)]
    parts = [part_of(id, 0.1, 0.2) for id in ids]
    assert parts[5:9] == ["validation", "train", "held-out", "train"]
    assert abs(parts.count("held-out") / 5000 - 0.2) < 0.02
    assert abs(parts.count("validation") / 5000 - 0.1) < 0.02


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [_rate(100, step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1
    assert rates[-1] < 1e-6


def test_noise_explains_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    data, _ = _drawn(tmp_path, 60)
    objective = Numbers(torch.from_numpy(rng.standard_normal(60)), data.parts["train"], 0.0)
    means = Means(data, text=True, image=True)
    measured, _ = objective.fit_head(means, data)
    assert measured.loss < 1.1 * objective.targets[data.parts["validation"]].square().mean()


def test_equal_scores_are_no_hits(tmp_path: Path) -> None:
    data, _ = _drawn(tmp_path, 30)

    objective = Match(8)
    represent = Means(data, text=True, image=False)
    torch.manual_seed(0)
    measured = objective.evaluate(objective.head(8), represent, data, list(range(30)))
    assert measured.score == 0


def test_a_head_is_found_on_one_thread(rng: np.random.Generator) -> None:
    """Threads that meet thousands of times wait for each other where something else runs."""
    seen = set()

    class Watched(Classes):
        def loss_of(self, *args: Any, **options: Any) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return super().loss_of(*args, **options)

    with on_threads(2):
        objective = Watched(torch.arange(12) % 2, ["a", "b"], 0.0, 0.0, None)
        data: Any = SimpleNamespace(parts={"train": list(range(8)), "validation": list(range(8, 12))})
        objective.fitted(torch.from_numpy(rng.standard_normal((12, D)).astype(np.float32)), data, [D])
        assert torch.get_num_threads() == 2
    assert seen == {1}


def test_best_weights_are_kept_when_a_later_epoch_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = _drawn(tmp_path, 60)
    objective = Classes(torch.arange(60) % 2, ["a", "b"], 0.0, 0.0, None)
    settings = loop.Settings(epochs=9, batch_size=16, lr=0.0, weight_decay=0.0, patience=9, seed=0, device="cpu")
    step = loop._Run._step
    told: list[Any] = []
    monkeypatch.setattr(loop._Run, "_step", lambda self, batch: math.nan if told else step(self, batch))
    kept = []
    keeper: Any = SimpleNamespace(best=lambda fusion, head, progress: kept.append(progress.best_epoch), state=id)
    listener: Any = SimpleNamespace(step=lambda *_: None, epoch=told.append)
    with pytest.raises(TrainingError, match=r"best weights are kept, of epoch 1.*") as error:
        loop.fit(Fusion(fusecli.init(8, 2)), loop.Lesson(objective, data, settings), keeper, listener, 100.0)
    assert "epoch 2, step 1 of " in str(error.value)
    assert kept == [1]


def test_patience_is_for_epochs_that_learn_nothing(tmp_path: Path) -> None:
    data, _ = _drawn(tmp_path, 60)
    objective = Classes(torch.arange(60) % 2, ["a", "b"], 0.0, 0.0, None)
    losses = iter([0.9, 0.8, 0.7, 0.75, 0.71, 0.6])
    objective.fit_head = lambda *_: (Evaluation(next(losses), torch.zeros(1)), {})  # type: ignore[method-assign]
    settings = loop.Settings(epochs=9, batch_size=16, lr=0.0, weight_decay=0.0, patience=2, seed=0, device="cpu")
    quiet: Any = SimpleNamespace(best=print, state=id, step=lambda *_: None, epoch=id)
    # None of it betters what it began with.
    progress = loop.fit(Fusion(fusecli.init(8, 2)), loop.Lesson(objective, data, settings), quiet, quiet, 0.5)
    assert (progress.epoch, progress.best_epoch) == (5, 0)


@pytest.mark.parametrize(("loss", "best"), [(0.985, 0), (0.975, 1)])
def test_what_betters_the_start_by_less_than_2_percent_is_not_kept(tmp_path: Path, loss: float, best: int) -> None:
    data, _ = _drawn(tmp_path, 60)
    objective = Classes(torch.arange(60) % 2, ["a", "b"], 0.0, 0.0, None)
    objective.fit_head = lambda *_: (Evaluation(loss, torch.zeros(1)), {})  # type: ignore[method-assign]
    settings = loop.Settings(epochs=1, batch_size=16, lr=0.0, weight_decay=0.0, patience=2, seed=0, device="cpu")
    quiet: Any = SimpleNamespace(best=lambda *_: None, state=id, step=lambda *_: None, epoch=id)
    progress = loop.fit(Fusion(fusecli.init(8, 2)), loop.Lesson(objective, data, settings), quiet, quiet, 1.0)
    assert progress.best_epoch == best


def test_pairs_come_in_another_order_in_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = _drawn(tmp_path, 60)
    objective = Classes(torch.arange(60) % 2, ["a", "b"], 0.0, 0.0, None)
    orders: list[list[int]] = [[]]

    def step(run: Any, batch: Any) -> float:
        orders[-1] += batch.which
        return 0.0

    monkeypatch.setattr(loop._Run, "_step", step)
    settings = loop.Settings(epochs=2, batch_size=16, lr=0.0, weight_decay=0.0, patience=9, seed=0, device="cpu")
    quiet: Any = SimpleNamespace(
        best=lambda *_: None, state=id, step=lambda *_: None, epoch=lambda _: orders.append([])
    )
    loop.fit(Fusion(fusecli.init(8, 2)), loop.Lesson(objective, data, settings), quiet, quiet, 100.0)
    first, second = orders[:2]
    assert sorted(first) == sorted(second) == data.parts["train"]
    assert first != second


def test_a_head_is_made_of_canonical_correlations(rng: np.random.Generator) -> None:
    x = rng.standard_normal((200, 6))
    y = x[:, :3] @ rng.standard_normal((3, 4)) + rng.standard_normal((200, 4))
    x, y = x - x.mean(0), y - y.mean(0)
    # Björck and Golub 1973: cosines between the subspaces that the columns span.
    expected = np.linalg.svd(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0])[1]
    of_x, of_y, cross = (torch.from_numpy(z) for z in (x.T @ x, y.T @ y, x.T @ y))
    ours, theirs = canonical(of_x, of_y, cross, 1e-12, 4)
    left, right = x @ ours.numpy().T, y @ theirs.numpy().T
    for side, other, power in ((left, left, 1), (right, right, 1), (left, right, 2)):
        np.testing.assert_allclose(side.T @ other, np.diag(expected**power), atol=1e-8)


def test_what_does_not_vary_has_a_head_of_numbers() -> None:
    still = torch.zeros(3, 3, dtype=torch.float64)
    assert all(torch.isfinite(side).all() for side in canonical(still, still, still, 0.1, 2))


def test_a_head_is_judged_without_smoothing(tmp_path: Path) -> None:
    data, _ = _drawn(tmp_path, 60)
    vectors = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    losses = {
        Classes(torch.arange(60) % 2, ["a", "b"], 0.0, smoothing, None).fitted(vectors, data, [4])[0].loss
        for smoothing in (0.0, 0.5)
    }
    assert len(losses) == 1


def test_small_differences_between_large_numbers_count(rng: np.random.Generator) -> None:
    x = torch.from_numpy(1e8 + rng.standard_normal((300, 3)))
    moments = Moments(2, 1)
    for part in (x[:100], x[100:]):
        moments.add(part[:, :2], part[:, 2:])
    seen, told, cross = moments.covariances()
    expected = np.cov(x.numpy().T, bias=True)
    for found, wanted in ((seen, expected[:2, :2]), (told, expected[2:, 2:]), (cross, expected[:2, 2:])):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(torch.cat(moments.means()), x.mean(0), rtol=1e-14)


def test_a_head_is_made_beside_the_texts_of_other_pairs(tmp_path: Path) -> None:

    data, _ = _drawn(tmp_path)
    moments = _moments(Means(data, text=True, image=False), data, data.parts["train"])
    seen, told, cross = moments.covariances()
    assert torch.allclose(seen, told)
    assert cross.norm() < 0.1 * told.norm()


def test_a_fusion_that_only_repeats_the_text_matches_nothing(tmp_path: Path) -> None:

    data, _ = _drawn(tmp_path, 300)
    weights = checkpoint.init(8, 2, method="gated", gate="tanh")  # shut
    measured, _ = Match(8).fit_head(Fusion(weights, learned=False), data)
    assert measured.score == 0


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_a_head_minds_no_unit(rng: np.random.Generator, scale: float) -> None:
    targets = torch.arange(60) % 3
    x = torch.from_numpy(rng.standard_normal((60, D)).astype(np.float32))
    x[:, 0] += 2 * targets
    data: Any = SimpleNamespace(parts={"train": list(range(40)), "validation": list(range(40, 60))})
    objective = Classes(targets, list("abc"), 0.0, 0.0, None)
    expected = objective.fitted(x, data, [D])[0].loss
    assert objective.fitted(scale * x, data, [D])[0].loss == pytest.approx(expected, rel=1e-3)
    beside = torch.cat([x[:, :1], scale * x[:, 1:]], 1)  # two sides, of which one has another unit
    assert objective.fitted(beside, data, [1, D - 1])[0].loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_matching_minds_no_unit_of_a_side(rng: np.random.Generator, scale: float) -> None:
    x, y = (torch.from_numpy(rng.standard_normal((300, D)).astype(np.float32)) for _ in range(2))
    y[:, :4] += x[:, :4]

    def told(x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        moments = Moments(D, D)
        moments.add(x, y)
        return torch.stack([_side(head, "fused", x) for head in _heads(moments, widths, 8, "cpu")])

    beside = torch.cat([x[:, :6], scale * x[:, 6:]], 1)
    torch.testing.assert_close(told(beside, [6, D - 6]), told(x, [6, D - 6]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(told(beside, [D]), told(x, [D]), rtol=1e-3, atol=1e-2)  # one vector keeps its units


def test_training_may_begin_with_what_has_seen_no_pairs(tmp_path: Path) -> None:
    data, _ = _drawn(tmp_path, 60)
    classes = Classes(torch.arange(60) % 2, ["a", "b"], 0.0, 0.0, None)
    for gate, may in (("sigmoid", True), ("tanh", False)):  # shut, nothing behind it would learn
        beginning = recipe.from_scratch(None, 0, {"method": "gated", "num_heads": 2, "gate": gate}, data, classes)
        assert any(start is beginning.untrained for start in beginning.starts) == may
        assert len(beginning.starts) == may + len(SHARES) + len(PARTS)


@pytest.mark.parametrize("method", ["attention", "gated", "weighted-sum", "concat"])
def test_the_image_begins_as_a_share_of_the_text_and_its_middle_as_nothing(tmp_path: Path, method: str) -> None:
    data, _ = _drawn(tmp_path, 60)
    options: dict[str, Any] = {"residual": True} if method == "attention" else {}
    weights = checkpoint.orthogonal(data.texts.width, 2, method=method, image_dim=data.images.width, **options)
    bare, laid = laid_apart(weights, ends_of(weights, data), [0.0, 0.5])

    def vectors(weights: fusecli.Weights) -> Any:
        fused = [fusecli.fuse(weights, data.images[at], data.texts[at]).mean(0) for at in data.parts["train"]]
        return np.stack(fused, dtype=np.float64)

    text, image = vectors(bare), vectors(laid) - vectors(bare)
    spread = float(text.var(0).sum())
    assert float(np.square(image.mean(0)).sum()) < 1e-3 * spread
    np.testing.assert_allclose(image.var(0).sum(), 0.25 * spread, rtol=0.05)


@pytest.mark.parametrize("options", [{"method": "gated"}, {"method": "weighted-sum"}, {"residual": True}], ids=str)
def test_a_fusion_may_begin_as_good_as_both_sides_next_to_each_other(tmp_path: Path, options: dict[str, Any]) -> None:
    data, _ = _drawn(tmp_path)  # in all directions alike: there is no room to lay the image apart
    sides = [side.means().double() @ torch.linspace(1, 2, 8).double() for side in (data.texts, data.images)]
    objective = Numbers(sides[0] / sides[0].std() + sides[1] / sides[1].std(), data.parts["train"], 0.0)
    weights = checkpoint.orthogonal(data.texts.width, 2, image_dim=data.images.width, **options)

    def loss(represent: Any) -> float:
        return objective.fit_head(represent, data)[0].loss

    ends = ends_of(weights, data)
    [apart], [along] = laid_apart(weights, ends, [1.0]), aligned(weights, ends, data, objective, [1.0])
    assert loss(Means(data, text=True, image=True)) < 0.01
    assert loss(Fusion(along, learned=False)) < 0.05 < 0.3 < loss(Fusion(apart, learned=False))


@pytest.mark.parametrize("said", [0.0, 1e-30])
def test_an_image_is_not_blown_up_to_reach_a_text_that_says_nothing(rng: np.random.Generator, said: float) -> None:
    images, texts = rng.standard_normal((2, 60, 3, 8)).astype(np.float32)
    parts = {"train": list(range(40)), "validation": list(range(40, 60))}
    data: Any = SimpleNamespace(ids=list(range(60)), images=images, texts=texts, parts=parts)
    head = {"head.weight": torch.cat([torch.full((1, 8), said), torch.ones(1, 8)], 1)}  # of the text, of the image
    told: Any = SimpleNamespace(fitted=lambda *_: (None, head))
    weights = checkpoint.orthogonal(8, 2, method="gated")
    for start in aligned(weights, ends_of(weights, data), data, told):
        fused = np.stack([fusecli.fuse(start, image, text) for image, text in zip(images, texts, strict=True)])
        assert np.abs(fused).max() < 1e4


def test_a_head_is_as_good_when_it_is_used_as_when_it_was_made(tmp_path: Path) -> None:
    data, _ = _drawn(tmp_path, 60)
    objective = Classes(torch.arange(60) % 2, ["a", "b"], 0.0, 0.0, None)
    means = Means(data, text=True, image=True)
    judged, head = objective.fit_head(means, data)
    assert objective.evaluate(head, means, data, data.parts["validation"]).loss == pytest.approx(judged.loss, rel=1e-4)
