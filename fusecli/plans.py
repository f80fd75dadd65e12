"""Where to put the brackets in the products of attention: the order that takes the least for a shape.

Letters as in `fusecli.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TypeAlias


class Order(Enum):
    """Where the brackets stand in a product of three: see `plan`."""

    DIRECT = "direct"
    IMAGE = "into the image"
    TEXT = "into the text"


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of the products."""

    scores: Order
    values: Order

    @property
    def is_direct(self) -> bool:
        """Whether both sides are projected."""
        return self.scores is self.values is Order.DIRECT


#: Both sides projected, whatever it takes.
DIRECT = Plan(Order.DIRECT, Order.DIRECT)

#: OpenBLAS copies ("packs") a weight matrix before it multiplies, whatever the number of rows: the time of
#: about this many rows more. It decides only between plans of nearly the same cost.
PACKING_ROWS = 16

#: The products of an order: the weight matrices as (rows that meet it, height, width), and the multiplications without.
Products: TypeAlias = tuple[list[tuple[int, int, int]], int]


def _products(
    n: int, m: int, dim: int, text_dim: int, image_dim: int, num_heads: int
) -> tuple[dict[Order, Products], dict[Order, Products]]:
    """Of scores and of values, in each order; see `plan`."""
    text_in, image_in, back = (n, text_dim, dim), (m, image_dim, dim), (n, dim, dim)
    scores: dict[Order, Products] = {
        Order.DIRECT: ([text_in, image_in], n * m * dim),
        Order.IMAGE: ([image_in, (m, dim, text_dim)], n * num_heads * m * text_dim),
        Order.TEXT: ([text_in, (n, dim, image_dim)], n * num_heads * m * image_dim),
    }
    values: dict[Order, Products] = {
        Order.DIRECT: ([image_in, back], n * m * dim),
        Order.IMAGE: ([image_in, (m, dim, dim)], n * num_heads * m * dim),
        Order.TEXT: ([(n, image_dim, dim), back], n * num_heads * m * image_dim),
    }
    return scores, values


@lru_cache(maxsize=1024)
def plan(n: int, m: int, dim: int, text_dim: int, image_dim: int, num_heads: int) -> Plan:
    """The cheapest association for one shape.

    Scores per head are ``T F_qᵀ_h · F_k,h Iᵀ``. ``DIRECT`` projects both sides to ``d``; ``IMAGE``
    takes each key back to the text's width (``A_h = K_h F_q,h``: the text is never projected);
    ``TEXT`` takes each query to the image's width (``B_h = Q_h F_k,h``: the image is never projected).
    Values ``P_h I F_vᵀ_h W_oᵀ_h`` likewise. The cost of a combination is the sum of its two halves, so the
    best of all nine is the best scores order with the best values order.
    """
    scores, values = _products(n, m, dim, text_dim, image_dim, num_heads)
    return Plan(
        min(Order, key=lambda order: _flops(*scores[order], PACKING_ROWS)),
        min(Order, key=lambda order: _flops(*values[order], PACKING_ROWS)),
    )


def flops(n: int, m: int, dim: int, text_dim: int, image_dim: int, num_heads: int) -> int:
    """The floating-point operations (multiply and add) of the products in the order that `plan` chooses."""
    shape = n, m, dim, text_dim, image_dim, num_heads
    (scores, values), chosen = _products(*shape), plan(*shape)
    return _flops(*scores[chosen.scores], 0) + _flops(*values[chosen.values], 0)


def _flops(weights: list[tuple[int, int, int]], rest: int, extra_rows: int) -> int:
    return 2 * (rest + sum((rows + extra_rows) * height * width for rows, height, width in weights))


#: What it costs, in multiplications, to copy a number between the layout of pairs, ``[B, N, ...]``, and that of heads.
CARRYING = 80


def plan_of_batch(n: int, m: int, dim: int, image_dim: int, num_heads: int) -> Plan:
    """The plan for a batch of tensors, pairs of ``n`` and ``m`` rows: ``DIRECT`` or, for both halves, ``TEXT``."""
    costs = costs_of_batch(n, m, dim, image_dim, num_heads)
    return _both(min(costs, key=costs.__getitem__))


def costs_of_batch(
    n: int, m: int, dim: int, image_dim: int, num_heads: int, carrying: int = CARRYING
) -> dict[Order, int]:
    """Multiplications of a pair by scores and values in each order, but for those that both have; half of them."""
    return {
        Order.DIRECT: m * dim * (image_dim + n),
        Order.TEXT: n * image_dim * (dim + num_heads * (m + carrying)),
    }


def plan_to_learn(
    pairs: int, n: int, m: int, dim: int, image_dim: int, num_heads: int, keep_direct: bool = False
) -> tuple[Plan, bool]:
    """The plan for a batch that is learned from, and whether to bring ``image_proj`` into the maps of keys and values.

    That costs a product of two weight matrices in each step. In return no image row is projected, and no gradient has
    to reach the image's features, which are not learned. With ``keep_direct`` the order is `DIRECT` in any case.
    """
    costs = costs_to_learn(pairs, n, m, dim, image_dim, num_heads)
    ways = [way for way in costs if way[0] is Order.DIRECT or not keep_direct]
    order, first = min(ways, key=costs.__getitem__)
    return _both(order), first


def costs_to_learn(
    pairs: int, n: int, m: int, dim: int, image_dim: int, num_heads: int, carrying: int = CARRYING
) -> dict[tuple[Order, bool], int]:
    """As `costs_of_batch`, of all pairs and with the way back, by order and whether ``image_proj`` is in the maps."""
    costs: dict[tuple[Order, bool], int] = {}
    for first, width in ((False, dim), (True, image_dim)):
        once = 3 * dim * dim * image_dim if first else pairs * m * image_dim * dim
        ways = 2 if first else 3  # forward, and back to the weights, and to the image's rows
        direct = m * dim * (width * ways + 3 * n)
        text = n * width * (3 * dim + num_heads * (m * ways + 3 * carrying))
        costs[Order.DIRECT, first] = once + pairs * direct
        costs[Order.TEXT, first] = once + pairs * text
    return costs


def _both(order: Order) -> Plan:
    return Plan(order, order)
