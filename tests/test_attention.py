from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusecli import attention, fusion
from fusecli.maps import fold
from fusecli.plans import DIRECT, PACKING_ROWS, Order, Plan, flops, plan, plan_of_batch, plan_to_learn
from fusecli.weights import Weights, layers_of
from tests.oracle import article, assert_as_good, both_precisions, features, weights_of

PLANS = list(product(Order, Order))


def _by_plan(scores: Order, values: Order, module: Any, image: Any, text: Any) -> tuple[Any, Any]:
    maps = weights_of(module).folded(text, str(text.dtype).removeprefix("torch."))
    side = attention.prepare(image, maps, module.attention.num_heads, Plan(scores, values))
    return attention.attend(text, side, need_weights=True)


@pytest.mark.parametrize(("scores", "values"), PLANS)
@pytest.mark.parametrize(("m", "n"), [(2, 1), (5, 9), (9, 5), (70, 130)])
def test_every_order_gives_the_articles_numbers(
    scores: Order, values: Order, m: int, n: int, rng: np.random.Generator
) -> None:
    module = article(48, 4, text_dim=40, image_dim=56)
    image, text = features(rng, m, 56, norm=9), features(rng, n, 40, norm=3)
    exact, single = both_precisions(module, image, text)
    for convert in (np.asarray, torch.from_numpy):
        fused, weights = _by_plan(scores, values, module, convert(image), convert(text))
        assert_as_good(fused, exact[0], single[0])
        assert_as_good(weights, exact[1], single[1])
    if scores is values is not Order.IMAGE:
        fused, weights = _by_plan(scores, values, module, *(torch.from_numpy(x)[None] for x in (image, text)))
        assert_as_good(fused[0], exact[0], single[0])
        assert_as_good(weights[0], exact[1], single[1])


@pytest.mark.parametrize(("scores", "values"), PLANS)
def test_orders_agree_in_float64_for_scores_that_would_overflow(
    scores: Order, values: Order, rng: np.random.Generator
) -> None:
    module = article(48, 4)
    image, text = (features(rng, rows, 48, norm=3000).astype(np.float64) for rows in (6, 4))
    fused, _ = _by_plan(scores, values, module, image, text)
    exact = module.double()(torch.from_numpy(image), torch.from_numpy(text))[0].numpy()
    np.testing.assert_allclose(fused, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("seed", range(4))
def test_large_scores_are_taken_exactly(order: Order, seed: int) -> None:
    # Also in a batch, where what one pair needs changes no other.
    rng = np.random.default_rng(seed)
    module = article(192, 8, seed=seed)
    for parameter in module.parameters():
        parameter.mul_(2)
    image, text = features(rng, 150, 192, norm=90, shared=1), features(rng, 3, 192, norm=90)
    exact, single = both_precisions(module, image, text)
    fused, weights = _by_plan(order, Order.DIRECT, module, image, text)
    assert_as_good(fused, exact[0], single[0])
    assert_as_good(weights, exact[1], single[1])
    if order is not Order.IMAGE:
        small = [(x / 1000).astype(np.float32) for x in (image, text)]
        mixed, others = (
            [torch.from_numpy(np.stack(pair)) for pair in zip(beside, small, strict=True)]
            for beside in ((image, text), small)
        )
        fused, weights = _by_plan(order, order, module, *mixed)
        assert_as_good(fused[0], exact[0], single[0])
        assert_as_good(weights[0], exact[1], single[1])
        torch.testing.assert_close(fused[1], _by_plan(order, order, module, *others)[0][1], atol=0, rtol=0)


def _table(n: int, m: int, d: int, h: int) -> dict[tuple[Order, Order], int]:
    """The table of orders for equal widths, as it stands in the README."""
    project = {"n": 2 * n * d * d, "m": 2 * m * d * d}
    direct = project["n"] + project["m"] + 2 * n * m * d
    image = 2 * project["m"] + 2 * n * h * m * d
    text = 2 * project["n"] + 2 * m * h * n * d
    half = {Order.DIRECT: direct, Order.IMAGE: image, Order.TEXT: text}
    return {(scores, values): half[scores] + half[values] for scores, values in PLANS}


@pytest.mark.parametrize("shape", list(product([1, 4, 16, 50, 77, 197, 577], repeat=2)))
def test_the_plan_counts_its_flops_and_is_near_the_fewest(shape: tuple[int, int]) -> None:
    n, m = shape
    _hold_the_plan((n, m, 768, 768, 768, 8), _table(n, m, 768, 8), 768 * 768)


def _hold_the_plan(shape: tuple[int, ...], counted: dict[tuple[Order, Order], int], matrix: int) -> None:
    chosen, told = plan(*shape), flops(*shape)
    assert told == counted[chosen.scores, chosen.values]
    spare = 8 * PACKING_ROWS * matrix  # at most what packing four matrices may outweigh
    assert told <= min(counted.values()) + spare


def _counted(n: int, m: int, scores: Order, values: Order, weights: Weights) -> int:
    """What torch counts in this order, but for the one product with a bias."""
    image, text = (torch.full((rows, width), 0.01) for rows, width in ((m, weights.image_dim), (n, weights.text_dim)))
    maps = weights.folded(text, "float32")
    with FlopCounterMode(display=False) as counter:
        attention.attend(text, attention.prepare(image, maps, 4, Plan(scores, values)))
    return int(counter.get_total_flops()) - 2 * m * weights.dim * (scores is Order.IMAGE)


@pytest.mark.parametrize("widths", [(48, 24, 96), (48, 96, 24), (96, 48, 48)])
@pytest.mark.parametrize("shape", list(product([1, 50, 197], repeat=2)))
def test_the_flops_of_the_plan_are_those_that_torch_counts(
    shape: tuple[int, int], widths: tuple[int, int, int]
) -> None:
    (n, m), (dim, text_dim, image_dim) = shape, widths
    weights = weights_of(article(dim, 4, text_dim, image_dim))
    counted = {(a, b): _counted(n, m, a, b, weights) for a, b in PLANS}
    _hold_the_plan((n, m, dim, text_dim, image_dim, 4), counted, max(widths) * dim)


def test_a_few_tokens_go_to_the_image_and_many_stay() -> None:
    assert plan(8, 577, 768, 768, 768, 8).scores is Order.TEXT
    assert plan(577, 4, 768, 768, 768, 8).scores is Order.IMAGE
    assert plan(577, 577, 768, 768, 768, 8).scores is Order.DIRECT


def test_the_order_of_a_batch_follows_its_shape() -> None:
    assert plan_of_batch(12, 256, 768, 768, 8) == Plan(Order.TEXT, Order.TEXT)
    assert plan_of_batch(77, 50, 768, 768, 8) == DIRECT
    assert plan_to_learn(64, 12, 256, 768, 768, 8) == (Plan(Order.TEXT, Order.TEXT), True)
    assert plan_to_learn(64, 12, 256, 768, 768, 8, keep_direct=True) == (DIRECT, True)
    assert plan_to_learn(4, 12, 16, 768, 768, 8) == (DIRECT, False)  # few rows: multiplying maps does not pay


def test_folding_is_the_layers_one_after_another(rng: np.random.Generator) -> None:
    weights = weights_of(article(24, 3, text_dim=20, image_dim=28))
    text = rng.standard_normal((5, 20))
    layers = layers_of(weights.at(text, "float64"), 3)
    maps = fold(layers)
    (query, query_bias), *_ = layers.thirds()
    projected = (text @ layers.text[0].T + layers.text[1]) @ query.T + query_bias
    np.testing.assert_allclose(text @ maps.query.T + maps.query_bias, projected / np.sqrt(8), rtol=1e-12)


def test_blocks_of_rows_give_what_one_block_gives(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(article(32, 4))
    image, text = features(rng, 6, 32), features(rng, 50, 32)
    whole = fusion.fuse(weights, image, text, need_weights=True)
    monkeypatch.setattr(fusion, "BLOCK_ROWS", 7)
    parts = fusion.fuse(weights, image, text, need_weights=True)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
