"""Images of one row: what each comes to before any text is seen.

With one key, softmax is 1 whatever the query, so every token gets the same vector; where the image is pooled, it gets
the same anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusecli.arrays import Array, dtype_name
from fusecli.functional import layer_norm, rows_apart
from fusecli.weights import Weights, layers_of


def single_rows(weights: Weights, images: Array) -> Array:
    """What every token gets from an image of one row, for ``images [B, Di]`` of one row each: ``[B, D]``.

    The numbers of an image do not depend on the others beside it, nor on how many there are.
    """
    return single(weights, images, rows_apart)


def single(weights: Weights, images: Array, times: Callable[[Array, Array], Array]) -> Array:
    """See `single_rows`; ``times`` multiplies rows by a transposed weight."""
    tensors = weights.at(images, dtype_name(images))
    if weights.config.layer_norm:
        images = layer_norm(images, tensors["image_norm.weight"], tensors["image_norm.bias"])

    if not weights.config.has_attention:
        return pooled(tensors, images, times)
    # Softmax over one key is 1: the text drops out, and W_o (W_v (W_i x + b_i) + b_v) + b_o is left. Multiplied out in
    # float32 it would miss the bar of numbers, in float64 that of memory for one pair alone.
    layers = layers_of(tensors, weights.config.num_heads)
    for weight, bias in (layers.image, layers.thirds()[2], layers.out_proj):
        images = times(images, weight) + bias
    return images


def pooled(tensors: Mapping[str, Array], rows: Array, times: Callable[[Array, Array], Array]) -> Array:
    """What image rows ``[..., Di]`` add to every token where the image is pooled: ``[..., D]``; ``times`` as above."""
    rows = times(rows, tensors["image_proj.weight"]) + tensors["image_proj.bias"]
    if "alpha" in tensors:
        return rows * tensors["alpha"]
    weight = tensors["concat_proj.weight"]
    return times(rows, weight[:, weight.shape[1] - len(weight) :]) + tensors["concat_proj.bias"]
