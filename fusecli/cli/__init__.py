"""The command line: parse, call one function, show. Errors are caught here and nowhere else."""

from __future__ import annotations

import sys
import traceback

import typer

from fusecli import __version__
from fusecli.cli.console import complain
from fusecli.cli.fuse import fuse
from fusecli.cli.inspect import inspect
from fusecli.cli.light import LightCommand, LightGroup
from fusecli.cli.weights import convert, init
from fusecli.errors import FusecliError

app = typer.Typer(
    cls=LightGroup,
    help="Fuse image features into text features with attention.",
    epilog="Start here: fusecli fuse image.npy text.npy -o fused.npy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than the help to read
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (fuse, init, convert, inspect):
    app.command(cls=LightCommand)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fusecli {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Fuse image features into text features with attention."""


def main() -> None:
    """Run the command line and exit with its code; see `fusecli.errors` for the codes."""
    debug = "--debug" in sys.argv
    try:
        app(prog_name="fusecli")
    except FusecliError as error:
        complain(str(error), error.hint)
        code = error.exit_code
    except MemoryError as error:
        complain(f"out of memory: {error}", "use smaller inputs, or fewer image rows")
        code = 1
    except Exception as error:  # a mistake of ours
        complain(f"internal error: {type(error).__name__}: {error}", "run again with --debug and report what it shows")
        code = 1
    if debug:
        traceback.print_exc()
    sys.exit(code)
