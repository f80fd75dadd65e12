"""The mathematics: scores, softmax, values (the maps are folded in `fusecli.maps`, the order is from `fusecli.plans`).

Letters, here and everywhere: ``N`` text rows, ``M`` image rows, ``D`` width of the fusion space,
``Dt``/``Di`` widths of text and image, ``H`` heads, ``d = D / H``. With ``T [N, Dt]``, ``I [M, Di]``
and, for head ``h``, rows ``h`` of the folded maps ``F_q [D, Dt]``, ``F_k``, ``F_v [D, Di]`` and
columns ``h`` of ``W_o [D, D]``, multi-head attention (Vaswani et al. 2017, section 3.2.2) is

    S_h = (T F_qᵀ_h + f_q,h) (I F_kᵀ_h)ᵀ                  [N, M],   1/sqrt(d) is in F_q and f_q
    P_h = softmax over M of S_h
    out = Σ_h P_h (I F_vᵀ_h) W_oᵀ_h + c                    [N, D],   c = W_o f_v + b_o

The key bias adds one number to a whole row of S and drops out; the value bias passes through P,
whose rows sum to 1, and joins the constant c. What is left is a chain of matrix products with one
softmax in it, and `fusecli.plans` chooses where to put the brackets.

Everything works on NumPy arrays and torch tensors alike; with torch, autograd follows it. `attend` has three
loops for the formula: torch, in the direct order and for batches, takes all heads at once; NumPy in the direct order a
few heads at a time, whose scores then stay in the cache; the other orders multiply as the plan says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

from fusecli.arrays import Array, cast, contiguous, cut, dtype_name, is_torch, joined, namespace, needs_grad, ones
from fusecli.functional import (
    SMALL_RESULT,
    dot,
    dot_by_parts,
    exp_and_sums,
    largest,
    linear,
    products_beside,
    range_of,
)
from fusecli.maps import Maps, merged
from fusecli.plans import Order, Plan


@dataclass(frozen=True)
class Keys:
    """The image's part of the scores, in one order and one precision."""

    order: Order
    num_heads: int
    maps: Maps
    image: Array  # [M, Di]
    rows: Array  # DIRECT [H, M, d]; IMAGE [Dt, H*M]; TEXT None
    shift: Array  # IMAGE [H*M]: the query bias, met by every key; else None

    @property
    def meet_queries(self) -> bool:
        """Whether text is projected before it meets the image."""
        return self.order is not Order.IMAGE

    def query(self, text: Array) -> Array:
        """``text [N, Dt]`` projected: ``[N, D]``; here and below a batch has an axis ``B`` before all of that."""
        # Arrays not by parts: the bar of numbers was held without, and they take a tenth longer.
        query = linear(text, self.maps.query, self.maps.query_bias, dot)  # [N, D]
        if self.maps.scale != 1:
            query *= self.maps.scale
        return query

    def queries(self, text: Array, query: Array = None) -> Array:
        """The same by heads, ``[H, N, d]``, of what `query` gave, if that is at hand."""
        return _split_heads(self.query(text) if query is None else query, self.num_heads)

    def scores(self, text: Array, query: Array = None) -> Array:
        """Scores ``[H, N, M]`` of ``text [N, Dt]``, for which `query` may have been called already."""
        heads = self.num_heads
        if self.order is Order.IMAGE:
            flat = dot(text, self.rows)  # [N, H*M]
            flat += self.shift
            return _split_heads(flat, heads)
        query = self.queries(text, query)  # [H, N, d]
        if self.order is Order.TEXT and len(text.shape) > 2:
            wide = _each_head(query, _by_head(self.maps.key, heads))  # [B, H, N, Di]
            return (wide.flatten(1, 2) @ self.image.mT).unflatten(1, (heads, -1))  # [B, H, N, M]
        if self.order is Order.TEXT:
            wide = products_beside(_by_head(self.maps.key, heads).mT, query.mT)  # [Di, H*N]
            return dot(wide.mT, self.image.mT).reshape(heads, len(text), -1)
        return dot(query, self.rows.swapaxes(-1, -2))  # no .mT here: torch's older exporter to ONNX does not know it

    @cached_property
    def exact(self) -> Keys:
        """The same in float64."""
        maps = self.maps.unrounded() if self.maps.unrounded else self.maps.like(self.image, "float64")
        return prepare_keys(self.order, self.num_heads, maps, cast(self.image, "float64"))


def prepare_keys(order: Order, num_heads: int, maps: Maps, image: Array, keys: Array = None) -> Keys:
    """Compute `Keys`; ``keys [H, M, d]`` are the projected image rows if they are at hand."""
    rows: Array = None
    shift: Array = None
    if order is not Order.TEXT:
        rows = keys if keys is not None else _split_heads(dot(image, maps.key.mT), num_heads)  # [H, M, d]
    if order is Order.IMAGE:
        shift = (rows @ maps.query_bias.reshape(num_heads, -1, 1)).reshape(-1)  # [H*M]
        rows = products_beside(_by_head(maps.query, num_heads).mT, rows.mT)  # [Dt, H*M]
    return Keys(order, num_heads, maps, image, rows, shift)


@dataclass(frozen=True, slots=True)
class ImageSide:
    """All that depends on the image alone: computed once, then attended to by any number of text blocks."""

    maps: Maps
    plan: Plan
    num_heads: int
    image: Array  # [M, Di]
    keys: Keys
    values: Array  # DIRECT [H, M, d]; IMAGE [D, H*M]; TEXT None
    mask: Array = None  # [B, 1, 1, M], True where an image row is to be seen; for batches

    def mixed(self, weights: Array) -> Array:
        """What ``weights [H, N, M]`` make of the values, ``[H, N, d]``, by torch; in the order ``TEXT`` of a batch."""
        if self.plan.values is Order.DIRECT:
            return weights @ self.values
        seen = (weights.flatten(1, 2) @ self.image).unflatten(1, (self.num_heads, -1))  # [B, H, N, Di]
        return _each_head(seen, _by_head(self.maps.value, self.num_heads).mT)


def prepare(image: Array, maps: Maps, num_heads: int, plan: Plan, mask: Array = None) -> ImageSide:
    """Compute the image's part of ``plan``. ``image [M, Di]`` has the dtype and device of ``maps``, of any kind.

    Where both orders are ``DIRECT``, or both ``TEXT``, a batch of tensors is taken too, ``[B, M, Di]``, and with it
    ``mask [B, M]``, true for rows that are no padding.
    """
    if maps.key_value_bias is not None and not plan.is_direct:
        maps = merged(maps)
    keys: Array = None
    values: Array = None
    if plan.scores is not Order.TEXT and plan.values is not Order.TEXT:
        bias = maps.key_value_bias
        rows = dot(image, maps.key_value.mT) if bias is None else linear(image, maps.key_value, bias)  # [M, 2D]
        both = _split_heads(rows, 2 * num_heads)  # [2H, M, d]
        keys, values = cut(both, num_heads, -3)  # [H, M, d] each
    elif plan.values is not Order.TEXT:
        values = _split_heads(dot(image, maps.value.mT), num_heads)  # [H, M, d]
    if plan.values is Order.IMAGE:
        values = products_beside(_by_head(maps.out.mT, num_heads).mT, values.mT)  # [D, H*M]
    ready = prepare_keys(plan.scores, num_heads, maps, image, keys)
    return ImageSide(maps, plan, num_heads, image, ready, values, None if mask is None else mask[:, None, None])


#: Scores that stay in the cache, in numbers: 1 MiB of float32.
TILE = 2**18


def attend(
    text: Array, side: ImageSide, *, need_weights: bool = False, query: Array = None
) -> tuple[Array, Array | None]:
    """Let ``text [N, Dt]`` attend to a prepared image; a batch ``[B, N, Dt]`` of tensors to a batch of images.

    ``query`` is what `Keys.query` gave for the text, if that is at hand.

    Returns:
        The fused rows ``[N, D]`` and, if asked for, the attention weights ``[H, N, M]``; of a batch, ``[B, ...]``.
    """
    if len(text.shape) > 2 or (side.plan.is_direct and is_torch(text)):
        return _attend_at_once(text, side, need_weights, query)
    if side.plan.is_direct:
        return _attend_by_heads(text, side, need_weights, query)
    scores = side.keys.scores(text, query)  # [H, N, M]
    weights, total = _softmax(scores, side.keys.order, dtype_name(text), partial(_exact_scores, text, side))
    if side.plan.values is Order.IMAGE:
        weights = weights / total  # not in place: autograd still needs the exponentials
        n, columns = text.shape[0], side.values.shape[1]
        flat = weights.swapaxes(0, 1).reshape(n, columns)  # [N, H*M]
        return _finish(flat, side.values.mT, side), weights if need_weights else None
    # Asking for the weights does not change the result.
    return _mix(weights, total, side), weights / total if need_weights else None


def _exact_scores(text: Array, side: ImageSide) -> Array:
    return side.keys.exact.scores(cast(text, "float64"))  # [H, N, M]


def _attend_by_heads(text: Array, side: ImageSide, need_weights: bool, query: Array) -> tuple[Array, Array | None]:
    # A few heads at a time, so that their scores are still in the cache when the values are taken.
    (n, m), heads = (text.shape[0], side.image.shape[0]), side.num_heads
    query = side.keys.queries(text, query)  # [H, N, d]
    step = max(1, TILE // (n * m))
    mixed, dump = [], []

    @cache  # for all heads that need it
    def exact_query() -> Array:
        return side.keys.exact.queries(cast(text, "float64"))  # [H, N, d]

    def exact_scores(some: slice) -> Array:
        return dot(exact_query()[some], side.keys.exact.rows[some].mT)  # [h, N, M]

    for start in range(0, heads, step):
        some = slice(start, start + step)
        scores = dot(query[some], side.keys.rows[some].mT)  # [h, N, M]
        exact = partial(exact_scores, some)
        weights, total = _softmax(scores, Order.DIRECT, dtype_name(text), exact)  # [h, N, M], [h, N, 1]
        if need_weights:
            dump.append(weights / total)
        mixed.append((dot(weights, side.values[some]) / total).swapaxes(0, 1))  # [N, h, d]
    beside = joined(mixed, 1).reshape(n, -1)  # [N, D]
    return _finish(beside, side.maps.out.mT, side), joined(dump, 0) if need_weights else None


def _attend_at_once(text: Array, side: ImageSide, need_weights: bool, query: Array) -> tuple[Array, Array | None]:
    # By torch, all heads of all pairs of a batch.
    def answer(weights: Array) -> tuple[Array, Array | None]:
        mixed = side.mixed(weights).swapaxes(-3, -2)  # [N, H, d]
        fused = linear(mixed.reshape(*text.shape[:-1], -1), side.maps.out, side.maps.bias)  # [N, D]
        return fused, weights if need_weights else None

    scores = side.keys.scores(text, query)  # [H, N, M]
    weights = _torch_softmax(_masked(scores, side.mask), dtype_name(text))
    answered = answer(weights)
    # The reference's own products, in its order, are as good as that; and who exports them wants no branches.
    if _is_coarse(scores) and side.maps.key_value_bias is None:
        # Whether float32 did is asked last: a GPU has the rest to do while this waits for the answer.
        peaks = namespace(scores).linalg.vector_norm(scores, math.inf, (-3, -2, -1))  # []; of a batch [B]
        large = LARGE_IN_TORCH if side.plan.scores is Order.DIRECT else LARGE_SCORE
        if not peaks.max() < large:
            exact = _masked(side.keys.exact.scores(cast(text, "float64")), side.mask)
            # What one pair needs changes no number of another.
            good = (peaks < large)[..., None, None, None]
            return answer(namespace(weights).where(good, weights, _torch_softmax(exact, dtype_name(text))))
    return answered


def _masked(scores: Array, mask: Array | None) -> Array:
    return scores if mask is None else namespace(scores).where(mask, scores, -math.inf)


def _mix(weights: Array, total: Array, side: ImageSide) -> Array:
    """``out [N, D]`` from weights ``[H, N, M]``, still to be divided by ``total [H, N, 1]``."""
    heads, n, m = weights.shape
    if side.plan.values is Order.TEXT:
        seen = dot(weights.reshape(heads * n, m), side.image).reshape(heads, n, -1)  # [H, N, Di]
        value = _by_head(side.maps.value, heads).mT  # [H, Di, d]
        # The reference averages the rounding of M projected rows; here one row carries it all, in a long sum over Di.
        # (OpenBLAS's small products round less by themselves where there is AVX-512, and elsewhere held the bar too.)
        product = dot if value.shape[-1] * n <= SMALL_RESULT else dot_by_parts
        mixed = product(seen, value)  # [H, N, d]
    else:
        mixed = dot(weights, side.values)  # [H, N, d]
    mixed /= total
    beside = mixed.swapaxes(0, 1).reshape(mixed.shape[1], -1)  # [H, N, d] -> [N, D]
    return _finish(beside, side.maps.out.mT, side)


def _finish(mixed: Array, out: Array, side: ImageSide) -> Array:
    if is_torch(mixed):
        return linear(mixed, out.mT, side.maps.bias)
    # The result has to lie in rows: from here on turning it round costs more than `dot` saves.
    fused = mixed @ out if mixed.shape[-2] >= 128 else dot(mixed, out)  # [N, D]
    fused += side.maps.bias
    return contiguous(fused)


# exp turns the rounding of a score into a relative error of its weight, and rounding grows with the scores.
# Beyond some size float32 was seen to lose more than twice what the reference loses (drawn shapes, norms to
# 90), so the scores are computed again in float64. The orders that leave one side unprojected round more, and
# get there at 3. The direct order on NumPy was over by 2% for one pair in 1,400, with scores of 23; there exp
# works without subtracting the row's maximum, so nothing is subtracted, and the row sums, between exp(max) and
# M exp(max), tell: they are too large from scores of about 10 on. (Not so for the half precision of a module: there
# exp soon overflows, or loses its digits below 6e-5.) torch in the direct order was over for one pair in fifty, with
# one head and scores from 10 on, and for one in two hundred from 5 to 10.
LARGE_SCORE = 3.0
LARGE_TOTAL = 1e6
LARGE_IN_TORCH = 5.0


def _is_coarse(scores: Array) -> bool:
    return dtype_name(scores) == "float32" and not needs_grad(scores)


def _softmax(scores: Array, order: Order, dtype: str, exact: Callable[[], Array]) -> tuple[Array, Array]:
    """``exp`` of scores ``[H, N, M]`` and its row sums ``[H, N, 1]``; their quotient is the softmax.

    Overwrites ``scores``. Where float32 does not do, ``exact`` gives them in float64. The result is of ``dtype``.
    """
    if not _is_coarse(scores):
        return _shifted_softmax(scores, dtype)
    if order is not Order.DIRECT and not largest(scores) <= LARGE_SCORE:
        return _shifted_softmax(exact(), dtype)
    weights, total = exp_and_sums(scores)
    low, high = range_of(total)
    return (weights, total) if low > 1 / LARGE_TOTAL and high < LARGE_TOTAL else _shifted_softmax(exact(), dtype)


def _shifted_softmax(scores: Array, dtype: str) -> tuple[Array, Array]:
    if is_torch(scores):
        weights = _torch_softmax(scores, dtype)
        return weights, ones((1,), weights)
    scores -= scores.max(axis=-1, keepdims=True)
    return exp_and_sums(cast(scores, dtype))


def _torch_softmax(scores: Array, dtype: str) -> Array:
    # Its gradient is exact where one weight is 1; through exp and sums it would be rounding alone.
    return cast(namespace(scores).softmax(scores, -1), dtype)


def _split_heads(x: Array, num_heads: int) -> Array:
    return x.reshape(*x.shape[:-1], num_heads, -1).swapaxes(-3, -2)  # [rows, D] -> [H, rows, d]


def _by_head(weight: Array, num_heads: int) -> Array:
    return weight.reshape(num_heads, -1, weight.shape[-1])  # [D, width] -> [H, d, width]


def _each_head(x: Array, weight: Array) -> Array:
    """``x [B, H, N, k]`` of tensors times ``weight [H, k, j]``, each head its own: ``[B, H, N, j]``."""
    return namespace(x).einsum("bhnk,hkj->bhnj", x, weight)
