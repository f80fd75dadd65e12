"""The methods: what each makes of one image and any number of text rows.

With ``T`` the text, ``I`` the image, ``ī`` the mean of the projected image rows and ``A = attention(T, I)``:

- ``attention``: ``A``, or ``T + A`` with ``residual``;
- ``weighted-sum``: ``(1 - α) text_proj(T) + α ī``, α one number;
- ``concat``: ``W [T ; ī] + b``;
- ``gated``: ``T + sigmoid(W_g [T ; A] + b_g) ⊙ A``, or ``T + tanh(γ) A`` (Alayrac et al. 2022, section 2.2);
- ``transformer``: layers of ``T += MHA(LN T, LN I, LN I); T += W_2 gelu(W_1 LN T)``, with self-attention of ``T``
  before if wanted, and a last LN (Vaswani et al. 2017, section 3.1, with the norms first: Xiong et al. 2020).

A method is built from a `View` of an image and then fuses text rows, in blocks or in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

from fusecli import attention
from fusecli.arrays import Array, cast, cut, filled, is_on_gpu, like, namespace, needs_grad, ones
from fusecli.functional import dot_by_parts, gelu, layer_norm, linear, mean_row, sigmoid
from fusecli.maps import Maps, merged, unfolded, with_image
from fusecli.one_row import pooled, single
from fusecli.plans import DIRECT, Plan, plan, plan_of_batch, plan_to_learn
from fusecli.text_rows import TextRows
from fusecli.weights import Weights, layers_of


class FusedRows(NamedTuple):
    """What came of some text rows."""

    fused: Array  # [n, D]
    attention: Array | None = None  # [H, n, M], if asked for
    gate: Array | None = None  # [n], the mean over channels, if asked for and there is one


@dataclass(frozen=True)
class View:
    """One image and how it is looked at.

    With a ``mask [B, M]``, true for rows that are no padding, it is a batch: ``image [B, M, Di]``.
    """

    weights: Weights
    image: Array  # [M, Di], of any float dtype and kind; not looked at where there is a `row`
    template: Array  # any array of the kind, and on the device, to compute with
    n: int  # rows that the text has in all blocks together; the plan depends on it
    dtype: str  # "float32" or "float64", what to compute in
    training: bool = False  # use the layers as they are instead of folded maps, so that autograd reaches them
    row: Array = None  # from `single_rows`: what an image of one row comes to
    mask: Array = None
    drop: Callable[[Array], Array] = lambda x: x  # dropout

    @property
    def m(self) -> int:
        """``M``."""
        return 1 if self.row is not None else int(self.image.shape[-2])

    @cached_property
    def one_row(self) -> Array:
        """What every token gets from the only image row, ``[D]``, where that can be told before any text is seen."""
        if self.row is not None or self.m > 1 or self.training or self.is_batch:
            return self.row
        wanted = needs_grad(self.template)  # the text's gradient: it is zero, but has to be there
        if wanted or not self.weights.config.one_row_needs_no_text:
            return None
        return single(self.weights, self._given[0], lambda x, weight: weight @ x)

    @cached_property
    def rows(self) -> Array:
        """The image rows to compute with, normed if there is a norm; in training without its weight and bias."""
        if not self.weights.config.layer_norm:
            return self._given
        return layer_norm(self._given, *(() if self.training else self.layer("image_norm")))

    @property
    def _given(self) -> Array:
        return cast(like(self.image, self.template), self.dtype)

    def text_rows(self, text: Array) -> TextRows:
        """Text rows of any float dtype as they are to be computed with, normed if there is a norm."""
        text = cast(text, self.dtype)
        return TextRows(layer_norm(text, *self.layer("text_norm")) if self.weights.config.layer_norm else text)

    @cached_property
    def tensors(self) -> Mapping[str, Array]:
        """The tensors by name, in the dtype to compute in.

        In training ``image_proj`` also does what is learned of ``image_norm``: no gradient is then carried to the rows.
        """
        tensors = self.weights.at(self.template, self.dtype)
        if not (self.training and self.weights.config.layer_norm):
            return tensors
        weight = tensors["image_proj.weight"]
        shift = weight @ tensors["image_norm.bias"] + tensors["image_proj.bias"]
        return {
            **tensors,
            "image_proj.weight": weight * tensors["image_norm.weight"],
            "image_proj.bias": shift,
        }

    def layer(self, name: str) -> tuple[Array, Array]:
        """Weight and bias of a layer."""
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    @property
    def is_batch(self) -> bool:
        """Whether it is a batch of images."""
        return self.mask is not None

    @property
    def keeps_direct(self) -> bool:
        """Whether the order of products is `DIRECT`, whatever that takes.

        A GPU waits for its next task longer than for the operations that other orders save, and one pair that is
        learned from takes the reference's products in its order, and rounds as that does.
        """
        return is_on_gpu(self.template) or (self.training and not self.is_batch)

    def plan(self, rows: Array, text_dim: int) -> Plan:
        """How to let the text, ``text_dim`` wide, attend to ``rows [M, width]``, which the maps begin with."""
        if self.keeps_direct:
            return DIRECT
        (m, width), dim, num_heads = rows.shape[-2:], self.weights.dim, self.weights.config.num_heads
        if self.is_batch:
            return plan_of_batch(self.n, m, dim, width, num_heads)
        return plan(self.n, m, dim, text_dim, width, num_heads)


class Method(Protocol):
    """An image prepared by one method."""

    def __init__(self, view: View) -> None:
        """Compute what depends on the image alone."""

    def begin(self, text: TextRows) -> None:
        """Compute what depends on text rows alone; `fuse` does what has not been done."""

    def fuse(self, text: TextRows, mask: Array, need_weights: bool) -> FusedRows:
        """Fuse text rows (of a batch, with ``mask [B, N]``)."""


class CrossAttention:
    """``A = attention(T, I)``, the article's module.

    ``row [D]`` is the answer to every token where there is but one image row, else None: softmax over one key is 1.
    """

    def __init__(self, view: View) -> None:
        self.row: Array | None = view.one_row
        self._heads = view.weights.config.num_heads
        self._text_proj: tuple[Array, Array] | None = None
        if self.row is not None:
            return
        if view.training:
            self._side = self._learning(view)
            return
        image = view.rows
        maps = view.weights.folded(view.template, view.dtype)
        plan = view.plan(image, view.weights.text_dim)
        self._side = attention.prepare(image, maps, self._heads, plan, view.mask)

    def _learning(self, view: View) -> attention.ImageSide:
        image, weights = view.rows, view.weights
        layers = layers_of(view.tensors, self._heads)
        self._text_proj = layers.text
        maps, plan, first = unfolded(layers.in_proj, layers.out_proj, self._heads), DIRECT, False
        if view.is_batch:
            shape = (len(image), view.n, image.shape[-2])
            plan, first = plan_to_learn(*shape, weights.dim, weights.image_dim, self._heads, view.keeps_direct)
        if first:
            maps = with_image(maps, *layers.image)
        else:
            image = linear(image, *layers.image)  # [M, D]
        return attention.prepare(image, maps, self._heads, plan, view.mask)

    def query(self, text: TextRows) -> Array | None:
        """The queries ``[n, D]``, if text is projected before it meets the image."""
        if self.row is not None or not self._side.keys.meet_queries:
            return None
        return text.made("query", lambda whole: self._side.keys.query(self._met(whole)))

    def attend(self, text: TextRows, need_weights: bool) -> tuple[Array, Array | None]:
        """``A [n, D]``, or ``[D]`` if all rows are that, and the attention if asked for."""
        if self.row is not None:
            return self.row, ones((self._heads, text.rows.shape[0], 1), self.row) if need_weights else None
        query = self.query(text)
        return attention.attend(self._met(text), self._side, need_weights=need_weights, query=query)

    def _met(self, text: TextRows) -> Array:
        """The rows that the maps begin with: ``[n, Dt]``, or ``[n, D]`` while there is something to learn."""
        if (layer := self._text_proj) is None:
            return text.rows
        return text.made("text_proj", lambda whole: linear(whole.rows, *layer))


class Attention:
    """``A``, or ``T + A``."""

    def __init__(self, view: View) -> None:
        self._attention = CrossAttention(view)
        self._residual = view.weights.config.residual
        self._dim = view.weights.dim

    def begin(self, text: TextRows) -> None:
        """See `Method`."""
        self._attention.query(text)

    def fuse(self, text: TextRows, mask: Array, need_weights: bool) -> FusedRows:
        """See `Method`."""
        fused, attended = self._attention.attend(text, need_weights)
        if self._residual:
            fused = fused + text.rows  # not in place: where products are in bfloat16, the text would be rounded to it
        elif self._attention.row is not None:
            fused = filled((text.rows.shape[0], self._dim), fused)
        return FusedRows(fused, attended)


class Gated:
    """``T + g ⊙ A``."""

    def __init__(self, view: View) -> None:
        self._attention = CrossAttention(view)
        self._dim = view.weights.dim
        self._tanh: Array = None
        if view.weights.config.gate == "tanh":
            self._tanh = namespace(view.template).tanh(view.tensors["gamma"])  # [1]
            return
        weight, self._bias = view.layer("gate_proj")
        self._by_text, self._by_image = cut(weight, self._dim, 1)
        row = self._attention.row
        self._by_row = None if row is None else self._by_image @ row  # [D]

    def begin(self, text: TextRows) -> None:
        """See `Method`."""
        self._attention.query(text)
        if self._tanh is None:
            self._gate(text)

    def _gate(self, text: TextRows) -> Array:
        return text.made("gate", lambda whole: linear(whole.rows, self._by_text, self._bias))  # [n, D]

    def fuse(self, text: TextRows, mask: Array, need_weights: bool) -> FusedRows:
        """See `Method`."""
        answer, attended = self._attention.attend(text, need_weights)
        if self._tanh is not None:
            gate = self._tanh
        else:
            by_image = dot_by_parts(answer, self._by_image.mT) if self._by_row is None else self._by_row
            gate = sigmoid(self._gate(text) + by_image)  # [n, D]
        fused = text.rows + gate * answer
        if not need_weights:
            return FusedRows(fused)
        return FusedRows(fused, attended, gate.mean(-1) if self._tanh is None else filled(fused.shape[:-1], gate))


class Pooled:
    """``text_map(T) + what the mean of the image rows comes to``: weighted-sum and concat."""

    def __init__(self, view: View) -> None:
        row = view.one_row
        if row is None:
            rows = mean_row(view.rows, view.mask)[..., None, :]  # [1, Di]
            row = pooled(view.tensors, rows, lambda x, weight: dot_by_parts(x, weight.mT))  # [1, D]
        tensors = view.tensors
        self._scale: Array = None
        if "alpha" in tensors:
            self._scale = 1 - tensors["alpha"]
            self._weight, self._shift = view.layer("text_proj")
            self._shift = self._shift * self._scale + row
        else:
            self._weight, self._shift = _text_columns(tensors), row

    def begin(self, text: TextRows) -> None:
        """See `Method`."""
        self._projected(text)

    def _projected(self, text: TextRows) -> Array:
        return text.made("projected", lambda whole: dot_by_parts(whole.rows, self._weight.mT))  # [n, D]

    def fuse(self, text: TextRows, mask: Array, need_weights: bool) -> FusedRows:
        """See `Method`."""
        projected = self._projected(text)
        return FusedRows((projected if self._scale is None else projected * self._scale) + self._shift)


def _text_columns(tensors: Mapping[str, Array]) -> Array:
    weight = tensors["concat_proj.weight"]
    return weight[:, : weight.shape[1] - len(weight)]


class Transformer:
    """Layers of attention to the image and a feed-forward network, the norms first."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._config = view.weights.config
        image = linear(view.rows, *view.layer("image_proj"))  # [M, D]
        self._sides = []
        for number in range(self._config.num_layers):
            name = f"layers.{number}"
            memory = layer_norm(image, *view.layer(f"{name}.norm_memory"))
            self._sides.append(self._prepared(f"{name}.multihead_attn", memory, view.mask))

    def _prepared(self, name: str, rows: Array, mask: Array) -> attention.ImageSide:
        view, heads = self._view, self._config.num_heads
        tensors = view.tensors

        def make() -> Maps:
            in_proj = tensors[f"{name}.in_proj_weight"], tensors[f"{name}.in_proj_bias"]
            return unfolded(in_proj, view.layer(f"{name}.out_proj"), heads)

        maps = make() if view.training else view.weights.kept(name, view.template, view.dtype, lambda: merged(make()))
        return attention.prepare(rows, maps, heads, view.plan(rows, view.weights.dim), mask)

    def begin(self, text: TextRows) -> None:
        """See `Method`."""
        self._projected(text)

    def _projected(self, text: TextRows) -> Array:
        return text.made("projected", lambda whole: linear(whole.rows, *self._view.layer("text_proj")))  # [n, D]

    def fuse(self, text: TextRows, mask: Array, need_weights: bool) -> FusedRows:
        """See `Method`. The attention is that of the last layer."""
        drop, attended = self._view.drop, None
        x = cast(self._projected(text), self._view.dtype)  # [n, D]; sums stay in float32 where products are not
        for number, side in enumerate(self._sides):
            layer = partial(self._layer, number)
            if self._config.self_attention:
                rows = layer_norm(x, *layer("norm1"))
                own = self._prepared(f"layers.{number}.self_attn", rows, mask)
                x = x + drop(attention.attend(rows, own)[0])
            last = number == len(self._sides) - 1
            rows = layer_norm(x, *layer("norm2"))
            answer, attended = attention.attend(rows, side, need_weights=need_weights and last)
            x = x + drop(answer)
            inner = gelu(linear(layer_norm(x, *layer("norm3")), *layer("linear1")))  # [n, dim_feedforward]
            x = x + drop(linear(drop(inner), *layer("linear2")))
        return FusedRows(layer_norm(x, *self._view.layer("norm")), attended)

    def _layer(self, number: int, name: str) -> tuple[Array, Array]:
        return self._view.layer(f"layers.{number}.{name}")


BY_NAME: dict[str, type[Method]] = {
    "attention": Attention,
    "weighted-sum": Pooled,
    "concat": Pooled,
    "gated": Gated,
    "transformer": Transformer,
}
