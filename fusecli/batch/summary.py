"""What came of a run, told as it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from fusecli.batch.job import Outcome
from fusecli.batch.ledger import Ledger

#: Ids that are shown of many.
FIRST = 5


@dataclass
class Summary:
    """What came of a run."""

    fused: int = 0  # pairs
    skipped: int = 0  # pairs that had been done before
    one_row: int = 0  # of the fused, those with one image row
    nbytes: int = 0  # bytes of features that were read, and of results that were written
    read: float = 0.0  # seconds, of all workers together
    fuse: float = 0.0  # likewise
    write: float = 0.0  # likewise
    failed: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # by cause: how many, the first ids
    examples: dict[str, list[str]] = field(default_factory=dict)  # by cause: all that was said of the first
    missing: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # by the side that is not there
    interrupted: bool = False
    stopped: Outcome | None = None  # what stopped it before its end

    @property
    def failures(self) -> int:
        """Pairs that failed."""
        return sum(count for count, _ in self.failed.values())

    @property
    def missed(self) -> int:
        """Pairs without one side."""
        return sum(count for count, _ in self.missing.values())

    def add(self, outcome: Outcome) -> None:
        """Count one pair."""
        if outcome.status == "skipped":
            self.skipped += 1
        elif outcome.status == "fused":
            self.fused += 1
            self.one_row += outcome.facts["image"][0] == 1
            self.nbytes += outcome.nbytes
            self.read += outcome.read
            self.fuse += outcome.fuse
            self.write += outcome.write
        else:
            failed = outcome.status == "failed"
            table, cause = (self.failed, "error") if failed else (self.missing, "missing")
            if failed:
                hint = [f"hint: {outcome.facts['hint']}"] if "hint" in outcome.facts else []
                self.examples.setdefault(outcome.facts[cause], [outcome.facts["message"], *hint])
            count, ids = table.get(outcome.facts[cause], (0, []))
            table[outcome.facts[cause]] = (count + 1, [*ids, outcome.id] if len(ids) < FIRST else ids)


class Reporter(Protocol):
    """Is told what happens, as it happens."""

    def planned(self, pairs: int | None) -> None:
        """So many pairs are to be looked at (None: nobody knows)."""

    def told(self, outcomes: list[Outcome], summary: Summary) -> None:
        """Something came of these; ``summary`` counts them already."""


@dataclass
class Recorder:
    """Passes on what happened: to the ledger, to the summary, to the reporter, and to a check that may raise."""

    ledger: Ledger
    missing: set[str]  # as the ledgers have them already
    reporter: Reporter
    check: Callable[[list[Outcome]], None]
    summary: Summary = field(default_factory=Summary)
    first_failure: Outcome | None = None

    def record(self, outcomes: list[Outcome]) -> None:
        """Something came of these pairs."""
        new = [x for x in outcomes if x.status != "skipped" and not (x.status == "missing" and x.id in self.missing)]
        self.ledger.add(new)
        for outcome in outcomes:
            self.summary.add(outcome)
        self.first_failure = self.first_failure or next((x for x in outcomes if x.ends_run(fail_fast=True)), None)
        self.reporter.told(outcomes, self.summary)
        self.check(outcomes)
