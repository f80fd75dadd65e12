"""``fusecli inspect``: what a file is."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fusecli.cli.console import complain, emit, note, printable
from fusecli.cli.options import Debug
from fusecli.errors import CheckpointError, FusecliError


def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Features, checkpoints or attention dumps.")],
    num_heads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Heads of a checkpoint that does not say.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable object a file on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Show what files hold.

    Names, shapes, dtypes, norms of rows and number of NaN/Inf; of a checkpoint also method, heads, parameters
    and a fingerprint.

    fusecli inspect features.safetensors fusion.safetensors
    """
    from fusecli.describe import describe

    code = 0
    for path in files:
        try:
            facts = describe(path, num_heads, lambda line: note(line, quiet=False))
        except FusecliError as error:
            if len(files) == 1:
                raise
            complain(str(error), error.hint)
            code = max(code, error.exit_code)
            continue
        if json:
            emit(facts)
        else:
            _show(facts)
        if "problem" in facts:
            complain(facts["problem"], None)
            code = max(code, CheckpointError.exit_code)
    if code:
        raise typer.Exit(code)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape as unmarked
    from rich.table import Table

    def escape(text: str) -> str:
        return unmarked(printable(text))

    console = Console(emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    console.begin_capture()
    apart = ("file", "kind", "tensors", "problem")
    head = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in apart)
    console.print(f"[bold]{escape(facts['file'])}[/bold]: {facts['kind']}" + (f" ({escape(head)})" if head else ""))
    table = Table("tensor", "shape", "dtype", "norm of rows", "NaN/Inf", box=None, pad_edge=False)
    for row in facts["tensors"]:
        norms = row["norms"]
        spread = f"{norms['min']:.4g} to {norms['max']:.4g}, mean {norms['mean']:.4g}" if norms else "-"
        shape, bad = str(row["shape"]), "-" if row["nonfinite"] is None else str(row["nonfinite"])
        table.add_row(escape(row["name"] or "-"), escape(shape), escape(row["dtype"]), spread, bad)
    console.print(table)
    print(console.end_capture(), end="", flush=True)  # rich would end a closed pipe with an error
