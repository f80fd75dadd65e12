"""``fuse(weights, image, text)``: the one path of every fusion, whatever its method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

from fusecli.arrays import (
    FLOAT_NAMES,
    Array,
    cast,
    compute_dtype,
    contiguous,
    dtype_name,
    is_on_gpu,
    is_torch,
    joined,
    like,
    needs_grad,
    numpy_can_have,
    ones,
    padded,
    plain,
    rows_of,
    to_numpy,
    unwarned,
)
from fusecli.errors import ShapeError, UsageError, ValuesError
from fusecli.methods import BY_NAME, FusedRows, Method, View
from fusecli.text_rows import TextRows
from fusecli.weights import Config, Weights

#: Scores of one block of text rows at most, in numbers: 32 MiB of float32.
BLOCK_SCORES = 2**23
#: Rows of one block at most: 24 MiB of float32 at a width of 768.
BLOCK_ROWS = 2**13


class Prepared:
    """One image, ready to be fused into text, a block of rows at a time: the single path of every fusion."""

    def __init__(self, view: View) -> None:
        self._view, self._config = view, view.weights.config
        self._method: Method = BY_NAME[self._config.method](view)

    @property
    def dtype(self) -> str:
        """What is computed in."""
        return self._view.dtype

    @property
    def rows_alike(self) -> bool:
        """Whether all fused rows are the same vector."""
        return self._view.one_row is not None and self._config.can_forget_text

    @property
    def only_adds(self) -> bool:
        """Whether nothing is multiplied for a text row: it is answered at the speed of copying."""
        return self._view.one_row is not None and self._config.one_row_is_added

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[slice]:
        """The rows ``0..N``, so many at a time, at most ``most``, that memory stays flat in ``N``.

        All at once where they attend to each other.
        """
        n, scores = self._view.n, self._config.num_heads * self._view.m
        step = n if self._config.self_attention else max(1, min(most, BLOCK_SCORES // scores))
        return (slice(start, min(start + step, n)) for start in range(0, n, step))

    def text_rows(self, text: Array) -> TextRows:
        """Text rows ``[n, Dt]`` to fuse more than once, with images that are looked at in the same way."""
        return self._view.text_rows(text)

    def begin(self, text: TextRows) -> None:
        """Compute what depends on text rows alone; `fuse` does what has not been done."""
        self._method.begin(text)

    def fuse(self, text: Array | TextRows, *, need_weights: bool = False, mask: Array = None) -> FusedRows:
        """Fuse one block of text rows ``[n, Dt]``, of any float dtype.

        It may be a batch ``[B, N, Dt]`` if the images are, with ``mask [B, N]`` true for rows that are no padding.

        Returns:
            Fused rows ``[n, D]`` and, if asked for, attention ``[H, n, M]`` and the mean gate ``[n]`` where there is
            one, in the dtype of computing.
        """
        rows = text if isinstance(text, TextRows) else self.text_rows(text)
        return self._method.fuse(rows, mask, need_weights)


class InTurn(NamedTuple):
    """One of the pairs that `fuse_in_turn` takes."""

    image: Array  # [M, Di]; not looked at where there is a `row`
    text: Array  # [N, Dt]
    dtype: str  # "float32" or "float64", what to compute in
    row: Array = None  # from `single_rows`: what an image of one row comes to


#: Numbers, as `numbers_in_turn` counts them, and pairs that `fuse_in_turn` takes at most: 16 MiB of float32. Of 2, 4, 8
#: and 16 pairs with M = 50 and N = 77 each took less time than with fewer.
NUMBERS_IN_TURN, PAIRS_IN_TURN = 2**22, 16


def numbers_in_turn(weights: Weights, n: int, m: int) -> int:
    """About how many numbers a pair has in memory while others are computed: rows, what is made of them, attention."""
    of_text = weights.text_dim + 2 * weights.dim
    of_image = weights.image_dim + 2 * weights.dim * weights.config.num_layers
    return n * of_text + m * of_image + weights.config.num_heads * n * m


def fuse_in_turn(weights: Weights, pairs: Sequence[InTurn], *, need_weights: bool = False) -> list[FusedRows]:
    """Fuse short pairs step by step, each step for all of them, so that weights are read from memory once for many.

    Each product is that of the pair alone, and so are its numbers. For arrays: a GPU has `fuse_together`.
    """
    prepared = [Prepared(View(weights, image, text, len(text), dtype, row=row)) for image, text, dtype, row in pairs]
    texts = [one.text_rows(pair.text) for one, pair in zip(prepared, pairs, strict=True)]
    for one, text in zip(prepared, texts, strict=True):
        one.begin(text)
    return [one.fuse(text, need_weights=need_weights) for one, text in zip(prepared, texts, strict=True)]


#: Pairs that are computed at once on a GPU, and rows of all of them together, at most: what fills it.
TOGETHER, ROWS_TOGETHER = 64, 2**13


def pairs_together(weights: Weights, n: int, m: int) -> int:
    """How many pairs of ``n`` text and ``m`` image rows `fuse_together` computes at once; 1: it does not pay.

    By shapes alone, so that a pair gives the same numbers in whatever company it comes.
    """
    scores = weights.config.num_heads * n * max(m, n if weights.config.self_attention else 0)
    return max(1, min(TOGETHER, ROWS_TOGETHER // (n + m), BLOCK_SCORES // scores))


def fuse_together(
    weights: Weights, images: Array, texts: Array, dtype: str, *, need_weights: bool = False
) -> FusedRows:
    """Fuse pairs of one shape at once, as `Prepared` would one by one.

    The numbers of a pair do not depend on the others, nor on how many there are: a batch is always filled up to
    `pairs_together`, since libraries choose their ways, and with them the last digits, by size.

    Args:
        weights: the fusion.
        images: ``[B, M, Di]``.
        texts: ``[B, N, Dt]``, of the same kind, on the same device.
        dtype: ``"float32"`` or ``"float64"``, what both are of.
        need_weights: give the attention as well.

    Returns:
        Fused rows ``[B, N, D]`` and, if asked for, attention ``[B, H, N, M]`` and gates ``[B, N]``.
    """
    (count, m), n = images.shape[:2], texts.shape[1]
    size = pairs_together(weights, n, m)
    images, texts = padded(images, size), padded(texts, size)
    mask = cast(ones((size, max(m, n)), images), "bool")
    prepared = Prepared(View(weights, images, texts, n, dtype, mask=mask[:, :m]))
    result = prepared.fuse(texts, need_weights=need_weights, mask=mask[:, :n])
    return FusedRows(*(None if x is None else x[:count] for x in result))


def require_attention(config: Config) -> None:
    """Raise `UsageError` if a method has no attention to show."""
    if not config.has_attention:
        raise UsageError(
            "no attention to show", found=f"method {config.method}", wanted="attention, gated or transformer"
        )


@overload
def fuse(weights: Weights, image: Array, text: Array, *, need_weights: Literal[False] = False) -> Array: ...


@overload
def fuse(weights: Weights, image: Array, text: Array, *, need_weights: Literal[True]) -> tuple[Array, Array]: ...


def fuse(weights: Weights, image: Array, text: Array, *, need_weights: bool = False) -> Any:
    """Fuse one pair: let each text row attend to the image rows.

    Args:
        weights: from `fusecli.load`, `fusecli.init` or built by hand.
        image: ``[M, Di]``, NumPy or torch, any float dtype; ``[Di]`` and ``[1, M, Di]`` are read as that.
        text: ``[N, Dt]``, likewise. The work is done where the text lives, and what comes back is of its kind: an
            array has no gradient. By NumPy for tensors on the CPU too, unless a gradient is wanted.
        need_weights: return the attention as well.

    Returns:
        The fused rows ``[N, D]`` in the text's dtype; with ``need_weights`` a pair of them and the attention
        ``[H, N, M]`` (float32, or float64 if an input is wider than 32 bits).

    Raises:
        ShapeError: an array has other axes, no rows or the wrong width.
        ValuesError: an array is not of a floating dtype.
        UsageError: the method has no attention to return, or ``weights`` are none.
    """
    if not isinstance(weights, Weights):
        raise UsageError("no weights", found=type(weights).__name__, hint="fusecli.load(path)")
    if need_weights:
        require_attention(weights.config)
    text = as_rows(plain(text, "text features"), "text", weights.text_dim)
    image = as_rows(plain(image, "image features"), "image", weights.image_dim)
    dtype, given = compute_dtype(dtype_name(text), dtype_name(image)), text
    training = is_torch(text) and needs_grad(text, image, *weights.tensors.values())
    if is_torch(text) and not is_on_gpu(text) and numpy_can_have(text, image, *weights.tensors.values()):
        text = to_numpy(text)
    with unwarned(given):
        prepared = Prepared(View(weights, image, text, len(text), dtype, training=training))
        parts = [prepared.fuse(text[rows], need_weights=need_weights) for rows in prepared.blocks()]
        fused = cast(contiguous(like(joined([part.fused for part in parts], 0), given)), dtype_name(given))
        if not need_weights:
            return fused
        return fused, contiguous(like(joined([part.attention for part in parts], 1), given))


def as_rows(x: Array, what: str, width: int) -> Array:
    """``x`` as ``[rows, width]``: one vector becomes one row, a leading axis of 1 goes.

    Raises:
        ShapeError: other axes, no rows, another width; the message calls the array ``what``.
        ValuesError: it is not of a floating dtype.
    """
    if (dtype := dtype_name(x)) not in FLOAT_NAMES:
        raise ValuesError("not floats", where=f"{what} features", found=dtype, wanted=", ".join(FLOAT_NAMES))
    shape = rows_of(x.shape, f"{what} features")
    if shape[1] != width:
        raise ShapeError(
            "features do not fit the weights",
            where=f"{what} features",
            found=f"width {shape[1]}",
            wanted=f"width {width}",
            hint=f"use features of width {width}, or weights made for {shape[1]}",
        )
    return x if len(x.shape) == 2 else x.reshape(shape)
