"""Keeps a training in files: the best weights with their head, a log, and a state to go on from."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from typing import Any
from zipfile import ZipFile

import torch
from torch import nn

from fusecli import checkpoint
from fusecli.errors import FileError, InputError, UsageError, listed, unwritable
from fusecli.formats import write_whole
from fusecli.training.files import HEAD, LOG, STATE, beside
from fusecli.training.loop import TrainingState
from fusecli.training.objective import Head, Objective
from fusecli.training.represent import Fusion
from fusecli.weights import Weights

#: Where a head's file says what it is, among its metadata.
ABOUT_HEAD = "fusecli-head"


class FileKeeper:
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

    def finished(self) -> dict[str, Any] | None:
        """What a run of the same data and options came to, if it was finished and its weights are still there."""
        damaged = ValueError, AttributeError, TypeError, KeyError, RecursionError
        with contextlib.suppress(OSError, InputError, *damaged), open(self._log, "rb") as file:
            first, *_, last = map(json.loads, file)
            weights, (about, _) = checkpoint.load(self._output), self._read_head("cpu")
            whole = last["fingerprint"] == checkpoint.fingerprint(weights) == about["fusion"]
            if whole and "verdict" in last and not self._other_than(first["run"]):
                return dict(last)
        return None

    def _other_than(self, facts: dict[str, Any]) -> list[str]:
        """What a run with those ``facts`` had that this one has not."""
        return [name for name in self._facts if json.loads(json.dumps(self._facts[name])) != facts.get(name)]

    def _read(self) -> dict[str, Any]:
        try:
            with open(self._state, "rb") as file:
                if ZipFile(file).testzip():  # torch does not look at the checksums
                    raise ValueError
                file.seek(0)
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            facts, progress = {"bfloat16": False, **json.loads(state["facts"])}, state["progress"]
            if not 0 <= int(progress["best_epoch"]) <= int(progress["epoch"]) or type(progress["log"]) is not list:
                raise ValueError
        except Exception:  # torch raises a dozen kinds for a bad file
            raise self.damaged() from None
        if other := self._other_than(facts):
            found = ", ".join(f"{name} {_apart(facts.get(name), self._facts[name])}" for name in other)
            wanted = ", ".join(f"{name} {_apart(self._facts[name], facts.get(name))}" for name in other)
            hint = "the same options as before, or --overwrite"
            raise UsageError(
                "the unfinished run had other data or options", where=self._state, found=found, wanted=wanted, hint=hint
            )
        return state

    def damaged(self) -> FileError:
        """What to say of a state that cannot be used."""
        return FileError("not the state of a training", where=self._state, hint="start over with --overwrite")

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
        return FileError("was changed since the run wrote it", where=path, hint="start over with --overwrite")

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

    def best(self, fusion: Fusion, head: Head, progress: TrainingState) -> None:
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
            raise unwritable(self._log, error) from None

    def give_up(self) -> None:
        """The run has failed, and would again; where it has kept no weights, the log of those that are there stays."""
        self.end()
        if self._best is None and self._before is not None:
            write_whole(self._log, self._before)

    def end(self) -> None:
        """The run is over."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._state)


def _apart(value: Any, other: Any) -> Any:
    """A value for a message; of a list only what another list lacks or has beyond it."""
    if not (isinstance(value, list) and isinstance(other, list)) or set(value) == set(other):
        return value
    if more := set(value) - set(other):
        return f"with {listed(str(x) for x in value if x in more)}"
    less = set(other) - set(value)
    return f"without {listed(str(x) for x in other if x in less)}"
