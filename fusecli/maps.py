"""The linear maps of an attention: its layers one after the other, or multiplied out.

Letters as in `fusecli.attention`. A query is ``F_q T + f_q`` with ``F_q = W_q W_t`` and ``f_q = W_q b_t + b_q``, times
``1 / sqrt(d)``; keys and values likewise. `fold` multiplies once for all pairs that follow; what learns is `unfolded`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fusecli.arrays import Array, cast, cut, like, namespace


@dataclass(frozen=True, slots=True)
class Maps:
    """The linear maps between features and fusion, all of one array kind, dtype and device."""

    query: Array  # [D, Dt], holds the factor 1/sqrt(d) unless `scale` does
    query_bias: Array  # [D], likewise
    key_value: Array  # [2D, Di], F_k above F_v: one product gives keys and values
    out: Array  # [D, D]
    bias: Array  # [D], the constant c
    unrounded: Callable[[], Maps] | None = None  # gives the same in float64, as they were folded
    scale: float = 1.0  # what queries are multiplied by; of `unfolded`
    key_value_bias: Array = None  # [2D], if the biases have not been dropped and moved into c; of `unfolded`

    def like(self, template: Array, dtype: str) -> Maps:
        """The same as ``dtype`` where ``template`` lives."""
        names = ("query", "query_bias", "key_value", "out", "bias")
        moved = {name: cast(like(getattr(self, name), template), dtype) for name in names}
        return replace(self, unrounded=None, **moved)

    @property
    def key(self) -> Array:
        """``F_k [D, Di]``."""
        return self.key_value[: len(self.out)]

    @property
    def value(self) -> Array:
        """``F_v [D, Di]``."""
        return self.key_value[len(self.out) :]


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of the reference module, under short names and with the shapes of `torch.nn`."""

    text: tuple[Array, Array]  # weight [D, Dt], bias [D]
    image: tuple[Array, Array]  # [D, Di], [D]
    in_proj: tuple[Array, Array]  # [3D, D], [3D]: query, key, value
    out_proj: tuple[Array, Array]  # [D, D], [D]
    num_heads: int

    def thirds(self) -> tuple[tuple[Array, Array], ...]:
        """Weight and bias of query, key and value: views of ``in_proj``."""
        dim = len(self.out_proj[0])
        return tuple((self.in_proj[0][at : at + dim], self.in_proj[1][at : at + dim]) for at in (0, dim, 2 * dim))

    @property
    def scale(self) -> float:
        """``1 / sqrt(d)``."""
        return _scale(len(self.out_proj[0]), self.num_heads)


def _scale(dim: int, num_heads: int) -> float:
    return float((dim // num_heads) ** -0.5)


def fold(layers: Layers) -> Maps:
    """Multiply out the linear maps that follow one another; give float64 layers, round the result once.

    Costs three products of ``D x D`` matrices, once per checkpoint. It is done for accuracy as much as for
    speed: the projected features are then rounded once instead of twice.
    """
    (q, q_bias), (k, _), (v, v_bias) = layers.thirds()
    (text, text_bias), (image, image_bias), (out, out_bias) = layers.text, layers.image, layers.out_proj
    return Maps(
        query=q @ text * layers.scale,
        query_bias=(q @ text_bias + q_bias) * layers.scale,
        key_value=namespace(k).concatenate([k @ image, v @ image]),
        out=out,
        bias=out @ (v @ image_bias + v_bias) + out_bias,
    )


def unfolded(in_proj: tuple[Array, Array], out_proj: tuple[Array, Array], num_heads: int) -> Maps:
    """The maps of multi-head attention alone, for features that have been projected already, in the order DIRECT.

    Nothing is computed, and autograd reaches every layer through them.
    """
    dim = len(out_proj[0])
    query, key_value = cut(in_proj[0], dim)
    bias, key_value_bias = cut(in_proj[1], dim)
    return Maps(query, bias, key_value, *out_proj, scale=_scale(dim, num_heads), key_value_bias=key_value_bias)


def with_image(maps: Maps, weight: Array, bias: Array) -> Maps:
    """What `unfolded` gives, for image rows that ``weight [D, Di]`` and ``bias`` have not projected yet."""
    shift = maps.key_value @ bias + maps.key_value_bias
    return replace(maps, key_value=maps.key_value @ weight, key_value_bias=shift)


def merged(maps: Maps) -> Maps:
    """What `unfolded` gives, for any order: the scale into the queries' map, the values' bias into the constant."""
    return replace(
        maps,
        query=maps.query * maps.scale,
        query_bias=maps.query_bias * maps.scale,
        bias=maps.out @ maps.key_value_bias[len(maps.out) :] + maps.bias,
        scale=1.0,
        key_value_bias=None,
    )
