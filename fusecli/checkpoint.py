"""Weights and files: load, save, change the dtype; and weights to begin with: init, orthogonal, identity.

A checkpoint is a ``.safetensors`` file with the tensors of `fusecli.weights.tensor_shapes` and one metadata
key, ``fusecli``, with canonical JSON. The bare ``state_dict`` of the article's module loads as well.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fusecli.arrays import Array, dtype_name, first_nonfinite, to_numpy
from fusecli.arrays import cast as to_dtype
from fusecli.drawing import CONSTANTS, HALF_OPEN, drawn, turned
from fusecli.errors import (
    CheckpointError,
    FileError,
    FusecliError,
    InputError,
    OutputError,
    UsageError,
    ValuesError,
    listed,
)
from fusecli.formats import NumpyArray, Source, as_bytes, itemsize, open_sink, open_source, safetensors, sniff
from fusecli.state_dict import article_names, is_pt, read_pt
from fusecli.weights import OPTIONS, Config, Weights, require_heads, tensor_shapes

#: Version of what the metadata of a checkpoint say.
FORMAT = 1


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=5)


def load(path: str | os.PathLike[str], num_heads: int | None = None, *, tell: Callable[[str], None] = _warn) -> Weights:
    """Read a checkpoint: ours, or a bare ``state_dict`` in ``.safetensors`` or a file of `torch.save`.

    Args:
        path: the file.
        num_heads: heads of a bare ``state_dict``, which does not say (default 8).
        tell: is called with a line for the user when the number of heads had to be assumed; else it is a warning.

    Raises:
        FileError: the file cannot be read, or is none of these.
        CheckpointError: a tensor is missing, one too many or misshapen, or holds NaN.
        UsageError: ``num_heads`` contradicts the checkpoint.
    """
    path = os.fspath(path)
    return load_from(open_source(path), num_heads, tell)


def load_from(source: Source, num_heads: int | None, tell: Callable[[str], None]) -> Weights:
    """The same as `load`, for a file that is open."""
    path = source.name
    if is_pt(source):
        return _bare(read_pt(source), path, num_heads, tell)
    if sniff(source, checkpoint=True) != "safetensors":
        raise FileError(
            "not a checkpoint",
            where=path,
            found=".npy",
            wanted=".safetensors or .pt",
            hint="make one with fusecli init",
        )
    tensors = {}
    for name, stored in safetensors.open_tensors(source).items():
        try:
            tensors[name] = stored.read()
        except ValuesError as error:
            raise CheckpointError(error.what, where=error.where, found=error.found, wanted=error.wanted) from None
    saved = safetensors.metadata(source).get(safetensors.OURS)
    if saved is None:
        return _bare(tensors, path, num_heads, tell)
    config = _config(saved, path)
    if num_heads is not None and not config.has_attention:
        raise UsageError("the checkpoint has no heads", where="--num-heads", found=f"method {config.method}")
    if num_heads not in (None, config.num_heads):
        raise UsageError(
            "--num-heads contradicts the checkpoint", where=path, found=str(config.num_heads), hint="leave it out"
        )
    return _checked(config, tensors, path, "its metadata do not fit its tensors: make it anew")


def _config(saved: str, path: str) -> Config:
    try:
        options = json.loads(saved)
        version = options.pop("format")
        unknown = sorted(set(options) - {field.name for field in fields(Config)})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(
            "malformed metadata", where=path, found=repr(saved[:80]), wanted="a JSON object with format"
        ) from None
    if "kind" in options:
        raise CheckpointError("holds attention, not weights", where=path, wanted="a checkpoint")
    if type(version) is not int or version != FORMAT:
        found = f"format {version}"
        raise CheckpointError("made by another version of fusecli", where=path, found=found, wanted=f"format {FORMAT}")
    if unknown:
        wanted = ", ".join(field.name for field in fields(Config))
        raise CheckpointError("unknown options in its metadata", where=path, found=listed(unknown), wanted=wanted)
    headless = [name for name, having in OPTIONS.items() if "num_heads" not in having]
    needed = ["method"] if options.get("method") in headless else ["method", "num_heads"]
    lacking = [name for name in needed if name not in options]
    if lacking:
        raise CheckpointError("incomplete metadata", where=path, wanted=", ".join(lacking))
    try:
        return Config(**options)
    except UsageError as error:
        raise _located(error, path) from None


def _checked(config: Config, tensors: Mapping[str, Array], path: str, hint: str | None = None) -> Weights:
    """``hint`` takes the place of those that name options."""
    try:
        weights = Weights(config, tensors)
    except InputError as error:
        raise _located(error, path) from None
    except UsageError as error:
        raise _located(error, path, hint) from None
    for name, tensor in tensors.items():
        bad = first_nonfinite(tensor)
        if bad is not None:
            place = f"{path}[{name}]{list(bad)}"
            raise CheckpointError("not finite", where=place, found=str(tensor[bad]), wanted="finite numbers")
    return weights


def _located(error: FusecliError, path: str, hint: str | None = None) -> CheckpointError:
    where = f"{path}[{error.where}]" if error.where else path
    return CheckpointError(error.what, where=where, found=error.found, wanted=error.wanted, hint=hint or error.hint)


def _bare(tensors: Mapping[str, Array], path: str, num_heads: int | None, tell: Callable[[str], None]) -> Weights:
    try:
        named = article_names(tensors)
    except CheckpointError as error:
        raise _located(error, path) from None
    weights = _checked(Config(num_heads=8 if num_heads is None else num_heads), named, path)
    if num_heads is None:
        tell(f"{path} does not say its number of heads: assuming 8; pass --num-heads if that is wrong")
    return weights


def save(weights: Weights, path: str | bytes | os.PathLike[str]) -> None:
    """Write a checkpoint, atomically; the same weights give the same bytes.

    Tensors keep their dtype, float16, bfloat16, float32 or float64; bfloat16 of torch is stored as float32. They stand
    in the order of the library of the format: the widest dtype first, which keeps numbers aligned, then by name.

    Raises:
        OutputError: it cannot be written, or the format cannot name the dtype of a tensor.
    """
    tensors = {name: to_numpy(tensor) for name, tensor in weights.tensors.items()}
    kinds = {name: (tensor.shape, dtype_name(tensor)) for name, tensor in tensors.items()}
    for name, (_, dtype) in kinds.items():
        if dtype not in safetensors.CODES:
            wanted = ", ".join(safetensors.CODES)
            raise OutputError(".safetensors cannot name the dtype", where=name, found=dtype, wanted=wanted)
    names = sorted(tensors, key=lambda name: (-itemsize(kinds[name][1]), kinds[name][1], name))
    options = {"format": FORMAT, "method": weights.config.method, **weights.config.options()}
    about = {safetensors.OURS: json.dumps(options, sort_keys=True, separators=(",", ":"))}
    header = safetensors.header(((name, *kinds[name]) for name in names), about)
    path = os.fsdecode(path)
    if "\0" in path:
        raise OutputError("no file name", where=repr(path))
    with open_sink(path) as sink:
        sink.put(0, header)
        at = len(header)
        for name in names:  # one by one: another copy of all may be too much
            sink.put(at, _little_endian(tensors[name]))
            at += tensors[name].nbytes


def _little_endian(tensor: NumpyArray) -> NumpyArray:
    """A tensor as files have it, in rows."""
    return np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))


def stored_as(weights: Weights, dtype: str) -> Weights:
    """The same weights in another dtype.

    Raises:
        OutputError: a number is too large for it.
    """
    with np.errstate(over="ignore"):  # what does not fit is looked for
        tensors = {name: to_dtype(tensor, dtype) for name, tensor in weights.tensors.items()}
    for name, tensor in tensors.items():
        if (bad := first_nonfinite(to_numpy(tensor))) is not None:
            found, hint = f"{float(weights.tensors[name][bad]):.4g}", "float64" if dtype == "float32" else "float32"
            raise OutputError(f"weights do not fit {dtype}", where=name, found=found, hint=f"--dtype {hint}")
    return Weights(weights.config, tensors)


def fingerprint(weights: Weights) -> str:
    """12 hexadecimal digits that tell these weights and options from any others, today and in later versions.

    SHA-256 of the method with those of its options that are not the usual ones, and of each tensor, by name: name,
    dtype, shape, numbers.
    """
    import hashlib  # not needed to fuse

    config = weights.config
    usual = Config(config.method).options()
    options = {name: value for name, value in config.options().items() if value != usual[name]}
    digest = hashlib.sha256(json.dumps([config.method, options], sort_keys=True).encode())
    for name in sorted(weights.tensors):
        tensor = _little_endian(to_numpy(weights.tensors[name]))
        digest.update(json.dumps([name, dtype_name(tensor), tensor.shape]).encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()[:12]


def dump_facts(config: Config, fingerprint: str, mean: bool) -> dict[str, Any]:
    """What a dump of attention says of its weights; with ``mean``, it is over heads. See `fusecli.dumps`."""
    return {"method": config.method, "num_heads": config.num_heads, "mean": mean, "weights": fingerprint}


def init(
    feature_dim: int = 768,
    num_heads: int = 8,
    *,
    text_dim: int | None = None,
    image_dim: int | None = None,
    seed: int = 0,
    method: str = "attention",
    **options: Any,
) -> Weights:
    """Untrained weights: those of ``torch.manual_seed(seed); ImageTextFusion(feature_dim, num_heads)``.

    Drawn without torch, by the same generator (Mersenne Twister) in the same order, so that every machine gets
    the same bytes. Other methods are drawn likewise, layer by layer, and begin near the text: where widths are
    equal, ``text_proj`` of weighted-sum and transformer is the identity; the gate ``γ`` is 0, ``α`` is ½.

    Args:
        feature_dim: ``D``.
        num_heads: ``H``, a divisor of ``D``; for methods that have heads.
        text_dim: ``Dt``; ``D`` by default.
        image_dim: ``Di``; ``D`` by default.
        seed: 0 to 2**32 - 1.
        method: one of `fusecli.weights.METHODS`.
        options: of the method, see `fusecli.Config`.

    Raises:
        UsageError: the heads do not divide the width, a width or the seed is out of range, or an option does not
            go with the method.
    """
    config = _configured(method, num_heads, options)
    text_dim, image_dim = (feature_dim if width is None else width for width in (text_dim, image_dim))
    _require_widths(feature_dim, text_dim, image_dim)
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise UsageError("bad seed", found=repr(seed), wanted="0 to 2**32 - 1")
    if config.has_attention:  # before anything is drawn
        require_heads(num_heads, feature_dim)
    tensors = drawn(tensor_shapes(config, feature_dim, text_dim, image_dim), seed)
    if method in ("weighted-sum", "transformer") and text_dim == feature_dim:
        tensors["text_proj.weight"] = np.eye(feature_dim, dtype=np.float32)
        tensors["text_proj.bias"] = np.zeros(feature_dim, np.float32)
    return Weights(config, tensors)


def orthogonal(feature_dim: int = 768, num_heads: int = 8, *, seed: int = 0, **options: Any) -> Weights:
    """Weights to learn from to tell images apart: as `init`, but every projection keeps lengths and angles.

    A product of three random matrices, as `init` has on the way from image to result, loses much of what is in the
    image, and without labels few pairs do not bring it back. ``image_proj`` turns the image about at random (Saxe,
    McClelland and Ganguli 2014, section 3), the others are the identity where they are square; a sigmoid gate and the
    last layer of a feed-forward network start at zero.

    Args and errors as in `init`.
    """
    weights = init(feature_dim, num_heads, seed=seed, **options)
    tensors = {name: turned(name, tensor) for name, tensor in weights.tensors.items()}
    return Weights(weights.config, tensors)


def _require_widths(feature_dim: int, text_dim: int, image_dim: int) -> None:
    widths = feature_dim, text_dim, image_dim
    found = "D={!r}, Dt={!r}, Di={!r}".format(*widths)
    if not all(isinstance(width, (int, np.integer)) for width in widths):
        raise UsageError("a width is no whole number", found=found)
    if min(widths) < 1:
        raise UsageError("a width is below 1", found=found)


def _configured(method: str, num_heads: int, options: Mapping[str, Any]) -> Config:
    heads: dict[str, Any] = {"num_heads": num_heads} if "num_heads" in OPTIONS.get(method, ()) else {}
    return Config(method, **heads, **options)


def identity(feature_dim: int = 768, num_heads: int = 1, *, method: str = "attention", **options: Any) -> Weights:
    """Weights of identity projections: plain scaled dot-product attention of text over image.

    For features that share a space already, as CLIP's do; nothing to train. ``gated`` adds half of it to the text,
    ``weighted-sum`` is the middle of text and mean image, ``concat`` their sum.

    Args:
        feature_dim: ``D``, and the width of both sides.
        num_heads: ``H``, a divisor of ``D``; for methods that have heads.
        method: one of `fusecli.weights.METHODS` but transformer.
        options: of the method, see `fusecli.Config`.

    Raises:
        UsageError: the heads do not divide the width, the width is below 1, an option does not go with the method, or
            the method is no projection (transformer).
    """
    config = _configured(method, num_heads, options)
    _require_widths(feature_dim, feature_dim, feature_dim)
    if method == "transformer":
        raise UsageError("a transformer has no identity", hint="choose another method, or train it")
    shapes = tensor_shapes(config, feature_dim, feature_dim, feature_dim)
    tensors = {name: np.full(shape, CONSTANTS.get(name, 0.0), np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name == "gamma":
            tensor[:] = HALF_OPEN
        elif name.endswith("norm.weight"):
            tensor[:] = 1
        elif name == "concat_proj.weight":
            tensor[:] = np.tile(np.eye(feature_dim, dtype=np.float32), 2)
        elif name.endswith("weight") and not name.startswith("gate_proj"):
            tensor.reshape(-1, feature_dim, feature_dim)[:] = np.eye(feature_dim, dtype=np.float32)
    return Weights(config, tensors)
