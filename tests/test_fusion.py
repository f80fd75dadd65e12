from __future__ import annotations

import gc
import pickle
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fusecli import Config, Weights, checkpoint, fuse
from fusecli.errors import CheckpointError, ShapeError, UsageError, ValuesError
from tests.oracle import KINDS, article, assert_as_good, both_precisions, features, in_torch, weights_of

FLOATS = ["float16", "float32", "float64"]


def _hold_against_article(m: int, n: int, h: int, widths: tuple[int, int, int], norm: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dim, text_dim, image_dim = (width // h * h for width in widths)
    module = article(dim, h, text_dim, image_dim, seed)
    image = features(rng, m, image_dim, norm, shared=seed % 2)
    text = features(rng, n, text_dim, norm)
    exact, single = both_precisions(module, image, text)
    for convert, here in KINDS:
        with here():
            fused, attended = fuse(weights_of(module), convert(image), convert(text), need_weights=True)
        assert_as_good(fused, exact[0], single[0])
        if m > 1:
            assert_as_good(attended, exact[1], single[1])


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 2, 7, 50, 197, 577])
@pytest.mark.parametrize("n", [1, 8, 77, 512])
@pytest.mark.parametrize("h", [1, 8, 12])
def test_numbers_of_the_article(m: int, n: int, h: int) -> None:
    for seed, (widths, norm) in enumerate([((768, 512, 1024), 1.0), ((64, 96, 80), 90.0)]):
        _hold_against_article(m, n, h, widths, norm, seed + m + n)


@settings(max_examples=60)
@given(
    m=st.integers(1, 80),
    n=st.integers(1, 80),
    h=st.sampled_from([1, 2, 8, 12]),
    widths=st.tuples(*[st.integers(24, 200)] * 3),
    norm=st.floats(1, 90),
    seed=st.integers(0, 2**16),
)
def test_numbers_of_the_article_at_drawn_shapes(
    m: int, n: int, h: int, widths: tuple[int, int, int], norm: float, seed: int
) -> None:
    _hold_against_article(m, n, h, widths, norm, seed)


@pytest.mark.parametrize("wanting", ["text", "image"])
@pytest.mark.parametrize("seed", range(40))
def test_numbers_of_the_article_where_a_gradient_of_features_is_wanted(seed: int, wanting: str) -> None:
    rng, module = np.random.default_rng(seed), article(384, 1, seed=seed)
    image, text = features(rng, 7, 384, 90), features(rng, 8, 384, 90)  # scores in the tens
    exact, single = both_precisions(module, image, text)
    sides = {"image": torch.from_numpy(image), "text": torch.from_numpy(text)}
    sides[wanting].requires_grad_()
    fused, attended = fuse(weights_of(module), sides["image"], sides["text"], need_weights=True)
    assert_as_good(fused.detach(), exact[0], single[0])
    assert_as_good(attended.detach(), exact[1], single[1])


@pytest.fixture
def drawn(rng: np.random.Generator) -> tuple[Weights, Any, Any]:
    return weights_of(article(32, 4)), features(rng, 6, 32, norm=20), features(rng, 9, 32, norm=20)


def test_permuting_image_rows_changes_nothing(drawn: tuple[Weights, Any, Any], rng: np.random.Generator) -> None:
    weights, image, text = drawn
    np.testing.assert_allclose(fuse(weights, rng.permutation(image), text), fuse(weights, image, text), atol=1e-6)


def test_permuting_text_rows_permutes_the_output(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    np.testing.assert_allclose(fuse(weights, image, text[::-1]), fuse(weights, image, text)[::-1], atol=1e-6)


def test_duplicating_every_image_row_changes_nothing(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    np.testing.assert_allclose(fuse(weights, np.repeat(image, 3, 0), text), fuse(weights, image, text), atol=1e-6)


def test_attention_rows_are_distributions(drawn: tuple[Weights, Any, Any]) -> None:
    _, attended = fuse(*drawn, need_weights=True)
    assert attended.shape == (4, 9, 6)
    assert (attended >= 0).all()
    np.testing.assert_allclose(attended.sum(-1), 1, rtol=1e-6)


def test_with_one_image_row_the_text_drops_out(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    fused, attended = fuse(weights, image[:1], text, need_weights=True)
    assert (fused == fused[0]).all()
    assert attended.shape == (4, 9, 1)
    assert (attended == 1).all()


def test_residual_adds_the_text(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    for rows in (1, 6):
        added = fuse(weights.with_options(residual=True), image[:rows], text) - fuse(weights, image[:rows], text)
        np.testing.assert_allclose(added, text, atol=2e-6)


def test_other_heads_are_not_served_from_the_cache(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    fuse(weights, image, text)
    fresh = Weights(Config(num_heads=2), weights.tensors)
    np.testing.assert_array_equal(fuse(weights.with_options(num_heads=2), image, text), fuse(fresh, image, text))


@pytest.mark.parametrize("text_dtype", FLOATS)
@pytest.mark.parametrize("image_dtype", FLOATS)
def test_the_output_has_the_texts_dtype(drawn: tuple[Weights, Any, Any], text_dtype: str, image_dtype: str) -> None:
    weights, image, text = drawn
    fused, attended = fuse(weights, image.astype(image_dtype), text.astype(text_dtype), need_weights=True)
    assert fused.dtype == text_dtype
    assert attended.dtype == ("float64" if "float64" in (text_dtype, image_dtype) else "float32")
    np.testing.assert_allclose(fused.astype(np.float64), fuse(weights, image, text), atol=2e-2)


def test_float64_features_are_fused_in_float64(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    exact = article(32, 4).double()(torch.from_numpy(image).double(), torch.from_numpy(text).double())[0]
    fused = fuse(weights, image, text.astype(np.float64))
    np.testing.assert_allclose(fused, exact.numpy(), rtol=1e-12, atol=1e-12)


def test_bfloat16_tensors_stay_bfloat16(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    low = torch.from_numpy(text).bfloat16()
    fused = fuse(weights, image, low)
    assert fused.dtype == torch.bfloat16
    expected = fuse(weights, image, low.float().numpy())
    np.testing.assert_allclose(fused.float().numpy(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("template", [np.asarray, torch.from_numpy])
def test_any_byte_order_will_do(drawn: tuple[Weights, Any, Any], template: Any) -> None:
    weights, image, text = drawn
    expected = fuse(weights, image, text)
    swapped = fuse(weights, image.astype(">f4"), template(text))
    np.testing.assert_array_equal(swapped, expected)
    if template is np.asarray:
        fused = fuse(weights, image, text.astype(">f4"))
        np.testing.assert_array_equal(fused, expected)
        assert fused.dtype.isnative


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("kind", [np.matrix, lambda x: x.tolist(), lambda x: x.astype(np.longdouble).byteswap()])
def test_other_kinds_of_arrays_are_taken_as_plain_ones(drawn: tuple[Weights, Any, Any], kind: Any) -> None:
    weights, image, text = drawn
    expected = fuse(weights, image, text)
    given = kind(image)
    if getattr(given, "dtype", None) == np.longdouble:
        given = given.view(given.dtype.newbyteorder())
        learned = Weights(weights.config, {k: torch.from_numpy(x).requires_grad_() for k, x in weights.tensors.items()})
        fused = fuse(learned, given, torch.from_numpy(text)).detach().numpy()
        np.testing.assert_allclose(fused, expected, rtol=1e-4, atol=1e-5)
    fused = fuse(weights, given, text)
    assert type(fused) is np.ndarray
    np.testing.assert_allclose(fused, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_is_not_lost_in_silence(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    with pytest.raises(ValuesError, match="masked"):
        fuse(weights, np.ma.masked_invalid(image), text)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_dense_array_is_refused(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    rows = torch.from_numpy(text)
    listed = [row.clone().requires_grad_() for row in rows]
    for bad in ([*text.tolist(), [0.0]], listed, rows.to_sparse(), torch.nested.nested_tensor([rows])):
        with pytest.raises(ValuesError, match="text features"):
            fuse(weights, image, bad)
        with pytest.raises(ValuesError, match="image features"):
            fuse(weights, bad, text)


def test_one_vector_and_a_leading_axis_of_one_are_rows(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    expected = fuse(weights, image[:1], text)
    np.testing.assert_array_equal(fuse(weights, image[0], text[None]), expected)


def test_weights_of_torch_serve_features_of_numpy_and_back(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights.tensors.items()}
    ours = fuse(Weights(weights.config, tensors), image, text)
    np.testing.assert_allclose(ours, fuse(weights, image, text), atol=1e-6)
    assert isinstance(fuse(weights, image, torch.from_numpy(text)), torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numpy_computes_for_tensors_on_the_cpu(drawn: tuple[Weights, Any, Any], dtype: torch.dtype) -> None:
    weights, image, text = drawn
    image, text = torch.from_numpy(image), torch.from_numpy(text).to(dtype)
    fused, attended = fuse(weights, image, text, need_weights=True)
    assert (fused.dtype, attended.device.type) == (dtype, "cpu")
    expected = fuse(weights, image.numpy(), (text.float() if dtype == torch.bfloat16 else text).numpy())
    assert torch.equal(fused, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("bad", [float("inf"), 3e38])
def test_numbers_that_overflow_raise_no_warning_for_tensors(drawn: tuple[Weights, Any, Any], bad: float) -> None:
    weights, image, text = drawn
    assert not fuse(weights, torch.full(image.shape, bad), torch.from_numpy(text)).isfinite().any()


@pytest.mark.filterwarnings("ignore")  # of tracing itself
def test_what_is_traced_is_no_constant(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn[0], *map(torch.from_numpy, drawn[1:])
    traced = torch.jit.trace(lambda text: fuse(weights, image, text), (text,), check_trace=False)  # type: ignore[no-untyped-call]
    assert torch.allclose(traced(text.flip(1)), fuse(weights, image, text.flip(1)), atol=1e-5)


def test_torch_sees_what_it_functionalizes_or_counts(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn[0], *map(torch.from_numpy, drawn[1:])
    functional = torch.func.functionalize(lambda text: fuse(weights, image, text))
    assert torch.allclose(functional(text), fuse(weights, image, text), atol=1e-5)
    with FlopCounterMode(display=False) as counter:
        fuse(weights, image, text)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("method", ["attention", "concat", "weighted-sum", "gated"])
def test_fused_tensors_lie_in_rows(rng: np.random.Generator, method: str) -> None:
    weights = checkpoint.init(32, num_heads=4, method=method)
    image, text = (torch.from_numpy(features(rng, rows, 32, norm=20)) for rows in (6, 9))
    assert fuse(weights, image, text).is_contiguous()


def test_gradients_of_features_flow_through_fixed_weights(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn[0], *(torch.from_numpy(x).requires_grad_() for x in drawn[1:])
    assert fuse(weights, image, text.detach()).requires_grad
    assert fuse(weights, image.detach(), text).requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's own, when jvp is first used
def test_derivatives_forward_flow_through_all_that_is_given(drawn: tuple[Weights, Any, Any]) -> None:
    weights = drawn[0]
    forward_ad: Any = torch.autograd.forward_ad
    image, text = (torch.from_numpy(x) for x in drawn[1:])
    name = "attention.out_proj.bias"  # the fused rows move as it moves
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights.tensors.items()}

    def by_bias(bias: Any) -> Any:
        return fuse(Weights(weights.config, {**tensors, name: bias}), image, text)

    def by_text(text: Any) -> Any:
        return fuse(weights, image, text)

    def by_image(image: Any) -> Any:
        return fuse(weights, image, text)

    for function, x in ((by_text, text), (by_image, image), (by_bias, tensors[name])):
        fused, change = torch.func.jvp(function, (x,), (1e-3 * x,))[:2]
        assert torch.allclose(fused + change, function(1.001 * x), atol=1e-3)
        with forward_ad.dual_level():
            dual = function(forward_ad.make_dual(x, 1e-3 * x))
            assert torch.allclose(forward_ad.unpack_dual(dual).tangent, change, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 32), (9, 33), (2, 9, 32), (1, 1, 9, 32), ()])
def test_text_that_does_not_fit_is_refused(drawn: tuple[Weights, Any, Any], shape: tuple[int, ...]) -> None:
    weights, image, _ = drawn
    with pytest.raises(ShapeError):
        fuse(weights, image, np.zeros(shape, np.float32))


def test_numbers_that_are_not_floats_are_refused(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    for dtype in (np.int64, np.complex64, bool):
        with pytest.raises(ValuesError):
            fuse(weights, image, text.astype(dtype))


def _without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize("name", ["text_proj.weight", "attention.in_proj_bias"])
def test_weights_name_the_tensor_that_does_not_fit(drawn: tuple[Weights, Any, Any], name: str) -> None:
    tensors = dict(drawn[0].tensors)
    config = Config(num_heads=4)
    for bad in (_without(tensors, name), tensors | {name: tensors[name][:-1]}, tensors | {name: tensors[name][None]}):
        with pytest.raises(CheckpointError, match=name):
            Weights(config, bad)
    with pytest.raises(CheckpointError, match="stranger"):
        Weights(config, tensors | {"stranger": tensors[name]})


def test_heads_must_divide_the_width(drawn: tuple[Weights, Any, Any]) -> None:
    with pytest.raises(UsageError, match="num_heads=5, D=32"):
        drawn[0].with_options(num_heads=5)


def test_residual_needs_equal_widths() -> None:
    with pytest.raises(UsageError, match="Dt=16"):
        weights_of(article(32, 4, text_dim=16), residual=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_cuda_agrees_with_the_cpu(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    fused = fuse(weights, torch.from_numpy(image).cuda(), torch.from_numpy(text).cuda())
    assert fused.is_cuda
    np.testing.assert_allclose(fused.cpu().numpy(), fuse(weights, image, text), atol=1e-5)


@pytest.mark.parametrize("m", [1, 3])
def test_a_text_has_a_gradient_where_only_it_wants_one(m: int) -> None:
    image, text = torch.randn(m, 16), torch.randn(3, 16, requires_grad=True)
    fuse(checkpoint.init(16, 4), image, text).sum().backward()
    assert text.grad is not None
    assert bool(text.grad.any()) == (m > 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_an_optimizer_changes_are_folded_anew(rows: int, fused: bool) -> None:
    drawn = checkpoint.init(16, 4)
    tensors = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in drawn.tensors.items()}
    weights, image, text = Weights(drawn.config, tensors), torch.ones(rows, 16), torch.ones(5, 16)
    with torch.no_grad():
        before = fuse(weights, image, text)
    fuse(weights, image, text).sum().backward()
    torch.optim.SGD(tensors.values(), 0.1, fused=fused).step()
    with torch.no_grad():
        after = fuse(weights, image, text)
        torch.testing.assert_close(after, fuse(Weights(drawn.config, tensors), image, text))
    assert not torch.allclose(after, before)


def test_tensors_that_are_changed_in_place_are_folded_anew() -> None:
    drawn = checkpoint.init(16, 4)
    weights = Weights(drawn.config, {name: torch.tensor(tensor) for name, tensor in drawn.tensors.items()})
    image, text = torch.ones(3, 16), torch.ones(5, 16)
    before = fuse(weights, image, text)
    weights.tensors["attention.in_proj_weight"].mul_(2)
    after = fuse(weights, image, text)
    torch.testing.assert_close(after, fuse(Weights(drawn.config, weights.tensors), image, text))
    assert not torch.allclose(after, before)


def test_weights_first_used_in_inference_mode_are_of_use_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecli.fusion.numpy_can_have", lambda *arrays: False)  # as on a GPU
    weights = checkpoint.init(16, 4)
    image, text = torch.ones(3, 16), torch.ones(5, 16)
    with torch.inference_mode():
        fuse(weights, image, text)
    text.requires_grad_()
    fuse(weights, image, text).sum().backward()
    assert text.grad is not None


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("method", ["attention", "gated", "concat", "transformer"])
def test_results_lie_in_rows(method: str, rows: int, rng: np.random.Generator) -> None:
    # Not all who write arrays look: safetensors.numpy stored what lies in columns as if it lay in rows.
    weights = checkpoint.init(32, 4, method=method)
    image, text = features(rng, rows, 32), features(rng, 9, 32)
    assert fuse(weights, image, text).flags.c_contiguous
    if method != "concat":
        assert fuse(weights, image, text[:1], need_weights=True)[1].flags.c_contiguous


@pytest.mark.parametrize("convert", [np.array, torch.from_numpy])
def test_weights_keep_nothing_of_the_features(convert: Any, rng: np.random.Generator) -> None:
    weights = checkpoint.init(32, 4)
    text = convert(features(rng, 2000, 32))
    with in_torch():
        fuse(weights, convert(features(rng, 3, 32)), text)
    gone = weakref.ref(text)
    del text
    gc.collect()
    assert gone() is None
    assert len(pickle.dumps(weights)) < 40_000  # nor do copies take folded maps along


def test_a_changed_copy_of_weights_is_computed_with(drawn: tuple[Weights, Any, Any]) -> None:
    weights, image, text = drawn
    fuse(weights, image, text)
    others = weights_of(article(32, 4, seed=5))
    changed = replace(weights, tensors=others.tensors)
    np.testing.assert_array_equal(fuse(changed, image, text), fuse(others, image, text))


def test_what_is_kept_is_not_rounded_by_whoever_asks_first(rng: np.random.Generator) -> None:
    image, text = (torch.from_numpy(features(rng, rows, 32)) for rows in (3, 5))
    weights = checkpoint.init(32, 4, method="transformer")
    tensors = {name: tensor + np.float32(rng.normal(0, 0.2, tensor.shape)) for name, tensor in weights.tensors.items()}
    first, second = (Weights(weights.config, tensors) for _ in range(2))
    with in_torch():
        with torch.autocast("cpu", torch.bfloat16):
            fuse(first, image, text)
        assert torch.equal(fuse(first, image, text), fuse(second, image, text))
