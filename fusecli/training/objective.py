"""What is learned: classes or numbers here, which picture belongs to a text in `fusecli.training.match`.

An objective turns vectors of pairs (`fusecli.training.represent`) into a loss, and into a score for every pair of a
part of the data, under a small head of its own. `fit_head` gives any representation the head that suits it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fusecli.errors import ValuesError
from fusecli.machine import cores
from fusecli.training.data import Batch, Data, batches, load
from fusecli.training.optim import LBFGS
from fusecli.training.represent import EVALUATED, Fusion, Representation

Head = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Evaluation:
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
    baseline_name: str  # of what `baseline` gives
    texts_per_image: int  # that it meets in a batch that is learned from
    margin: float  # share of the loss by which training has to better what it began with
    unknown: int  # pairs whose label no pair to train on has

    def head(self, width: int) -> dict[str, nn.Parameter]:
        """A head for vectors of ``width`` that learns along with a fusion."""

    def loss(self, head: Head, fusion: Fusion, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, to be learned from."""

    def fit_head(self, represent: Representation, data: Data) -> tuple[Evaluation, Head]:
        """The head that suits the pairs to train on, made afresh, and how the pairs for validation come out under it.

        What is judged is not the head that learned along, which is overfitted to the pairs that it saw.
        """

    def evaluate(self, head: Head, represent: Representation, data: Data, part: list[int]) -> Evaluation:
        """How the pairs of ``part`` come out; nothing is learned."""

    def baseline(self, part: list[int], train: list[int]) -> torch.Tensor:
        """Scores of the best answer that looks at no features."""

    def shares(self, part: list[int]) -> torch.Tensor | None:
        """How much there is to explain by each pair, 1 on average, where a score says how much of it was."""

    def checksum(self) -> str:
        """Of the labels of all pairs."""

    def facts(self) -> dict[str, Any]:
        """What has to be known to use a head."""


def vectors(represent: Representation, data: Data, wanted: list[int]) -> torch.Tensor:
    """The vectors ``[pairs, width]``, those of the pairs ``wanted`` filled in."""
    found = torch.zeros(len(data.ids), represent.width)
    with torch.no_grad():
        for which in batches(data, wanted, EVALUATED, None):
            found[which] = represent.encode(load(data, which).to(represent.device)).float().cpu()
    return found


#: Share of a pair's vector that the head does not see in training.
HEAD_DROPOUT = 0.5
#: Iterations that a head is given: more hardly change anything.
ITERATIONS = 50
#: What a channel varies by at least, as a share of how large it is and of what the others vary by; and at all.
FLAT, TINY = 1e-6, 1e-30
#: Copies of a head that a search for it holds (two for each iteration), and how many numbers all searches may hold.
HELD_EACH, MOST_HELD = 2 * ITERATIONS, 2**27


def usual_spread(std: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """For each channel, what those of its part of a vector vary by (root of the mean square): ``[width]``."""
    parts = torch.split(std, widths)
    return torch.cat([part.square().mean().sqrt().expand(len(part)) for part in parts])


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: of thousands of operations of microseconds, each would wait for whoever has no core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Supervised:
    """What classes and numbers have in common: a linear head on the vector of a pair.

    In training, the text of some pairs can be hidden (``text_dropout``), so that more is learned from the image:
    modality dropout (Neverova et al. 2016, section 3.3).
    """

    texts_per_image = 1
    margin = 0.02  # a hundred pairs tell no less from chance
    unknown = 0
    outputs: int
    #: Strengths of the penalty on squared weights that a head is tried with; the validation part chooses.
    penalties: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1)

    def __init__(self, targets: torch.Tensor, text_dropout: float) -> None:
        self.targets, self._text_dropout = targets, text_dropout

    def head(self, width: int) -> dict[str, nn.Parameter]:
        """See `Objective`. It starts at zero: no class is likelier than another."""
        return {
            "head.weight": nn.Parameter(torch.zeros(self.outputs, width)),
            "head.bias": nn.Parameter(torch.zeros(self.outputs)),
        }

    def loss(self, head: Head, fusion: Fusion, batch: Batch) -> torch.Tensor:
        """See `Objective`."""
        shown = torch.rand(len(batch.which), 1, 1) >= self._text_dropout
        batch = replace(batch, texts=batch.texts * shown.to(batch.texts.device))
        x = F.dropout(fusion.encode(batch), HEAD_DROPOUT)
        return self.loss_of(_applied(head, x), self.targets[batch.which].to(x.device))

    def shares(self, part: list[int]) -> torch.Tensor | None:
        """See `Objective`."""
        return None

    def checksum(self) -> str:
        """See `Objective`."""
        return f"{zlib.crc32(self.targets.numpy().data):08x}"

    def fit_head(self, represent: Representation, data: Data) -> tuple[Evaluation, Head]:
        """See `Objective`."""
        x = vectors(represent, data, data.parts["train"] + data.parts["validation"])
        measured, best = self.fitted(x, data, represent.widths)
        return measured, {name: nn.Parameter(tensor.to(represent.device)) for name, tensor in best.items()}

    @one_thread()
    def fitted(self, x: torch.Tensor, data: Data, widths: list[int]) -> tuple[Evaluation, Head]:
        """The best linear head on ``x [pairs, width]``, and how the pairs for validation come out under it.

        Trained to the end (L-BFGS: Liu and Nocedal 1989) on standardised vectors, with the penalty that suits the pairs
        for validation. Parts of ``widths`` may be of different scales.
        """
        train, validation = data.parts["train"], data.parts["validation"]
        mean, std = x[train].mean(0), x[train].std(0)
        std = std + FLAT * (mean.abs() + usual_spread(std, widths)) + TINY  # what does not vary is rounding
        x = (x - mean) / std
        if not torch.isfinite(x).all():
            raise ValuesError("numbers too large to learn from", hint="scale the features down")
        seen, asked, targets = x[train], x[validation], self.targets

        def under(penalty: float) -> tuple[Evaluation, Head]:
            fresh = self.head(x.shape[1])
            self._minimise(fresh, seen, targets[train], penalty)
            with torch.no_grad():
                measured = self.evaluated(_applied(fresh, asked), targets[validation])
                weight = fresh["head.weight"] / std
                bias = fresh["head.bias"] - weight @ mean
            return measured, {"head.weight": nn.Parameter(weight), "head.bias": nn.Parameter(bias)}

        room = MOST_HELD // (x.shape[1] * self.outputs * HELD_EACH)
        with ThreadPoolExecutor(max(1, min(cores(), len(self.penalties), room))) as pool:
            return min(pool.map(under, self.penalties), key=lambda pair: pair[0].loss)

    def _minimise(self, head: Head, x: torch.Tensor, targets: torch.Tensor, penalty: float) -> None:
        optimizer = LBFGS(list(head.values()), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss_of(_applied(head, x), targets, 0.0) + penalty * head["head.weight"].square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    def evaluate(self, head: Head, represent: Representation, data: Data, part: list[int]) -> Evaluation:
        """See `Objective`."""
        x = vectors(represent, data, part)[part].to(represent.device)
        with torch.no_grad():
            return self.evaluated(_applied(head, x).cpu(), self.targets[part])

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, smoothing: float | None = None) -> torch.Tensor:
        """The loss in training; of classes, with the ``smoothing`` that was asked for unless told otherwise."""
        raise NotImplementedError

    def evaluated(self, outputs: torch.Tensor, targets: torch.Tensor) -> Evaluation:
        """Loss and scores."""
        raise NotImplementedError


def _applied(head: Head, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, head["head.weight"], head["head.bias"])


#: The target of a pair whose label no pair to train on has: it has no loss, and no answer is right.
UNKNOWN = -1


class Classes(Supervised):
    """Tell the label: cross-entropy; the score of a pair is 1 if the likeliest label is right."""

    name, score_name, baseline_name = "classify", "accuracy", "majority"

    def __init__(
        self,
        targets: torch.Tensor,
        names: list[str],
        text_dropout: float,
        smoothing: float,
        weights: torch.Tensor | None,
    ) -> None:
        super().__init__(targets, text_dropout)
        self.names, self.outputs = names, len(names)
        self.unknown = int((targets == UNKNOWN).sum())
        self._smoothing, self._weights = smoothing, weights

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, smoothing: float | None = None) -> torch.Tensor:
        """See `Supervised`."""
        weights = None if self._weights is None else self._weights.to(outputs.device)
        smoothing = self._smoothing if smoothing is None else smoothing
        return F.cross_entropy(outputs, targets, weights, label_smoothing=smoothing)

    def evaluated(self, outputs: torch.Tensor, targets: torch.Tensor) -> Evaluation:
        """See `Supervised`."""
        right = (outputs.argmax(1) == targets).float()
        return Evaluation(float(F.cross_entropy(outputs, targets, ignore_index=UNKNOWN)), right)

    def baseline(self, part: list[int], train: list[int]) -> torch.Tensor:
        """See `Objective`: the most frequent label."""
        return (self.targets[part] == self.targets[train].mode().values).float()

    def facts(self) -> dict[str, Any]:
        """See `Objective`."""
        weights = None if self._weights is None else [round(weight, 6) for weight in self._weights.tolist()]
        about = {"label_smoothing": self._smoothing, "class_weights": weights}
        return {"classes": self.names, "text_dropout": self._text_dropout, **about}


class Numbers(Supervised):
    """Tell a number: squared error in units of the training pairs' variance.

    The score of a pair is 1 minus its squared error over that of the mean of the training pairs, so that the mean
    score is R² against that baseline.
    """

    name, score_name, baseline_name, outputs = "regression", "R²", "mean", 1
    penalties = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # up to where nothing but the mean is left

    def __init__(self, targets: torch.Tensor, train: list[int], text_dropout: float) -> None:
        # In float64: points in time, say, are all alike in float32 before their mean is taken off.
        self.mean, self.std = float(targets[train].mean()), float(targets[train].std())
        super().__init__(((targets - self.mean) / self.std).float(), text_dropout)

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, smoothing: float | None = None) -> torch.Tensor:
        """See `Supervised`."""
        return F.mse_loss(outputs[:, 0], targets)

    def evaluated(self, outputs: torch.Tensor, targets: torch.Tensor) -> Evaluation:
        """See `Supervised`."""
        squares = (outputs[:, 0] - targets).square()
        return Evaluation(float(squares.mean()), 1 - squares / targets.square().mean())

    def baseline(self, part: list[int], train: list[int]) -> torch.Tensor:
        """See `Objective`: the mean."""
        return 1 - self.shares(part)

    def shares(self, part: list[int]) -> torch.Tensor:
        """See `Objective`."""
        squares = self.targets[part].square()
        return squares / squares.mean()

    def facts(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"mean": self.mean, "std": self.std, "text_dropout": self._text_dropout}
