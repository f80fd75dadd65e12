"""How a training goes unless told otherwise: what it begins with, how fast it learns, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusecli import checkpoint
from fusecli.errors import ShapeError, UsageError
from fusecli.training.data import Data
from fusecli.training.loop import Settings
from fusecli.training.objective import Objective, Supervised
from fusecli.training.start import MOST, Beginning, aligned, ends_of, laid_apart, sized
from fusecli.weights import Weights

#: Label smoothing.
SMOOTHING = 0.1


@dataclass(frozen=True)
class Recipe:
    """All that decides what is learned from pairs, once they have been read."""

    objective: Callable[[Data], Objective]
    beginning: Callable[[Data, Objective], Beginning]
    settings: Settings
    validation: float  # share of the pairs that choose the best epoch
    held_out: float  # share of the pairs that are compared on at the end


class Pace(NamedTuple):
    """How fast learning goes, and how long."""

    epochs: int
    lr: float
    patience: int


#: What did best on the pairs of the README. Training goes on from where the image is laid apart from the text already,
#: in small steps; a fusion without the text in its result has everything to learn, at least with labels.
WITH_LABELS, WITHOUT_LABELS = Pace(12, 3e-4, 12), Pace(6, 3e-4, 3)
FROM_NOTHING = WITH_LABELS._replace(lr=1e-3)


def pace(labelled: bool, options: Mapping[str, Any]) -> Pace:
    """The pace for a method and its ``options``; none are given where a checkpoint is trained further."""
    if not labelled:
        return WITHOUT_LABELS
    return FROM_NOTHING if options.get("method") == "attention" and "residual" not in options else WITH_LABELS


def from_checkpoint(weights: Weights, path: str | None, data: Data, objective: Objective) -> Beginning:
    """Begin with the weights of a checkpoint, whatever the ``objective``.

    Raises:
        ShapeError: the features of the pairs have other widths.
    """
    text_dim, image_dim = data.texts.width, data.images.width
    if (text_dim, image_dim) != (weights.text_dim, weights.image_dim):
        found, wanted = f"Dt={text_dim}, Di={image_dim}", f"Dt={weights.text_dim}, Di={weights.image_dim}"
        raise ShapeError("features do not fit the weights", where=path, found=found, wanted=wanted)
    return Beginning(weights, [weights])


def from_scratch(
    feature_dim: int | None, seed: int, options: Mapping[str, Any], data: Data, objective: Objective
) -> Beginning:
    """Begin with new weights of ``feature_dim``, or else the text's width, and of a method and its ``options``.

    Raises:
        UsageError: there are no such weights for the widths of these pairs.
        ValuesError: the features are too large.
    """

    def draw(how: Callable[..., Weights]) -> Weights:
        widths = {"text_dim": data.texts.width, "image_dim": data.images.width}
        return how(feature_dim or data.texts.width, seed=seed, **widths, **{"num_heads": 8, **options})

    try:
        untrained, labelled = draw(checkpoint.init), isinstance(objective, Supervised)
        if untrained.config.can_forget_text:
            return sized(untrained, untrained if labelled else draw(checkpoint.orthogonal), data)
        drawn = draw(checkpoint.orthogonal)
        ends = ends_of(drawn, data)
        if not isinstance(objective, Supervised):
            return Beginning(untrained, laid_apart(drawn, ends, [MOST]))
        starts = [*laid_apart(drawn, ends), *aligned(drawn, ends, data, objective)]
        shut = untrained.config.gate == "tanh"  # so that nothing behind it would be learned
        return Beginning(untrained, starts if shut else [untrained, *starts])
    except UsageError as error:
        error.hint = error.hint or ("leave out --feature-dim" if feature_dim else None)
        raise
