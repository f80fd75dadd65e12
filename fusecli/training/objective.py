"""What is learned: classes, numbers, or which picture belongs to a text; each with a small head of its own.

An objective turns vectors of pairs (`fusecli.training.represent`) into a loss, and into a score for every pair of a
part of the data. `probe` gives any representation the same head, trained in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fusecli.training.data import Batch, Data, batches, load
from fusecli.training.represent import EVALUATED, Representation, masked_mean

Head = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Measured:
    """How a part of the data came out."""

    loss: float
    scores: torch.Tensor  # one number a pair

    @property
    def score(self) -> float:
        """The mean of the scores."""
        return float(self.scores.mean())


class Objective(Protocol):
    """Something to learn."""

    name: str
    score_name: str

    def head(self, width: int) -> dict[str, nn.Parameter]:
        """A fresh head for vectors of ``width``."""

    def loss(self, head: Head, represent: Representation, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, to be learned from."""

    def measure(self, head: Head, represent: Representation, data: Data, part: list[int]) -> Measured:
        """How the pairs of ``part`` come out; nothing is learned."""

    def guess(self, part: list[int], train: list[int]) -> torch.Tensor:
        """Scores of the best answer that looks at no features."""

    def facts(self) -> dict[str, Any]:
        """What has to be known to use a head."""


def vectors(represent: Representation, data: Data, device: str) -> torch.Tensor:
    """The vectors ``[pairs, width]`` of all pairs."""
    found = torch.empty(len(data.ids), represent.width)
    with torch.no_grad():
        for which in batches(data, range(len(data.ids)), EVALUATED, None):
            found[which] = represent.own(load(data, which).to(device)).float().cpu()
    return found


class Supervised:
    """What classes and numbers have in common: a linear head on the vector of a pair."""

    outputs: int

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets

    def head(self, width: int) -> dict[str, nn.Parameter]:
        """See `Objective`. It starts at zero: no class is likelier than another."""
        return {
            "head.weight": nn.Parameter(torch.zeros(self.outputs, width)),
            "head.bias": nn.Parameter(torch.zeros(self.outputs)),
        }

    def loss(self, head: Head, represent: Representation, batch: Batch) -> torch.Tensor:
        """See `Objective`."""
        found = F.linear(self.regularised(represent.own(batch)), head["head.weight"], head["head.bias"])
        return self.loss_of(found, self.targets[batch.which].to(found.device))

    def regularised(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors in training."""
        return F.dropout(x, HEAD_DROPOUT)

    def measure(self, head: Head, represent: Representation, data: Data, part: list[int]) -> Measured:
        """See `Objective`."""
        weight, bias = head["head.weight"], head["head.bias"]
        outputs = torch.empty(len(data.ids), self.outputs)
        with torch.no_grad():
            for which in batches(data, part, EVALUATED, None):
                batch = load(data, which).to(str(weight.device))
                outputs[which] = F.linear(represent.own(batch), weight, bias).float().cpu()
        return self.measured(outputs[part], self.targets[part])

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss in training."""
        raise NotImplementedError

    def measured(self, outputs: torch.Tensor, targets: torch.Tensor) -> Measured:
        """Loss and scores."""
        raise NotImplementedError


#: Share of a pair's vector that the head does not see in training.
HEAD_DROPOUT = 0.5


class Classes(Supervised):
    """Tell the label: cross-entropy; the score of a pair is 1 if the likeliest label is right."""

    name, score_name = "classify", "accuracy"

    def __init__(self, targets: torch.Tensor, names: list[str], smoothing: float, weights: torch.Tensor | None) -> None:
        super().__init__(targets)
        self.names, self.outputs = names, len(names)
        self._smoothing, self._weights = smoothing, weights

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See `Supervised`."""
        weights = None if self._weights is None else self._weights.to(outputs.device)
        return F.cross_entropy(outputs, targets, weights, label_smoothing=self._smoothing)

    def measured(self, outputs: torch.Tensor, targets: torch.Tensor) -> Measured:
        """See `Supervised`."""
        right = (outputs.argmax(1) == targets).float()
        return Measured(float(F.cross_entropy(outputs, targets)), right)

    def guess(self, part: list[int], train: list[int]) -> torch.Tensor:
        """See `Objective`: the most frequent label."""
        return (self.targets[part] == self.targets[train].mode().values).float()

    def facts(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"classes": self.names}


class Numbers(Supervised):
    """Tell a number: squared error in units of the training pairs' variance.

    The score of a pair is 1 minus its squared error over that of the mean of the training pairs, so that the mean
    score is R² against that guess.
    """

    name, score_name, outputs = "regression", "R²", 1

    def __init__(self, targets: torch.Tensor, train: list[int]) -> None:
        self.mean, self.std = float(targets[train].mean()), float(targets[train].std())
        super().__init__((targets - self.mean) / self.std)

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See `Supervised`."""
        return F.mse_loss(outputs[:, 0], targets)

    def measured(self, outputs: torch.Tensor, targets: torch.Tensor) -> Measured:
        """See `Supervised`."""
        squares = (outputs[:, 0] - targets).square()
        return Measured(float(squares.mean()), 1 - squares / targets.square().mean())

    def guess(self, part: list[int], train: list[int]) -> torch.Tensor:
        """See `Objective`: the mean."""
        return 1 - self.targets[part].square() / self.targets[part].square().mean()

    def facts(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"mean": self.mean, "std": self.std}


class Match:
    """Tell the image of a text from the images of other pairs.

    The score of a text and an image is the cosine, times a learned factor, between the mean text and the mean of
    what the fusion makes of both, each under a linear map of its own. The loss is a cross-entropy over the true image
    and the hardest of a batch (van den Oord et al. 2018, equation 4): those whose own fused vectors come closest to
    the text. A pair scores 1 if its image comes first among those of its part.
    """

    name, score_name = "match", "recall@1"
    #: Width that text and fusion are compared in; wrong images for each text.
    space, negatives = 256, 15

    def __init__(self, text_dim: int) -> None:
        self._text_dim = text_dim

    def head(self, width: int) -> dict[str, nn.Parameter]:
        """See `Objective`."""
        return {
            "text_head.weight": _linear_weight(self.space, self._text_dim),
            "fused_head.weight": _linear_weight(self.space, width),
            "logit_scale": nn.Parameter(torch.tensor([math.log(10.0)])),
        }

    def loss(self, head: Head, represent: Representation, batch: Batch) -> torch.Tensor:
        """See `Objective`."""
        text = self._text(head, batch)  # [B, space]
        own = self._fused(head, represent.own(batch))  # [B, space]
        size = len(batch.which)
        count = min(self.negatives, size - 1)
        if not count:
            raise ValueError("nothing to tell it from")
        close = (text @ own.mT).detach()
        close.fill_diagonal_(-math.inf)
        wrong = close.topk(count, 1).indices  # [B, count]
        texts = torch.arange(size, device=wrong.device).repeat_interleave(count)
        images = wrong.reshape(-1)
        other = Batch(
            [batch.which[at] for at in texts.tolist()],
            batch.images[images],
            batch.image_mask[images],
            batch.texts[texts],
            batch.text_mask[texts],
        )
        others = self._fused(head, represent.own(other)).reshape(size, count, -1)  # [B, count, space]
        scores = torch.cat([(text * own).sum(1, keepdim=True), (others @ text[..., None])[..., 0]], 1)
        return F.cross_entropy(scores * _factor(head), torch.zeros(size, dtype=torch.long, device=scores.device))

    def measure(self, head: Head, represent: Representation, data: Data, part: list[int]) -> Measured:
        """See `Objective`."""
        device = str(head["logit_scale"].device)
        with torch.no_grad():
            text = torch.cat(
                [
                    self._text(head, load(data, part[at : at + EVALUATED]).to(device))
                    for at in range(0, len(part), EVALUATED)
                ]
            )
            columns = [
                (text * self._fused(head, represent.beside(data, part, image).to(device))).sum(1) for image in part
            ]
            scores = torch.stack(columns, 1).cpu() * _factor(head).cpu()  # [texts, images]
        true = torch.arange(len(part))
        # Equal scores count as beaten: a representation that cannot tell images apart scores nothing.
        rank = (scores >= scores.diagonal()[:, None]).sum(1)
        return Measured(float(F.cross_entropy(scores, true)), (rank <= 1).float())

    def guess(self, part: list[int], train: list[int]) -> torch.Tensor:
        """See `Objective`: chance."""
        return torch.full((len(part),), 1 / len(part))

    def facts(self) -> dict[str, Any]:
        """See `Objective`."""
        return {}

    def _text(self, head: Head, batch: Batch) -> torch.Tensor:
        return F.normalize(F.linear(masked_mean(batch.texts, batch.text_mask), head["text_head.weight"]), dim=1)

    def _fused(self, head: Head, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.linear(x, head["fused_head.weight"]), dim=1)


def _linear_weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) / math.sqrt(columns))


def _factor(head: Head) -> torch.Tensor:
    return head["logit_scale"].clamp(max=math.log(100.0)).exp()
