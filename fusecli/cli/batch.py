"""``fusecli batch``: many pairs."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusecli.cli.console import note
from fusecli.cli.options import (
    AllowNonfinite,
    AttentionDtype,
    AttentionMean,
    Debug,
    Device,
    Dtype,
    GridSize,
    NumHeads,
    Quiet,
    Residual,
    Seed,
    SkipRows,
    WeightsOption,
    refuse_stdin_twice,
    to_grid,
)
from fusecli.cli.shared import ONE_ROW, check_attention_options, load_weights
from fusecli.cli.sources import (
    ImageKey,
    ImagePattern,
    Sources,
    TextKey,
    TextPattern,
    check_sources,
    find_pairs,
    find_stream,
    refuse_inside,
)
from fusecli.errors import STDIN, InputError, UsageError

if TYPE_CHECKING:
    from fusecli.batch.feed import Pairs
    from fusecli.batch.plan import Shard
    from fusecli.batch.request import Request
    from fusecli.dumps import Tokens
    from fusecli.weights import Weights

#: Suffixes that tell of a file that is meant, where there would be a folder of that name.
MISTAKEN = (".npy", ".safetensors", ".safetensor", ".npz", ".pt", ".pth", ".bin", ".h5", ".parquet")


def batch(
    images: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGES", help="Image features, or both sides: a folder, a packed .safetensors or a stacked .npy."
        ),
    ] = None,
    texts: Annotated[str | None, typer.Argument(metavar="TEXTS", help="Text features, likewise.")] = None,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="OUT", help="A folder, or one .safetensors or .npy for all results."),
    ] = "",
    weights: WeightsOption = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", "-a", metavar="OUT", help="Also write the attention, in a form as for --output."),
    ] = None,
    attention_mean: AttentionMean = False,
    attention_dtype: AttentionDtype = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON lines with id and tokens; stored in the .safetensors of --attention."),
    ] = None,
    grid: GridSize = None,
    skip_rows: SkipRows = None,
    residual: Residual = False,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="CSV, TSV or JSON lines with id,image,text; - reads lines as they arrive."),
    ] = None,
    image_pattern: ImagePattern = None,
    text_pattern: TextPattern = None,
    image_key: ImageKey = None,
    text_key: TextKey = None,
    suffix: Annotated[
        str, typer.Option(metavar=".npy|.safetensors", help="Format of the result files in a folder OUT.")
    ] = ".npy",
    dtype: Dtype = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-j", metavar="N", min=1, max=1024, help="Number of processes.  [default: all cores]"
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Fuse the I-th of N parts, from 1: for job arrays.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, metavar="N", help="Fuse at most N pairs.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry only pairs that failed or lacked a side.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over: fuse all pairs again.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Do not count ids with only one side as failures.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first pair that fails.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    num_heads: NumHeads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    allow_nonfinite: AllowNonfinite = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a pair on stdout, as it is done.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fuse many pairs; run it again to resume.

    fusecli batch images/ texts/ -o fused/
    """
    parameters = locals()
    from fusecli.batch.request import is_one_file, named_like
    from fusecli.batch.run import run
    from fusecli.cli.progress import INTERRUPTED, Progress, report

    output, attention = _without_slash(output), attention and _without_slash(attention)
    sources = Sources(images, texts, manifest, image_key, text_key, image_pattern, text_pattern, tokens)
    check_sources(sources)
    _check_outputs(output, attention, suffix, weights, sources)
    dumped = attention and named_like(attention, suffix)
    placed = {"tokens": tokens, "grid": grid, "skip-rows": skip_rows}
    given = {"attention-mean": attention_mean, "attention-dtype": attention_dtype, **placed}
    check_attention_options(dumped, given)
    refuse_stdin_twice(tokens, manifest)
    _refuse_contradictions(parameters | {"output": output})
    loaded = load_weights(weights, num_heads, seed, residual, attention, lambda line: note(line, quiet))
    part = _shard(shard)
    request = _request(parameters | {"output": output, "attention": attention, "shard": part}, loaded, sources)
    outputs = [output, attention]
    if dry_run:
        _tell_plan(request, find_pairs(sources, outputs, part, weights), quiet)
        return
    plan = partial(find_stream, sources) if manifest == "-" else partial(find_pairs, sources, outputs, part, weights)
    if attention and attention_mean and is_one_file(attention) and attention.endswith(".npy"):
        told = "will be [B, N, M], which `fusecli show` takes for heads; .safetensors says what it is"
        note(f"{attention}: {told}", quiet)
    try:
        with Progress(quiet, json, output, suffix) as progress:
            summary = run(request, plan, progress)
    except KeyboardInterrupt:
        note(INTERRUPTED, quiet)
        raise typer.Exit(130) from None
    if summary.one_row and loaded.config.can_forget_text:
        note(f"{summary.one_row:,} of the pairs: {ONE_ROW}", quiet)
    came = summary.fused or summary.skipped or summary.failures or summary.missed or retry_failed
    if manifest == "-" and not (came or summary.interrupted or shard or limit == 0):
        raise InputError("no pairs arrived", where=STDIN, wanted="lines with id,image,text")
    code = report(summary, request, allow_missing, quiet)
    if code:
        raise typer.Exit(code)


def _request(given: dict[str, Any], weights: Weights, sources: Sources) -> Request:
    """What the command's parameters ask for."""
    from fusecli.batch.job import Options
    from fusecli.batch.request import Request
    from fusecli.machine import cores

    as_given = ("output", "attention", "suffix", "device", "shard", "limit", "retry_failed", "overwrite", "fail_fast")
    options = ("dtype", "attention_mean", "attention_dtype", "allow_nonfinite")
    return Request(
        weights=weights,
        options=Options(**{name: given[name] for name in options}),
        facts=sources.seen_from(given["output"]),
        workers=given["workers"] or cores(),
        tokens=_read_tokens(given["tokens"]) if given["tokens"] else None,
        grid=to_grid(given["grid"]),
        skip_rows=given["skip_rows"],
        other_inputs=tuple(given[name] for name in ("weights", "tokens") if given[name] and given[name] != "-"),
        **{name: given[name] for name in as_given},
    )


def _refuse_contradictions(given: dict[str, Any]) -> None:
    """Raise `UsageError` for options of which one makes nonsense of the other."""
    from fusecli.arrays import cuda_number
    from fusecli.batch.request import named_like, removal

    if given["overwrite"] and given["retry_failed"]:
        raise UsageError("--overwrite forgets what has failed", where="--retry-failed", hint="leave one of them out")
    if given["overwrite"] and given["shard"]:
        hint = f"{removal(given['output'])}, then start the shards"
        raise UsageError("one shard cannot restart all of them", where="--overwrite", hint=hint)
    if given["dry_run"] and given["manifest"] == "-":
        raise UsageError("lines that have not arrived yet cannot be planned", where="--dry-run")
    if given["dry_run"] and given["device"] != "cpu":
        cuda_number(given["device"])  # nothing else would look at it
    if given["dtype"] == "bfloat16" and named_like(given["output"], given["suffix"]).endswith(".npy"):
        raise UsageError(".npy cannot name bfloat16", where="--dtype", hint="-o OUT.safetensors, or another --suffix")


def _check_outputs(output: str, attention: str | None, suffix: str, weights: str | None, sources: Sources) -> None:
    from fusecli.batch.request import state_folder
    from fusecli.collections import SUFFIXES

    if not output:
        raise UsageError("no output", hint="add -o FOLDER")
    if suffix not in SUFFIXES:
        raise UsageError("unknown format", where="--suffix", found=suffix, wanted=" or ".join(SUFFIXES))
    inputs = [path for path in (*sources.paths(), weights) if path]
    for path in filter(None, (output, attention)):
        _check_output(path, inputs)
    if attention:
        one, other = os.path.realpath(output) + "/", os.path.realpath(attention) + "/"
        state, kept = (os.path.realpath(state_folder(path)) + "/" for path in (output, attention))
        if one.startswith((other, kept)) or other.startswith((one, state)):
            raise UsageError("attention would lie among the results", where=attention, hint="write to another place")


def _check_output(path: str, inputs: list[str]) -> None:
    from fusecli.collections import SUFFIXES

    if path == "-":
        hint = "name a folder; --json says what is done"
        raise UsageError("many results cannot go to stdout", where="-o -", hint=hint)
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise UsageError("output is also an input", where=path, hint="write to another place")
    if os.path.isdir(path):
        return
    suffix = os.path.splitext(path)[1]
    if suffix.lower() in MISTAKEN and suffix not in SUFFIXES:
        raise UsageError("cannot be written", where=path, found=suffix, wanted="a folder, .safetensors or .npy")
    if os.path.exists(path) and not (path.endswith(SUFFIXES) and os.path.isfile(path)):
        raise UsageError("is a file or a pipe", where=path, wanted="a folder, .safetensors or .npy")
    if path.endswith(SUFFIXES):
        refuse_inside(path, filter(os.path.isdir, inputs))


def _read_tokens(path: str) -> Tokens:
    from fusecli.dumps import read_tokens

    tokens = read_tokens(path)
    tokens.require_many()
    return tokens


def _without_slash(path: str) -> str:
    return path.rstrip("/") or path[:1]


def _shard(text: str | None) -> Shard | None:
    from fusecli.batch.plan import Shard

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (len(text) < 20 and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        hint = "--shard $SLURM_ARRAY_TASK_ID/8 with --array=1-8"
        raise UsageError("not a valid shard", where="--shard", found=text, wanted="I/N, I from 1 to N", hint=hint)
    return Shard(int(number), int(count))


def _tell_plan(request: Request, pairs: Pairs, quiet: bool) -> None:
    from fusecli.batch.run import look

    done, bad, todo = look(request, pairs)
    count = f"{len(pairs.ids):,} pair{'s' * (len(pairs.ids) != 1)}"
    note(f"{count}: {done:,} done, {bad:,} failed or incomplete before, {todo:,} to do", quiet)
    for outcome in pairs.known[:5]:
        what = outcome.facts.get("message") or f"no {outcome.facts['missing']} for {outcome.id}"
        note(what, quiet)
    if len(pairs.known) > 5:
        note(f"and {len(pairs.known) - 5:,} more that cannot be fused", quiet)
