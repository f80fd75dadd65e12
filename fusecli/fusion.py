"""Config, Weights and the methods: ``fuse(weights, image, text)``.

The one method so far, ``attention``, is the article's: project text and image, let the text attend
to the image (`torch.nn.MultiheadAttention`). The option ``residual`` adds the text to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, overload

from fusecli import attention
from fusecli.arrays import (
    FLOAT_NAMES,
    Array,
    cast,
    compute_dtype,
    dtype_name,
    filled,
    is_torch,
    like,
    namespace,
    needs_grad,
    ones,
    place,
    rows_apart,
)
from fusecli.errors import CheckpointError, ShapeError

Kept = TypeVar("Kept")

METHODS = ("attention",)


@dataclass(frozen=True, slots=True)
class Config:
    """What a checkpoint says of itself beside its tensors.

    Raises:
        CheckpointError: an unknown method, or no heads.
    """

    method: str = "attention"
    num_heads: int = 8
    residual: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CheckpointError("unknown method", found=repr(self.method), wanted=" or ".join(METHODS))
        if type(self.num_heads) is not int or self.num_heads < 1:
            raise CheckpointError("bad num_heads", found=repr(self.num_heads), wanted="a whole number from 1")
        if type(self.residual) is not bool:
            raise CheckpointError("bad residual", found=repr(self.residual), wanted="true or false")


def tensor_shapes(dim: int, text_dim: int, image_dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors of method ``attention`` and their shapes, in the order of the module."""
    return {
        "text_proj.weight": (dim, text_dim),
        "text_proj.bias": (dim,),
        "image_proj.weight": (dim, image_dim),
        "image_proj.bias": (dim,),
        "attention.in_proj_weight": (3 * dim, dim),
        "attention.in_proj_bias": (3 * dim,),
        "attention.out_proj.weight": (dim, dim),
        "attention.out_proj.bias": (dim,),
    }


@dataclass(frozen=True, eq=False)
class Weights:
    """A fusion: its config and its tensors (NumPy or torch, any float dtype), checked at once.

    Folded maps are kept beside them, so that many calls fold once; do not change the tensors after the
    first `fuse`.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or one too many; heads do not divide ``D``;
            ``residual`` with ``Dt`` unequal to ``D``.
    """

    config: Config
    tensors: Mapping[str, Array]
    _cache: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_tensors()
        if not self.dim or not self.text_dim or not self.image_dim:
            found = f"D={self.dim}, Dt={self.text_dim}, Di={self.image_dim}"
            raise CheckpointError("a width is zero", found=found)
        if self.dim % self.config.num_heads:
            raise CheckpointError(
                "heads do not divide the width",
                found=f"num_heads={self.config.num_heads}, D={self.dim}",
                wanted=f"a divisor of {self.dim}",
                hint="pass the number of heads that the module was built with: --num-heads",
            )
        if self.config.residual and self.text_dim != self.dim:
            raise CheckpointError(
                "residual adds the text to the result, so their widths must be equal",
                found=f"Dt={self.text_dim}, D={self.dim}",
            )

    def _check_tensors(self) -> None:
        axes = {name: len(shape) for name, shape in tensor_shapes(1, 1, 1).items()}
        for name, wanted in axes.items():
            if name not in self.tensors:
                raise CheckpointError("tensor is missing", where=name, found=_listed(self.tensors))
            if len(self.tensors[name].shape) != wanted:
                raise _misshapen(name, self.tensors[name], f"{wanted} axes")
        for name in self.tensors:
            if name not in axes:
                raise CheckpointError("unexpected tensor", where=name, wanted=_listed(axes))
        for name, shape in tensor_shapes(self.dim, self.text_dim, self.image_dim).items():
            if tuple(self.tensors[name].shape) != shape:
                raise _misshapen(name, self.tensors[name], str(list(shape)))
            if dtype_name(self.tensors[name]) not in FLOAT_NAMES:
                found = dtype_name(self.tensors[name])
                raise CheckpointError("tensor is not of floats", where=name, found=found, wanted="a float dtype")

    @property
    def dim(self) -> int:
        """``D``."""
        return int(self.tensors["attention.out_proj.weight"].shape[0])

    @property
    def text_dim(self) -> int:
        """``Dt``."""
        return int(self.tensors["text_proj.weight"].shape[1])

    @property
    def image_dim(self) -> int:
        """``Di``."""
        return int(self.tensors["image_proj.weight"].shape[1])

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors together."""
        shapes = tensor_shapes(self.dim, self.text_dim, self.image_dim).values()
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)

    def with_options(self, **options: Any) -> Weights:
        """The same tensors under a changed config, e.g. ``with_options(residual=True)``."""
        return replace(self, config=replace(self.config, **options))

    def layers(self, template: Array, dtype: str) -> attention.Layers:
        """The tensors as ``dtype``, where ``template`` lives."""

        def take(name: str) -> tuple[Array, Array]:
            pair = self.tensors[f"{name}weight"], self.tensors[f"{name}bias"]
            return cast(like(pair[0], template), dtype), cast(like(pair[1], template), dtype)

        def make() -> attention.Layers:
            return attention.Layers(
                text=take("text_proj."),
                image=take("image_proj."),
                in_proj=take("attention.in_proj_"),
                out_proj=take("attention.out_proj."),
                num_heads=self.config.num_heads,
            )

        live = is_torch(template) and needs_grad(*self.tensors.values())
        return make() if live else self._kept("layers", template, dtype, make)

    def folded(self, template: Array, dtype: str) -> attention.Maps:
        """The folded maps as ``dtype`` where ``template`` lives; folded in float64, once."""

        def make() -> attention.Maps:
            own = self.tensors["attention.out_proj.weight"]
            exact = attention.fold(self.layers(own, "float64"))
            self._cache.pop(self._key("layers", own, "float64"), None)  # twice the size of the checkpoint
            unrounded = None if dtype == "float64" else partial(self.folded, template, "float64")
            return replace(exact.like(template, dtype), exact=unrounded)

        return self._kept("maps", template, dtype, make)

    def _kept(self, what: str, template: Array, dtype: str, make: Callable[[], Kept]) -> Kept:
        key = self._key(what, template, dtype)
        if key not in self._cache:
            self._cache[key] = make()
        kept: Kept = self._cache[key]
        return kept

    def _key(self, what: str, template: Array, dtype: str) -> tuple[str, ...]:
        # `with_options` shares the cache, and the maps hold 1/sqrt(d).
        return (what, str(self.config.num_heads), *place(template), dtype)


#: Scores of one block of text rows at most, in numbers: 32 MiB of float32.
BLOCK_SCORES = 2**23
#: Rows of one block at most: 24 MiB of float32 at a width of 768.
BLOCK_ROWS = 2**13


def single_rows(weights: Weights, images: Array) -> Array:
    """What every token gets from an image of one row, for ``images [B, Di]`` of one row each: ``[B, D]``.

    The numbers of an image do not depend on the others beside it, nor on how many there are.
    """
    return _single(weights, images, rows_apart)


def _single(weights: Weights, image: Array, times: Callable[[Array, Array], Array]) -> Array:
    # Softmax over one key is 1: the text drops out, and W_o (W_v (W_i x + b_i) + b_v) + b_o is left. Three
    # products with vectors: folding them would cost more than a thousand pairs save.
    layers = weights.layers(image, dtype_name(image))
    for weight, bias in (layers.image, layers.thirds()[2], layers.out_proj):
        image = times(image, weight) + bias
    return image


class Seen:
    """One image, ready to meet text in blocks of rows: the single path of every fusion.

    Args:
        weights: the fusion.
        image: ``[M, Di]``; ``[Di]`` and ``[1, M, Di]`` are read as that.
        template: an array of the kind (and device) to compute with: the text, or a part of it.
        n: rows that the text has in all blocks together; the plan depends on it.
        dtype: ``"float32"`` or ``"float64"``, what to compute in.
        training: compute with the layers as they are instead of folded maps, so that autograd reaches them.
        row: the answer of one image row, from `single_rows`, in place of ``image``.

    Raises:
        ShapeError: the image has other axes, no rows, or a width other than ``Di``.
    """

    def __init__(
        self,
        weights: Weights,
        image: Array,
        template: Array,
        n: int,
        dtype: str,
        *,
        training: bool = False,
        row: Array = None,
    ) -> None:
        self.weights, self.n, self.m, self.dtype = weights, n, 1, dtype
        self._text_layer: tuple[Array, Array] | None = None
        self._side: attention.ImageSide | None = None
        self._row: Array | None = row
        if row is not None:
            return
        image = as_rows(image, "image", weights.image_dim)
        self.m = len(image)
        image = cast(like(image, template), dtype)
        if self.m == 1 and not training:
            self._row = _single(weights, image[0], lambda x, weight: weight @ x)  # [D]
            return
        if training:
            layers = weights.layers(template, dtype)
            maps = attention.unfolded(layers)
            image = image @ layers.image[0].mT + layers.image[1]  # [M, D]
            self._text_layer = layers.text[0] * layers.scale, layers.text[1] * layers.scale
            plan = attention.Plan(attention.Order.DIRECT, attention.Order.DIRECT, 0)
        else:
            maps = weights.folded(template, dtype)
            heads = weights.config.num_heads
            plan = attention.plan(n, self.m, weights.dim, weights.text_dim, weights.image_dim, heads)
        self._side = attention.see(image, maps, weights.config.num_heads, plan)

    @property
    def rows_alike(self) -> bool:
        """Whether all fused rows are the same vector."""
        return self._row is not None and not self.weights.config.residual

    @property
    def block_rows(self) -> int:
        """Text rows to pass at once, so that memory stays flat in ``N``."""
        return max(1, min(BLOCK_ROWS, BLOCK_SCORES // (self.weights.config.num_heads * self.m)))

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[slice]:
        """The rows ``0..N``, a block of at most ``most`` at a time."""
        step = min(self.block_rows, most)
        return (slice(start, min(start + step, self.n)) for start in range(0, self.n, step))

    def meet(self, text: Array, *, need_weights: bool = False) -> tuple[Array, Array | None]:
        """Fuse one block of text rows ``[n, Dt]``, of any float dtype.

        Returns:
            Fused rows ``[n, D]`` and, if asked for, attention ``[H, n, M]``, in the dtype of computing.
        """
        text = cast(text, self.dtype)
        if self._row is not None:
            fused = filled((len(text), self.weights.dim), self._row)
            heads = self.weights.config.num_heads
            attended = ones((heads, len(text), 1), self._row) if need_weights else None
        else:
            assert self._side is not None
            query = text
            if self._text_layer is not None:
                query = text @ self._text_layer[0].mT + self._text_layer[1]  # [n, D]
            fused, attended = attention.meet(query, self._side, need_weights=need_weights)
        if self.weights.config.residual:
            fused += text
        return fused, attended


@overload
def fuse(weights: Weights, image: Array, text: Array, *, need_weights: Literal[False] = False) -> Array: ...


@overload
def fuse(weights: Weights, image: Array, text: Array, *, need_weights: Literal[True]) -> tuple[Array, Array]: ...


def fuse(weights: Weights, image: Array, text: Array, *, need_weights: bool = False) -> Any:
    """Fuse one pair: let each text row attend to the image rows.

    Args:
        weights: from `fusecli.load`, `fusecli.init` or built by hand.
        image: ``[M, Di]``, NumPy or torch, any float dtype; ``[Di]`` and ``[1, M, Di]`` are read as that.
        text: ``[N, Dt]``, likewise. The work is done where the text lives.
        need_weights: return the attention as well.

    Returns:
        The fused rows ``[N, D]`` in the text's dtype; with ``need_weights`` a pair of them and the attention
        ``[H, N, M]`` (float32, or float64 if an input is wider than 32 bits).

    Raises:
        ShapeError: an array has other axes, no rows or the wrong width.
        ValuesError: an array is not of a floating dtype.
    """
    text = as_rows(text, "text", weights.text_dim)
    dtype = compute_dtype(text, image)
    training = is_torch(text) and needs_grad(*weights.tensors.values())
    seen = Seen(weights, image, text, len(text), dtype, training=training)
    parts = [seen.meet(text[rows], need_weights=need_weights) for rows in seen.blocks()]
    fused = cast(_joined([part for part, _ in parts], 0), dtype_name(text))
    return (fused, _joined([part for _, part in parts], 1)) if need_weights else fused


def _joined(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concatenate(parts, axis=axis)


def as_rows(x: Array, what: str, width: int) -> Array:
    """``x`` as ``[rows, width]``: one vector becomes one row, a leading axis of 1 goes.

    Raises:
        ShapeError: other axes, no rows, another width; the message calls the array ``what``.
    """
    shape = list(x.shape)
    letters = "[M, Di]" if what == "image" else "[N, Dt]"
    if len(shape) == 3 and shape[0] == 1:
        x = x[0]
    elif len(shape) == 1:
        x = x[None]
    if len(x.shape) != 2:
        raise ShapeError(f"{what} features have the wrong axes", found=str(shape), wanted=letters)
    if x.shape[0] == 0:
        raise ShapeError(f"{what} features have no rows", found=str(shape), wanted=letters)
    if x.shape[1] != width:
        raise ShapeError(
            f"{what} features do not fit the checkpoint",
            found=f"width {x.shape[1]}",
            wanted=f"width {width}",
            hint=f"use features of width {width}, or a checkpoint made for {x.shape[1]}",
        )
    return x


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _misshapen(name: str, tensor: Array, wanted: str) -> CheckpointError:
    return CheckpointError("tensor has the wrong shape", where=name, found=str(list(tensor.shape)), wanted=wanted)
