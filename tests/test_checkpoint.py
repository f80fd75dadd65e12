from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from fusecli import Config, ImageTextFusion, Weights, checkpoint, fuse, identity, init, load, save
from fusecli.arrays import cast
from fusecli.checkpoint import fingerprint, stored_as
from fusecli.errors import CheckpointError, FileError, OutputError, UsageError
from fusecli.formats.safetensors import OURS
from fusecli.weights import METHODS
from tests.conftest import Run
from tests.oracle import article, features


@pytest.mark.parametrize(("widths", "seed"), [((32, 32, 32), 0), ((48, 20, 33), 5), ((768, 768, 768), 1)])
def test_init_draws_what_torch_draws(widths: tuple[int, int, int], seed: int) -> None:
    dim, text_dim, image_dim = widths
    torch.manual_seed(seed)
    module = ImageTextFusion(dim, 4, text_dim=text_dim, image_dim=image_dim)
    weights = init(dim, 4, text_dim=text_dim, image_dim=image_dim, seed=seed)
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(weights.tensors[name], tensor.numpy())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: init(seed=-1), "bad seed: found -1"),
        (lambda: init(seed=2**32), "bad seed"),
        (lambda: init(0, 1), "a width is below 1: found D=0"),
        (lambda: init(8, 1, text_dim=-1), "a width is below 1"),
        (lambda: identity(0, 1), "a width is below 1: found D=0"),
        (lambda: identity(-4, 2), "a width is below 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Callable[[], Any], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        make()


def test_identity_is_plain_attention(rng: np.random.Generator) -> None:
    image, text = features(rng, 5, 16, norm=3), features(rng, 4, 16, norm=3)
    expected = nn.functional.scaled_dot_product_attention(
        torch.from_numpy(text), torch.from_numpy(image), torch.from_numpy(image)
    )
    np.testing.assert_allclose(fuse(identity(16), image, text), expected.numpy(), atol=1e-6)


def test_saved_and_loaded_weights_are_the_same_bytes(tmp_path: Path) -> None:
    weights = init(32, 4, seed=3).with_options(residual=True)
    save(weights, tmp_path / "w.safetensors")
    again = load(tmp_path / "w.safetensors")
    assert again.config == weights.config
    save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    assert fingerprint(again) == fingerprint(weights) != fingerprint(init(32, 4, seed=4))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "mixed"])
def test_a_checkpoint_is_what_the_library_of_the_format_writes(dtype: str, tmp_path: Path) -> None:
    dtypes = ["bfloat16", "float64", "float16", "float32"] * 2 if dtype == "mixed" else [dtype] * 8
    drawn = init(32, 4, residual=True)
    tensors = {name: cast(tensor, kind) for (name, tensor), kind in zip(drawn.tensors.items(), dtypes, strict=True)}
    save(Weights(drawn.config, tensors), tmp_path / "w.safetensors")
    about = {"format": 1, "method": "attention", **drawn.config.options()}
    metadata = {OURS: json.dumps(about, sort_keys=True, separators=(",", ":"))}
    save_file(tensors, tmp_path / "library.safetensors", metadata)
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_a_fingerprint_is_of_the_numbers_however_they_lie() -> None:
    weights = init(32, 4)
    tensors = {name: np.asfortranarray(tensor).astype(">f4") for name, tensor in reversed([*weights.tensors.items()])}
    assert fingerprint(Weights(weights.config, tensors)) == fingerprint(weights)
    last = tensors["attention.out_proj.bias"]
    last[-1] = np.nextafter(last[-1], 1, dtype=np.float32)
    others = [Weights(weights.config, tensors), stored_as(weights, "float64"), init(32, 8), init(32, 4, residual=True)]
    assert len({fingerprint(other) for other in (weights, *others)}) == 5


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "fusion."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_a_state_dict_loads_under_any_prefix(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    module = article(32, 4)
    state: Any = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "model.pt")
    weights = load(tmp_path / "model.pt", num_heads=4)
    assert weights.config.num_heads == 4
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(weights.tensors[name], tensor.numpy())


def test_separate_projections_and_missing_biases_are_understood(tmp_path: Path, rng: np.random.Generator) -> None:
    state = dict(article(32, 4).state_dict())
    stacked = state.pop("attention.in_proj_weight")
    for letter, part in zip("qkv", stacked.chunk(3), strict=True):
        state[f"attention.{letter}_proj_weight"] = part.clone()
    for name in ("text_proj.bias", "attention.in_proj_bias", "attention.out_proj.bias"):
        state[name].zero_()
    whole = {name: tensor for name, tensor in state.items() if "q_proj" not in name and "v_proj" not in name}
    del whole["attention.k_proj_weight"]
    torch.save({**whole, "attention.in_proj_weight": stacked}, tmp_path / "reference.pt")
    for name in ("text_proj.bias", "attention.in_proj_bias", "attention.out_proj.bias"):
        del state[name]
    torch.save(state, tmp_path / "model.bin")
    image, text = features(rng, 3, 32), features(rng, 5, 32)
    expected = fuse(load(tmp_path / "reference.pt", 4), image, text)
    np.testing.assert_array_equal(fuse(load(tmp_path / "model.bin", 4), image, text), expected)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, str]]:
    path = tmp_path / "w.safetensors"
    save(init(32, 4), path)
    text = json.dumps({"format": 1, "method": "attention", "num_heads": 4, "residual": False})
    return path, load_file(path), {OURS: text}


@pytest.mark.parametrize("name", ["text_proj.weight", "text_proj.bias", "attention.out_proj.bias"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_damaged_checkpoint_names_the_tensor(stored: Any, name: str, ours: bool) -> None:
    path, tensors, metadata = stored
    short, infinite = tensors[name][:-1], tensors[name].copy()
    infinite.reshape(-1)[3] = np.inf
    without = {key: value for key, value in tensors.items() if key != name}
    damaged = [tensors | {name: np.ascontiguousarray(short)}, tensors | {name: infinite}]
    if name != "text_proj.bias" or ours:  # a whole layer without bias is a layer built with bias=False
        damaged.append(without)
    for bad in damaged:
        save_file(bad, path, metadata if ours else None)
        with pytest.raises(CheckpointError, match=name):
            load(path, None if ours else 4)
    save_file(tensors | {"stranger": short.copy()}, path, metadata if ours else None)
    with pytest.raises(CheckpointError, match="stranger"):
        load(path, None if ours else 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        '{"format":2,"method":"attention"}',
        '{"format":1,"method":"magic"}',
        '{"format":1,"method":["x"],"num_heads":8}',
        '{"format":1,"method":{}}',
        '{"format":1,"x":1}',
    ]
    + [f'{{"format":1,"method":"attention","num_heads":{heads}}}' for heads in ("0", "true", '"8"', "5")],
)
def test_metadata_that_make_no_sense_are_refused(stored: Any, text: str) -> None:
    path, tensors, _ = stored
    save_file(tensors, path, {OURS: text})
    with pytest.raises(CheckpointError, match=path.name):
        load(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format":1,"method":"attention"}', "wanted num_heads"),
        ('{"format":1,"num_heads":8}', "wanted method"),
        ('{"format":1,"kind":"attention","ids":["a"]}', "holds attention, not weights"),
        (
            '{"format":1,"method":"attention","num_heads":8,"x":1}',
            "unknown options in its metadata: found x, wanted method, num",
        ),
        ('{"format":9,"method":"attention","num_heads":8,"x":1}', "another version"),
    ],
)
def test_what_metadata_do_not_say_is_not_assumed(stored: Any, text: str, told: str) -> None:
    path, tensors, _ = stored
    save_file(tensors, path, {OURS: text})
    with pytest.raises(CheckpointError, match=told):
        load(path)


def test_heads_that_are_assumed_are_a_warning(stored: Any) -> None:
    path, tensors, _ = stored
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="num-heads") as caught:
        load(path)
    assert caught[0].filename == __file__


def test_weights_are_shown_in_a_line() -> None:
    shown = repr(init(32, 4))
    assert "method='attention', num_heads=4" in shown
    assert len(shown) < 200


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_of_tensors_that_contradict_each_other_the_odd_one_is_named(method: str, layer_norm: bool) -> None:
    whole = init(32, 4, method=method, layer_norm=layer_norm)
    for name in ("image_proj.weight", "image_proj.bias"):
        tensors = {**whole.tensors, name: whole.tensors[name][:-1]}
        with pytest.raises(CheckpointError, match=rf"^{name}: .*found \[31.*wanted \[32"):
            Weights(whole.config, tensors)


def test_heads_of_metadata_are_not_to_be_chosen(stored: Any) -> None:
    path, tensors, metadata = stored
    save_file(tensors, path, {OURS: metadata[OURS].replace("4", "7")})
    with pytest.raises(CheckpointError, match="heads do not divide") as caught:
        load(path)
    assert "--num-heads" not in str(caught.value.hint)


def test_heads_that_contradict_the_checkpoint_are_refused(stored: Any) -> None:
    with pytest.raises(UsageError, match="num-heads"):
        load(stored[0], num_heads=2)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"text_proj.weight": Bomb()}, tmp_path / "model.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    for name in ("model.pt", "junk.pt", "none.pt"):
        with pytest.raises(FileError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_a_checkpoint_is_its_bytes_say_not_its_name(run: Run, tmp_path: Path) -> None:
    state = article(16, 4).state_dict()
    torch.save(state, tmp_path / "model.pt")
    wanted = load(tmp_path / "model.pt", 4)
    save(wanted, tmp_path / "named.pt")
    (tmp_path / "MODEL").write_bytes((tmp_path / "model.pt").read_bytes())
    for path in (tmp_path / "MODEL", tmp_path / "named.pt"):
        assert fingerprint(load(path, 4)) == fingerprint(wanted)
    piped = run("convert", "-", "-o", "w.safetensors", "--num-heads", 4, input=(tmp_path / "MODEL").read_bytes())
    assert fingerprint(wanted).encode() in piped.stderr


def test_other_archives_and_headers_are_not_taken_for_torchs(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3, np.float32))
    assert "numpy.save" in run("inspect", "x.npz", code=3).stderr.decode()
    for length in (0x280, 0x4B50):  # lengths that begin as a pickle, as an archive
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).ljust(length).encode()
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(8))
        assert b"features" in run("inspect", "x.safetensors").stdout


def _in_itself(state: Any) -> Any:
    wrapped: dict[str, Any] = {}
    wrapped["model"] = {"state_dict": wrapped}
    return wrapped


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_in_itself, "holds no state_dict"),
        (
            lambda state: {**{f"m.{k}": v for k, v in state.items()}, "head.bias": torch.ones(16)},
            "more than the fusion",
        ),
        (lambda state: {f"{set}.{k}": v for set in ("model", "ema") for k, v in state.items()}, "more than one fusion"),
        (lambda state: {**state, **{f"attention.{third}_proj_weight": torch.ones(16, 16) for third in "qkv"}}, "twice"),
        (lambda state: {"net": state}, r"found 'net' \(OrderedDict\)"),
        (lambda state: {**state, "epoch": 3}, r"found 'epoch' \(int\)"),
        (lambda state: {**state, "context_proj.weight": torch.ones(2, 2)}, r"context_proj.weight\]: unexpected tensor"),
    ],
)
def test_a_state_dict_that_says_two_things_is_refused(tmp_path: Path, spoil: Any, told: str) -> None:
    torch.save(spoil(article(16, 4).state_dict()), tmp_path / "model.pt")
    with pytest.raises((CheckpointError, FileError), match=told):
        load(tmp_path / "model.pt", 4)


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.fusion.", "fusion_"])
def test_any_prefix_goes(prefix: str, tmp_path: Path) -> None:
    state = article(16, 4).state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.pt")
    assert list(load(tmp_path / "model.pt", 4).tensors) == list(state)


def test_a_file_of_torch_that_is_cut_is_called_so(tmp_path: Path) -> None:
    torch.save(article(16, 4).state_dict(), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    for size in range(4, len(data), len(data) // 7):
        (tmp_path / "model.pt").write_bytes(data[:size])
        with pytest.raises(FileError, match="cut short"):
            load(tmp_path / "model.pt", 4)


def test_a_file_of_torch_that_asks_for_more_than_it_holds_is_damaged(tmp_path: Path) -> None:
    torch.save(article(16, 4).state_dict(), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "model.pt").read_bytes()
    assert b"M\x00\x03" in data  # 768 numbers of in_proj_weight
    (tmp_path / "model.pt").write_bytes(data.replace(b"M\x00\x03", b"\x8a\x06\x00\x00\x00\x00\x00\x10"))
    with pytest.raises(FileError, match="damaged"):
        load(tmp_path / "model.pt", 4)


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    with pytest.raises(FileError, match="not a checkpoint"):
        load(tmp_path / "zero.pt")


def test_bfloat16_of_torch_stays_that(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in article(16, 4).state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    weights = load(tmp_path / "model.pt", 4)
    for name, tensor in state.items():
        assert weights.tensors[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(weights.tensors[name].astype(np.float32), tensor.float().numpy())


def test_heads_are_no_option_of_a_checkpoint_without_any(tmp_path: Path) -> None:
    save(init(16, method="concat"), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="no heads"):
        load(tmp_path / "w.safetensors", 8)


def _columns(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # the first of them is told to be in beta
        return tensor.to_sparse_csc()


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.eye(4).to_sparse(),
        _columns(torch.eye(4)),
        torch.zeros(4, 4, device="meta"),
        torch.zeros(4, 4, dtype=torch.int64),
    ],
)
def test_odd_tensors_are_named_and_cost_nothing(tmp_path: Path, odd: torch.Tensor) -> None:
    torch.save({"state_dict": {"model": {"text_proj.weight": odd}}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"text_proj\.weight"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_changes_the_dtype(run: Run, tmp_path: Path, dtype: str) -> None:
    run("init", "-o", "w.safetensors", "--method", "gated", "--feature-dim", 16, "-q")
    run("convert", "w.safetensors", "-o", "half.safetensors", "--dtype", dtype, "-q")
    whole, half = (checkpoint.load(tmp_path / name) for name in ("w.safetensors", "half.safetensors"))
    assert half.config == whole.config
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(half.tensors[name], cast(tensor, dtype))


def test_weights_of_a_dtype_without_a_name_are_refused(tmp_path: Path) -> None:
    wide = {name: tensor.astype(np.longdouble) for name, tensor in init(8, 2).tensors.items()}
    with pytest.raises(OutputError, match="longdouble"):
        save(Weights(Config(num_heads=2), wide), tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_a_dtype_are_refused() -> None:
    weights = checkpoint.init(8, 2)
    weights.tensors["text_proj.weight"][0, 0] = 1e6
    with pytest.raises(OutputError, match=r"text_proj\.weight"):
        checkpoint.stored_as(weights, "float16")


def test_separate_thirds_of_several_dtypes_are_stacked_without_loss(tmp_path: Path) -> None:
    state = article(16, 4).state_dict()
    thirds = dict(zip("qkv", state.pop("attention.in_proj_weight").chunk(3), strict=True))
    dtypes = {"q": torch.float16, "k": torch.bfloat16, "v": torch.float32}
    state |= {f"attention.{third}_proj_weight": thirds[third].to(dtypes[third]) for third in "qkv"}
    torch.save(state, tmp_path / "model.pt")
    stacked = load(tmp_path / "model.pt", 4).tensors["attention.in_proj_weight"]
    expected = torch.cat([thirds[third].to(dtypes[third]).float() for third in "qkv"])
    np.testing.assert_array_equal(stacked, expected.numpy())


def test_torchs_older_files_of_other_protocols_are_read_or_told_of(tmp_path: Path) -> None:
    state = article(16, 4).state_dict()
    for protocol in (2, 3, 5):
        torch.save(state, tmp_path / f"{protocol}.pt", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert fingerprint(load(tmp_path / "2.pt", 4)) == fingerprint(load(tmp_path / "3.pt", 4))
    with pytest.raises(FileError, match="protocol"):
        load(tmp_path / "5.pt", 4)


def test_a_damaged_end_of_an_archive_is_no_mistake_of_ours(tmp_path: Path) -> None:
    torch.save(article(16, 4).state_dict(), tmp_path / "model.pt")
    data, whole = bytearray((tmp_path / "model.pt").read_bytes()), fingerprint(load(tmp_path / "model.pt", 4))
    for at in range(data.rindex(b"PK\x05\x06") - 80, len(data)):
        damaged = data.copy()
        damaged[at] ^= 0x15
        (tmp_path / "model.pt").write_bytes(damaged)
        with contextlib.suppress(FileError, CheckpointError):
            assert fingerprint(load(tmp_path / "model.pt", 4)) == whole


def test_inspect_shows_what_is_no_checkpoint_and_goes_on_after_what_is_no_file(run: Run, tmp_path: Path) -> None:
    save_file({"vision.image_proj.weight": np.ones((2, 3), np.float32)}, tmp_path / "other.safetensors")
    rest = {name: tensor for name, tensor in init(32, 4).tensors.items() if name != "image_proj.weight"}
    save_file(rest, tmp_path / "rest.safetensors")
    np.save(tmp_path / "a.npy", np.array([["1e4000", "inf"]]).astype(np.longdouble))
    done = run("inspect", "none.npy", "other.safetensors", "rest.safetensors", "a.npy", "--json", code=3)
    other, cut, array = map(json.loads, done.stdout.splitlines())
    assert (other["kind"], other["tensors"][0]["shape"]) == ("no checkpoint", [2, 3])
    assert "text_proj" in other["problem"]
    assert "image_proj" in cut["problem"]
    assert array["tensors"][0]["nonfinite"] == 1
    assert b"no such file" in done.stderr


def test_transposed_weights_are_saved_as_what_they_are(tmp_path: Path) -> None:
    weights = init(8, 2)
    turned = {name: np.ascontiguousarray(tensor.T).T for name, tensor in weights.tensors.items()}
    save(Weights(weights.config, turned), tmp_path / "turned.safetensors")
    save(weights, tmp_path / "w.safetensors")
    assert (tmp_path / "turned.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_whole_numbers_are_no_weights() -> None:
    weights = init(8, 2)
    with pytest.raises(CheckpointError, match="floating"):
        Weights(weights.config, {name: tensor.astype(np.int64) for name, tensor in weights.tensors.items()})


def test_a_weighted_sum_begins_with_the_text_as_it_is() -> None:
    tensors = init(8, method="weighted-sum").tensors
    np.testing.assert_array_equal(tensors["text_proj.weight"], np.eye(8))
    assert not tensors["text_proj.bias"].any()


def test_a_width_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError):
        init(8, 2, text_dim=0)


@pytest.mark.parametrize(
    "bad", [{"feature_dim": 32.0}, {"text_dim": "32"}, {"seed": 1.5}, {"seed": None}, {"seed": -1}]
)
def test_new_weights_of_no_whole_number_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        init(**{"feature_dim": 32, "num_heads": 4, **bad})


def test_paths_are_as_the_system_has_them(tmp_path: Path) -> None:
    weights = init(8, 2)
    save(weights, os.fsencode(tmp_path / "x.safetensors"))
    assert fingerprint(load(tmp_path / "x.safetensors")) == fingerprint(weights)
    with pytest.raises(OutputError, match="no file name"):
        save(weights, "a\0b")


def test_masked_weights_are_refused() -> None:
    weights = init(8, 2)
    masked = {name: np.ma.masked_less(tensor, 0) for name, tensor in weights.tensors.items()}
    with pytest.raises(CheckpointError, match="masked"):
        Weights(weights.config, masked)


def test_the_same_dropout_has_the_same_fingerprint() -> None:
    one, other = (init(8, 2, method="transformer", dropout=dropout) for dropout in (0, 0.0))
    assert fingerprint(one) == fingerprint(other)


def test_heads_are_assumed_of_a_checkpoint_that_is_one(tmp_path: Path) -> None:
    told: list[str] = []
    state = article(16, 4).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "image_proj.weight"}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"image_proj\.weight"):
        load(tmp_path / "x.pt", tell=told.append)
    assert not told
    torch.save(state, tmp_path / "x.pt")
    load(tmp_path / "x.pt", tell=told.append)
    assert "assuming 8" in told[0]


def test_a_folder_is_no_name_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert b"-o out/fusion.safetensors" in run("init", "-o", "out/", code=2).stderr
