"""The loop: AdamW, warm-up and cosine, early stopping, and a state after every epoch to go on from.

Everything that is drawn in an epoch is drawn from the seed and the epoch's number, so that a run that was killed and
goes on makes the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from fusecli.errors import FileError, TrainingError, ValuesError
from fusecli.training.data import Batch, Data, ahead, batches, load
from fusecli.training.objective import Head, Objective
from fusecli.training.optim import AdamW
from fusecli.training.represent import Fusion

#: Gradients are scaled down to this norm.
MAX_NORM = 1.0
#: Share of all steps in which the learning rate rises.
WARM_UP = 0.1
#: How much faster a head learns, which starts from nothing, than the fusion.
HEAD_LR = 10.0


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        epochs: passes over the pairs to train on, at most.
        batch_size: pairs of a step.
        lr: the highest learning rate of the fusion; the head's is `HEAD_LR` times that.
        weight_decay: of AdamW, for matrices and the head; times the learning rate it is what a step takes off.
        patience: epochs without a lower validation loss after which to stop.
        seed: of the first head, of order and dropout.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        bfloat16: whether the fusion learns from products in bfloat16; None: `train_on` sees what is fast.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    patience: int
    seed: int
    device: str
    bfloat16: bool | None = None


@dataclass
class TrainingState:
    """How far a run is: all that has to be kept beside weights and optimizer."""

    epoch: int = 0  # done
    best_epoch: int = 0
    best_loss: float = math.inf
    lowest_epoch: int = 0  # with the lowest loss so far, whether that betters what was begun with or not
    lowest_loss: float = math.inf
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Lesson:
    """What to learn, from what, and how."""

    objective: Objective
    data: Data
    settings: Settings
    sizes: Mapping[str, float] = field(default_factory=dict)  # see `fusecli.training.start.Beginning`


class Keeper(Protocol):
    """Keeps what a run has come to."""

    def best(self, fusion: Fusion, head: Head, progress: TrainingState) -> None:
        """The weights are better than all before."""

    def state(self, state: dict[str, Any]) -> None:
        """An epoch is over, and this is enough to go on from it."""

    def damaged(self) -> FileError:
        """What to say of a state that cannot be used."""


class Listener(Protocol):
    """Is told how far a run is."""

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """A step was taken."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is over."""


def fit(
    fusion: Fusion,
    lesson: Lesson,
    keeper: Keeper,
    listener: Listener,
    loss_before: float | None = None,
    state: dict[str, Any] | None = None,
) -> TrainingState:
    """Train a fusion, and a head along with it.

    Args:
        fusion: what learns.
        lesson: what it learns.
        keeper: keeps the best weights, and the state after every epoch.
        listener: is told of each step and each epoch.
        loss_before: for validation, before anything is learned; not needed with a state.
        state: of a run to go on with.

    Raises:
        FileError: the state is of another run.
        TrainingError: the loss became NaN or Inf; the best weights so far have been kept.
        ValuesError: it was so from the beginning.
    """
    run, settings = _Run(fusion, lesson), lesson.settings
    progress = run.progress
    if state is not None:
        if not run.restore(state):
            raise keeper.damaged()
        progress = run.progress
    elif loss_before is not None:  # what training does not better is kept as it was
        progress.best_loss = (1 - lesson.objective.margin) * loss_before
        if not math.isfinite(progress.best_loss):
            raise ValuesError("features give no finite numbers", hint="scale them down")
        keeper.state(run.state())
    while progress.epoch < settings.epochs and progress.epoch - progress.lowest_epoch < settings.patience:
        record, judged = run.epoch(listener)
        if progress.best_epoch == progress.epoch:
            keeper.best(fusion, judged, progress)
        keeper.state(run.state())
        listener.epoch(record)
    return progress


class _Run:
    """Weights, optimizer and schedule of one training."""

    def __init__(self, fusion: Fusion, lesson: Lesson) -> None:
        objective, data, settings = lesson.objective, lesson.data, lesson.settings
        self._fusion, self._objective, self._data, self._settings = fusion, objective, data, settings
        torch.manual_seed(settings.seed)
        head = {name: tensor.detach().to(settings.device) for name, tensor in objective.head(fusion.width).items()}
        self._head = {name: nn.Parameter(tensor) for name, tensor in head.items()}
        self.progress = TrainingState()
        ours, along = fusion.parameters(), list(self._head.values())
        lr, decay, first = settings.lr, settings.weight_decay, lesson.sizes
        groups = [
            {"params": [p for name, p in fusion.named.items() if p.ndim > 1 and name not in first], "lr": lr},
            {"params": [p for p in ours if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
            {"params": along, "lr": lr * HEAD_LR},
        ]
        for name, size in first.items():
            groups.append({"params": [fusion.named[name]], "lr": lr / size, "weight_decay": decay * size})
        self._learned = [*ours, *along]
        # All of an update in one pass over memory; in a pass for each operation it takes a sixth of an epoch.
        self.optimizer = AdamW(groups, weight_decay=decay, fused=True)
        self.steps = len(self._batches(torch.Generator()))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(_rate, self.steps * settings.epochs))

    def epoch(self, listener: Listener) -> tuple[dict[str, Any], Head]:
        """Learn from each pair once, and judge; returns what the log says of it, and the head that was judged."""
        began, progress = time.perf_counter(), self.progress
        loss = self._learned_once(listener)
        try:
            measured, judged = self._objective.fit_head(self._fusion, self._data)
        except ValuesError:  # at the start they were not too large
            raise self._diverged(self.steps, math.nan) from None
        if not math.isfinite(measured.loss):
            raise self._diverged(self.steps, measured.loss)
        progress.epoch += 1
        record = {
            "epoch": progress.epoch,
            "loss": round(loss, 6),
            "validation_loss": round(measured.loss, 6),
            f"validation_{self._objective.score_name}": round(measured.score, 6),
            "lr": self.schedule.get_last_lr()[0],
            "seconds": round(time.perf_counter() - began, 3),
        }
        progress.log.append(record)
        if measured.loss < progress.lowest_loss:
            progress.lowest_epoch, progress.lowest_loss = progress.epoch, measured.loss
        if measured.loss < progress.best_loss:
            progress.best_epoch, progress.best_loss = progress.epoch, measured.loss
        return record, judged

    def _learned_once(self, listener: Listener) -> float:
        """One pass over the pairs to train on; returns the mean loss."""
        settings, epoch = self._settings, self.progress.epoch + 1
        seed = settings.seed * 2**20 + epoch
        torch.manual_seed(seed)
        made = self._batches(torch.Generator().manual_seed(seed))
        total = 0.0
        loaded = ahead(partial(load, self._data), made)
        with self._fusion.training(), contextlib.closing(loaded):  # its thread ends here, whatever happens
            for step, batch in enumerate(loaded, 1):
                loss = self._step(batch.to(settings.device))
                if not math.isfinite(loss):
                    raise self._diverged(step, loss)
                total += loss * len(batch.which)
                listener.step(epoch, step, len(made), loss)
        return total / len(self._data.parts["train"])

    def _batches(self, generator: torch.Generator) -> list[list[int]]:
        data, size = self._data, self._settings.batch_size
        own = self._fusion.config.self_attention
        return batches(data, data.parts["train"], size, generator, self._objective.texts_per_image, own)

    def _step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self._objective.loss(self._head, self._fusion, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._learned, MAX_NORM)
        if not torch.isfinite(norm):
            return math.nan
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def _diverged(self, step: int, loss: float) -> TrainingError:
        """What to say of a loss that is NaN or Inf."""
        best = self.progress.best_epoch
        nothing = "no epoch bettered the weights before it, so none are written"
        kept = f"the best weights are kept, of epoch {best}" if best else nothing
        where = f"epoch {self.progress.epoch + 1}, step {step} of {self.steps}"
        lr, decay = self._settings.lr, self._settings.weight_decay
        hint = f"a lower --lr than {lr:g}" + ("" if self._fusion.config.layer_norm else ", or --layer-norm")
        if decay > 1 and lr * decay > 2:  # a step takes off lr * decay of each weight, and what is left is larger
            hint = f"a lower --weight-decay than {decay:g}"
        return TrainingError(f"the training diverged; {kept}", where=where, found=f"loss {loss}", hint=hint)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            "fusion": {name: tensor.detach() for name, tensor in self._fusion.named.items()},
            "head": {name: tensor.detach() for name, tensor in self._head.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": vars(self.progress),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Go back to a saved state; returns whether it is one of this run."""
        try:
            self._fusion.restore(state["fusion"])
            with torch.no_grad():
                for name, tensor in self._head.items():
                    tensor.copy_(state["head"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.progress = TrainingState(**state["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            return False
        return True


def _rate(steps: int, step: int) -> float:
    """The learning rate as a share of the highest, after ``step`` of ``steps``."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))  # where pairs are long, epochs differ by a step or two
    return 0.5 * (1 + math.cos(math.pi * done))
