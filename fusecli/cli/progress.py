"""What the user sees of long work: a bar on a terminal, a line now and then elsewhere, a table at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fusecli.cli.console import note
from fusecli.cli.shared import ONE_ROW
from fusecli.errors import OutputError, listed

if TYPE_CHECKING:
    from fusecli.batch.job import Outcome
    from fusecli.batch.request import Request
    from fusecli.batch.summary import Summary

#: Seconds between lines where there is no terminal, and between two looks of the bar.
EVERY = 10.0
INTERRUPTED = "interrupted; run the same command again to continue"
REDRAW = 0.1


def _has_bar(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


class Progress:
    """Told of outcomes, shows how far the run is; a `fusecli.batch.summary.Reporter`."""

    def __init__(self, quiet: bool, as_json: bool, output: str, suffix: str) -> None:
        self._quiet, self._json = quiet, as_json
        self._where = (output, suffix)
        self._pairs: int | None = None
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def planned(self, pairs: int | None) -> None:
        """So many pairs are to be looked at (None: nobody knows)."""
        self._pairs = pairs
        if not _has_bar(self._quiet):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        # No thread of its own: workers are made by fork.
        self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
        self._task = self._bar.add_task("", total=pairs, rate="")
        self._bar.start()

    def told(self, outcomes: list[Outcome], summary: Summary) -> None:
        """Something came of these; ``summary`` counts them already."""
        if self._json and outcomes:
            sys.stdout.write("".join(json.dumps(self._line(outcome)) + "\n" for outcome in outcomes))
            sys.stdout.flush()
        now = time.monotonic()
        if now - self._last < (EVERY if self._bar is None else REDRAW):
            return
        self._last = now
        worked = summary.fused + summary.failures
        done = worked + summary.skipped
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=self._rate(summary), refresh=True)
        else:
            of = "" if self._pairs is None else f" of {self._pairs:,}"
            note(f"{done:,}{of} pairs, {self._rate(summary)}{self._left(done, worked)}", self._quiet)

    def _line(self, outcome: Outcome) -> dict[str, Any]:
        record = outcome.record()
        output, suffix = self._where
        if outcome.status == "fused":
            record["output"] = output if "part" in record else f"{output}/{outcome.id}{suffix}"
        return {name: _without_parts(value) for name, value in _without_parts(record).items()}

    def _rate(self, summary: Summary) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = f"{summary.fused / seconds:,.0f} pairs/s, {summary.nbytes / seconds / 1e6:,.0f} MB/s"
        return f"{rate}, {summary.failures:,} failed" if summary.failures else rate

    def _left(self, done: int, worked: int) -> str:
        if self._pairs is None or not worked:
            return ""
        seconds = (time.monotonic() - self._start) * max(0, self._pairs - done) / worked
        return f", {seconds:,.0f} s left"


class Epochs:
    """Shows how far a training is, a bar on a terminal, a line an epoch; a `fusecli.training.run.Reporter`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Epochs:
        if _has_bar(self._quiet):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("reading", total=None)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def read(self, done: int, total: int) -> None:
        """So many pairs have been read."""
        self._show("reading", done, total)

    def forgets_text(self, pairs: int) -> None:
        """So many pairs have one image row, which is all that the fusion makes of them."""
        note(f"{pairs:,} of the pairs: {ONE_ROW}", self._quiet)

    def unknown_labels(self, pairs: int) -> None:
        """So many pairs have a label that no pair to train on has."""
        note(f"{pairs:,} of the pairs held out or for validation have a label that none to train on has", self._quiet)

    def nothing_to_resume(self) -> None:
        """There is no unfinished run to go on with, so one begins."""
        note("no unfinished run to resume: starting from the beginning", self._quiet)

    def finished_before(self) -> None:
        """The same run has been finished, so nothing is done."""
        note("done before: nothing is trained; --overwrite would start over", self._quiet)

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """A step was taken."""
        self._show(f"epoch {epoch}, loss {loss:.3f}", step, steps)

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is over."""
        name = next(name for name in record if name.startswith("validation_") and name != "validation_loss")
        score = f"{name.removeprefix('validation_')} {record[name]:.3f}"
        told = f"loss {record['loss']:.4f}, validation: loss {record['validation_loss']:.4f}, {score}"
        note(f"epoch {record['epoch']:>3}  {told}, {record['seconds']:.1f} s", self._quiet)

    def comparing(self, name: str) -> None:
        """A line of the table is being computed."""
        self._show(f"comparing: {name}", None, None)

    def _show(self, what: str, done: int | None, total: int | None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done or 0, total=total)


def _without_parts(value: Any) -> Any:
    """Facts of a result without where it lies on its way to one file."""
    return {k: x for k, x in value.items() if k not in ("part", "at")} if isinstance(value, dict) else value


def counted(ids: list[str], quiet: bool) -> Iterator[str]:
    """``ids`` one by one, with a bar on a terminal, and a line now and then elsewhere."""
    if _has_bar(quiet):
        from rich.console import Console
        from rich.progress import track

        tracked: Iterable[str] = track(ids, "", console=Console(stderr=True), transient=True)
        yield from tracked
        return
    last = time.monotonic()
    for at, id in enumerate(ids):
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            note(f"{at:,} of {len(ids):,} pairs", quiet)
        yield id


def report(summary: Summary, request: Request, allow_missing: bool, quiet: bool) -> int:
    """Print the table of what came of a run; returns the exit code."""
    from fusecli.batch.request import state_folder

    def line(name: str, count: int, told: str) -> None:
        note(f"{name:9} {count:>9,}  {told}".rstrip(), quiet)

    line("fused", summary.fused, "")
    if summary.skipped:
        line("skipped", summary.skipped, "done before")
    for cause, (count, ids) in summary.failed.items():
        line("failed", count, f"{cause}: {listed(ids, count=count)}")
        for told in summary.examples[cause]:
            note(f"{'':21}{told}", quiet)
    for side, (count, ids) in summary.missing.items():
        line(f"no {side}", count, listed(ids, count=count))
    seconds = summary.read + summary.fuse + summary.write
    if seconds:
        parts = (f"{name} {getattr(summary, name):.1f} s" for name in ("read", "fuse", "write"))
        note(f"time of all workers: {', '.join(parts)}", quiet)
    if summary.failed:
        note(f"details of every pair are in {state_folder(request.output)}/", quiet)
    return _code(summary, request, allow_missing, quiet)


def _code(summary: Summary, request: Request, allow_missing: bool, quiet: bool) -> int:
    if summary.interrupted:
        note(INTERRUPTED, quiet)
        return 130
    if summary.stopped and summary.stopped.stop:
        raise OutputError(
            f"stopped: {summary.stopped.facts['message']}", hint="fix the cause, then run the same command again"
        )
    if summary.stopped:
        note(f"stopped at the first failure: {summary.stopped.facts['message']}", quiet)
    if request.shard and not summary.failures:
        note("this shard is done; a run without --shard sees what all of them have done", quiet)
    return 4 if summary.failures or (summary.missed and not allow_missing) else 0
