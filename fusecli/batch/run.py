"""A batch from beginning to end: what is to be done, doing it, keeping the ledger, gathering the results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fusecli.arrays import to_device
from fusecli.batch.apart import require_apart
from fusecli.batch.feed import ListFeed, Pairs, StreamFeed
from fusecli.batch.gather import is_whole, read_history, remove_left
from fusecli.batch.job import Job, Outcome, Stop, unfailing
from fusecli.batch.ledger import History, Ledger, require_same_run, runs_beside
from fusecli.batch.local import Pool
from fusecli.batch.lock import Lock, claim, require_unclaimed
from fusecli.batch.manifest import Manifest
from fusecli.batch.order import gather_what_is_there
from fusecli.batch.plan import Shard, item_size
from fusecli.batch.request import Request, is_one_file, named_like, removal
from fusecli.batch.stacks import Stacks, is_stack
from fusecli.batch.store import STATE, FolderStore, PartStore, Piece, Store
from fusecli.batch.summary import Recorder, Reporter, Summary
from fusecli.batch.worker import work
from fusecli.errors import UsageError, unwritable
from fusecli.formats import has_names, require_replaceable
from fusecli.machine import undisturbed
from fusecli.pipeline import takes_gate


def run(request: Request, plan: Callable[[], Pairs | Manifest], reporter: Reporter) -> Summary:
    """Do what is asked, or what is left of it.

    Args:
        request: what to do.
        plan: gives the pairs, or the manifest that reads them from standard input as they arrive. It is called when
            the workers are there already: they need not carry what is known of millions of pairs.
        reporter: is told what happens.

    Raises:
        UsageError: the output was begun with other weights or options.
        OutputError: the output cannot be written.
    """
    folder, attended = request.states()
    job, lock, stop = _job(request, folder), Lock(), Stop()
    pool: Pool | None = None
    try:
        pool = Pool(unfailing(partial(work, job)), request.processes, lock.release)
        pairs = plan()
        if isinstance(pairs, Pairs):
            require_apart(pairs.ids, pairs.inside, request.targets())
        try:
            for held in (folder, attended) if attended else (folder,):
                os.makedirs(held, exist_ok=True)
                lock.take(held, _name(request.shard))
            return _run(request, pairs, reporter, job, pool, stop)
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.filename is None:  # of no file
                raise
            raise unwritable(error.filename, error) from error
    finally:
        if pool:
            pool.close()
        stop.close()
        lock.release()


def _run(request: Request, pairs: Pairs | Manifest, reporter: Reporter, job: Job, pool: Pool, stop: Stop) -> Summary:
    folder, attended = request.states()
    if request.overwrite:
        _forget(folder)
    if not request.shard:
        remove_left(_stores(job), (folder, attended))
    history = read_history(folder, _stores(job))
    _require_fitting(request, job, history, pairs)
    for store in _stores(job):
        if isinstance(store, PartStore):
            require_replaceable(store.path)
    folders = _folders(job)
    ledger = Ledger(folder, _name(request.shard))
    try:
        for store in folders:
            store.begin()
        _begin(ledger, request, history.began)
        claim(folder, attended)
        stacks = Stacks(_stores(job))
        recorder = Recorder(ledger, history.missing, reporter, stacks.see)
        feed = _feed(request, pairs, history, job, stacks)
        reporter.planned(feed.total)
        recorder.record(pairs.known if isinstance(pairs, Pairs) else [])
        _drive(request, job, feed, recorder, pool, stop)
    finally:
        with undisturbed():
            pool.close()  # or a worker might still write to what is removed
            for store in folders:
                store.end()
            ledger.close()
    summary = recorder.summary
    if not (summary.interrupted or summary.stopped or request.shard):
        # Results of ids that were away for a while may stand behind the others.
        moved = not history.missing.isdisjoint(feed.ids)
        del history  # a gathering reads it anew
        _gather(job, folder, feed, summary, moved)
    return summary


def _begin(ledger: Ledger, request: Request, after: float) -> None:
    """Begin a run; of parts that begin at once with other weights or options, all but one stop, or all.

    Each writes what it begins with, and then looks at what the others have written.
    """
    ledger.begin(request.run_facts(), after)
    if request.shard:
        try:
            ledger.show()
            require_same_run(runs_beside(ledger.path), request.run_facts(), request.output, _way_out(request))
        except BaseException:
            ledger.take_back()
            raise


def _way_out(request: Request) -> str:
    """What to do where an output cannot be gone on with; one shard cannot start over for all."""
    over = f"{removal(request.output)}, then start all shards" if request.shard else "start over with --overwrite"
    return f"write to another output, or {over}"


def _require_fitting(request: Request, job: Job, history: History, pairs: Pairs | Manifest) -> None:
    """Raise `UsageError` if what is there was not made with the same weights, options and ids."""
    folder, attended = request.states()
    if not request.overwrite:
        require_unclaimed(folder, attended)
    hint = _way_out(request)
    require_same_run(history.runs, request.run_facts(), request.output, hint)
    if not history.runs and next(history.ids(), None) is not None:
        raise UsageError("the ledger does not say which weights and options its results had", where=folder, hint=hint)
    stacked = any(map(is_stack, _stores(job)))
    if not stacked or isinstance(pairs, Manifest) or request.shard:
        return
    for id in history.ids(but=set(pairs.rows)):  # they would have no row any more
        pieces = history.pieces(id)
        if pieces and _is_there(job, id, *pieces):
            raise UsageError("holds results of other pairs", where=request.output, found=id, hint=hint)


def _stores(job: Job) -> list[Store]:
    return [job.fused, job.attention] if job.attention else [job.fused]


def _folders(job: Job) -> list[FolderStore]:
    return [store for store in _stores(job) if isinstance(store, FolderStore)]


def look(request: Request, pairs: Pairs) -> tuple[int, int, int]:
    """How many pairs are done, have failed and are to be done; nothing is written."""
    require_apart(pairs.ids, pairs.inside, request.targets())
    folder, _ = request.states()
    job = _job(replace(request, device="cpu"), folder)
    history = read_history(folder, _stores(job)) if not request.overwrite else History()
    _require_fitting(request, job, history, pairs)
    written = ((id, history.pieces(id)) for id in pairs.ids)
    done = sum(pieces is not None and _is_there(job, id, *pieces) for id, pieces in written)
    bad = sum(map(history.undone, pairs.ids))
    todo = bad if request.retry_failed else len(pairs.ids) - done
    return done, bad, todo if request.limit is None else min(todo, request.limit)


def _name(shard: Shard | None) -> str | None:
    return str(shard) if shard else None


def _forget(folder: str) -> None:
    for name in os.listdir(folder):
        if name.endswith((".jsonl", ".part", ".index")):
            os.unlink(f"{folder}/{name}")


def _job(request: Request, folder: str) -> Job:
    def store(path: str, kind: str) -> Store:
        written, dumps = named_like(path, request.suffix), kind == "attention"
        label = request.label() if dumps and has_names(written) else None
        gate = dumps and takes_gate(request.weights, written)
        if is_one_file(path):
            return PartStore(path, folder, kind, gate, label)
        temporary = f"{path}/{STATE}/{f'tmp-{request.shard}' if request.shard else 'tmp'}"
        return FolderStore(path, request.suffix, temporary, kind, gate, label)

    on_cpu = request.device == "cpu"
    return Job(
        weights=request.weights,
        options=request.options,
        attention=store(request.attention, "attention") if request.attention else None,
        fused=store(request.output, "fused"),
        to_device=None if on_cpu else to_device(request.device),
        folder=folder,
        threads=request.workers if on_cpu else 1,
        other_inputs=request.other_inputs,
        fail_fast=request.fail_fast,
    )


def _feed(
    request: Request, pairs: Pairs | Manifest, history: History, job: Job, stacks: Stacks
) -> ListFeed | StreamFeed:
    def keep(id: str) -> Outcome | None:
        pieces = history.pieces(id)
        if not pieces or not _is_there(job, id, *pieces):
            return None
        stacks.add(id, *pieces)
        return Outcome(id, "skipped", {})

    wanted = history.undone if request.retry_failed else None
    if isinstance(pairs, Manifest):
        return StreamFeed(pairs, 0, request.shard, keep, request.limit, wanted)
    ids = list(filter(wanted, pairs.ids)) if wanted else pairs.ids
    size = item_size(min(len(ids), request.limit or len(ids)), request.processes)
    return ListFeed(pairs, ids, keep, size, request.limit)


def _is_there(job: Job, id: str, fused: Piece, attention: Piece | None) -> bool:
    if not job.fused.holds(id, fused):
        return False
    return job.attention is None or (attention is not None and job.attention.holds(id, attention))


def _drive(request: Request, job: Job, feed: ListFeed | StreamFeed, recorder: Recorder, pool: Pool, stop: Stop) -> None:
    summary, runner = recorder.summary, pool.run
    if request.fail_fast and summary.failures:
        summary.stopped = recorder.first_failure
        return
    if request.device != "cpu":
        from fusecli.batch import inline, together  # 10 ms that only a GPU needs

        runner = partial(inline.run, unfailing(partial(together.work, job)))
    with stop.on_interrupt():
        for outcomes in runner(feed, stop):
            outcomes = [*feed.outcomes(), *outcomes]
            recorder.record(outcomes)
            if not stop.asked and (reason := next((x for x in outcomes if x.ends_run(request.fail_fast)), None)):
                summary.stopped = reason
                stop.ask()
        for outcomes in pool.drain():
            recorder.record(outcomes)
        recorder.record(feed.outcomes())
    summary.interrupted = stop.asked and summary.stopped is None


def _gather(job: Job, folder: str, feed: ListFeed | StreamFeed, summary: Summary, moved: bool) -> None:
    """Make one file of the parts, where there is something new; rows of a stack also come and go without results."""
    stores = [store for store in _stores(job) if isinstance(store, PartStore)]
    rows = None if feed.streams else feed.rows
    new = moved or summary.fused or summary.failures or not all(is_whole(store, rows) for store in stores)
    if not stores or not new:
        return
    history = read_history(folder, _stores(job))
    for store in stores:
        gather_what_is_there(store, history, feed)
