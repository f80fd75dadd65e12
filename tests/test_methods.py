from __future__ import annotations

import json
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import fusecli
from fusecli import Config, Weights, checkpoint, fuse, methods
from fusecli.arrays import FLOAT_NAMES
from fusecli.cli.options import METHOD_OPTIONS, DtypeName, Gate, MethodName
from fusecli.errors import UsageError
from fusecli.fusion import Prepared
from fusecli.methods import View
from fusecli.one_row import single_rows
from fusecli.plans import Order, Plan
from fusecli.weights import GATES, METHODS, OPTIONS
from tests.batches import D
from tests.conftest import Run
from tests.oracle import KINDS, assert_as_good, features
from tests.oracle_methods import oracle

CASES: list[tuple[str, dict[str, Any]]] = [
    ("attention", {}),
    ("attention", {"residual": True}),
    ("weighted-sum", {}),
    ("concat", {}),
    ("gated", {}),
    ("gated", {"gate": "tanh"}),
    ("transformer", {"num_layers": 2}),
    ("transformer", {"self_attention": True, "dim_feedforward": 48}),
]
EVERY = pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)) or "-"
)


def _adds_text(method: str, options: dict[str, Any]) -> bool:
    return method == "gated" or bool(options.get("residual"))


def _hold(
    method: str, options: dict[str, Any], m: int, n: int, dims: tuple[int, int, int], norm: float, seed: int
) -> None:
    dim, text_dim, image_dim = dims
    module, weights = oracle(
        method, dim, 4, dim if _adds_text(method, options) else text_dim, image_dim, seed, **options
    )
    rng = np.random.default_rng(seed)
    image = features(rng, m, image_dim, norm, shared=seed % 2)
    text = features(rng, n, weights.text_dim, 3.0)
    single = module.float()(torch.from_numpy(image), torch.from_numpy(text))
    exact = module.double()(torch.from_numpy(image).double(), torch.from_numpy(text).double())
    shown = exact[1] is not None
    for convert, here in KINDS:
        with here():
            ours = fuse(weights, convert(image), convert(text), need_weights=True) if shown else None
            fused = ours[0] if ours else fuse(weights, convert(image), convert(text))
        assert_as_good(fused, exact[0].numpy(), single[0].numpy())
        if ours and m > 1:
            assert_as_good(ours[1], exact[1].numpy(), single[1].numpy())


@EVERY
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 5), (3, 1), (16, 9), (257, 77)])
def test_numbers_of_torchs_layers(method: str, options: dict[str, Any], layer_norm: bool, m: int, n: int) -> None:
    _hold(method, {**options, "layer_norm": layer_norm}, m, n, (64, 96, 80), 60.0, m + n)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(("m", "n"), [(1, 77), (50, 8), (577, 77), (16, 512)])
def test_numbers_of_torchs_layers_at_full_width(method: str, options: dict[str, Any], m: int, n: int) -> None:
    _hold(method, options, m, n, (768, 512, 1024), 1.0, m)
    _hold(method, {**options, "layer_norm": True}, m, n, (768, 512, 1024), 80.0, n)


@settings(max_examples=60)
@given(
    case=st.sampled_from(CASES),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    dims=st.tuples(st.integers(2, 12).map(lambda k: 4 * k), st.integers(3, 60), st.integers(3, 60)),
    norm=st.floats(0.5, 90),
    seed=st.integers(0, 2**16),
)
def test_numbers_of_torchs_layers_at_drawn_shapes(
    case: tuple[str, dict[str, Any]], m: int, n: int, dims: tuple[int, int, int], norm: float, seed: int
) -> None:
    _hold(case[0], {**case[1], "layer_norm": bool(seed % 3)}, m, n, dims, norm, seed)


def _drawn(method: str, options: dict[str, Any], rows: int = 6) -> tuple[Weights, Any, Any]:
    rng = np.random.default_rng(3)
    weights = oracle(method, 32, 4, 32, 32, **options)[1]
    return weights, features(rng, rows, 32, norm=20), features(rng, 9, 32, norm=4)


@EVERY
def test_permuting_image_rows_or_repeating_each_changes_nothing(method: str, options: dict[str, Any]) -> None:
    weights, image, text = _drawn(method, options)
    expected = fuse(weights, image, text)
    np.testing.assert_allclose(fuse(weights, image[::-1], text), expected, atol=5e-6)
    np.testing.assert_allclose(fuse(weights, np.repeat(image, 3, 0), text), expected, atol=5e-6)


@EVERY
def test_permuting_text_rows_permutes_the_output(method: str, options: dict[str, Any]) -> None:
    weights, image, text = _drawn(method, options)
    np.testing.assert_allclose(fuse(weights, image, text[::-1]), fuse(weights, image, text)[::-1], atol=5e-6)


@EVERY
def test_text_rows_know_of_each_other_by_self_attention_only(method: str, options: dict[str, Any]) -> None:
    weights, image, text = _drawn(method, options)
    alone = fuse(weights, image, text[:4])
    same = np.allclose(alone, fuse(weights, image, text)[:4], atol=5e-6)
    assert same is not options.get("self_attention", False)


@EVERY
def test_with_one_image_row_the_text_stays(method: str, options: dict[str, Any]) -> None:
    weights, image, text = _drawn(method, options, rows=1)
    fused = fuse(weights, image, text)
    assert (len(np.unique(fused, axis=0)) == 1) is (method == "attention" and not options)


@EVERY
def test_blocks_of_text_give_what_the_whole_gives(method: str, options: dict[str, Any]) -> None:
    weights, image, text = _drawn(method, options)
    prepared = Prepared(View(weights, image, text, len(text), "float32"))
    parts = [prepared.fuse(text[rows]).fused for rows in prepared.blocks(4)]
    assert len(parts) == (1 if options.get("self_attention") else 3)
    np.testing.assert_allclose(np.concatenate(parts), fuse(weights, image, text), atol=5e-6)


#: Orders of products in a batch, and whether image_proj is brought into the maps before.
WAYS = pytest.mark.parametrize("way", list(product([Order.DIRECT, Order.TEXT], [False, True])), ids=str)


def _go(way: tuple[Order, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Plan(way[0], way[0])
    monkeypatch.setattr(methods, "plan_of_batch", lambda *shape: chosen)
    monkeypatch.setattr(methods, "plan_to_learn", lambda *shape: (chosen, way[1]))


@pytest.mark.parametrize("method", ["attention", "transformer"])
@pytest.mark.parametrize("batch", [True, False])
def test_orders_are_chosen_for_the_shape_of_a_batch(method: str, batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def listen(name: str) -> Any:
        choose = getattr(methods, name)

        def chosen(*shape: int) -> Any:
            asked.append((name, *shape))
            return choose(*shape)

        return chosen

    for name in ("plan", "plan_of_batch", "plan_to_learn"):
        monkeypatch.setattr(methods, name, listen(name))
    weights = oracle(method, 24, 6, 20, 40)[1]
    images, texts = torch.zeros(2, 9, 40), torch.zeros(2, 5, 20)
    mask = torch.ones(2, 9, dtype=torch.bool) if batch else None
    for training in (True, False):
        Prepared(View(weights, images if batch else images[0], texts, 5, "float32", training=training, mask=mask))
    if not batch:  # one pair that is learned from takes the module's order
        assert asked == [("plan", 5, 9, 24, *((20, 40) if method == "attention" else (24, 24)), 6)]
    elif method == "attention":
        assert asked == [("plan_to_learn", 2, 5, 9, 24, 40, 6, False), ("plan_of_batch", 5, 9, 24, 40, 6)]
    else:
        assert asked == [("plan_of_batch", 5, 9, 24, 24, 6)] * 2


@EVERY
@WAYS
def test_a_padded_batch_gives_what_each_pair_gives(
    method: str, options: dict[str, Any], way: tuple[Order, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    _go(way, monkeypatch)
    weights, image, text = _drawn(method, options)
    sizes = [(6, 9), (1, 4), (3, 1)]
    images, texts = torch.full((3, 6, 32), 7.0), torch.full((3, 9, 32), -5.0)
    image_mask, text_mask = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(3, 9, dtype=torch.bool)
    for k, (m, n) in enumerate(sizes):
        images[k, :m], texts[k, :n] = torch.from_numpy(image[:m]), torch.from_numpy(text[:n])
        image_mask[k, :m], text_mask[k, :n] = True, True
    for training in (True, False):
        prepared = Prepared(View(weights, images, texts, 9, "float32", training=training, mask=image_mask))
        fused = prepared.fuse(texts, mask=text_mask).fused
        for k, (m, n) in enumerate(sizes):
            np.testing.assert_allclose(fused[k, :n], fuse(weights, image[:m], text[:n]), atol=1e-5)


@EVERY
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradcheck(method: str, options: dict[str, Any], m: int, layer_norm: bool) -> None:
    weights = oracle(method, 4, 2, 4, 3, layer_norm=layer_norm, **{**options, **_small(options)})[1]
    names = list(weights.tensors)
    tensors = [torch.from_numpy(weights.tensors[name]).double().requires_grad_() for name in names]
    image = torch.randn(m, 3, dtype=torch.float64, requires_grad=True)
    text = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(image: Any, text: Any, *tensors: Any) -> Any:
        return fuse(Weights(weights.config, dict(zip(names, tensors, strict=True))), image, text)

    assert torch.autograd.gradcheck(run, (image, text, *tensors))


@pytest.mark.parametrize("method", ["attention", "gated", "transformer"])
@WAYS
def test_gradients_of_a_batch_are_those_of_its_pairs(
    method: str, way: tuple[Order, bool], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    _go(way, monkeypatch)
    drawn, pairs = oracle(method, 8, 2, 8, 6)[1], 3
    images = torch.from_numpy(rng.standard_normal((pairs, 3, 6)))
    texts = torch.from_numpy(rng.standard_normal((pairs, 4, 8)))
    gradients = []
    for together in (True, False):
        tensors = {name: torch.from_numpy(x).double().requires_grad_() for name, x in drawn.tensors.items()}
        weights = Weights(drawn.config, tensors)
        if together:
            mask = torch.ones(pairs, 4, dtype=torch.bool)
            prepared = Prepared(View(weights, images, texts, 4, "float64", training=True, mask=mask[:, :3]))
            fused = prepared.fuse(texts, mask=mask).fused
        else:
            fused = torch.stack([fuse(weights, image, text) for image, text in zip(images, texts, strict=True)])
        fused.square().sum().backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items()})
    torch.testing.assert_close(*gradients)


@EVERY
def test_training_computes_the_same(method: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    drawn = oracle(method, 8, 2, 8, 6, layer_norm=True, **{**options, **_small(options)})[1]
    tensors = {name: x + 0.3 * rng.standard_normal(x.shape, np.float32) for name, x in drawn.tensors.items()}
    image, text = rng.standard_normal((20, 6), np.float32), rng.standard_normal((4, 8), np.float32)
    learned = {name: torch.from_numpy(tensor).requires_grad_() for name, tensor in tensors.items()}
    fused = fuse(Weights(drawn.config, learned), torch.from_numpy(image), torch.from_numpy(text))
    assert fused.requires_grad
    expected = fuse(Weights(drawn.config, tensors), image, text)
    np.testing.assert_allclose(fused.detach(), expected, rtol=1e-4, atol=1e-5)


def _small(options: dict[str, Any]) -> dict[str, Any]:
    return {"dim_feedforward": 5} if "dim_feedforward" in options or "num_layers" in options else {}


@pytest.mark.parametrize(("method", "options"), [case for case in CASES if case[0] != "transformer"])
def test_one_image_row_alone_or_among_others_gives_the_same_bits(method: str, options: dict[str, Any]) -> None:
    weights, image, _ = _drawn(method, {**options, "layer_norm": True})
    together = single_rows(weights, image)
    for k, row in enumerate(image):
        assert (single_rows(weights, row[None])[0] == together[k]).all()


@pytest.mark.parametrize("method", ["weighted-sum", "concat"])
def test_a_text_of_many_rows_rounds_no_more_than_torchs(method: str) -> None:
    ours, reference = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        module, weights = oracle(method, 1009, 1, 1009, 64, seed)
        image, text = features(rng, 1, 64, norm=300), features(rng, 77, 1009, norm=90)
        single = module.float()(torch.from_numpy(image), torch.from_numpy(text))[0].numpy()
        exact = module.double()(torch.from_numpy(image).double(), torch.from_numpy(text).double())[0].numpy()
        ours.append(fuse(weights, image, text) - exact)
        reference.append(single - exact)
    assert np.square(ours).mean() < 1.5 * np.square(reference).mean()


def test_an_untrained_tanh_gate_changes_nothing() -> None:
    _, image, text = _drawn("gated", {})
    weights = checkpoint.init(32, 4, method="gated", gate="tanh")
    assert (fuse(weights, image, text) == text).all()


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_gate_can_be_looked_at(gate: str, rows: int) -> None:
    weights, image, text = _drawn("gated", {"gate": gate}, rows)
    result = Prepared(View(weights, image, text, 9, "float32")).fuse(text, need_weights=True)
    taken = (result.fused - text) / fuse(
        Weights(Config(num_heads=4), {k: v for k, v in weights.tensors.items() if k[:4] not in ("gate", "gamm")}),
        image,
        text,
    )
    assert result.gate is not None
    np.testing.assert_allclose(result.gate, taken.mean(1), rtol=2e-3)


@pytest.mark.parametrize("method", ["weighted-sum", "concat"])
def test_what_has_no_attention_says_so(method: str) -> None:
    with pytest.raises(UsageError, match=method):
        fuse(*_drawn(method, {}), need_weights=True)


def test_identity_needs_no_training() -> None:
    _, image, text = _drawn("attention", {})
    attended = fuse(checkpoint.identity(32, 1), image, text)
    expected = {
        "gated": text + attended / 2,
        "weighted-sum": (text + image.mean(0)) / 2,
        "concat": text + image.mean(0),
    }
    for method, wanted in expected.items():
        np.testing.assert_allclose(fuse(checkpoint.identity(32, 1, method=method), image, text), wanted, atol=1e-5)
    with pytest.raises(UsageError, match="transformer"):
        checkpoint.identity(32, 1, method="transformer")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"method": "sum"}, "unknown method"),
        ({"method": "concat", "residual": True}, "residual is an option of attention"),
        ({"method": "gated", "gate": "relu"}, "sigmoid or tanh"),
        ({"method": "transformer", "dropout": 1.0}, "dropout"),
        ({"method": "transformer", "num_layers": 0}, "num_layers"),
        ({"method": "transformer", "num_layers": 10**9}, "from 1 to 1024"),
        ({"num_layers": 2}, "num_layers is an option of transformer"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        Config(**options)


@EVERY
def test_checkpoints_of_every_method_come_back(method: str, options: dict[str, Any], tmp_path: Any) -> None:
    weights = checkpoint.init(16, 4, image_dim=24, method=method, **options, layer_norm=True)
    checkpoint.save(weights, tmp_path / "w.safetensors")
    loaded = checkpoint.load(tmp_path / "w.safetensors")
    assert loaded.config == weights.config
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(weights)


@pytest.mark.parametrize("method", ["gated", "transformer", "concat", "weighted-sum"])
def test_every_method_through_the_commands(method: str, run: Run, many: dict[str, Any], tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--feature-dim", D, "--method", method, "--layer-norm", "-q")
    weights = fusecli.load(tmp_path / "w.safetensors")
    shown = weights.config.has_attention
    dump = ("-a", "att", "--suffix", ".safetensors") if shown else ("--suffix", ".safetensors")
    run("batch", "img", "txt", "-w", "w.safetensors", "-o", "out", *dump, "-q")
    again = run("batch", "img", "txt", "-w", "w.safetensors", "-o", "out", *dump)
    assert b"skipped" in again.stderr
    for id, (image, text) in many.items():
        one = ("-a", "a.safetensors") if shown else ()
        run("fuse", f"img/{id}.npy", f"txt/{id}.npy", "-w", "w.safetensors", "-o", "o.safetensors", *one, "-q")
        assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / f"out/{id}.safetensors").read_bytes()
        np.testing.assert_allclose(
            load_file(tmp_path / "o.safetensors")["fused"], fuse(weights, image, text), atol=1e-5
        )
        if shown:
            assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / f"att/{id}.safetensors").read_bytes()
    facts = json.loads(run("inspect", "w.safetensors", "--json").stdout)
    assert (facts["method"], facts["layer_norm"]) == (method, True)


@pytest.mark.parametrize("mean", [(), ("--attention-mean",)])
def test_gates_stand_behind_the_attention(mean: tuple[str, ...], run: Run, pair: Any, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--method", "gated", "-q")
    run("fuse", "regions.npy", "txt.npy", "-w", "w.safetensors", "-o", "o.npy", "-a", "a.safetensors", *mean, "-q")
    found = load_file(tmp_path / "a.safetensors")
    image, text = pair
    result = Prepared(View(fusecli.load(tmp_path / "w.safetensors"), image, text, 5, "float32")).fuse(
        text, need_weights=True
    )
    assert result.gate is not None
    np.testing.assert_allclose(found["gate"], result.gate, atol=1e-6)
    assert found["attention"].shape == ((5, 16) if mean else (8, 5, 16))
    facts = json.loads(run("inspect", "a.safetensors", "--json").stdout)
    assert (facts["kind"], facts["text_rows"], facts["image_rows"]) == ("attention", 5, 16)


@pytest.mark.parametrize("method", ["concat", "weighted-sum"])
def test_asking_for_attention_where_there_is_none(method: str, run: Run, pair: Any, many: Any, tmp_path: Path) -> None:
    run("init", "-o", "w.safetensors", "--method", method, "-q")
    for command in (("fuse", "regions.npy", "txt.npy"), ("batch", "img", "txt")):
        told = run(*command, "-w", "w.safetensors", "-o", "o", "-a", "a", code=2).stderr
        assert f"no attention to show: found method {method}".encode() in told
        assert not set("oa") & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "concat", "--residual"), b"--residual: only for --method attention: found --method concat"),
        (
            ("--method", "concat", "--num-heads", 8),
            b"--num-heads: only for --method attention, gated, transformer: found --method concat",
        ),
        (("--method", "transformer", "--identity"), b"no identity"),
        (("--method", "gated", "--text-dim", 512), b"needs Dt = D"),
        (
            (
                "--method",
                "sum",
            ),
            b"sum",
        ),
    ],
)
def test_init_says_what_does_not_go_together(options: Any, told: bytes, run: Run) -> None:
    assert told in run("init", "-o", "w.safetensors", *options, code=2).stderr


def test_the_command_line_knows_what_the_library_knows() -> None:
    assert {method.value for method in MethodName} == set(METHODS)
    assert {gate.value for gate in Gate} == set(GATES)
    assert {name.value for name in DtypeName} == set(FLOAT_NAMES) - {"longdouble"}  # no format has that
    assert {field.name for field in fields(Config)} == {"method", *METHOD_OPTIONS}
    assert set(METHOD_OPTIONS) == {name for names in OPTIONS.values() for name in names}
