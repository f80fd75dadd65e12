"""A training from beginning to end: weights, head, log and state in files beside each other."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from fusecli import checkpoint
from fusecli.arrays import to_device
from fusecli.collections import Place
from fusecli.errors import FileError, InputError, OutputError, TrainingError, UsageError, ValuesError
from fusecli.formats import write_whole
from fusecli.machine import cores
from fusecli.training.data import read, require_enough
from fusecli.training.loop import Lesson, Listener, Progress, StateError, fit
from fusecli.training.objective import Head, Measured, Objective
from fusecli.training.recipe import Recipe
from fusecli.training.represent import Fusion
from fusecli.training.start import Beginning
from fusecli.training.table import Row, compare, verdict
from fusecli.weights import Weights

#: What goes in place of the suffix of the checkpoint.
HEAD, LOG, STATE = ".head.safetensors", ".log.jsonl", ".state.pt"
#: A log that says more is damaged.
MOST_THREADS = 1024
#: Where a head's file says what it is, among its metadata.
ABOUT_HEAD = "fusecli-head"


class Reporter(Listener, Protocol):
    """Is told how far a training is."""

    def read(self, done: int, total: int) -> None:
        """So many pairs have been read."""

    def forgets_text(self, pairs: int) -> None:
        """So many pairs have one image row, which is all that the fusion makes of them."""

    def comparing(self, name: str) -> None:
        """A line of the table is being computed."""


def beside(output: str, suffix: str) -> str:
    """The name of a file that belongs to a checkpoint."""
    return output.removesuffix(".safetensors") + suffix


def files_of(output: str) -> list[str]:
    """What is written beside a checkpoint; the state last."""
    return [beside(output, suffix) for suffix in (HEAD, LOG, STATE)]


@dataclass(frozen=True)
class Result:
    """What a training came to."""

    progress: Progress
    score: str  # the name of what the table shows
    rows: list[Row]
    fingerprint: str

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
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
) -> Result:
    """Read the pairs, `train` on them, compare.

    Args:
        output: the checkpoint to write; head, log and state are named after it.
        ids: of the pairs.
        places: where image and text of each lie.
        recipe: what to learn, from what on, and how.
        reporter: is told how far it is.
        resume: go on with an unfinished run.
        overwrite: forget it.

    Raises:
        FusecliError: the pairs cannot be used, or the training diverged.
    """
    # The command multiplies on one thread for the sake of equal bytes everywhere; here it would take twice as long.
    # What goes on keeps to its number of them, or the last digits would differ.
    threads = _begun(output).get("threads", 0) if resume else 0
    torch.set_num_threads(threads if 0 < threads <= MOST_THREADS else cores())
    if recipe.settings.device != "cpu":
        to_device(recipe.settings.device)
    begin(output, resume, overwrite)
    folder, shares = os.path.dirname(output) or ".", (recipe.validation, recipe.held_out)
    data = read(ids, places, folder, *shares, lambda done: reporter.read(done, len(ids)))
    require_enough(data)
    lesson, beginning = Lesson(recipe.objective(data), data, recipe.settings), recipe.beginning(data)
    alone = sum(data.images.length(at) == 1 for at in range(len(data.ids)))
    if alone and beginning.untrained.config.can_forget_text:
        reporter.forgets_text(alone)
    return train(output, beginning, lesson, reporter, resume)


def begin(output: str, resume: bool, overwrite: bool) -> None:
    """See that it is said what to do with an unfinished run.

    Raises:
        UsageError: there is one, or none to go on with.
    """
    if resume and overwrite:
        raise UsageError("to go on and to start afresh", where="--resume --overwrite", hint="leave out either")
    state = beside(output, STATE)
    there = os.path.exists(state)
    if resume and not there:
        raise UsageError("no unfinished run to go on with", where=state, hint="leave out --resume to start afresh")
    if there and not resume and not overwrite:
        raise UsageError("there is an unfinished run", where=state, hint="--resume or --overwrite")


def train(output: str, beginning: Beginning, lesson: Lesson, reporter: Reporter, resume: bool) -> Result:
    """Train from ``beginning`` on and write the best weights to ``output``; then compare on the held-out pairs.

    Raises:
        UsageError: the run to go on with had other pairs or options.
        TrainingError: the training diverged.
        ValuesError: the features are too large.
    """
    objective, device = lesson.objective, lesson.settings.device
    begun = _begun(output) if resume else {}
    starts = [_Start(weights, lesson) for weights in beginning.starts]
    which = _best(starts, begun.get("start"))
    start = starts[which]
    keeper = _Files(output, objective, _facts(beginning.untrained, lesson))
    state = keeper.begin(resume, which)
    try:
        before = start.loss if state is None else None
        progress = fit(Fusion(start.weights, device), lesson, keeper, reporter, before, state)
    except StateError:
        raise keeper.damaged() from None
    except (TrainingError, ValuesError):
        keeper.give_up()
        raise
    del state
    if not progress.best_epoch:  # what training does not better is left as it was
        keeper.best(start.fusion, start.judged[1], progress)
    trained, head = keeper.result(device)
    rows = compare(objective, lesson.data, device, beginning.untrained, trained, head, reporter.comparing)
    result = Result(progress, objective.score_name, rows, checkpoint.fingerprint(trained))
    keeper.log(result.facts())
    keeper.end()
    return result


def _facts(weights: Weights, lesson: Lesson) -> dict[str, Any]:
    """All that decides what is learned, for the log: a run goes on only if it is the same.

    What it began with follows from ``weights``, that have seen no pairs, and from the pairs; but in its last digits it
    also depends on the processor, and a job may go on elsewhere.
    """
    data = lesson.data
    return {
        "method": weights.config.method,
        **weights.config.options(),
        "weights": checkpoint.fingerprint(weights),
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
    def judged(self) -> tuple[Measured, Head]:
        """See `Objective`."""
        return self._objective.judge(self.fusion, self._data)

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


def _begun(output: str) -> dict[str, int]:
    """Which of the starts an unfinished run began with, and on how many threads, as far as its log says so."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(beside(output, LOG), "rb") as file:
        first = json.loads(file.readline())
        return {name: first[name] for name in ("start", "threads") if type(first.get(name)) is int}
    return {}


class _Files:
    """Keeps a run in files: a `fusecli.training.loop.Keeper`."""

    def __init__(self, output: str, objective: Objective, facts: dict[str, Any]) -> None:
        self._output, self._objective, self._facts = output, objective, facts
        self._head, self._state, self._log = (beside(output, suffix) for suffix in (HEAD, STATE, LOG))
        self._best: str | None = None  # fingerprint of the weights that lie at `output`
        self._before: bytes | None = None  # the log of the weights that lay there before

    def begin(self, resume: bool, start: int = 0) -> dict[str, Any] | None:
        """The state to go on from, if that is wanted; the log as far as that, with which ``start`` was taken."""
        state = self._read() if resume else None
        if state:
            self._require_best(state["progress"])
        if not resume:
            self.end()
            with contextlib.suppress(OSError), open(self._log, "rb") as file:
                self._before = file.read()
        first = {"run": self._facts, "start": start, "threads": torch.get_num_threads()}
        lines = [first, *(state["progress"]["log"] if state else [])]
        write_whole(self._log, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return state

    def _read(self) -> dict[str, Any]:
        try:
            with open(self._state, "rb") as file:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            facts, progress = dict(json.loads(state["facts"])), state["progress"]
            _ = progress["epoch"], progress["best_epoch"], [*progress["log"]]
        except Exception:  # torch raises a dozen kinds for a bad file
            raise self.damaged() from None
        other = [name for name in self._facts if json.loads(json.dumps(self._facts[name])) != facts.get(name)]
        if other:
            found = ", ".join(f"{name} {facts.get(name)}" for name in other)
            wanted = ", ".join(f"{name} {self._facts[name]}" for name in other)
            hint = "the same options as before, or --overwrite"
            raise UsageError(
                "the run to go on with is another one", where=self._state, found=found, wanted=wanted, hint=hint
            )
        return state

    def damaged(self) -> FileError:
        """What to say of a state that cannot be used."""
        return FileError("not the state of a training", where=self._state, hint="start afresh with --overwrite")

    def _require_best(self, progress: dict[str, Any]) -> None:
        """See that the best weights so far, and their head, are still there."""
        if not progress["best_epoch"]:
            return
        about, _ = self._read_head("cpu")
        if about.get("epoch") == progress["epoch"] + 1:  # written last, before the state: that epoch is done again
            progress["best_loss"] = math.inf  # and is written again, whatever it comes to this time
            return
        if about.get("epoch") != progress["best_epoch"]:
            raise self._changed(self._head)
        self._best = about.get("fusion")
        self._read_weights()

    def _read_weights(self) -> Weights:
        """The best weights; `FileError` if others lie in their place."""
        try:
            weights = checkpoint.load(self._output)
        except InputError:
            raise self._changed(self._output) from None
        if checkpoint.fingerprint(weights) != self._best:
            raise self._changed(self._output)
        return weights

    def _read_head(self, device: str) -> tuple[dict[str, Any], Head]:
        """What a head file says of itself, and the head."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._head, "pt", device) as file:
                about = json.loads((file.metadata() or {})[ABOUT_HEAD])
                head = {name: nn.Parameter(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError):
            raise self._changed(self._head) from None
        return (about if isinstance(about, dict) else {}), head

    def _changed(self, path: str) -> FileError:
        return FileError("is not what the run has put there", where=path, hint="start afresh with --overwrite")

    def result(self, device: str) -> tuple[Weights, Head]:
        """The best weights and their head.

        Raises:
            FileError: something else lies there by now.
        """
        weights = self._read_weights()
        about, head = self._read_head(device)
        if about.get("fusion") != self._best:
            raise self._changed(self._head)
        return weights, head

    def best(self, fusion: Fusion, head: Head, progress: Progress) -> None:
        """See `Keeper`."""
        from safetensors.numpy import save

        weights = fusion.snapshot()
        self._best = checkpoint.fingerprint(weights)
        about = {
            "objective": self._objective.name,
            "epoch": progress.best_epoch,
            "fusion": self._best,
            **self._objective.facts(),
        }
        tensors = {name: tensor.detach().cpu().numpy().copy() for name, tensor in head.items()}
        write_whole(self._head, save(tensors, {ABOUT_HEAD: json.dumps(about, sort_keys=True)}))
        checkpoint.save(weights, self._output)

    def state(self, state: dict[str, Any]) -> None:
        """See `Keeper`."""
        buffer = io.BytesIO()
        torch.save({**state, "facts": json.dumps(self._facts)}, buffer)
        write_whole(self._state, buffer.getvalue())
        for record in state["progress"]["log"][-1:]:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line."""
        try:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError("cannot be written", where=self._log, found=error.strerror) from None

    def give_up(self) -> None:
        """The run has failed, and would again; where it has kept no weights, the log of those that are there stays."""
        self.end()
        if self._best is None and self._before is not None:
            write_whole(self._log, self._before)

    def end(self) -> None:
        """The run is over."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._state)
