"""What the fusion is worth: held-out scores of everything that could have been used instead, under the same head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from fusecli.training.data import Data
from fusecli.training.loop import InMemory, Settings, fit
from fusecli.training.objective import Match, Measured, Objective, Supervised, vectors
from fusecli.training.represent import Fusion, Means, Representation
from fusecli.weights import Weights

#: Strengths of the penalty on squared weights that a head is tried with; the validation part chooses.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Iterations that a head is given: more change nothing any more.
ITERATIONS = 100
RESAMPLED = 2000
#: Of a standard normal distribution, for an interval of 95%.
Z = 1.959964


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    score: float
    low: float
    high: float
    scores: torch.Tensor  # of each held-out pair

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"features": self.name, "score": self.score, "low": self.low, "high": self.high}


def row(name: str, scores: torch.Tensor) -> Row:
    """A line from the scores of the held-out pairs, with its 95% interval.

    For scores of 0 and 1 Wilson's (1927, equation 1), else the percentiles of means of pairs drawn with replacement.
    """
    mean, n = float(scores.mean()), len(scores)
    if ((scores == 0) | (scores == 1)).all():
        middle = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        return Row(name, mean, middle - half, middle + half, scores)
    return Row(name, mean, *resampled(scores), scores)


def resampled(scores: torch.Tensor) -> tuple[float, float]:
    """The middle 95% of the means of as many scores drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    means = scores[torch.randint(len(scores), (RESAMPLED, len(scores)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def compare(
    objective: Objective,
    data: Data,
    settings: Settings,
    untrained: Weights,
    trained: Weights,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The table: everything gets the same head, trained in the same way on the same pairs."""
    train, test = data.parts["train"], data.parts["held-out"]
    guess = {"classify": "majority", "regression": "mean", "match": "chance"}[objective.name]
    known: list[tuple[str, Callable[[], Representation]]] = [
        ("text only", lambda: Means(data, text=True, image=False)),
        ("image only", lambda: Means(data, text=False, image=True)),
        ("both side by side", lambda: Means(data, text=True, image=True)),
        ("this fusion, untrained", lambda: Fusion(untrained, settings.device, learned=False)),
        ("this fusion, trained", lambda: Fusion(trained, settings.device, learned=False)),
    ]
    rows = [row(guess, objective.guess(test, train))]
    for name, make in known:
        tell(name)
        rows.append(row(name, _held_out(objective, make(), data, settings).scores))
    return rows


def _held_out(objective: Objective, represent: Representation, data: Data, settings: Settings) -> Measured:
    if isinstance(objective, Supervised):
        return probe(objective, vectors(represent, data, settings.device), data)
    assert isinstance(objective, Match)
    keeper = InMemory()
    fit(
        represent,
        objective,
        data,
        replace(settings, device="cpu" if isinstance(represent, Means) else settings.device),
        keeper,
    )
    head = {name: torch.nn.Parameter(tensor) for name, tensor in keeper.head.items()}
    return objective.measure(head, represent, data, data.parts["held-out"])


def probe(objective: Supervised, x: torch.Tensor, data: Data) -> Measured:
    """How held-out pairs come out under a linear head on ``x [pairs, width]``.

    Trained to the end (L-BFGS: Nocedal 1980) on standardised vectors, with the penalty that suits the validation part.
    """
    train, validation, test = (data.parts[part] for part in ("train", "validation", "held-out"))
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    found = []
    for penalty in PENALTIES:
        weight = torch.zeros(objective.outputs, x.shape[1], requires_grad=True)
        bias = torch.zeros(objective.outputs, requires_grad=True)
        _minimise(objective, x[train], objective.targets[train], weight, bias, penalty)
        with torch.no_grad():
            outputs = F.linear(x, weight, bias)
        chosen_by = objective.measured(outputs[validation], objective.targets[validation]).loss
        found.append((chosen_by, objective.measured(outputs[test], objective.targets[test])))
    return min(found, key=lambda pair: pair[0])[1]


def _minimise(
    objective: Supervised,
    x: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    penalty: float,
) -> None:
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = objective.loss_of(F.linear(x, weight, bias), targets) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def verdict(rows: list[Row]) -> str:
    """In words, whether the fusion beats both sides without it."""
    beside, trained = rows[-3], rows[-1]
    gain = trained.scores - beside.scores
    if gain.mean() <= 0:
        return "the fusion does not beat side by side here"
    low, high = resampled(gain)
    told = f"the fusion beats side by side by {float(gain.mean()):.3f} (95% interval {low:+.3f} to {high:+.3f})"
    return told if low > 0 else f"{told}, which may be chance"
