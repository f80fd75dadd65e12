"""The table at the end of a training: scores, intervals, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusecli.training import table
from fusecli.training.objective import Classes, Numbers


def test_intervals() -> None:
    row = table.row("x", torch.tensor([1.0] * 8 + [0.0] * 2))
    assert (round(row.low, 3), round(row.high, 3)) == (0.490, 0.943)  # Wilson 1927
    low, high = table.resampled(torch.randn(400, generator=torch.Generator().manual_seed(0)))
    assert -0.2 < low < 0 < high < 0.2


def test_intervals_of_what_is_explained_are_those_of_a_ratio(rng: np.random.Generator) -> None:
    targets = torch.from_numpy(rng.standard_normal(60)).float()
    objective = Numbers(targets, list(range(60)), 0.0)
    part = list(range(60))
    guess = table.row("mean", objective.baseline(part, part), objective.shares(part))
    assert (guess.score, guess.low, guess.high) == (0, 0, 0)
    few = Numbers(torch.tensor([1.0, 2, 3, 4, 5, 3, 3, 4, 3, 3]), list(range(5)), 0.0)  # three are just their mean
    assert table.row("mean", few.baseline(part[5:10], []), few.shares(part[5:10])).high == 0
    outputs = objective.targets[:, None] + 0.5 * torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    found = table.row("fit", objective.evaluated(outputs, objective.targets).scores, objective.shares(part))
    squares = (outputs[:, 0] - objective.targets).square().numpy(), objective.targets.square().numpy()
    drawn = rng.integers(0, 60, (20_000, 60))
    ratios = 1 - squares[0][drawn].sum(1) / squares[1][drawn].sum(1)
    np.testing.assert_allclose([found.low, found.high], np.quantile(ratios, [0.025, 0.975]), atol=0.02)


def test_the_mean_explains_nothing_and_the_truth_all() -> None:
    numbers = Numbers(torch.tensor([1.0, 2, 3, 10], dtype=torch.float64), [0, 1, 2], 0.0)
    part = [2, 3]
    truth = numbers.targets[part][:, None]
    assert numbers.evaluated(truth, numbers.targets[part]).score == 1
    nothing = numbers.evaluated(torch.zeros(2, 1), numbers.targets[part])
    torch.testing.assert_close(nothing.scores, numbers.baseline(part, [0, 1, 2]))
    assert nothing.score == pytest.approx(0, abs=1e-6)


def test_the_majority_is_that_of_the_pairs_to_train_on() -> None:
    objective = Classes(torch.tensor([0, 0, 0, 1, 1]), ["a", "b"], 0.0, 0.0, None)
    assert objective.baseline([3, 4], [0, 1, 2]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        ([1.0] * 20, "beats {} by 1.000 (95% interval +1.000 to +1.000)"),
        ([1.0] * 3 + [0.0] * 15 + [-1.0] * 2, ", perhaps by chance)"),
        ([0.0] * 20, "does not beat {}"),
        ([-0.5] * 20, "does not beat {} here (-0.500, 95% interval -0.500 to -0.500)"),
    ],
)
def test_the_verdict_is_about_the_difference(gains: list[float], told: str) -> None:
    gain, nothing, half = torch.tensor(gains), torch.zeros(20), torch.full((20,), 0.5)

    def verdict(text: torch.Tensor, image: torch.Tensor, both: torch.Tensor, trained: torch.Tensor) -> list[str]:
        names = (table.TEXT, table.IMAGE, table.SIDE_BY_SIDE, table.TRAINED)
        rows = [table.row(*line) for line in zip(names, (text, image, both, trained), strict=True)]
        return table.verdict(rows).split("; it ")

    # Of text and image it is the better one that counts.
    assert told.format("side by side") in verdict(nothing, half, nothing, gain)[0]
    assert told.format("image only") in verdict(nothing, half, nothing, gain + 0.5)[1]
    assert told.format("text only") in verdict(half, nothing, nothing, gain + 0.5)[1]
    assert ("chance" in verdict(nothing, half, nothing, gain)[0]) == ("chance" in told)
    assert verdict(nothing, half, half, half)[0] == "the fusion does not beat side by side here"
    assert verdict(half, nothing, nothing, nothing)[-1] == 'does not even beat "text only"'  # that is the first line
    assert len(verdict(half, nothing, nothing, half)) == 3  # as good is not better
    assert len(verdict(nothing, nothing, nothing, half)) == 2
