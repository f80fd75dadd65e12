"""What the fusion is worth: held-out scores of everything that could have been used instead, under the same head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from fusecli.training.data import Data
from fusecli.training.objective import Head, Objective
from fusecli.training.represent import Means, Representation

RESAMPLED = 2000
#: Of a standard normal distribution, for an interval of 95%.
Z = 1.959964


#: The lines that the verdict is about.
TEXT, IMAGE, SIDE_BY_SIDE, TRAINED = "text only", "image only", "both side by side", "this fusion, trained"


#: What stands for a pair, and the head that suits it.
Judged: TypeAlias = tuple[Representation, Head]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    score: float
    low: float
    high: float
    scores: torch.Tensor  # of each held-out pair
    shares: torch.Tensor | None = None  # see `Objective.shares`

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"features": self.name, "score": self.score, "low": self.low, "high": self.high}


def row(name: str, scores: torch.Tensor, shares: torch.Tensor | None = None) -> Row:
    """A line from the scores of the held-out pairs, with its 95% interval.

    For scores of 0 and 1 Wilson's (1927, equation 1), else percentiles for pairs drawn with replacement.
    """
    if shares is not None:
        left = 1 - scores  # unexplained
        low, high = resampled(left, shares)
        explained = [round(1 - x, 6) + 0.0 for x in (float(left.mean() / shares.mean()), high, low)]  # no -0.0
        return Row(name, explained[0], explained[1], explained[2], scores, shares)
    mean, n = float(scores.mean()), len(scores)
    if ((scores == 0) | (scores == 1)).all():
        middle = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        return Row(name, mean, max(0.0, middle - half), min(1.0, middle + half), scores)
    return Row(name, mean, *resampled(scores), scores)


def resampled(values: torch.Tensor, shares: torch.Tensor | None = None) -> tuple[float, float]:
    """The middle 95% of the means of as many values drawn with replacement, over the means of their shares."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLED, len(values)), generator=generator)
    means = values[drawn].mean(1)
    if shares is not None:
        total = shares[drawn].mean(1)
        means = means[total > 0] / total[total > 0]  # where there is nothing to explain, nothing can be said
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def compare(
    objective: Objective,
    data: Data,
    untrained: Callable[[], Judged],
    trained: Judged,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The table: everything gets the same kind of head, trained in the same way on the same pairs.

    Args:
        objective: what was to be learned.
        data: the pairs.
        untrained: gives the fusion before, with the head that suits it.
        trained: the fusion after, and its head.
        tell: is told which line is being computed.
    """

    def of_means(text: bool, image: bool) -> Judged:
        means = Means(data, text=text, image=image)
        return means, objective.fit_head(means, data)[1]

    train, test = data.parts["train"], data.parts["held-out"]
    shares = objective.shares(test)
    rows = [row(objective.baseline_name, objective.baseline(test, train), shares)]
    lines: list[tuple[str, Callable[[], Judged]]] = [
        (TEXT, partial(of_means, True, False)),
        (IMAGE, partial(of_means, False, True)),
        (SIDE_BY_SIDE, partial(of_means, True, True)),
        ("this fusion, untrained", untrained),
        (TRAINED, lambda: trained),
    ]
    for name, judged in lines:
        tell(name)
        represent, head = judged()
        rows.append(row(name, objective.evaluate(head, represent, data, test).scores, shares))
    return rows


def verdict(rows: list[Row]) -> str:
    """In words, whether the fusion beats both sides without it, and the better one of them alone.

    What looks at no features is named only where the fusion does not beat that either.
    """
    named, shares = {row.name: row for row in rows}, rows[0].shares
    trained, side_by_side, blind = named[TRAINED], named[SIDE_BY_SIDE], rows[0]
    alone = max(named[TEXT], named[IMAGE], key=lambda row: row.score)
    both = _beaten(trained.scores - side_by_side.scores, "side by side", shares)
    told = f"the fusion {both}; it {_beaten(trained.scores - alone.scores, alone.name, shares)}"
    return told if trained.score > blind.score else f'{told}; it does not even beat "{blind.name}"'


def _beaten(gain: torch.Tensor, what: str, shares: torch.Tensor | None) -> str:
    # Pair by pair: the interval is narrower than those of the two lines.
    mean, (low, high) = float(gain.mean()), resampled(gain, shares)
    interval = f"95% interval {low:+.3f} to {high:+.3f}"
    if mean <= 0:
        return f"does not beat {what} here" + (f" ({mean:+.3f}, {interval})" if high < 0 else "")
    chance = "" if low > 0 else ", perhaps by chance"
    return f"beats {what} by {mean:.3f} ({interval}{chance})"
