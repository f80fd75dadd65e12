"""The command line: parse, call one function, show. Errors become words here."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from importlib import import_module

import typer

from fusecli import __version__
from fusecli.cli.console import complain, flush_stdout, open_streams
from fusecli.cli.light import LightCommand, LightGroup
from fusecli.errors import FusecliError, is_out_of_memory
from fusecli.machine import BLAS_THREADS, have_threads_sleep, listen

#: What the libraries that NumPy and torch multiply with take the number of their threads from.
THREADS = (
    BLAS_THREADS,
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
#: The commands in the order of the help, each with the module that it is in.
COMMANDS = {
    "fuse": "fuse",
    "batch": "batch",
    "train": "train",
    "init": "weights",
    "convert": "weights",
    "inspect": "inspect",
    "show": "show",
}


def _app(named: str) -> typer.Typer:
    """The command that was ``named`` alone, all where it is none: importing and building the others takes time."""
    app = typer.Typer(
        cls=LightGroup,
        help="Fuse image features into text features with attention.",
        epilog="Start here: fusecli fuse image.npy text.npy -o fused.npy",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich takes longer to import than the help to read
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_of_all)
    for name in (named,) if named in COMMANDS else COMMANDS:
        app.command(cls=LightCommand)(getattr(import_module(f"fusecli.cli.{COMMANDS[name]}"), name))
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fusecli {__version__}")
        raise typer.Exit


def _of_all(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Fuse image features into text features with attention."""


def main() -> None:
    """Run the command line and exit with its code; see `fusecli.errors` for the codes."""
    # Libraries that multiply on several threads round differently for different numbers of them. One thread
    # gives the same bytes on every machine size, from `fuse` and from any number of workers of `batch`.
    for name in THREADS:
        os.environ[name] = "1"
    have_threads_sleep()  # torch has several all the same, in `train`
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for us, not for users
    for number in (signal.SIGTERM, signal.SIGHUP):
        listen(number, _leave)
    open_streams()
    sys.exit(_ended(_run()))


def _run() -> int | str | None:
    try:
        app = _app(sys.argv[1] if len(sys.argv) > 1 else "")
        listen(signal.SIGINT, signal.default_int_handler)
        app(prog_name="fusecli")
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        return _explain(error)
    return 0


def _ended(code: int | str | None) -> int | str | None:
    """The exit code of a command that ended with ``code``, when the last of what it printed has gone out."""
    error = flush_stdout()
    return _explain(error) if error and not code and not isinstance(error, BrokenPipeError) else code


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)  # an exception, so that unfinished files are removed


def _explain(error: Exception) -> int:
    """Say what happened; returns the exit code."""
    if isinstance(error, FusecliError):
        complain(str(error), error.hint)
        return error.exit_code
    if is_out_of_memory(error):
        told = f": {error}" if str(error) else ""
        complain(f"out of memory{told}", "use smaller inputs, fewer image rows, smaller widths or batches")
    elif isinstance(error, OSError):
        where = error.filename or _missing_folder()
        complain(f"{where}: {error.strerror or error}" if where else f"{error.strerror or error}", None)
    elif isinstance(error, ImportError):
        hint = "install fusecli again, or allow it more memory (ulimit -v)"
        complain(f"a library cannot be loaded: {error}", hint)
    else:  # a mistake of ours
        told = f"{type(error).__name__}: {error}"
        complain(f"internal error: {told}", "run again with --debug and report what it shows")
    return 1


def _missing_folder() -> str | None:
    try:
        os.getcwd()
    except OSError:
        return "the current folder"
    return None
