"""What the fusion is worth: held-out scores of everything that could have been used instead, under the same head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fusecli.training.data import Data
from fusecli.training.objective import Head, Objective
from fusecli.training.represent import Fusion, Means, Representation
from fusecli.weights import Weights

RESAMPLED = 2000
#: Of a standard normal distribution, for an interval of 95%.
Z = 1.959964


#: The two lines that the verdict is about.
SIDE_BY_SIDE, TRAINED = "both side by side", "this fusion, trained"


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
        return Row(name, mean, max(0.0, middle - half), min(1.0, middle + half), scores)
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
    device: str,
    untrained: Weights,
    trained: Weights,
    head: Head,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The table: everything gets the same kind of head, trained in the same way on the same pairs.

    Args:
        objective: what was to be learned.
        data: the pairs.
        device: where the fusion is computed.
        untrained: the weights before.
        trained: the weights after.
        head: that of the trained weights.
        tell: is told which line is being computed.
    """
    train, test = data.parts["train"], data.parts["held-out"]
    others: list[tuple[str, Callable[[], Representation]]] = [
        ("text only", lambda: Means(data, text=True, image=False)),
        ("image only", lambda: Means(data, text=False, image=True)),
        (SIDE_BY_SIDE, lambda: Means(data, text=True, image=True)),
        ("this fusion, untrained", lambda: Fusion(untrained, device, learned=False)),
    ]
    rows = [row(objective.guess_name, objective.guess(test, train))]
    for name, make in others:
        tell(name)
        represent = make()
        _, fitted = objective.judge(represent, data)
        rows.append(row(name, objective.measure(fitted, represent, data, test).scores))
    fusion = Fusion(trained, device, learned=False)
    return [*rows, row(TRAINED, objective.measure(head, fusion, data, test).scores)]


def verdict(rows: list[Row]) -> str:
    """In words, whether the fusion beats both sides without it."""
    scores = {row.name: row.scores for row in rows}
    gain = scores[TRAINED] - scores[SIDE_BY_SIDE]
    if gain.mean() <= 0:
        return "the fusion does not beat side by side here"
    low, high = resampled(gain)
    told = f"the fusion beats side by side by {float(gain.mean()):.3f} (95% interval {low:+.3f} to {high:+.3f})"
    return told if low > 0 else f"{told}, which may be chance"
