"""``fusecli show``: attention that one can look at."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusecli.cli.console import emit, note, printable
from fusecli.cli.options import Debug, GridSize, Json, Quiet, SkipRows, refuse_stdin_twice, require_names, to_grid
from fusecli.cli.paths import refuse_same_file
from fusecli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from fusecli.heatmap.dump import Dumps, Wanted
    from fusecli.heatmap.view import HeatMaps


class Heads(StrEnum):
    """Which heads are shown."""

    mean = "mean"
    all = "all"


class Scale(StrEnum):
    """What a colour is a share of, as `fusecli.heatmap.shades` has them."""

    token = "token"
    all = "all"
    contrast = "contrast"


class Fit(StrEnum):
    """What an encoder does with a picture of another shape, as `fusecli.heatmap.picture` has them."""

    contain = "contain"
    cover = "cover"
    stretch = "stretch"


#: Columns of a table's words.
LONGEST = 60
#: Suffixes of what is drawn.
PAGES, FIGURES = (".html", ".htm"), (".png", ".svg")


def show(
    attention: Annotated[
        str, typer.Argument(metavar="ATTENTION", help="A dump of attention [H, N, M], or a folder or file of many.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="OUT", help="A .png, .svg or .html, or a folder for a report of many."),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", metavar="ID", help="Show only this pair.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="JSON, a token a line, or JSON lines with id and tokens.  [default: the dump's]"
        ),
    ] = None,
    token: Annotated[
        list[str] | None,
        typer.Option("--token", metavar="TOKEN", help="Show only this token, by word or number; repeatable."),
    ] = None,
    head: Annotated[
        int | None, typer.Option("--head", metavar="N", help="Show only this head, counted from 0.")
    ] = None,
    heads: Annotated[Heads, typer.Option("--heads", help="Each head by itself, or their mean.")] = Heads.mean,
    grid: GridSize = None,
    skip_rows: SkipRows = None,
    scale: Annotated[
        Scale,
        typer.Option(help="Full colour: the token's largest weight, the largest of all, or the token's own range."),
    ] = Scale.token,
    image: Annotated[str | None, typer.Option(metavar="PICTURE", help="The picture, to lay the maps over.")] = None,
    images: Annotated[str | None, typer.Option(metavar="FOLDER", help="Pictures by id, for a report.")] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(help="How the encoder fitted the picture: padded, cut or stretched.  [default: cover]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which part of the picture each token looked at.

    fusecli show attention.safetensors --image photo.jpg -o map.html
    """
    from fusecli.dumps import read_tokens
    from fusecli.heatmap.dump import Wanted, open_dumps
    from fusecli.heatmap.view import ONE_ROW, look_at

    _check_options(locals())
    wanted = Wanted(read_tokens(tokens) if tokens else None, to_grid(grid), skip_rows)
    dumps = open_dumps(attention)
    style = str(fit or Fit.cover), str(scale)
    if output and _is_folder(output):
        if wanted.tokens and len(dumps.ids) > 1:
            wanted.tokens.require_many()
        _report(dumps, output, wanted, images, style, overwrite, quiet)
        return
    dump = dumps.open(id, wanted)
    view = look_at(dump, head, heads is Heads.all, token)
    if json:
        emit(view.facts())
    if output:
        _draw(view, output, image, *style, quiet)
        note(f"{output}: {view.title}", quiet)
    elif dump.m == 1 and not json:
        where = printable(dump.stored.where)
        if dump.gate is None:
            print(f"{where}: {ONE_ROW[0]}\n{ONE_ROW[1]}")
        else:  # the share of the image that each token takes
            note(
                f"{where}: one image row, so each weight is 1, whatever the token says; the gates are the tokens' own",
                quiet,
            )
            print("\n".join(_table(view)))
    elif not json:
        _print(view, style[1])


def _check_options(given: dict[str, Any]) -> None:
    output, attention = given["output"], given["attention"]
    require_names({f"--{name}": given[name] for name in ("image", "images", "output", "tokens", "id")})
    if given["head"] is not None and given["heads"] is Heads.all:
        raise UsageError("one head and all heads", where="--head", hint="leave one of them out")
    folder = bool(output) and _is_folder(output)
    if given["image"] and (not output or folder):
        hint = "--images FOLDER, with a picture for each id" if folder else "add -o map.html, map.png or map.svg"
        raise UsageError("no map to draw the picture under", where="--image", hint=hint)
    if given["images"] and not folder:
        raise UsageError("pictures of many pairs, for a report", where="--images", hint="add -o report/")
    if given["fit"] and not (given["image"] or given["images"]):
        raise UsageError("no picture to fit", where="--fit", hint="add --image PICTURE, or --images FOLDER")
    alone = {
        "--id": given["id"],
        "--token": given["token"],
        "--head": given["head"] is not None,
        "--json": given["json"],
        "--heads": given["heads"] is Heads.all,
    }
    for name, value in alone.items():
        if folder and value:
            raise UsageError(
                "not for a report, which shows everything", where=name, hint="leave it out, or write -o map.html"
            )
    if output == "-":
        raise UsageError("pictures and pages go to files", where="-o", hint="-o map.html")
    refuse_stdin_twice(given["tokens"], attention)
    refuse_same_file([output], [attention, given["image"], given["tokens"]])


def _is_folder(output: str) -> bool:
    """Whether a report is asked for: a name without suffix, or a folder that is there."""
    return output.endswith("/") or os.path.isdir(output) or not _suffix(output)


def _suffix(output: str) -> str:
    """In lower case; that of a picture or page also where it is all of the name."""
    name = os.path.basename(output).lower()
    return name if name in (*PAGES, *FIGURES) else os.path.splitext(name)[1]


def _draw(view: HeatMaps, output: str, image: str | None, fit: str, scale: str, quiet: bool) -> None:
    suffix = _suffix(output)
    if suffix in PAGES:
        from fusecli.heatmap.page import write_page

        write_page(view, output, image, fit, scale)
    elif suffix in FIGURES:
        from fusecli.heatmap.figure import write_figure

        for line in write_figure(view, output, image, fit, scale):
            note(line, quiet)
    else:
        hint, wanted = "a folder, for a report, ends with /", ".png, .svg or .html"
        raise UsageError("cannot tell what to draw", where=output, found=suffix, wanted=wanted, hint=hint)


def _report(
    dumps: Dumps, output: str, wanted: Wanted, images: str | None, style: tuple[str, str], overwrite: bool, quiet: bool
) -> None:
    from fusecli.cli.progress import counted
    from fusecli.heatmap.report import write_report

    done = write_report(dumps, output, wanted, images, *style, overwrite, lambda ids: counted(ids, quiet))
    for line in done.failed[:5]:
        note(line, False)
    more = f", {len(done.failed):,} failed" if done.failed else ""
    single = f", {done.single:,} with one image row passed over" if done.single else ""
    bare = f", {done.bare:,} without a picture" if done.bare and images else ""
    pages = f"{done.pages:,} page" + ("s" if done.pages > 1 else "")
    note(f"{output}: {pages}{bare}{single}{more}; open {os.path.join(output, 'index.html')}", quiet)
    if done.failed:
        raise typer.Exit(4)


def _print(view: HeatMaps, scale: str) -> None:
    """On a terminal maps, elsewhere a plain table."""
    from rich.console import Console

    from fusecli.cli.tiles import Painter

    console = Console(emoji=False, highlight=False, soft_wrap=True)
    console.begin_capture()
    if console.is_terminal:
        _legend(console, view, scale)
        Painter(console).paint(view, scale)
        print(console.end_capture(), end="", flush=True)
    else:
        console.end_capture()
        print("\n".join(_table(view)), flush=True)


def _legend(console: Console, view: HeatMaps, scale: str) -> None:
    import math

    from fusecli.cli.tiles import fitted, shown_on
    from fusecli.heatmap.shades import FULL

    where = "line,column:" if view.dump.grid else "row:"
    below = f"below: entropy of at most {math.log2(view.dump.m):.2f} bits, then {where}weight"
    for line in (f"{view.dump.id}: {view.title}", f"colour: {FULL[scale]}", below):
        console.print(fitted(shown_on(console, line), console.width), markup=False)


def _table(view: HeatMaps) -> list[str]:
    from rich.cells import cell_len

    from fusecli.cli.tiles import fitted

    grid, gated = view.dump.grid, view.dump.gate is not None
    where = " (line,column)" if grid else ""
    rows = [["token", "bits", *(["gate"] if gated else []), f"strongest image rows{where}"]]
    for look in view.looks:
        top = []
        for row, weight in look.top:
            cell = grid.cell(row) if grid else None
            top.append(f"{row}{' ({},{})'.format(*cell) if cell else ''} {weight:.4f}")
        token = fitted(printable(look.label[:LONGEST]), LONGEST)
        rows.append([token, f"{look.bits:.3f}", *([f"{look.gate:.3f}"] if gated else []), "  ".join(top)])
    widths = [max(cell_len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    lines = []
    for token, *numbers, last in rows:
        padded = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join([token + " " * (widths[0] - cell_len(token)), *padded, last]).rstrip())
    return lines
