"""Options that commands share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from fusecli.errors import UsageError


class MethodName(StrEnum):
    """The methods, as `fusecli.weights` has them."""

    attention = "attention"
    weighted_sum = "weighted-sum"
    concat = "concat"
    gated = "gated"
    transformer = "transformer"


class Gate(StrEnum):
    """The gates of method gated."""

    sigmoid = "sigmoid"
    tanh = "tanh"


class DtypeName(StrEnum):
    """What an output can be stored as."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", "-w", metavar="FILE", envvar="FUSECLI_WEIGHTS", help="Checkpoint with the weights of the fusion."
    ),
]
AttentionMean = Annotated[
    bool, typer.Option("--attention-mean", help="Write the attention averaged over heads, [N, M].")
]
AttentionDtype = Annotated[
    DtypeName | None,
    typer.Option(help="Dtype of the written attention.  [default: float32; float64 if a side is float64]"),
]
GridSize = Annotated[
    str | None,
    typer.Option(
        "--grid", metavar="HxW", help="Lines and columns of image rows in the picture, unless it is a square."
    ),
]
Residual = Annotated[
    bool, typer.Option("--residual", help="Add the text features to the result; their width must be D.")
]
Dtype = Annotated[DtypeName | None, typer.Option(help="Dtype of the output.  [default: the text's]")]
NumHeads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Number of attention heads, for a checkpoint that does not say.  [default: 8]"
    ),
]
Seed = Annotated[
    int,
    typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of the random weights that are used without --weights."),
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to compute.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Accept NaN and Inf in the features; they pass into the output.")
]
SkipRows = Annotated[
    int | None,
    typer.Option(
        "--skip-rows", metavar="N", min=0, help="Number of image rows before the grid (class token, registers)."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]
MethodOption = Annotated[MethodName, typer.Option("--method", "-m", help="How to fuse: see Methods in the README.")]
GateOption = Annotated[Gate | None, typer.Option("--gate", help="Gate of method gated.  [default: sigmoid]")]
NumLayers = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=1024, help="Number of layers of method transformer.  [default: 1]")
]
DimFeedforward = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=2**20,
        help="Width inside the feed-forward layers of method transformer.  [default: 4 D]",
    ),
]
SelfAttention = Annotated[
    bool, typer.Option("--self-attention", help="Let the text rows of method transformer attend to each other as well.")
]
Dropout = Annotated[
    float | None,
    typer.Option(metavar="X", min=0, max=0.99, help="Dropout of method transformer in training.  [default: 0.1]"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


#: The parameters of commands that are options of methods.
METHOD_OPTIONS = (
    "num_heads",
    "residual",
    "gate",
    "num_layers",
    "dim_feedforward",
    "self_attention",
    "dropout",
    "layer_norm",
)


def to_grid(text: str | None) -> tuple[int, int] | None:
    """Height and width from what was given for ``--grid``.

    Raises:
        UsageError: it is no grid.
    """
    from fusecli.grid import parse_grid

    try:
        return parse_grid(text) if text is not None else None
    except ValueError:
        raise UsageError("not a grid", where="--grid", found=text, wanted="height x width", hint="--grid 7x9") from None


def given_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's ``parameters`` that are options of methods, and were given."""
    found = {name: parameters[name] for name in METHOD_OPTIONS}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def method_options(method: MethodName, parameters: dict[str, Any]) -> dict[str, Any]:
    """Method and options as `fusecli.Config` takes them; those that were not given are left out.

    Raises:
        UsageError: an option that the method does not have.
    """
    from fusecli.weights import OPTIONS, Config

    given: dict[str, Any] = {
        name: str(value) if isinstance(value, Gate) else value for name, value in given_options(parameters).items()
    }
    for name in given:
        if name not in OPTIONS[method]:
            what = f"only for --method {', '.join(known for known, names in OPTIONS.items() if name in names)}"
            raise UsageError(what, where=f"--{name.replace('_', '-')}", found=f"--method {method}", hint="leave it out")
    Config(str(method), **given)
    return {"method": str(method), **given}


def refuse_stdin_twice(tokens: str | None, *others: str | None) -> None:
    """Raise `UsageError` if tokens would come on standard input, and one of the ``others`` too."""
    if tokens == "-" and "-" in others:
        raise UsageError("standard input is used already", where="--tokens -", hint="name a file")


def require_names(given: Mapping[str, str | None]) -> None:
    """Raise `UsageError` for an empty name among those ``given`` by option: often a variable that is not set."""
    for where, name in given.items():
        if name == "":
            raise UsageError("is empty", where=where, hint="leave it out, or check that the variable is set")


def require_safetensors(output: str) -> None:
    """Raise `UsageError` for a checkpoint of another name."""
    from fusecli.formats import has_names

    if not output or output == "-":
        raise UsageError("no file name", where="--output", hint="-o fusion.safetensors")
    if not has_names(output):
        stem = output + "fusion" if output.endswith("/") else os.path.splitext(output)[0]
        hint = f"-o {shlex.quote(stem)}.safetensors"
        raise UsageError("checkpoints are .safetensors files", where=output, hint=hint)
