"""What a user asks for, and where it is to go."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fusecli.batch.job import Options
from fusecli.batch.plan import Shard
from fusecli.batch.store import STATE
from fusecli.checkpoint import dump_facts, fingerprint
from fusecli.collections import SUFFIXES
from fusecli.dumps import DumpMetadata, Tokens
from fusecli.pipeline import takes_gate
from fusecli.weights import Weights


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    weights: Weights
    output: str  # a folder, or one file for all results
    attention: str | None = None  # likewise
    suffix: str = ".npy"  # of the files in a folder
    options: Options = field(default_factory=Options)
    facts: dict[str, Any] = field(default_factory=dict)  # what else decides the results: where the features come from
    workers: int = 1  # processes
    device: str = "cpu"
    shard: Shard | None = None
    limit: int | None = None  # pairs to do at most
    retry_failed: bool = False
    overwrite: bool = False
    fail_fast: bool = False
    tokens: Tokens | None = None  # for the dumps of attention
    grid: tuple[int, int] | None = None  # likewise
    skip_rows: int | None = None  # likewise
    other_inputs: tuple[str, ...] = ()  # files that are read beside the features: weights, tokens

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.weights)

    @property
    def processes(self) -> int:
        """That share the pairs; 0 where a GPU has them all, and this process does them."""
        return self.workers if self.device == "cpu" else 0

    def label(self) -> DumpMetadata:
        """What dumps of attention say of themselves."""
        facts = dump_facts(self.weights.config, self.fingerprint, self.options.attention_mean)
        return DumpMetadata(facts, self.tokens, self.grid, self.skip_rows)

    def targets(self) -> list[tuple[str, str | None]]:
        """Where results go: a folder and the suffix of the files in it, or a file and None."""
        paths = [path for path in (self.output, self.attention) if path]
        return [(path, None if is_one_file(path) else self.suffix) for path in paths]

    def states(self) -> tuple[str, str | None]:
        """The folders with the state of the output, and of the attention."""
        return state_folder(self.output), state_folder(self.attention) if self.attention else None

    @property
    def packs_gates(self) -> bool:
        """Whether gates go into one file with the attention of all pairs."""
        path = self.attention
        return path is not None and is_one_file(path) and takes_gate(self.weights, path)

    def run_facts(self) -> dict[str, Any]:
        """All that decides the bytes of the results, as the ledger has it."""
        config = self.weights.config
        return {
            "weights": self.fingerprint,
            "method": config.method,
            **config.options(),
            "device": self.device.partition(":")[0],
            "suffix": self.suffix,
            "attention": self.attention and os.path.relpath(*map(os.path.realpath, (self.attention, self.output))),
            **self.options.facts(),
            "grid": self.grid and "{}x{}".format(*self.grid),
            "skip_rows": self.skip_rows,
            # They take room between the numbers of pairs; nothing is said where there are none.
            **({"gates in packed attention": True} if self.packs_gates else {}),
            **self.facts,
        }


def state_folder(output: str) -> str:
    """The folder with the ledger of an output: in an output folder; beside an output file, that behind a link."""
    if not is_one_file(output):
        return f"{output}/{STATE}"
    return f"{os.path.realpath(output) if os.path.islink(output) else output}{STATE}"


def removal(output: str) -> str:
    """The command that removes an output, and what is known of it."""
    if not is_one_file(output):
        return f"rm -r {shlex.quote(output)}"
    return f"rm -rf {shlex.quote(output)} {shlex.quote(state_folder(output))}"  # some may not be there yet


def is_one_file(output: str) -> bool:
    """Whether results are to share one file, by its suffix."""
    return output.endswith(SUFFIXES) and not os.path.isdir(output)


def named_like(path: str, suffix: str) -> str:
    """What tells the format of results at ``path``: its own suffix, or that of the files in the folder."""
    return path if is_one_file(path) else suffix
