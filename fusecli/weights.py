"""Config and Weights: what a fusion is made of, whatever its method.

The tensors of each method, and what they are called, stand in `tensor_shapes`; the methods themselves in
`fusecli.methods`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from fusecli.arrays import FLOAT_NAMES, Array, cast, dtype_name, is_masked, is_torch, kind_and_device, lasting, like
from fusecli.errors import CheckpointError, UsageError, listed
from fusecli.maps import Layers, Maps, fold

Kept = TypeVar("Kept")

#: The methods, each with the options that it has.
OPTIONS: dict[str, tuple[str, ...]] = {
    "attention": ("num_heads", "residual", "layer_norm"),
    "weighted-sum": ("layer_norm",),
    "concat": ("layer_norm",),
    "gated": ("num_heads", "gate", "layer_norm"),
    "transformer": ("num_heads", "num_layers", "dim_feedforward", "self_attention", "dropout", "layer_norm"),
}
METHODS = tuple(OPTIONS)
GATES = ("sigmoid", "tanh")


@dataclass(frozen=True, slots=True)
class Config:
    """What a checkpoint says of itself beside its tensors. Options are called as in `torch.nn.Transformer`.

    Args:
        method: one of `METHODS`.
        num_heads: ``H`` of attention, gated and transformer.
        residual: attention adds the text to its result.
        gate: ``"sigmoid"`` or ``"tanh"``, of gated.
        num_layers: of the transformer.
        dim_feedforward: width inside its feed-forward layers; ``4 D`` if None.
        self_attention: whether its tokens attend to each other before they attend to the image.
        dropout: of its layers, in training.
        layer_norm: whether text and image go through a layer norm first.

    Raises:
        UsageError: an unknown method, an option that the method does not have, or a value it cannot take.
    """

    method: str = "attention"
    num_heads: int = 8
    residual: bool = False
    gate: str = "sigmoid"
    num_layers: int = 1
    dim_feedforward: int | None = None
    self_attention: bool = False
    dropout: float = 0.1
    layer_norm: bool = False

    def __post_init__(self) -> None:
        if type(self.dropout) is int:
            object.__setattr__(self, "dropout", float(self.dropout))  # the same number has the same fingerprint
        if self.method not in METHODS:
            raise UsageError("unknown method", found=repr(self.method), wanted=" or ".join(METHODS))
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            valid, wanted = _VALUES[option.name]
            if not valid(value):
                raise UsageError(f"bad {option.name}", found=repr(value), wanted=wanted)
            if option.name not in OPTIONS[self.method] and value != option.default:
                having = " or ".join(name for name, names in OPTIONS.items() if option.name in names)
                found = f"method {self.method}"
                raise UsageError(f"{option.name} is an option of {having}", found=found)

    def options(self) -> dict[str, Any]:
        """The options that the method has."""
        return {name: getattr(self, name) for name in OPTIONS[self.method]}

    @property
    def has_attention(self) -> bool:
        """Whether there are attention weights to look at."""
        return "num_heads" in OPTIONS[self.method]

    @property
    def one_row_needs_no_text(self) -> bool:
        """Whether what an image of one row gives is known before any text is seen: see `fusecli.one_row`."""
        return self.method != "transformer"

    @property
    def one_row_is_added(self) -> bool:
        """Whether each text row then gets just that, or that and itself, and no product is left to do."""
        return self.method == "attention"

    @property
    def can_forget_text(self) -> bool:
        """Whether nothing of the text is left in the result where there is but one image row."""
        return self.method == "attention" and not self.residual

    @property
    def adds_text(self) -> bool:
        """Whether the text itself is part of the result, so that it has to have the width ``D``."""
        return self.residual or self.method == "gated"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_depth(value: Any) -> bool:
    return _is_count(value) and value <= MAX_LAYERS


#: Names of tensors that a message lists at most.
MOST_TENSORS = 20
#: More layers than this mean a damaged file, and the names of all their tensors would be made before one is looked for.
MAX_LAYERS = 1024
_COUNT = _is_count, "a whole number from 1"
_SWITCH = (lambda value: type(value) is bool), "true or false"
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_heads": _COUNT,
    "residual": _SWITCH,
    "gate": ((lambda value: value in GATES), " or ".join(GATES)),
    "num_layers": (_is_depth, f"a whole number from 1 to {MAX_LAYERS}"),
    "dim_feedforward": ((lambda value: value is None or _is_count(value)), _COUNT[1]),
    "self_attention": _SWITCH,
    "dropout": ((lambda value: type(value) in (int, float) and 0 <= value < 1), "a number from 0 to below 1"),
    "layer_norm": _SWITCH,
}


def are_of_weights(names: Iterable[str]) -> bool:
    """Whether tensors of these ``names`` are meant for a checkpoint, with any prefix, be it whole or not."""
    return any(name.endswith(("image_proj.weight", "text_proj.weight")) for name in names)


def tensor_shapes(config: Config, dim: int, text_dim: int, image_dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a fusion and their shapes, in the order of the module."""
    text = _linear("text_proj", dim, text_dim)
    image = _linear("image_proj", dim, image_dim)
    match config.method:
        case "attention":
            shapes = text | image | _multihead("attention", dim)
        case "gated":
            gate = _linear("gate_proj", dim, 2 * dim) if config.gate == "sigmoid" else {"gamma": (1,)}
            shapes = text | image | _multihead("attention", dim) | gate
        case "weighted-sum":
            shapes = text | image | {"alpha": (1,)}
        case "concat":
            shapes = image | _linear("concat_proj", dim, text_dim + dim)
        case _:  # transformer
            shapes = text | image
            for number in range(config.num_layers):
                shapes |= _layer(f"layers.{number}", config, dim)
            shapes |= _norm("norm", dim)
    return shapes | (_norm("text_norm", text_dim) | _norm("image_norm", image_dim) if config.layer_norm else {})


def _layer(name: str, config: Config, dim: int) -> dict[str, tuple[int, ...]]:
    # As in torch.nn.TransformerDecoderLayer; the norm of the image, which that has not, is norm_memory.
    inside = config.dim_feedforward or 4 * dim
    before = _norm(f"{name}.norm1", dim) | _multihead(f"{name}.self_attn", dim) if config.self_attention else {}
    cross = _norm(f"{name}.norm2", dim) | _norm(f"{name}.norm_memory", dim) | _multihead(f"{name}.multihead_attn", dim)
    feed = _linear(f"{name}.linear1", inside, dim) | _linear(f"{name}.linear2", dim, inside)
    return before | cross | _norm(f"{name}.norm3", dim) | feed


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _multihead(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    inner = {f"{name}.in_proj_weight": (3 * dim, dim), f"{name}.in_proj_bias": (3 * dim,)}
    return inner | _linear(f"{name}.out_proj", dim, dim)


@dataclass(frozen=True, eq=False)
class Weights:
    """A fusion: its config and its tensors (NumPy or torch, any float dtype), checked at once.

    Folded maps are kept beside them, so that many calls fold once; not of tensors that require a gradient, which an
    optimizer may change at any time. Other tensors are folded anew when torch has counted a change in place. Do not
    change what it does not count after the first `fuse`: arrays of NumPy, the memory behind ``.data``, and tensors
    without gradient that share theirs with what an optimizer of torch changes (``fused=True`` counts nothing).

    Raises:
        CheckpointError: a tensor is missing, misshapen, or one too many.
        UsageError: heads do not divide ``D``, or the text is to be added with ``Dt`` unequal to ``D``.
    """

    config: Config
    tensors: Mapping[str, Array]
    _cache: dict[tuple[str, ...], Any] = field(default_factory=dict, init=False, repr=False)
    _versions: list[int] = field(default_factory=list, init=False, repr=False)  # of tensors, when the cache was made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config, self.tensors)  # a copy, on whatever machine, folds for itself

    def __post_init__(self) -> None:
        self._check_tensors()
        if self.config.has_attention:
            require_heads(self.config.num_heads, self.dim)
        if self.config.adds_text and self.text_dim != self.dim:
            method = "residual" if self.config.residual else self.config.method
            raise UsageError(
                f"{method} adds the text to the result, so their widths must be equal",
                found=f"Dt={self.text_dim}, D={self.dim}",
            )

    def _check_tensors(self) -> None:
        axes = {name: len(shape) for name, shape in tensor_shapes(self.config, 1, 1, 1).items()}
        for name, wanted in axes.items():
            if name not in self.tensors:
                raise CheckpointError(
                    "tensor is missing", where=name, found=listed(sorted(self.tensors), MOST_TENSORS) or "nothing"
                )
            if len(self.tensors[name].shape) != wanted:
                raise _misshapen(name, self.tensors[name], f"{wanted} axes")
        for name in self.tensors:
            if name not in axes:
                raise CheckpointError("unexpected tensor", where=name, wanted=listed(sorted(axes), MOST_TENSORS))
        if min(self.dim, self.text_dim, self.image_dim) < 1:
            found = f"D={self.dim}, Dt={self.text_dim}, Di={self.image_dim}"
            raise CheckpointError("a width is zero", found=found)
        for name, shape in tensor_shapes(self.config, *self._likeliest_widths()).items():
            if tuple(self.tensors[name].shape) != shape:
                raise _misshapen(name, self.tensors[name], str(list(shape)))
            _require_floats(name, self.tensors[name])

    def _likeliest_widths(self) -> tuple[int, int, int]:
        """``D``, ``Dt``, ``Di`` as most tensors have them, so that it is the odd one which is called misshapen."""
        marks = (10**9 + 7, 10**9 + 9, 10**9 + 21)  # no sum or multiple of which is another
        votes: dict[int, list[int]] = defaultdict(list)
        for name, shape in tensor_shapes(self.config, *marks).items():
            for mark, width in zip(shape, self.tensors[name].shape, strict=True):
                votes[mark].append(width)
        dim, text_dim, image_dim = (Counter(votes[mark] or [0]).most_common(1)[0][0] for mark in marks)
        if not text_dim:  # of concat, which has no tensor of that width without layer norm
            text_dim = votes[marks[0] + marks[1]][0] - dim
        return dim, text_dim, image_dim

    @property
    def dim(self) -> int:
        """``D``."""
        return int(self.tensors["image_proj.weight"].shape[0])

    @property
    def text_dim(self) -> int:
        """``Dt``."""
        if self.config.method == "concat":
            return int(self.tensors["concat_proj.weight"].shape[1]) - self.dim
        return int(self.tensors["text_proj.weight"].shape[1])

    @property
    def image_dim(self) -> int:
        """``Di``."""
        return int(self.tensors["image_proj.weight"].shape[1])

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def __repr__(self) -> str:
        return f"Weights({', '.join(f'{name}={value!r}' for name, value in self.facts().items())})"

    def facts(self) -> dict[str, Any]:
        """Method, options and widths, as ``--json`` and ``inspect`` have them."""
        widths = {"dim": self.dim, "text_dim": self.text_dim, "image_dim": self.image_dim}
        return {"method": self.config.method, **self.config.options(), **widths, "parameters": self.num_parameters}

    def with_options(self, **options: Any) -> Weights:
        """The same tensors under a changed config, e.g. ``with_options(residual=True)``."""
        return replace(self, config=replace(self.config, **options))

    def at(self, template: Array, dtype: str) -> Mapping[str, Array]:
        """All tensors as ``dtype``, where ``template`` lives."""
        return self.kept("tensors", template, dtype, lambda: self._cast(self.tensors, template, dtype))

    def _cast(self, names: Iterable[str], template: Array, dtype: str) -> dict[str, Array]:
        return {name: cast(like(self.tensors[name], template), dtype) for name in names}

    def folded(self, template: Array, dtype: str) -> Maps:
        """The folded maps of the article's attention as ``dtype`` where ``template`` lives; folded in float64, once."""

        def make() -> Maps:
            names = tensor_shapes(Config(), 1, 1, 1)
            own = self.tensors["attention.out_proj.weight"]
            exact = fold(layers_of(self._cast(names, own, "float64"), self.config.num_heads))
            maps = exact.like(template, dtype)
            # Not partial of the template: that is somebody's text, which would live as long as the weights.
            return maps if dtype == "float64" else replace(maps, unrounded=partial(self.folded, maps.query, "float64"))

        return self.kept("maps", template, dtype, make)

    def kept(self, what: str, template: Array, dtype: str, make: Callable[[], Kept]) -> Kept:
        """What ``make`` gives, made once for each kind of ``template`` and ``dtype`` while the tensors are the same."""
        if any(tensor.requires_grad for tensor in self._changeable):  # fused optimizers change no version
            self._cache.clear()
            return make()
        versions = [tensor._version for tensor in self._changeable]
        if versions != self._versions:
            self._cache.clear()
            self._versions[:] = versions
        key = (what, *kind_and_device(template), dtype)
        kept: Kept | None = self._cache.get(key)
        if kept is None:
            with lasting(template):
                self._cache[key] = kept = make()
        return kept

    @cached_property
    def _changeable(self) -> list[Array]:
        """The tensors of which torch counts how often they have been changed."""
        return [tensor for tensor in self.tensors.values() if is_torch(tensor) and not tensor.is_inference()]


def require_heads(num_heads: int, dim: int) -> None:
    """Raise `UsageError` unless ``num_heads`` heads can share a width of ``dim``."""
    if dim % num_heads:
        raise UsageError(
            "heads do not divide the width",
            found=f"num_heads={num_heads}, D={dim}",
            wanted=f"a divisor of {dim}",
            hint="choose another --num-heads; for a module of PyTorch, the number it was built with",
        )


def layers_of(tensors: Mapping[str, Array], num_heads: int) -> Layers:
    """The layers of the article's module among ``tensors``."""

    def take(name: str) -> tuple[Array, Array]:
        return tensors[f"{name}weight"], tensors[f"{name}bias"]

    return Layers(
        text=take("text_proj."),
        image=take("image_proj."),
        in_proj=take("attention.in_proj_"),
        out_proj=take("attention.out_proj."),
        num_heads=num_heads,
    )


def _require_floats(name: str, tensor: Array) -> None:
    if is_masked(tensor):
        raise CheckpointError("masked arrays are not supported", where=name, wanted="an array of numbers")
    if (dtype := dtype_name(tensor)) not in FLOAT_NAMES:
        raise CheckpointError("not a floating-point tensor", where=name, found=dtype, wanted="a float dtype")


def _misshapen(name: str, tensor: Array, wanted: str) -> CheckpointError:
    return CheckpointError("tensor has the wrong shape", where=name, found=str(list(tensor.shape)), wanted=wanted)
