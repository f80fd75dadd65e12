"""Weights to begin with: the image laid where the text leaves room.

A fusion adds what the image says to what the text says, in one space of `D` channels, and a head has to tell both
apart again. From random projections much of that falls together, and few pairs do not teach it to keep clear. So the
last matrix on the image's way begins as a turn that brings the direction in which the images of the pairs vary most to
the one in which their texts vary least, and so on: principal axes (Hotelling 1933) against principal axes in reverse.
How much varies by the image then, compared with the text, is tried out; the middle of all images adds nothing.

Where texts vary in all directions alike there is no such room. So with labels it is also tried to bring the image to
where a head reads the text: then the fusion begins as good as both sides next to each other. Weights that have seen
no pairs are tried beside all these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from fusecli.drawing import HALF_OPEN
from fusecli.errors import ValuesError
from fusecli.formats import NumpyArray
from fusecli.functional import layer_norm
from fusecli.training.data import Data, Rows
from fusecli.training.objective import Supervised
from fusecli.weights import Config, Weights

#: Rows ``[n, width]`` to rows of another width.
Map = Callable[[NumpyArray], NumpyArray]
#: How much varies by the image, as shares of how much varies by the text (standard deviations): what is tried. Of 0.125
#: to 1.4, half as much did best where the texts say nearly all, as much or more where they are blurred.
#: With labels `aligned` stands in for the most; without, when only the image is to be told, the most is best.
SHARES, MOST = (0.35, 0.7), 1.4
#: How much of what a head adds by the image, where it is brought to what the head reads of the text: what is tried.
#: Less than all, since a head makes too much of a side that says little.
PARTS = (0.5, 1.0)
#: Directions that a head reads with less than this share of the most are noise.
FAINT = 1e-2
#: By the image there varies at most so many times what varies by the text.
LARGEST = 1e3
#: What varies less than this share of the whole (squares) is not scaled up further.
FLAT = 1e-6
#: Numbers of features are taken to be at least so large, and at most one over that.
SMALLEST = 1e-6
#: What queries are scaled by: the attention begins nearly even, so that all of the image counts.
EVEN = 0.1


class Beginning(NamedTuple):
    """Where a training may begin."""

    untrained: Weights  # that have seen no pairs, to compare with
    starts: list[Weights]  # the best of these is trained
    sizes: Mapping[str, float] = MappingProxyType({})  # that its matrices, and so learning rates, are divided by


def sizes(config: Config, data: Data) -> dict[str, float]:
    """How large the numbers are that meet the first matrices, by their names, where that is to be made up for.

    Encoders differ: a row has norm 1, say, or 90. Where no layer norm makes that equal and the text is not in the
    result, a matrix is drawn, and learned, as if its numbers were of size 1: it is divided by their size, and so is its
    learning rate. In steps of one length small numbers would hardly be learned from, and large ones in leaps.
    """
    if config.layer_norm or not config.can_forget_text:
        return {}
    sides = {"text_proj.weight": data.texts, "image_proj.weight": data.images}
    found = {name: side.size(data.parts["train"]) for name, side in sides.items()}
    return {name: min(max(size, SMALLEST), 1 / SMALLEST) for name, size in found.items()}


def sized(untrained: Weights, drawn: Weights, data: Data) -> Beginning:
    """Begin with ``drawn`` weights, for numbers as large as those of the pairs to train on: see `sizes`."""
    found = sizes(drawn.config, data)
    tensors = {name: tensor / np.float32(found.get(name, 1)) for name, tensor in drawn.tensors.items()}
    return Beginning(untrained, [Weights(drawn.config, tensors)], found)


class Ends(NamedTuple):
    """What pairs come to where the ways of text and image meet: those to train on, then those for validation."""

    texts: NumpyArray  # [pairs, D], means
    images: NumpyArray  # [pairs, width], likewise
    last: str  # the name of the last matrix of the image's way, which is not in that
    part: list[int]  # which pairs these are
    train: int  # of these, pairs to train on


def ends_of(weights: Weights, data: Data) -> Ends:
    """See `Ends`.

    Raises:
        ValuesError: the features are too large.
    """
    text, image, last = _ways(weights)
    train = data.parts["train"]
    part = train + data.parts["validation"]
    with np.errstate(all="ignore"):  # what overflows is found by looking
        ends = Ends(_means(data.texts, part, text), _means(data.images, part, image), last, part, len(train))
    if not (np.isfinite(ends.images).all() and np.isfinite(ends.texts).all()):
        raise ValuesError("numbers too large to learn from", hint="scale the features down")
    return ends


def laid_apart(weights: Weights, ends: Ends, shares: Sequence[float] = SHARES) -> list[Weights]:
    """``weights`` from `fusecli.checkpoint.orthogonal` with the image laid apart from the text, as pairs to train show.

    One for each of ``shares``. The fusion must hold the text in its result.
    """
    images, texts = ends.images[: ends.train], ends.texts[: ends.train]
    turn = _turn(images, texts)  # [D, width]
    return [_with_turn(weights, ends, share * turn) for share in shares]


def aligned(
    weights: Weights, ends: Ends, data: Data, objective: Supervised, parts: Sequence[float] = PARTS
) -> list[Weights]:
    """``weights`` from `fusecli.checkpoint.orthogonal` with the image brought to where a head reads the text.

    Of a head on both sides next to each other, ``W_t T + W_i I``, the image's part is carried by ``W_t⁺ W_i`` (Penrose
    1955), as ``W_t (T + W_t⁺ W_i I)`` is the same wherever the rows of ``W_t`` do not depend on each other. One for
    each of ``parts``, which that is multiplied by. The fusion must hold the text in its result.

    Raises:
        ValuesError: the features are too large.
    """
    images, texts, width = ends.images, ends.texts, ends.texts.shape[1]
    x = torch.zeros(len(data.ids), width + images.shape[1])
    x[ends.part, :width], x[ends.part, width:] = torch.from_numpy(texts).float(), torch.from_numpy(images).float()
    _, head = objective.fitted(x, data, [width, images.shape[1]])
    weight = head["head.weight"].detach().double().numpy()
    if len(weight) > 1:
        weight = weight - weight.mean(0)  # what all classes have in common tells none from another
    turn = np.linalg.pinv(weight[:, :width], rcond=FAINT) @ weight[:, width:]  # [D, width]
    spread, most = (images @ turn.T).std(0).max(), LARGEST * texts.std(0).max()
    turn *= min(1.0, most / spread) if spread > 0 else 1.0
    return [_with_turn(weights, ends, part * turn) for part in parts]


def _with_turn(weights: Weights, ends: Ends, turn: NumpyArray) -> Weights:
    last, middle = ends.last, ends.images[: ends.train].mean(0)
    tensors = {name: np.array(tensor) for name, tensor in weights.tensors.items()}
    if weights.config.method == "concat":
        tensors[last][:, weights.text_dim :] = turn
    else:
        turn = turn * _before(weights)
        tensors[last][...] = turn
    tensors[last.replace("weight", "bias")][...] = -turn @ middle  # the middle of all images adds nothing
    for name, tensor in tensors.items():
        if name == "gamma":
            tensor[...] = HALF_OPEN  # it is shut, where nothing behind it can learn
        if name.endswith("in_proj_weight"):
            tensor[: weights.dim] *= EVEN
        if name.endswith("multihead_attn.out_proj.weight") and name != last:
            tensor[...] = 0  # further layers begin as nothing
    return Weights(weights.config, tensors)


def _before(weights: Weights) -> float:
    """What the last matrix is multiplied by, to make up for a gate that is half open, say."""
    if weights.config.method == "weighted-sum":
        return 1 / float(weights.tensors["alpha"][0])
    return 2.0 if weights.config.method == "gated" else 1.0


class _Way(NamedTuple):
    """What a side goes through: each row by itself, and then what is linear, where their mean does as well."""

    rows: Map
    means: Map


def _ways(weights: Weights) -> tuple[_Way, _Way, str]:
    """The ways of text and of image, and the name of the last matrix of the image's way."""
    tensors, config, dim = weights.tensors, weights.config, weights.dim

    def through(name: str) -> Map:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return lambda x: np.add(x @ weight.T, bias)

    def values(name: str, x: NumpyArray) -> NumpyArray:
        value: NumpyArray = x @ tensors[f"{name}.in_proj_weight"][2 * dim :].T
        return value

    def normed(side: str) -> Map:
        if not config.layer_norm:
            return lambda x: x
        return lambda x: layer_norm(x, tensors[f"{side}_norm.weight"], tensors[f"{side}_norm.bias"])

    text, image, projected = normed("text"), normed("image"), through("image_proj")
    if config.method == "weighted-sum":
        rest = 1 - float(tensors["alpha"][0])
        by_text = _Way(text, lambda x: rest * through("text_proj")(x))
        return by_text, _Way(image, lambda x: x), "image_proj.weight"
    if config.method == "concat":
        columns = tensors["concat_proj.weight"][:, : weights.text_dim]
        return _Way(text, lambda x: x @ columns.T), _Way(image, projected), "concat_proj.weight"
    if config.method == "transformer":
        name, norm = "layers.0.multihead_attn", "layers.0.norm_memory"

        def memory(x: NumpyArray) -> NumpyArray:
            rows: NumpyArray = layer_norm(projected(image(x)), tensors[f"{norm}.weight"], tensors[f"{norm}.bias"])
            return rows

        by_image = _Way(memory, lambda x: values(name, x))
        return _Way(text, through("text_proj")), by_image, f"{name}.out_proj.weight"
    by_image = _Way(image, lambda x: values("attention", projected(x)))
    return _Way(text, lambda x: x), by_image, "attention.out_proj.weight"


def _means(rows: Rows, part: list[int], way: _Way) -> NumpyArray:
    """The mean row of each pair, ``[pairs, width]``, where ``way`` ends."""
    means = [way.rows(np.asarray(rows[at], np.float32)).mean(0, dtype=np.float64) for at in part]
    return way.means(np.stack(means))


def _turn(images: NumpyArray, texts: NumpyArray) -> NumpyArray:
    """A matrix ``[D, width]`` from ``images [pairs, width]`` to where ``texts [pairs, D]`` leave room."""
    (image_axes, image_spread), (text_axes, text_spread) = _axes(images), _axes(texts)
    count = min(len(image_axes), len(text_axes))
    least = FLAT * float(np.square(images).sum(1).mean())  # of images that are all the same, rounding is left
    scale = math.sqrt(text_spread / max(image_spread, least)) if image_spread > 0 and text_spread > 0 else 1.0
    turn: NumpyArray = scale * text_axes[:, :count] @ image_axes[:, ::-1][:, :count].T
    return turn


def _axes(x: NumpyArray) -> tuple[NumpyArray, float]:
    """Principal axes as columns, the least first, and the variance in all."""
    x = x - x.mean(0)
    variances, axes = np.linalg.eigh(x.T @ x / len(x))
    return axes, float(variances.sum())
