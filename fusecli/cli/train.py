"""``fusecli train``: weights from pairs."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any

import typer

from fusecli.cli.console import emit, note
from fusecli.cli.lesson import ClassWeights, Objective, Task, check, check_labels, options_of_method, recipe_of
from fusecli.cli.options import (
    Debug,
    Device,
    DimFeedforward,
    Dropout,
    GateOption,
    Json,
    MethodName,
    NumLayers,
    Quiet,
    Residual,
    SelfAttention,
)
from fusecli.cli.paths import refuse_same_file
from fusecli.cli.progress import Epochs
from fusecli.cli.sources import ImageKey, ImagePattern, Sources, TextKey, TextPattern, complete_ids, find_pairs
from fusecli.errors import UsageError

#: Held-out pairs, below which intervals of the table are so wide that it says little.
FEW = 20


def train(
    images: Annotated[
        str | None,
        typer.Argument(metavar="IMAGES", help="Image features, in any place that `fusecli batch` takes."),
    ] = None,
    texts: Annotated[str | None, typer.Argument(metavar="TEXTS", help="Text features, likewise.")] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Checkpoint to write (.safetensors).")
    ] = "",
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="FILE", help="CSV with id,label: learn to predict the labels.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of --labels with the labels.  [default: label]")
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="Whether labels are classes or numbers.  [default: classify]")
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(help="What to learn without labels; match: which image belongs to a text.  [default: match]"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", "-w", metavar="FILE", help="Checkpoint to train further; it brings its method and options."
        ),
    ] = None,
    method: Annotated[
        MethodName | None,
        typer.Option("--method", "-m", help="How to fuse: see Methods in the README.  [default: gated]"),
    ] = None,
    feature_dim: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=2**20, help="D, the width of the fused features.  [default: the text's]"),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="H, the number of attention heads.  [default: 8]")
    ] = None,
    residual: Residual = False,
    gate: GateOption = None,
    num_layers: NumLayers = None,
    dim_feedforward: DimFeedforward = None,
    self_attention: SelfAttention = False,
    dropout: Dropout = None,
    layer_norm: Annotated[
        bool | None,
        typer.Option(
            "--layer-norm/--no-layer-norm",
            help="Normalise text and image first (layer norm).  [default: with all methods but attention]",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Passes over the pairs, at most.  [default: 12 with labels, else 6]"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=2, help="Pairs in one step; fewer where they are very long.")
    ] = 64,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="Highest learning rate (AdamW, warm-up, cosine).  "
            "[default: 0.0003; with labels, for new attention without --residual: 0.001]",
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(metavar="X", min=0, help="Weight decay of weight matrices and of the head.")
    ] = 0.05,
    text_dropout: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=0.99,
            help="With labels: share of the pairs whose text is hidden in a step.  [default: 0]",
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, max=0.99, help="Smoothing of labels that are classes.  [default: 0.1]"),
    ] = None,
    class_weights: Annotated[
        ClassWeights | None, typer.Option(help="With balanced, rare labels count as much as frequent ones.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Stop after so many epochs without progress.  [default: 12 with labels, else 3]"
        ),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(metavar="X", min=0.01, max=0.9, help="Share of the pairs by which the best epoch is chosen."),
    ] = 0.1,
    held_out: Annotated[
        float,
        typer.Option(metavar="X", min=0.01, max=0.9, help="Share of the pairs that only the table at the end uses."),
    ] = 0.2,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of starting weights, order and dropout.")
    ] = 0,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="CSV, TSV or JSON lines with id,image,text, in place of IMAGES and TEXTS."),
    ] = None,
    image_pattern: ImagePattern = None,
    text_pattern: TextPattern = None,
    image_key: ImageKey = None,
    text_key: TextKey = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Skip ids without image, text or label.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a stopped run, if there is one.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over instead of resuming a stopped run.")
    ] = False,
    device: Device = "cpu",
    bfloat16: Annotated[
        bool | None,
        typer.Option(
            "--bfloat16/--no-bfloat16",
            help="Learn from products in bfloat16.  [default: on GPUs, and CPUs with instructions for them]",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn the weights of a fusion from pairs.

    fusecli train images/ texts/ --labels labels.csv -o fusion.safetensors
    """
    parameters = locals()
    from fusecli import checkpoint
    from fusecli.training.files import files_of, goes_on
    from fusecli.training.labels import read_labels

    for where, rate in {"--lr": lr, "--weight-decay": weight_decay}.items():
        if rate == math.inf:
            raise UsageError("is infinite", where=where, wanted="a number")
    sources = Sources(images, texts, manifest, image_key, text_key, image_pattern, text_pattern)
    check(sources, output, labels, weights, validation + held_out)
    check_labels(parameters)
    given = options_of_method(parameters)
    loaded = None if weights is None else checkpoint.load(weights, num_heads, tell=lambda line: note(line, quiet))
    pairs = find_pairs(sources, [output])
    state = files_of(output)[-1]
    before = _stamp(state)
    known = read_labels(labels, label_column or "label") if labels is not None else None
    ids = complete_ids(pairs, known, allow_missing, quiet)
    features = {place.path for id in ids for place in pairs.places(id)}  # behind links, say
    refuse_same_file([output, *files_of(output)], sorted(features))
    goes_on(output, resume, overwrite)  # as `train_on` asks too, but that takes seconds to load
    try:
        with Epochs(quiet) as reporter:
            from fusecli.training.run import train_on

            chosen = recipe_of(parameters, known, given, loaded)
            facts = train_on(output, ids, pairs.places, chosen, reporter, resume, overwrite)
    except KeyboardInterrupt:
        kept = _stamp(state) not in (None, before if overwrite else None)
        note(f"interrupted; {_to_continue(overwrite) if kept else 'nothing is kept'}", quiet)
        raise typer.Exit(130) from None
    except Exception:
        if _stamp(state) not in (None, before):  # written by this run
            note(f"stopped; {_to_continue(overwrite)}", quiet)
        raise
    if facts["held_out"] < FEW:
        note(f"only {facts['held_out']} held-out pairs: too few for a reliable table", quiet)
    if json:
        emit({"output": output, **facts})
    else:
        _show(facts, output, quiet)


def _to_continue(overwrite: bool) -> str:
    return f"run the same command with {'--resume in place of --overwrite' if overwrite else '--resume'} to continue"


def _stamp(path: str) -> tuple[int, ...] | None:
    """What tells the file that is there from a later one of that name; None if there is none."""
    from fusecli.collections import stamp_of

    try:
        return stamp_of(os.stat(path))
    except OSError:
        return None


def _show(facts: dict[str, Any], output: str, quiet: bool) -> None:
    best = facts["best_epoch"]
    what = f"weights of epoch {best}" if best else "the weights that it began with: no epoch was clearly better"
    note(f"{output}: {what}; fingerprint {facts['fingerprint']}", quiet)
    note(f"{facts['held_out']:,} held-out pairs:  {facts['score']}  95% interval", quiet)
    for row in facts["table"]:
        note(f"  {row['features']:24} {row['score']:6.3f}   {row['low']:.3f} to {row['high']:.3f}", quiet)
    note(facts["verdict"], quiet)
