from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from fusecli.errors import FileError, FusecliError, UsageError, ValuesError
from fusecli.formats import format_of, npy, open_sink, open_tensors, safetensors


def _read(path: Path) -> Any:
    return next(iter(open_tensors(str(path)).values())).read()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", np.longdouble])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (1, 4, 3)])
def test_npy_written_by_numpy_is_read(
    tmp_path: Path, dtype: Any, order: Any, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x = np.asarray(rng.standard_normal(shape), dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    stored = open_tensors(str(tmp_path / "x.npy"))[""]
    found = stored.read()
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, x)
    rows = stored.as_rows()
    if rows.shape[0] > 1:
        np.testing.assert_array_equal(rows.read(slice(1, 3)), x.reshape(rows.shape)[1:3])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_npy_version_is_read(tmp_path: Path, version: tuple[int, int]) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, x, version=version)
    np.testing.assert_array_equal(_read(tmp_path / "x.npy"), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_written_by_the_library_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 4).to(dtype), "b/c": torch.randn(2).to(dtype), "ids": torch.arange(3)}
    save_torch(tensors, tmp_path / "x.safetensors", metadata={"who": "test"})
    stored = open_tensors(str(tmp_path / "x.safetensors"))
    assert set(stored) == set(tensors)
    for name in ("a", "b/c"):
        np.testing.assert_array_equal(stored[name].read().astype(np.float64), tensors[name].double().numpy())
    with pytest.raises(ValuesError, match="I64"):
        stored["ids"].read()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_what_is_written_is_read_by_the_official_library(tmp_path: Path, dtype: str, suffix: str) -> None:
    x = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    path = str(tmp_path / f"x.{suffix}")
    if (dtype, suffix) == ("bfloat16", "npy"):
        with pytest.raises(UsageError, match="bfloat16"):
            format_of(path).header([("fused", x.shape, dtype)])
        return
    header = format_of(path).header([("fused", x.shape, dtype)], {"k": "v"} if suffix == "safetensors" else {})
    with open_sink(path) as sink:
        sink.put(len(header), x)
        sink.put(0, header)
    if suffix == "npy":
        np.testing.assert_array_equal(np.load(path), x)
        return
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"k": "v"}
        np.testing.assert_array_equal(file.get_tensor("fused").double().numpy(), x.astype(np.float64))


def _bytes_of(suffix: str) -> bytes:
    x = np.ones((7, 9), np.float32)
    if suffix == "npy":
        out = io.BytesIO()
        np.save(out, x)
        return out.getvalue()
    entry = {"x": {"dtype": "F32", "shape": [7, 9], "data_offsets": [0, 252]}}
    text = json.dumps(entry).encode()
    return struct.pack("<Q", len(text)) + text + x.tobytes()


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    whole, path = _bytes_of(suffix), tmp_path / f"x.{suffix}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=path.name):
            open_tensors(str(path))
    path.write_bytes(whole)
    assert _read(path).shape == (7, 9)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((9, 5), np.float32))
    stored = open_tensors(str(tmp_path / "x.npy"))[""]
    os.truncate(tmp_path / "x.npy", 200)
    with pytest.raises(FileError, match="shrank"):
        stored.read()


@given(data=st.data(), suffix=st.sampled_from(["npy", "safetensors"]))
def test_flipped_bits_give_an_array_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    whole = bytearray(_bytes_of(suffix))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / f"x.{suffix}"
    path.write_bytes(whole)
    try:
        for stored in open_tensors(str(path)).values():
            stored.as_rows().read()
    except FusecliError as error:
        assert error.exit_code == 3  # noqa: PT017


def _npy(header: str) -> bytes:
    return npy.MAGIC + b"\x01\x00" + struct.pack("<H", len(header)) + header.encode()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 768)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 768)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 768)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1e3,)}",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ", 768)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10**30, 0)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 70 + ")}",
        "{'descr': None, 'fortran_order': False, 'shape': (1,)}",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}",
        "((((((((((((((((((((" * 40,
        "__import__('os').system('true')",
        "",
    ],
)
def test_npy_headers_that_lie_are_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "x.npy").write_bytes(_npy(header) + bytes(64))
    with pytest.raises(FileError, match=r"x\.npy"):
        open_tensors(str(tmp_path / "x.npy"))


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [10**12, 768], "data_offsets": [0, 64]}},
        {"x": {"dtype": "F32", "shape": [16], "data_offsets": [0, 10**15]}},
        {"x": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}},
        {"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
        {"x": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}},
        {"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 64]}},
        {"x": {"dtype": "F32", "shape": [999999999] * 100_000, "data_offsets": [0, 64]}},
        {"x": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 0]}},
        {"x": {"dtype": 7, "shape": [16], "data_offsets": [0, 64]}},
        {"x": {"dtype": "F32", "shape": [16]}},
        {"x": []},
        [],
        {c: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for c in "xy"},
    ],
)
def test_safetensors_headers_that_lie_are_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(FileError, match=r"x\.safetensors"):
        open_tensors(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("text", "wanted"), [(b"{x", "wanted a JSON object"), (b"\xff{}", "wanted UTF-8")])
def test_a_header_that_is_no_json_says_so(text: bytes, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(FileError, match=f"malformed header.*{wanted}"):
        open_tensors(str(tmp_path / "x.safetensors"))


def test_an_empty_array_of_absurd_width_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(FileError, match="malformed header"):
        open_tensors(str(tmp_path / "x.safetensors"))


def test_a_dtype_that_is_called_as_ours_is_not_read(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "float32", "shape": [10**9, 16], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(ValuesError, match="FLOAT32"):
        _read(tmp_path / "x.safetensors")


def test_absurd_header_lengths_do_not_allocate(tmp_path: Path) -> None:
    for name, start in (("x.safetensors", struct.pack("<Q", 2**62)), ("x.npy", npy.MAGIC + b"\x02\x00" + b"\xff" * 4)):
        (tmp_path / name).write_bytes(start + b"{" * 100)
        with pytest.raises(FileError, match="header too long"):
            open_tensors(str(tmp_path / name))


def test_more_data_than_the_header_says_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.save(file, np.ones((3, 2), np.float32))
        file.write(b"x")
    for at_once in (0, 4096):
        with pytest.raises(FileError, match=r"longer than its header says: found 25 bytes of data, wanted 24"):
            open_tensors(str(tmp_path / "x.npy"), at_once=at_once)


def test_what_is_no_feature_file_is_called_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    np.array([{}], dtype=object).dump(tmp_path / "p.npy")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, words in (("a.npz", "zip"), ("p.npy", "pickle"), ("o.npy", "pickled"), ("none.npy", "no such file")):
        with pytest.raises((FileError, ValuesError), match=words):
            open_tensors(str(tmp_path / name))


def test_an_empty_tensor_may_stand_behind_one_that_begins_where_it_does(tmp_path: Path) -> None:
    shapes = {"full": ([1, 2], [0, 8]), "empty": ([0, 2], [0, 0]), "last": ([1, 1], [8, 12])}
    tensors = {k: {"dtype": "F32", "shape": shape, "data_offsets": at} for k, (shape, at) in shapes.items()}
    head = json.dumps(tensors).encode()
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(12))
    theirs = load_file(tmp_path / "a.safetensors")
    assert {k: x.shape for k, x in open_tensors(str(tmp_path / "a.safetensors")).items()} == {
        k: x.shape for k, x in theirs.items()
    }


def test_safetensors_metadata_are_those_of_the_library(tmp_path: Path) -> None:
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "x.safetensors", metadata={"a": "ü"})
    source = open_tensors(str(tmp_path / "x.safetensors"))["x"].source
    assert safetensors.metadata(source) == {"a": "ü"}
    assert load_file(tmp_path / "x.safetensors")["x"].shape == (2,)


def test_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    entry = '"x": {"dtype": "F32", "shape": [4], "data_offsets": [%d, %d]}'
    text = f"{{{entry % (0, 16)}, {entry % (16, 32)}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    with pytest.raises(FileError, match="twice"):
        open_tensors(str(tmp_path / "x.safetensors"))
