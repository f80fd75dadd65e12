"""Features in files, and the pair that two of them make."""

from __future__ import annotations

from fusecli.arrays import first_nonfinite
from fusecli.errors import FileError, ShapeError, ValuesError, listed
from fusecli.formats import NumpyArray, Stored, open_tensors
from fusecli.weights import are_of_weights

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
    return choose(open_tensors(path, at_once=at_once), path, side, key)


def choose(tensors: dict[str, Stored], path: str, side: str, key: str | None) -> Stored:
    """The one of a file's tensors that holds the features of a side; see `find_features`."""
    stored = _choose(tensors, path, side, key)
    stored.require_float()
    return stored.as_rows()


def _choose(tensors: dict[str, Stored], path: str, side: str, key: str | None) -> Stored:
    if key is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if not tensors:
        raise FileError("no tensors in it", where=path, wanted=f"{side} features")
    found = listed(sorted(tensors), 10)
    hint = GIVE_WEIGHTS if are_of_weights(tensors) else None
    if key is not None and "" not in tensors:
        if key in tensors:
            return tensors[key]
        raise FileError("no such tensor", where=f"{path}[{key}]", found=found, hint=hint)
    if key is not None:
        raise FileError("a .npy has one array without a name", where=path, hint=f"leave out --{side}-key")
    for known in (KNOWN_NAMES[side], SHARED_NAMES):
        for name in known:
            if name in tensors:
                return tensors[name]
    hint = hint or f"name it with --{side}-key"
    raise FileError(f"cannot tell which tensor holds the {side}", where=path, found=found, hint=hint)


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


def require_widths(image: Stored, text: Stored, image_dim: int, text_dim: int) -> None:
    """Raise `ShapeError` if the rows of a pair are not as wide as the weights want them."""
    found = image.shape[1], text.shape[1]
    if found == (image_dim, text_dim):
        return
    hint = "fusecli init -o other.safetensors --image-dim {} --text-dim {}".format(*found)
    if found == (text_dim, image_dim):
        hint = "image and text look swapped"
    require_width(image, image_dim, "image", hint)
    require_width(text, text_dim, "text", hint)


def require_width(stored: Stored, width: int, side: str, hint: str | None = None) -> None:
    """Raise `ShapeError` if the rows of a side are not ``width`` wide."""
    if stored.shape[1] != width:
        raise ShapeError(
            "features do not fit the weights",
            where=stored.where,
            found=f"{list(stored.shape)}, width {stored.shape[1]}",
            wanted=f"width {width}",
            hint=hint or f"other weights: fusecli init with --{side}-dim {stored.shape[1]}",
        )
