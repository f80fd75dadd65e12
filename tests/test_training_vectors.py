"""What stands for a pair in training is the same, whatever is computed together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fusecli import methods
from fusecli.collections import open_collection
from fusecli.errors import is_out_of_memory
from fusecli.plans import Order, Plan, costs_of_batch, costs_to_learn
from fusecli.training.data import Batch, load, read
from fusecli.training.match import Match
from fusecli.training.represent import Fusion, fast_in_bfloat16
from tests.lessons import on_threads
from tests.oracle_methods import oracle
from tests.test_methods import EVERY

D = 16


def _fusion(method: str, options: dict[str, Any], bfloat16: bool = False) -> Fusion:
    return Fusion(oracle(method, D, 4, D, D, layer_norm=True, **options)[1], bfloat16=bfloat16)


def _batch(m: int) -> Batch:
    drawn = torch.Generator().manual_seed(m)
    rows = [torch.randn(5, most, D, generator=drawn) for most in (m, 7)]
    masks = [torch.arange(x.shape[1]) < torch.randint(1, x.shape[1] + 1, (5, 1), generator=drawn) for x in rows]
    return Batch(list(range(5)), rows[0], masks[0], rows[1], masks[1])


@EVERY
@pytest.mark.parametrize("m", [1, 40])
def test_an_image_meets_many_texts_as_it_meets_each(method: str, options: dict[str, Any], m: int) -> None:
    batch, which = _batch(m), torch.tensor([[0, 3], [1, 1], [4, 2], [0, 2], [3, 4]])
    fusion, found, gradients = _fusion(method, options), [], []
    vectors: Any
    for together in (True, False):
        if together:
            vectors = fusion.each(batch, which)
        else:
            beside = [replace(batch, texts=batch.texts[at], text_mask=batch.text_mask[at]) for at in which.mT]
            vectors = torch.stack([fusion.encode(some) for some in beside], 1)
        vectors.square().sum().backward()
        found.append(vectors.detach())
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in fusion.parameters()])
        for parameter in fusion.parameters():
            parameter.grad = None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-5)


@pytest.mark.parametrize(
    ("method", "self_attention"), [("gated", False), ("transformer", False), ("transformer", True)]
)
def test_matching_has_the_same_gradients_every_time(method: str, self_attention: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    sides = [torch.randn(64, rows, D, generator=drawn) for rows in (4, 3)]
    masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in sides]
    batch = Batch(list(range(64)), sides[0], masks[0], sides[1], masks[1])
    fusion = _fusion(method, {"self_attention": True} if self_attention else {})

    class Overlapping(Match):
        def _groups(self, text: torch.Tensor) -> torch.Tensor:
            return torch.randint(len(text), (4, 16))  # threads meet in the texts that groups share

    objective, found = Overlapping(D), []
    head = objective.head(D)
    with on_threads(2):  # which can add up in another order each time
        for _ in range(5):
            torch.manual_seed(1)
            loss = objective.loss(head, fusion, batch)
            found.append(torch.autograd.grad(loss, [*head.values(), *fusion.parameters()]))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@EVERY
@pytest.mark.parametrize("together", [False, True])
def test_products_in_bfloat16_teach_the_same_and_judge_nothing(
    method: str, options: dict[str, Any], together: bool
) -> None:
    batch, which = _batch(6), torch.tensor([[0, 3], [1, 1], [4, 2], [0, 2], [3, 4]])
    learned, judged = [], []
    for bfloat16 in (False, True):
        fusion = _fusion(method, options, bfloat16)
        vectors: Any = fusion.each(batch, which) if together else fusion.encode(batch)
        assert vectors.dtype == torch.float32
        vectors.square().sum().backward()
        learned.append([vectors.detach(), *(p.grad for p in fusion.parameters() if p.grad is not None)])
        with torch.no_grad():
            judged.append(fusion.encode(batch))
    assert torch.equal(*judged)
    exact, narrow = (torch.cat([x.flatten() for x in some]) for some in learned)
    off = (exact - narrow).norm() / exact.norm()
    assert 2**-16 < off < 2**-5  # 8 bits, and what a few layers make of them


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches which dtypes matrices are multiplied in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@EVERY
def test_all_products_of_learning_are_in_bfloat16_and_the_text_is_not(method: str, options: dict[str, Any]) -> None:
    batch = _batch(40)
    batch = replace(batch, texts=batch.texts + 100)  # in bfloat16 that takes all digits but one
    fusion, exact = _fusion(method, options, True), _fusion(method, options)
    with _Products() as products:
        vectors: Any = fusion.encode(batch)
        vectors.square().sum().backward()
    assert products.dtypes == {torch.bfloat16}
    if exact.config.adds_text:
        assert (vectors - exact.encode(batch)).abs().max() < 0.05


def test_what_does_not_learn_is_computed_in_float32() -> None:
    fusion = Fusion(oracle("gated", D, 4, D, D)[1], learned=False, bfloat16=True)
    with _Products() as products:
        fusion.encode(_batch(6))
    assert torch.bfloat16 not in products.dtypes


@pytest.mark.parametrize(
    ("found", "fast"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False)]
)
def test_a_processor_says_whether_it_is_fast_in_bfloat16(
    found: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert fast_in_bfloat16("cpu") == fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions
    assert not fast_in_bfloat16("cpu")
    assert fast_in_bfloat16("cuda:0")


@EVERY
def test_an_image_among_texts_is_judged_as_each_pair_is(
    method: str, options: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    for side, lengths in (("i", [1, 3, 70]), ("t", [5, 1, 9])):
        rows = {str(k): rng.standard_normal((n, D), np.float32) for k, n in enumerate(lengths)}
        save_file(rows, tmp_path / f"{side}.safetensors")
    images, texts = (open_collection(str(tmp_path / f"{side}.safetensors")) for side in "it")
    data = read(list(images), lambda name: (images.place(name), texts.place(name)), str(tmp_path), 0.1, 0.2)
    fusion, pairs = _fusion(method, options), [0, 1, 2]
    with torch.no_grad():
        beside = fusion.encode_beside(data, pairs)
        for image in pairs:
            expected = fusion.encode(load(data, pairs, [image] * 3))
            torch.testing.assert_close(beside(image), expected, rtol=1e-4, atol=1e-5)


def test_costs_of_orders_are_the_products_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, n, m, dim, image_dim, heads = shape = (3, 5, 11, 24, 40, 4)
    weights = oracle("attention", dim, heads, 16, image_dim)[1]
    drawn = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(pairs, k, width, generator=drawn) for k, width in ((m, image_dim), (n, 16)))
    whole = [torch.ones(pairs, k, dtype=torch.bool) for k in (m, n)]

    def counted(order: Order, learn: bool, first: bool = False) -> int:
        monkeypatch.setattr(methods, "plan_of_batch", lambda *given: Plan(order, order))
        monkeypatch.setattr(methods, "plan_to_learn", lambda *given: (Plan(order, order), first))
        fusion = Fusion(weights, learned=learn)
        with FlopCounterMode(display=False) as counter:
            vectors: Any = fusion.encode(Batch(list(range(pairs)), images, whole[0], texts, whole[1]))
            if learn:
                vectors.sum().backward()
        return int(counter.get_total_flops())

    costs = costs_of_batch(*shape[1:], carrying=0)
    spared = costs[Order.DIRECT] - costs[Order.TEXT]
    assert counted(Order.DIRECT, False) - counted(Order.TEXT, False) == 4 * pairs * spared
    ways = costs_to_learn(*shape, carrying=0)
    first = counted(Order.DIRECT, True)
    for way, cost in ways.items():
        assert counted(way[0], True, way[1]) - first == 4 * (cost - ways[Order.DIRECT, False])


def test_memory_that_torch_does_not_get_is_called_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
