"""``fusecli fuse``: one pair."""

from __future__ import annotations

import os
import stat
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusecli.cli.console import emit, note
from fusecli.cli.options import (
    AllowNonfinite,
    AttentionDtype,
    AttentionMean,
    Debug,
    Device,
    Dtype,
    GridSize,
    Json,
    NumHeads,
    Quiet,
    Residual,
    Seed,
    SkipRows,
    WeightsOption,
    refuse_stdin_twice,
    require_names,
    to_grid,
)
from fusecli.cli.paths import pair_id, refuse_same_file
from fusecli.cli.shared import KEPT_TEXT, ONE_ROW, check_attention_options, load_weights
from fusecli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from fusecli.pipeline import Fused, Output, Pair
    from fusecli.weights import Config, Weights

#: Other names of standard output: opened anew, they would write over what is there.
STDOUT_PATHS = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class Format(StrEnum):
    """Formats that can be written."""

    npy = "npy"
    safetensors = "safetensors"


def fuse(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE", help="Image features [M, Di]: .npy, .safetensors or - (stdin; IMAGE before TEXT)."
        ),
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text features [N, Dt], likewise.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where the fused features [N, D] go; - is stdout.")
    ],
    weights: WeightsOption = None,
    attention: Annotated[
        str | None, typer.Option("--attention", "-a", metavar="FILE", help="Also write the attention [H, N, M].")
    ] = None,
    attention_mean: AttentionMean = False,
    attention_dtype: AttentionDtype = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Tokens of TEXT, as JSON or one a line; stored in the .safetensors of --attention."
        ),
    ] = None,
    grid: GridSize = None,
    skip_rows: SkipRows = None,
    residual: Residual = False,
    image_key: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the tensor in IMAGE.")] = None,
    text_key: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the tensor in TEXT.")] = None,
    dtype: Dtype = None,
    format: Annotated[
        Format | None, typer.Option(help="Format of the output.  [default: by suffix; npy for -]")
    ] = None,
    num_heads: NumHeads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fuse one pair: each text row attends to the image rows.

    fusecli fuse image.npy text.npy -o fused.npy
    """
    parameters = locals()
    from fusecli import pairs, pipeline
    from fusecli.formats import has_names, is_stream
    from fusecli.machine import cores

    started = time.perf_counter()
    output = "-" if output in STDOUT_PATHS else output
    attention = "-" if attention in STDOUT_PATHS else attention
    _check_streams(output, attention, json)
    refuse_stdin_twice(tokens, image, text)
    placed = {"tokens": tokens, "grid": grid, "skip-rows": skip_rows}
    given = {"attention-mean": attention_mean, "attention-dtype": attention_dtype, **placed}
    require_names({"--output": output})
    check_attention_options(attention, given)
    refuse_same_file([output, attention], [image, text, weights, tokens])
    layout = to_grid(grid), skip_rows
    stored_image = pairs.find_features(image, "image", image_key)
    stored_text = pairs.find_features(text, "text", text_key)
    loaded = load_weights(weights, num_heads, seed, residual, attention, lambda line: note(line, quiet))
    gate = attention is not None and pipeline.takes_gate(loaded, attention)
    told = None
    if attention and has_names(attention):
        shape = (stored_text.shape[0], stored_image.shape[0])
        told = _metadata(loaded, attention_mean, tokens, layout, pair_id(image, text), shape)
    form = pipeline.Output(
        pipeline.to_file(output, "fused", format),
        pipeline.to_file(attention, "attention", gate=gate, metadata=told) if attention else None,
        attention_mean=attention_mean,
        attention_dtype=attention_dtype,
        dtype=dtype,
        finite=not allow_nonfinite,
        stream=is_stream(output) or (attention is not None and is_stream(attention)),
        gate=gate,
        threads=cores() if device == "cpu" else 1,
    )
    done = _fuse(loaded, pipeline.Pair(stored_image, stored_text), form, device, [output, attention])
    if done.m == 1:
        _tell_of_one_row(loaded.config, quiet)
    if json:
        emit(_facts(parameters | {"output": output, "attention": attention}, loaded, done, started))
    elif output != "-":
        note(f"{output}: [{done.n}, {done.dim}] {done.dtype} from {done.m} image and {done.n} text rows", quiet)


def _fuse(weights: Weights, pair: Pair, form: Output, device: str, outputs: list[str | None]) -> Fused:
    import numpy as np

    from fusecli.arrays import to_device
    from fusecli.pipeline import fuse_pair

    mover = None if device == "cpu" else to_device(device)
    try:
        with np.errstate(all="ignore"):  # what overflows is found by looking
            return fuse_pair(weights, pair, form, mover)
    except BrokenPipeError as error:
        if None in outputs:
            raise
        # Whoever stops reading one result has not said that the other is not wanted.
        raise OutputError("its reader has gone, so the results are incomplete", where=error.filename) from None


def _facts(given: dict[str, Any], weights: Weights, done: Fused, started: float) -> dict[str, Any]:
    """What ``--json`` says, of the parameters ``given`` and of what was done."""
    return {
        "output": given["output"],
        "shape": [done.n, done.dim],
        "dtype": done.dtype,
        "image": [done.m, weights.image_dim],
        "text": [done.n, weights.text_dim],
        "attention": given["attention"],
        "weights": given["weights"],
        "method": weights.config.method,
        **weights.config.options(),
        "device": given["device"],
        "seconds": round(time.perf_counter() - started, 4),
    }


def _metadata(
    weights: Weights,
    mean: bool,
    tokens: str | None,
    layout: tuple[tuple[int, int] | None, int | None],  # the grid of the image rows, and the rows before it
    id: str,
    shape: tuple[int, int],
) -> dict[str, str]:
    from fusecli.checkpoint import dump_facts, fingerprint
    from fusecli.dumps import DumpMetadata, read_tokens

    words = read_tokens(tokens) if tokens else None
    if words:
        words.require(id)
    return DumpMetadata(dump_facts(weights.config, fingerprint(weights), mean), words, *layout).of_one(id, shape)


def _tell_of_one_row(config: Config, quiet: bool) -> None:
    if config.can_forget_text:
        note(ONE_ROW, quiet)
    elif config.residual or (config.method == "gated" and config.gate == "tanh"):
        note(KEPT_TEXT, quiet)


def _check_streams(output: str, attention: str | None, json: bool) -> None:
    for path in (output, attention):
        if path and _is_terminal(path):
            raise UsageError("binary data on a terminal", where=path, hint="name a file, or pipe it on")
    if "-" in (output, attention) and json:
        raise UsageError("--json and a result would both go to stdout", hint="write the result to a file")


def _is_terminal(path: str) -> bool:
    if path == "-":
        return sys.stdout.isatty()
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):
            return False
        fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)
