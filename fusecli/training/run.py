"""A training from beginning to end: weights, head, log and state in files beside each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from fusecli import checkpoint
from fusecli.arrays import to_device
from fusecli.collections import Place
from fusecli.errors import TrainingError, ValuesError
from fusecli.machine import cores
from fusecli.training.data import read, require_enough
from fusecli.training.files import Begun, begun_with, goes_on
from fusecli.training.keeper import FileKeeper
from fusecli.training.loop import Lesson, Listener, TrainingState, fit
from fusecli.training.objective import Evaluation, Head
from fusecli.training.recipe import Recipe
from fusecli.training.represent import Fusion, fast_in_bfloat16
from fusecli.training.start import Beginning
from fusecli.training.table import Judged, Row, compare, verdict
from fusecli.weights import Weights

#: Threads at most that a log is believed to say of a run that goes on.
MOST_THREADS = 1024


class Reporter(Listener, Protocol):
    """Is told how far a training is."""

    def read(self, done: int, total: int) -> None:
        """So many pairs have been read."""

    def forgets_text(self, pairs: int) -> None:
        """So many pairs have one image row, which is all that the fusion makes of them."""

    def unknown_labels(self, pairs: int) -> None:
        """So many pairs have a label that no pair to train on has."""

    def nothing_to_resume(self) -> None:
        """There is no unfinished run to go on with, so one begins."""

    def finished_before(self) -> None:
        """The same run has been finished, so nothing is done."""

    def comparing(self, name: str) -> None:
        """A line of the table is being computed."""


@dataclass(frozen=True)
class Result:
    """What a training came to."""

    progress: TrainingState
    score: str  # the name of what the table shows
    rows: list[Row]
    fingerprint: str

    def facts(self) -> dict[str, Any]:
        """As JSON and the log have it."""
        return {
            "fingerprint": self.fingerprint,
            "epochs": self.progress.epoch,
            "best_epoch": self.progress.best_epoch,
            "held_out": len(self.rows[0].scores),
            "score": self.score,
            "table": [row.facts() for row in self.rows],
            "verdict": verdict(self.rows),
        }


def train_on(
    output: str,
    ids: Sequence[str],
    places: Callable[[str], tuple[Place, Place]],
    recipe: Recipe,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read the pairs, `train` on them, compare; returns what the training came to, as the log has it.

    Args:
        output: the checkpoint to write; head, log and state are named after it.
        ids: of the pairs.
        places: where image and text of each lie.
        recipe: what to learn, from what on, and how.
        reporter: is told how far it is.
        resume: go on with an unfinished run, if there is one; if the same has been finished, nothing is done.
        overwrite: forget it.

    Raises:
        FusecliError: the pairs cannot be used, or the training diverged.
    """
    going_on = goes_on(output, resume, overwrite)
    # The command multiplies on one thread for the sake of equal bytes everywhere; here it would take twice as long.
    # What goes on keeps to its number of them, and its precision, or digits would differ.
    begun = begun_with(output) if going_on else None
    before, settings = begun or Begun(), recipe.settings
    threads = before.threads or 0
    torch.set_num_threads(threads if 0 < threads <= MOST_THREADS else cores())
    if settings.device != "cpu":
        to_device(settings.device)
    if settings.bfloat16 is None:
        usual = before.bfloat16 is None
        settings = replace(settings, bfloat16=fast_in_bfloat16(settings.device) if usual else before.bfloat16)
    folder, shares = os.path.dirname(output) or ".", (recipe.validation, recipe.held_out)
    data = read(ids, places, folder, *shares, lambda done: reporter.read(done, len(ids)))
    require_enough(data)
    objective = recipe.objective(data)
    beginning = recipe.beginning(data, objective)
    lesson = Lesson(objective, data, settings, beginning.sizes)
    if unknown := lesson.objective.unknown:
        reporter.unknown_labels(unknown)
    alone = sum(data.images.length(at) == 1 for at in range(len(data.ids)))
    if alone and beginning.untrained.config.can_forget_text:
        reporter.forgets_text(alone)
    keeper = FileKeeper(output, objective, _facts(beginning, lesson))
    if resume and not going_on:
        if done := keeper.finished():
            reporter.finished_before()
            return done
        reporter.nothing_to_resume()
    return train(keeper, beginning, lesson, reporter, begun).facts()


def train(keeper: FileKeeper, beginning: Beginning, lesson: Lesson, reporter: Reporter, begun: Begun | None) -> Result:
    """Train from ``beginning`` on and keep the best weights; then compare on the held-out pairs.

    A run that was ``begun`` and not finished is gone on with.

    Raises:
        UsageError: the run to go on with had other pairs or options.
        TrainingError: the training diverged.
        ValuesError: the features are too large.
    """
    objective, device = lesson.objective, lesson.settings.device
    starts = [_Start(weights, lesson) for weights in beginning.starts]
    which = _best(starts, begun.start if begun else None)
    start = starts[which]
    state = keeper.begin(begun is not None, which)
    try:
        before = start.loss if state is None else None
        fusion = Fusion(start.weights, device, bfloat16=bool(lesson.settings.bfloat16))
        progress = fit(fusion, lesson, keeper, reporter, before, state)
    except (TrainingError, ValuesError):
        keeper.give_up()
        raise
    del state
    if not progress.best_epoch:  # what training does not better is left as it was
        keeper.best(start.fusion, start.judged[1], progress)
    trained, head = keeper.result(device)

    def untrained() -> Judged:
        judged = [one for one in starts if one.weights is beginning.untrained]
        first = judged[0] if judged else _Start(beginning.untrained, lesson)
        return first.fusion, first.judged[1]

    after = Fusion(trained, device, learned=False), head
    rows = compare(objective, lesson.data, untrained, after, reporter.comparing)
    result = Result(progress, objective.score_name, rows, checkpoint.fingerprint(trained))
    keeper.log(result.facts())
    keeper.end()
    return result


def _facts(beginning: Beginning, lesson: Lesson) -> dict[str, Any]:
    """All that decides what is learned, for the log: a run goes on only if it is the same.

    What it began with follows from weights that have seen no pairs, and from the pairs; but in its last digits it
    also depends on the processor, and a job may go on elsewhere.
    """
    data, weights = lesson.data, beginning.untrained
    return {
        "method": weights.config.method,
        **weights.config.options(),
        "weights": checkpoint.fingerprint(weights),
        "starts": len(beginning.starts),
        "objective": lesson.objective.name,
        **lesson.objective.facts(),
        **{name: value for name, value in asdict(lesson.settings).items() if name != "device"},
        "pairs": hashlib.sha256("\n".join(data.ids).encode("utf-8", "surrogateescape")).hexdigest()[:12],
        "parts": {part: len(which) for part, which in data.parts.items()},
        "features": f"{data.images.checksum:08x}{data.texts.checksum:08x}",
        "labels": lesson.objective.checksum(),
    }


class _Start:
    """Weights to begin with, judged once, if at all."""

    def __init__(self, weights: Weights, lesson: Lesson) -> None:
        self.weights, self.fusion = weights, Fusion(weights, lesson.settings.device, learned=False)
        self._objective, self._data = lesson.objective, lesson.data

    @cached_property
    def judged(self) -> tuple[Evaluation, Head]:
        """See `Objective`."""
        return self._objective.fit_head(self.fusion, self._data)

    @property
    def loss(self) -> float:
        """On the pairs for validation."""
        return self.judged[0].loss


def _best(starts: list[_Start], begun: int | None) -> int:
    """Which one has the lowest loss, or a run has ``begun`` with; a lone one is not judged."""
    if len(starts) == 1:
        return 0
    if begun is not None and begun in range(len(starts)):
        return begun
    return min(range(len(starts)), key=lambda which: starts[which].loss)
