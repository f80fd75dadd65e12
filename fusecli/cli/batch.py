"""``fusecli batch``: many pairs."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import typer

from fusecli.cli.console import note
from fusecli.cli.fuse import ONE_ROW, check_attention_options, load_weights
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
    Weights,
    to_grid,
)

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
    weights: Weights = None,
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
        typer.Option(metavar="FILE|-", help="CSV, TSV or JSON lines with id,image,text; - takes lines as they come."),
    ] = None,
    image_pattern: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Where the id stands in an image's file name: '{id}.image.npy'."),
    ] = None,
    text_pattern: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Where the id stands in a text's file name: '{id}.text.npy'.")
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the tensor to take from each .safetensors of images.")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the tensor to take from each .safetensors of texts.")
    ] = None,
    suffix: Annotated[
        str, typer.Option(metavar=".npy|.safetensors", help="Format of the result files in a folder OUT.")
    ] = ".npy",
    dtype: Dtype = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, max=1024, help="Number of processes.  [default: all cores]")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts, from 1: for job arrays.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, metavar="N", help="Do at most N pairs.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do only the pairs that failed, or lacked a side, before.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh: do all pairs again.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Do not count ids with only one side as failures.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first pair that fails.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
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
    """Fuse many pairs; start it again to go on where it was.

    fusecli batch images/ texts/ -o fused/
    """
    from fusecli.arrays import cores
    from fusecli.batch import run as batches
    from fusecli.batch.job import Options
    from fusecli.cli.progress import INTERRUPTED, Progress, explain
    from fusecli.errors import InputError, UsageError

    output, attention = _without_slash(output), attention and _without_slash(attention)
    sources = Sources(images, texts, manifest, image_key, text_key, image_pattern, text_pattern, tokens)
    check_sources(sources)
    _check_outputs(output, attention, suffix, weights, sources)
    dumped = attention and batches.written_suffix(attention, suffix)
    placed = {"tokens": tokens, "grid": grid, "skip-rows": skip_rows}
    given = {"attention-mean": attention_mean, "attention-dtype": attention_dtype, **placed}
    check_attention_options(dumped, given)
    if overwrite and retry_failed:
        raise UsageError("--overwrite forgets what has failed", where="--retry-failed", hint="leave one of them out")
    if dtype == "bfloat16" and batches.written_suffix(output, suffix).endswith(".npy"):
        raise UsageError(".npy cannot name bfloat16", where="--dtype", hint="-o OUT.safetensors, or another --suffix")
    if shard and overwrite:
        hint = f"rm -r {output}, then start the parts"
        raise UsageError("a part cannot start all parts afresh", where="--overwrite", hint=hint)
    loaded = load_weights(weights, num_heads, seed, residual, attention, lambda line: note(line, quiet))
    part = _shard(shard)
    request = batches.Request(
        weights=loaded,
        output=output,
        attention=attention,
        suffix=suffix,
        options=Options(dtype, attention_mean, attention_dtype, allow_nonfinite),
        facts=sources.seen_from(output),
        workers=workers or cores(),
        device=device,
        shard=part,
        limit=limit,
        retry_failed=retry_failed,
        overwrite=overwrite,
        fail_fast=fail_fast,
        tokens=_read_tokens(tokens) if tokens else None,
        grid=to_grid(grid),
        skip_rows=skip_rows,
    )
    if dry_run:
        _tell_plan(request, find_pairs(sources, [output, attention], part, weights), quiet)
        return
    if attention and attention_mean and batches.is_one_file(attention) and attention.endswith(".npy"):
        told = "will be [B, N, M], which `fusecli show` takes for heads; .safetensors says what it is"
        note(f"{attention}: {told}", quiet)
    try:
        with Progress(quiet, json, output, suffix) as progress:
            summary = batches.run(request, partial(find_pairs, sources, [output, attention], part, weights), progress)
    except KeyboardInterrupt:
        note(INTERRUPTED, quiet)
        raise typer.Exit(130) from None
    if summary.one_row and loaded.config.can_forget_text:
        note(f"{summary.one_row:,} of the pairs: {ONE_ROW}", quiet)
    came = summary.fused or summary.skipped or summary.failures or summary.missed or retry_failed
    if manifest == "-" and not came:
        raise InputError("no pairs came", where="<stdin>", wanted="lines with id,image,text")
    code = explain(summary, request, allow_missing, quiet)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True)
class Sources:
    """Where the pairs come from, as it was typed."""

    images: str | None
    texts: str | None
    manifest: str | None
    image_key: str | None
    text_key: str | None
    image_pattern: str | None
    text_pattern: str | None
    tokens: str | None = None

    @property
    def one_place(self) -> bool:
        """Whether both sides lie in the same place."""
        if self.images is None:
            return False
        return self.texts is None or os.path.realpath(self.texts) == os.path.realpath(self.images)

    def paths(self) -> list[str]:
        """The places that are read."""
        return [path for path in (self.images, self.texts, self.manifest, self.tokens) if path and path != "-"]

    def seen_from(self, output: str) -> dict[str, str | None]:
        """For the ledger, paths as seen from the output: moved together, they are still the same."""
        facts = asdict(self) | {"texts": self.texts or self.images}
        start = os.path.realpath(output)
        for name in ("images", "texts", "manifest", "tokens"):
            if facts[name] not in (None, "-"):
                real = os.path.realpath(facts[name])
                lasts = os.path.isfile(real) or os.path.isdir(real)  # a pipe is another one each time
                facts[name] = os.path.relpath(real, start) if lasts else "-"
        return facts


def check_sources(sources: Sources) -> None:
    """Raise `UsageError` if the options do not say where pairs come from."""
    from fusecli.collections import matcher
    from fusecli.errors import UsageError

    for name, value in asdict(sources).items():
        if value == "":  # often a variable of the shell that is not set
            where = name.upper() if name in ("images", "texts") else f"--{name.replace('_', '-')}"
            raise UsageError("is empty", where=where, hint="leave it out, or look whether a variable is set")
    if sources.manifest is None and sources.images is None:
        raise UsageError("no features", hint="fusecli batch IMAGES TEXTS -o FOLDER, or --manifest FILE")
    if sources.manifest is not None and sources.images is not None:
        raise UsageError("a manifest names both sides itself", where="--manifest", hint="leave out IMAGES and TEXTS")
    patterns = {"image": sources.image_pattern, "text": sources.text_pattern}
    if sources.manifest is not None and any(patterns.values()):
        hint = "leave out --image-pattern and --text-pattern"
        raise UsageError("a manifest names every id itself", where="--manifest", hint=hint)
    apart = (sources.image_pattern, sources.text_pattern), (sources.image_key, sources.text_key)
    if sources.one_place and not any(image != text and None not in (image, text) for image, text in apart):
        hint = "give TEXTS of their own, or --image-pattern '{id}.image.npy' --text-pattern '{id}.text.npy'"
        raise UsageError(
            "images and texts are the same place, with nothing to distinguish them", where=sources.images, hint=hint
        )
    for side, pattern in patterns.items():
        try:
            matcher("{id}" if pattern is None else pattern)
        except ValueError:
            raise UsageError("no pattern", where=f"--{side}-pattern", found=pattern, wanted="{id} in it once") from None


def _check_outputs(output: str, attention: str | None, suffix: str, weights: str | None, sources: Sources) -> None:
    from fusecli.batch.run import state_folder
    from fusecli.collections import SUFFIXES
    from fusecli.errors import UsageError

    if not output:
        raise UsageError("no output", hint="add -o FOLDER")
    if suffix not in SUFFIXES:
        raise UsageError("unknown format", where="--suffix", found=suffix, wanted=" or ".join(SUFFIXES))
    inputs = {os.path.realpath(path) for path in (*sources.paths(), weights) if path}
    for path in filter(None, (output, attention)):
        _check_output(path, inputs, [place + "/" for place in inputs if os.path.isdir(place)])
    if attention:
        one, other = os.path.realpath(output) + "/", os.path.realpath(attention) + "/"
        state = os.path.realpath(state_folder(output)) + "/"
        if one.startswith(other) or other.startswith((one, state)):
            raise UsageError("attention would lie among the results", where=attention, hint="write to another place")


def _check_output(path: str, inputs: set[str], folders: list[str]) -> None:
    from fusecli.collections import SUFFIXES
    from fusecli.errors import UsageError

    real, elsewhere = os.path.realpath(path), "write to another place"
    if path == "-":
        hint = "name a folder; --json says what is done"
        raise UsageError("many results cannot go to stdout", where="-o -", hint=hint)
    if real in inputs:
        raise UsageError("output is also an input", where=path, hint=elsewhere)
    if os.path.isdir(path):
        return
    suffix = os.path.splitext(path)[1]
    if suffix.lower() in MISTAKEN and suffix not in SUFFIXES:
        raise UsageError("cannot be written", where=path, found=suffix, wanted="a folder, .safetensors or .npy")
    if os.path.exists(path) and not (path.endswith(SUFFIXES) and os.path.isfile(path)):
        raise UsageError("is a file or a pipe", where=path, wanted="a folder, .safetensors or .npy")
    if path.endswith(SUFFIXES) and real.startswith(tuple(folders)):
        raise UsageError("output would lie among the inputs", where=path, hint=elsewhere)


def _read_tokens(path: str) -> Any:
    from fusecli.dumps import read_tokens

    tokens = read_tokens(path)
    tokens.require_many()
    return tokens


def _without_slash(path: str) -> str:
    return path.rstrip("/") or path[:1]


def _shard(text: str | None) -> Any:
    from fusecli.batch.plan import Shard
    from fusecli.errors import UsageError

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (len(text) < 20 and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        hint = "--shard $SLURM_ARRAY_TASK_ID/8 with --array=1-8"
        raise UsageError("no such part", where="--shard", found=text, wanted="I/N, I from 1 to N", hint=hint)
    return Shard(int(number), int(count))


def find_pairs(sources: Sources, outputs: list[str | None], shard: Any, weights: str | None = None) -> Any:
    """The pairs, or the manifest that reads them from standard input."""
    from fusecli.batch.apart import Inputs
    from fusecli.batch.feed import from_collections, from_manifest
    from fusecli.batch.manifest import Manifest
    from fusecli.batch.plan import match
    from fusecli.collections import open_collection
    from fusecli.errors import FileError, InputError

    keys = sources.image_key, sources.text_key
    inputs = Inputs(filter(None, outputs))
    for place in (*sources.paths(), weights):
        if place and os.path.isfile(place):
            inputs.see(place)
    if sources.manifest == "-":
        if sys.stdin is None:
            raise FileError("standard input is closed", where="-")
        return Manifest("<stdin>", "", *keys)
    if sources.manifest is not None:
        path = sources.manifest
        return from_manifest(Manifest(path, os.path.dirname(path), *keys), path, shard, inputs)
    image_place = sources.images or ""
    text_place = sources.texts or image_place
    own = {os.path.realpath(path) for path in outputs if path}
    images = open_collection(image_place, sources.image_key, sources.image_pattern, own)
    texts = open_collection(text_place, sources.text_key, sources.text_pattern, own)
    found = match(images, texts, shard)
    if not found.both and not shard:
        shown = [", ".join(ids[:3]) or "nothing" for ids in (found.no_text, found.no_image)]
        raise InputError(
            "no id has both an image and a text",
            found=f"{shown[0]} in {image_place}; {shown[1]} in {text_place}",
            wanted="the same names on both sides",
            hint="ids are paths without suffix, names of tensors or numbers of rows; see --image-pattern",
        )
    return from_collections(images, texts, found, inputs)


def _tell_plan(request: Any, pairs: Any, quiet: bool) -> None:
    from fusecli.batch.manifest import Manifest
    from fusecli.batch.run import look
    from fusecli.errors import UsageError

    if isinstance(pairs, Manifest):
        raise UsageError("lines that have not come yet cannot be planned", where="--dry-run")
    done, bad, todo = look(request, pairs)
    note(f"{len(pairs.ids):,} pairs: {done:,} done, {bad:,} failed or incomplete before, {todo:,} to do", quiet)
    for outcome in pairs.known[:5]:
        what = outcome.facts.get("message") or f"no {outcome.facts['missing']} for {outcome.id}"
        note(what, quiet)
    if len(pairs.known) > 5:
        note(f"and {len(pairs.known) - 5:,} more that cannot be fused", quiet)
