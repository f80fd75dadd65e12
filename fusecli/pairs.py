"""Features in files, and the pair that two of them make."""

from __future__ import annotations

import math
from typing import Any

from fusecli.arrays import first_nonfinite
from fusecli.errors import FileError, ShapeError, ValuesError, listed
from fusecli.formats import NumpyArray, Stored, open_source, tensors_of
from fusecli.weights import Config, Weights, are_of_weights

#: Names that encoders and dataset tools give their tensors, the most telling first.
KNOWN_NAMES = {
    "image": ("image", "image_features", "image_embeds", "image_embeddings", "img", "pixel_features"),
    "text": ("text", "text_features", "text_embeds", "text_embeddings", "txt", "token_features"),
}
#: What a model's output is called whatever went in.
SHARED_NAMES = ("last_hidden_state", "features", "embeddings", "hidden_states")
#: A hint for who gives the fusion's weights as features.
GIVE_WEIGHTS = "a checkpoint is given by -w"


def find_features(path: str, side: str, key: str | None = None, at_once: int = 0) -> Stored:
    """The image or text features in a file, not read yet.

    Args:
        path: ``.npy`` or ``.safetensors``; ``-`` is standard input.
        side: ``"image"`` or ``"text"``, for well-known names and messages.
        key: the tensor's name; else the only tensor, else the one whose name comes first among the well-known.
        at_once: files of up to so many bytes are read at once, and pipes refused.

    Raises:
        FileError: the file cannot be used, or it does not say which tensor is meant.
        ShapeError, ValuesError: the tensor holds no rows of floats.
    """
    source = open_source(path, at_once=at_once)
    return choose(tensors_of(source), source.name, side, key)


def choose(tensors: dict[str, Stored], file: str, side: str, key: str | None) -> Stored:
    """The one of a file's tensors that holds the features of a side; see `find_features`."""
    stored = _choose(tensors, file, side, key)
    stored.require_float()
    return stored.as_rows()


def _choose(tensors: dict[str, Stored], file: str, side: str, key: str | None) -> Stored:
    if key is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if not tensors:
        raise FileError("no tensors in it", where=file, wanted=f"{side} features")
    found = listed(sorted(tensors), 10)
    hint = GIVE_WEIGHTS if are_of_weights(tensors) else None
    if key is not None and "" not in tensors:
        if key in tensors:
            return tensors[key]
        raise FileError("no such tensor", where=f"{file}[{key}]", found=found, hint=hint)
    if key is not None:
        raise FileError("a .npy has one array without a name", where=file, hint=f"leave out --{side}-key")
    for known in (KNOWN_NAMES[side], SHARED_NAMES):
        for name in known:
            if name in tensors:
                return tensors[name]
    hint = hint or f"name it with --{side}-key"
    raise FileError(f"cannot tell which tensor holds the {side}", where=file, found=found, hint=hint)


def read_finite(stored: Stored, finite: bool = True, rows: slice | None = None) -> NumpyArray:
    """``stored``, or some ``rows`` of it; with ``finite`` unset, NaN and Inf may pass.

    Raises:
        ValuesError: there is NaN or Inf in it; the message names the first place.
        FileError: the data end early or cannot be read.
    """
    block = stored.read(rows)
    bad = first_nonfinite(block) if finite else None
    if bad is not None:
        row = bad[0] + (rows.start if rows else 0)
        raise ValuesError(
            "not finite",
            where=f"{stored.where}, row {row}, column {bad[1]}",
            found=str(block[bad]),
            wanted="finite numbers",
            hint="pass --allow-nonfinite to fuse it all the same",
        )
    return block


def require_widths(image: Stored, text: Stored, weights: Weights) -> None:
    """Raise `ShapeError` if the rows of a pair are not as wide as the weights want them."""
    found, wanted = (image.shape[1], text.shape[1]), (weights.image_dim, weights.text_dim)
    if found == wanted:
        return
    hint = "image and text look swapped" if found == wanted[::-1] else _init_like(weights, *found)
    for stored, width in zip((image, text), wanted, strict=True):
        if stored.shape[1] != width:
            raise of_other_width(stored, width, hint)


def of_other_width(stored: Stored, width: int, hint: str) -> ShapeError:
    """What to say of a side whose rows are not ``width`` wide."""
    return ShapeError(
        "features do not fit the weights",
        where=stored.where,
        found=f"{list(stored.shape)}, width {stored.shape[1]}",
        wanted=f"width {width}",
        hint=hint,
    )


def _init_like(weights: Weights, image_dim: int, text_dim: int) -> str:
    """The command that makes weights of the same kind for other widths."""
    config, dim = weights.config, weights.dim if text_dim == weights.text_dim else text_dim
    asked, usual = config.options(), Config(config.method).options()
    if config.has_attention:
        asked["num_heads"] = math.gcd(config.num_heads, dim)
    other: dict[str, Any] = {"method": config.method} if config.method != Config().method else {}
    other |= {name: value for name, value in asked.items() if value != usual[name]}
    widths = {"feature_dim": dim, "text_dim": text_dim, "image_dim": image_dim}
    other |= {name: width for name, width in widths.items() if name == "feature_dim" or width != dim}
    flags = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in other.items())
    return f"fusecli init -o other.safetensors {' '.join(flags)}"
