"""Options that commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class DtypeName(StrEnum):
    """What an output can be stored as."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


Weights = Annotated[
    str | None,
    typer.Option("--weights", "-w", metavar="FILE", envvar="FUSECLI_WEIGHTS", help="Checkpoint of the fusion."),
]
AttentionMean = Annotated[bool, typer.Option("--attention-mean", help="Write its mean over heads, [N, M].")]
Residual = Annotated[bool, typer.Option("--residual", help="Add the text to the result (Dt = D).")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Dtype of the output.  [default: the text's]")]
NumHeads = Annotated[
    int | None, typer.Option(min=1, help="Number of heads, for weights that do not say it.  [default: 8]")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the untrained weights that are used without --weights.")
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to compute.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the features through, into the output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
