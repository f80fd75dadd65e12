"""Attention on a terminal and as pictures: planted maps are found again, and bad input is told of."""

from __future__ import annotations

import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusecli.errors import FileError, UsageError
from fusecli.heatmap.dump import Wanted, caption, open_dumps
from fusecli.heatmap.report import _pictures as pictures_of
from fusecli.heatmap.shades import colours, entropy, pooled, shades, strongest
from fusecli.heatmap.view import look_at
from tests.conftest import Run
from tests.planted import DOT, FITS, PICTURES, paint, place_of, plant, require_dot_in_hot_cell, terminal_cells

SNAPSHOTS = Path(__file__).parent / "snapshots"
TERMINALS = {
    "truecolor": {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"},
    "256": {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": ""},
    "plain": {"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"},
    "pipe": {"TERM": "dumb"},
}


def terminal(kind: str) -> dict[str, str]:
    """What a terminal of that kind, 80 columns wide, tells programs."""
    nothing = {"NO_COLOR": "", "COLORTERM": "", "FORCE_COLOR": ""}
    return nothing | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"} | TERMINALS[kind]


def drawn(rng: np.random.Generator, *shape: int) -> Any:
    return rng.dirichlet(np.full(shape[-1], 0.3), shape[:-1]).astype(np.float32)


@pytest.mark.parametrize("kind", TERMINALS)
@pytest.mark.parametrize("rows", ["grid", "strip"])
def test_what_each_terminal_shows_at_80_columns(run: Run, tmp_path: Path, kind: str, rows: str) -> None:
    m = 4 if rows == "grid" else 6
    weights = np.full((2, 3, m), 0.5 / (m - 1), np.float32)
    weights[:, np.arange(3), [1, 2, 3]] = 0.5
    save_file({"attention": weights}, tmp_path / "a.safetensors")
    (tmp_path / "t").write_text("red\n金魚\n<[bold]>")
    shown = run("show", "a.safetensors", "--tokens", "t", env=terminal(kind)).stdout.decode()
    shown = shown.replace("\x1b", "␛")
    path = SNAPSHOTS / f"{rows}-{kind}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown)
    assert shown == path.read_text()


@pytest.mark.parametrize("grid", [(4, 4), (3, 8), (9, 5), (16, 16), (50, 50)])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_planted_patch_is_hot_at_its_place_on_the_terminal(
    run: Run, tmp_path: Path, rng: np.random.Generator, grid: tuple[int, int], skip: int
) -> None:
    row = int(rng.integers(grid[0] * grid[1]))
    plant(tmp_path / "a.npy", [row + skip, skip], grid[0] * grid[1] + skip)
    size = f"{grid[0]}x{grid[1]}"
    shown = run("show", "a.npy", "--token", "0", "--grid", size, env=terminal("truecolor")).stdout.decode()
    cells = np.array(terminal_cells(shown))
    hot = np.argwhere(cells[..., 0] - cells[..., 2] > 100)
    at, extent = (hot.min(0) + hot.max(0) + 1) / 2, np.array(cells.shape[:2])
    step = -(-max(grid) // 32)  # patches a cell
    assert np.all(np.abs(at / extent * grid - np.array(divmod(row, grid[1])) - 0.5) <= step)
    plain = run("show", "a.npy", "--token", "0", "--grid", size, env=terminal("plain")).stdout.decode()
    assert sum("@@" in line for line in plain.splitlines()) in (1, 2)
    assert max(map(len, plain.splitlines())) <= 80


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
def test_a_planted_patch_is_hot_at_its_place_in_the_picture(
    run: Run, tmp_path: Path, shape: str, fit: str, grid: tuple[int, int]
) -> None:
    from PIL import Image

    line, column = map(int, place_of(DOT, PICTURES[shape], grid, fit))
    plant(tmp_path / "a.npy", [line * grid[1] + column], grid[0] * grid[1])
    paint(tmp_path / "p.png", PICTURES[shape])
    run("show", "a.npy", "--grid", f"{grid[0]}x{grid[1]}", "--image", "p.png", "--fit", fit, "-o", "map.png", "-q")
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"), int)
    ground = pixels[..., 2] - pixels[..., 1] > 20  # the purple of what is cold
    lines, columns = np.nonzero(ground[: pixels.shape[0] - 40])
    panel = pixels[lines.min() : lines.max() + 1, columns.min() : columns.max() + 1]
    require_dot_in_hot_cell(panel, (line, column), grid, PICTURES[shape], fit)


def test_the_hottest_patch_is_that_of_matplotlib(tmp_path: Path, rng: np.random.Generator) -> None:
    from matplotlib.figure import Figure

    for _ in range(50):
        heads, n, g, skip = (int(rng.integers(*span)) for span in ((1, 9), (1, 6), (2, 12), (0, 2)))
        weights = drawn(rng, heads, n, g * g + skip)
        np.save(tmp_path / "a.npy", weights)
        view = look_at(open_dumps(str(tmp_path / "a.npy")).open(None, Wanted()))
        cells = view.shades("token")
        for token in range(n):
            axes = Figure().subplots()
            shown = axes.imshow(weights.mean(0)[token, skip:].reshape(g, g)).get_array()
            assert shown is not None
            assert cells[token].argmax() == shown.argmax()
            assert view.looks[token].top[0][0] == weights.mean(0)[token].argmax()


def test_colours_are_those_of_viridis() -> None:
    import matplotlib as mpl

    shares = np.linspace(0, 1, 101)
    wanted = mpl.colormaps["viridis"](shares)[:, :3] * 255
    assert np.abs(colours(shares).astype(float) - wanted).max() < 8


def test_entropy_runs_from_none_to_the_number_of_rows() -> None:
    rows = np.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(entropy(rows), [0, 1, 2])
    assert not np.signbit(entropy(np.eye(40, dtype=np.float32))).any()


def test_the_strongest_rows_come_in_order_and_ties_by_number(rng: np.random.Generator) -> None:
    rows = rng.integers(0, 5, (20, 100)).astype(float)
    wanted = np.array([[j for _, j in sorted((-weight, j) for j, weight in enumerate(row))][:3] for row in rows])
    assert np.array_equal(strongest(rows, 3), wanted)


@pytest.mark.parametrize("scale", ["token", "all", "contrast"])
def test_shades_lie_between_nothing_and_full(rng: np.random.Generator, scale: str) -> None:
    maps = rng.random((4, 3, 3))
    shares = shades(maps, scale)
    tops, lows = shares.max((1, 2)), shares.min((1, 2))
    assert tops.max() == 1
    assert (tops == 1).all() == (scale != "all")
    assert lows.min() >= 0
    assert (lows == 0).all() == (scale == "contrast")
    assert np.array_equal(shares.reshape(4, -1).argsort(), maps.reshape(4, -1).argsort())
    assert np.isfinite(shades(np.zeros((2, 2, 2)), scale)).all()
    assert (shades(np.full((2, 2, 2), 0.25), scale) == 1).all()


def test_a_pooled_map_keeps_its_hottest_cell(rng: np.random.Generator) -> None:
    maps = rng.random((3, 37, 70))
    cells, steps = pooled(maps, (32, 32))
    assert steps == (2, 3)
    assert cells.shape == (3, 19, 24)
    for map, cell in zip(maps, cells, strict=True):
        line, column = divmod(int(map.argmax()), 70)
        assert divmod(int(cell.argmax()), 24) == (line // 2, column // 3)


def test_heads_are_their_own_and_their_mean(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    weights = drawn(rng, 3, 2, 16)
    np.save(tmp_path / "a.npy", weights)
    for options, wanted in (([], weights.mean(0)), (["--head", "2"], weights[2])):
        facts = json.loads(run("show", "a.npy", "--json", *options).stdout)
        assert [t["strongest"][0]["row"] for t in facts["tokens"]] == wanted.argmax(-1).tolist()
    facts = json.loads(run("show", "a.npy", "--json", "--heads", "all", "--token", "1").stdout)
    assert [t["head"] for t in facts["tokens"]] == [0, 1, 2]
    assert [t["strongest"][0]["row"] for t in facts["tokens"]] == weights[:, 1].argmax(-1).tolist()


@pytest.mark.parametrize(("word", "rows"), [("red", [1, 3]), ("▁red", [1]), ("2", [2]), ("##ish", [2]), ("ish", [2])])
def test_a_token_is_found_by_its_word_or_number(run: Run, tmp_path: Path, word: str, rows: list[int]) -> None:
    plant(tmp_path / "a.npy", [0, 1, 2, 3], 4)
    (tmp_path / "t.json").write_text(json.dumps(["<s>", "▁red", "##ish", "Ġred"]))
    facts = json.loads(run("show", "a.npy", "--tokens", "t.json", "--token", word, "--json").stdout)
    assert [token["row"] for token in facts["tokens"]] == rows


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["<s>", "key", "##cap", ":", "</s>"], "keycap :"),
        (["[CLS]", "a", "dog", "[SEP]"], "a dog"),
        (["<|startoftext|>", "gold</w>", "fi", "sh</w>", "<|endoftext|>"], "gold fish"),
        (["▁gold", "fi", "sh", "▁swims", "</s>"], "goldfish swims"),
        (["<s>", "<script>", "</s>"], "<script>"),
    ],
)
def test_a_caption_is_read_off_the_tokens(words: list[str], text: str) -> None:
    assert caption(words) == text


def test_scale_all_counts_the_tokens_that_are_not_shown(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = drawn(rng, 2, 9, 16)
    np.save(tmp_path / "a.npy", weights)
    dump = open_dumps(str(tmp_path / "a.npy")).open(None, Wanted())
    every, one = look_at(dump).shades("all"), look_at(dump, tokens=["4"]).shades("all")
    np.testing.assert_array_equal(every[4:5], one)


def test_a_dump_brings_its_own_tokens_grid_and_gate(run: Run, tmp_path: Path, pair: Any) -> None:
    (tmp_path / "t").write_text("a\nb\nc\nd\ne")
    run("init", "-m", "gated", "-o", "w.safetensors", "-q")
    options = ["-a", "a.safetensors", "--tokens", "t", "--grid", "2x8", "-q"]
    run("fuse", "regions.npy", "txt.npy", "-w", "w.safetensors", "-o", "o.npy", *options)
    facts = json.loads(run("show", "a.safetensors", "--json").stdout)
    assert (facts["method"], facts["grid"]) == ("gated", [2, 8])
    assert [token["token"] for token in facts["tokens"]] == list("abcde")
    assert all(0 < token["gate"] < 1 for token in facts["tokens"])


def test_a_dump_keeps_its_tokens_under_another_name(run: Run, tmp_path: Path, pair: Any) -> None:
    (tmp_path / "t").write_text("a\nb\nc\nd\ne")
    (tmp_path / "dumps").mkdir()
    run("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "-a", "dumps/x.safetensors", "--tokens", "t", "-q")
    facts = json.loads(run("show", "dumps", "--id", "x", "--json").stdout)
    assert [token["token"] for token in facts["tokens"]] == list("abcde")


@pytest.mark.parametrize(
    ("told", "asked", "grid", "skip"),
    [
        (["--grid", "2x8"], ["--skip-rows", 0], [2, 8], 0),
        (["--grid", "3x4", "--skip-rows", 4], ["--skip-rows", 4], [3, 4], 4),
        (["--grid", "3x4", "--skip-rows", 4], ["--grid", "3x4"], [3, 4], 4),
        (["--grid", "3x4", "--skip-rows", 4], ["--grid", "4x4"], [4, 4], 0),
        (["--grid", "3x4", "--skip-rows", 4], ["--skip-rows", 7], [3, 3], 7),
        (["--grid", "2x8"], ["--skip-rows", 7], [3, 3], 7),
    ],
)
def test_what_is_not_said_of_a_grid_is_as_the_dump_has_it(
    told: list[Any], asked: list[Any], grid: list[int], skip: int, run: Run, pair: Any
) -> None:
    run("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "-a", "a.safetensors", *told, "-q")
    facts = json.loads(run("show", "a.safetensors", "--json", *asked).stdout)
    assert (facts["grid"], facts["skip_rows"]) == (grid, skip)


def test_a_grid_of_a_dump_that_does_not_fit_it_is_passed_over(run: Run, tmp_path: Path) -> None:
    about = {"fusecli": json.dumps({"kind": "attention", "format": 1, "grid": [14, 14], "skip_rows": 1})}
    save_file({"attention": np.full((2, 3, 50), 0.02, np.float32)}, tmp_path / "a.safetensors", about)
    facts = json.loads(run("show", "a.safetensors", "--json").stdout)
    assert (facts["grid"], facts["skip_rows"]) == ([7, 7], 1)


@pytest.mark.parametrize("name", [".rep", "rep", "a/.rep/"])
def test_a_report_may_be_hidden(name: str, run: Run, tmp_path: Path) -> None:
    plant(tmp_path / "a.npy", [0], 4)
    (tmp_path / "a").mkdir()
    run("show", "a.npy", "-o", name)
    assert (tmp_path / name / "index.html").exists()


def test_a_picture_may_be_hidden(run: Run, tmp_path: Path) -> None:
    plant(tmp_path / "a.npy", [0], 4)
    run("show", "a.npy", "-o", ".html")
    assert (tmp_path / ".html").is_file()


def test_gates_are_to_be_seen_where_there_is_one_image_row(run: Run, pair: Any) -> None:
    run("init", "-m", "gated", "-o", "w.safetensors", "-q")
    run("fuse", "img.npy", "txt.npy", "-w", "w.safetensors", "-o", "o.npy", "-a", "a.safetensors", "-q")
    shares = [token["gate"] for token in json.loads(run("show", "a.safetensors", "--json").stdout)["tokens"]]
    done = run("show", "a.safetensors")
    assert b"one image row" in done.stderr
    header, *lines = done.stdout.decode().splitlines()
    assert header.split()[:3] == ["token", "bits", "gate"]
    assert [line.split()[2] for line in lines] == [f"{share:.3f}" for share in shares]


def test_one_image_row_has_nothing_to_see(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3, 1), np.float32))
    assert "nothing to see" in run("show", "a.npy").stdout.decode()
    assert "M > 1" in run("show", "a.npy", "-o", "m.html", code=3).stderr.decode()
    assert not (tmp_path / "m.html").exists()


def test_a_pair_of_many_is_shown_by_its_id(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {"a/b": drawn(rng, 2, 3, 4), "c": drawn(rng, 2, 1, 9)}
    save_file(arrays, tmp_path / "packed.safetensors")
    np.save(tmp_path / "stack.npy", np.stack([arrays["a/b"], arrays["a/b"][::-1]]))
    for id, array in arrays.items():
        (tmp_path / "tree" / id).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "tree" / f"{id}.npy", array)
        for place in ("packed.safetensors", "tree"):
            facts = json.loads(run("show", place, "--id", id, "--json").stdout)
            assert (facts["id"], facts["text_rows"], facts["image_rows"]) == (id, *array.shape[1:])
    assert json.loads(run("show", "stack.npy", "--id", "1", "--json").stdout)["text_rows"] == 3
    assert "--id a/b" in run("show", "packed.safetensors", code=3).stderr.decode()
    assert "a/b, c" in run("show", "tree", "--id", "x", code=3).stderr.decode()


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_a_picture_is_whole_or_not_there(run: Run, tmp_path: Path, suffix: str) -> None:
    plant(tmp_path / "a.npy", [0, 1], 4)
    (tmp_path / "p.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    done = run("show", "a.npy", "--image", "p.jpg", "-o", f"m.{suffix}", code=3)
    assert "not a readable picture" in done.stderr.decode()
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "p.jpg"]
    run("show", "a.npy", "-o", f"m.{suffix}", "-q")
    assert (tmp_path / f"m.{suffix}").stat().st_size > 2000


def test_a_picture_lies_as_its_camera_says(tmp_path: Path) -> None:
    from PIL import Image

    from fusecli.heatmap.picture import for_page, load_picture

    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "p.jpg", exif=exif)
    picture = load_picture(str(tmp_path / "p.jpg"))
    assert picture.size == (20, 40)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    deep = np.linspace(0, 65535, 100 * 100).reshape(100, 100).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_allclose(np.asarray(load_picture(str(tmp_path / "deep.png")))[..., 0], deep / 256, atol=1)
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")  # more than goes into a page as it is
    for name, kind in (("p.jpg", "image/jpeg"), ("large.png", "image/jpeg"), ("clear.png", "image/png")):
        mime, raw = for_page(str(tmp_path / name), load_picture(str(tmp_path / name)))
        assert mime == kind
        assert Image.open(io.BytesIO(raw)).size == load_picture(str(tmp_path / name)).size


def test_words_stay_words_in_an_svg(run: Run, tmp_path: Path) -> None:
    plant(tmp_path / "a.npy", [0, 1, 2], 4)
    (tmp_path / "t").write_text("金魚\n🐟 $x^2$\n<script>")
    run("show", "a.npy", "--tokens", "t", "-o", "m.svg", "-q")
    svg = (tmp_path / "m.svg").read_text()
    for word in ("金魚", "🐟 $x^2$", "&lt;script&gt;"):
        assert word in svg
    assert "<script>" not in svg


def written(text: str, lost: set[str] | None = None) -> Any:
    """Dark pixels of a line of text in a picture of 200 x 40."""
    from PIL import Image

    from fusecli.heatmap.lettering import Fonts

    fonts, picture = Fonts([text]), Image.new("RGB", (200, 40), "white")
    fonts.lost |= lost or set()
    fonts.write(picture, (5, 30), text, 190, 12, False, "#000000")
    return np.asarray(picture)


def test_letters_without_a_font_are_written_as_their_numbers() -> None:
    from fusecli.heatmap.lettering import Fonts

    assert np.array_equal(written("aü", {"ü"}), written("aU+00FC"))
    fonts = Fonts(["a"])
    assert fonts.missing() == []
    fonts.lost = {"ü"}
    assert "install" in fonts.missing()[0]


@pytest.mark.parametrize("letter", ["金", "🥇"])
def test_labels_find_fonts_for_letters_that_the_first_has_not(letter: str) -> None:
    from fusecli.heatmap import lettering

    if not any(letter in lettering._letters(path) for path in lettering._fonts_here()):
        pytest.skip(f"NOT TESTED: no font with {letter} on this machine")
    assert lettering.Fonts([letter]).lost == set()
    pixels = written(letter).astype(int)
    assert (pixels.sum(-1) < 600).sum() > 20
    assert (np.ptp(pixels, axis=-1).max() > 60) == (letter == "🥇")  # emoji have colours


@pytest.mark.parametrize(
    "text", ["½" * 50, "ไทย" * 20, "a" + "\u0301" * 30, "金" * 5000, "👩\u200d🚀" * 5000, "x" * 10000, "", "\n\x1b[31m"]
)
def test_a_label_stays_within_its_panel(text: str) -> None:
    dark = written(text).min(-1) < 128
    assert dark.any()
    assert not dark[:, 195:].any()
    assert not dark[:15].any()
    assert not dark[35:].any()


BAD: dict[str, tuple[list[str], str]] = {
    "a checkpoint": (["w.safetensors"], "a checkpoint"),
    "features": (["txt.npy"], "features"),
    "a picture": (["p.png"], "PNG"),
    "no such file": (["absent.npy"], "absent.npy"),
    "sums": (["sums.npy"], "rows do not sum to 1"),
    "not finite": (["nan.npy"], "not finite"),
    "axes": (["flat.npy"], "[H, N, M]"),
    "integers": (["ints.npy"], "int64"),
    "not a grid": (["m7.npy", "-o", "m.png"], "--grid 2x3"),
    "no such grid": (["m63.npy", "--grid", "8x8"], "--grid 7x9"),
    "tokens": (["m63.npy", "--tokens", "four"], "4 tokens"),
    "head": (["m63.npy", "--head", "2"], "--head 1"),
    "head below": (["m63.npy", "--head", "-1"], "0 to 1"),
    "head of a mean": (["mean.npy", "--head", "0"], "--attention-mean"),
    "heads of a mean": (["mean.npy", "--heads", "all"], "--attention-mean"),
    "token": (["m63.npy", "--token", "red"], "--tokens FILE"),
    "float picture": (["m63.npy", "--grid", "7x9", "--image", "f.tif", "-o", "m.png"], "floats"),
    "text as picture": (["m63.npy", "--grid", "7x9", "--image", "four", "-o", "m.png"], "not a readable picture"),
    "broken list": (["m63.npy", "--tokens", "broken"], "JSON list of strings"),
    "list of numbers": (["m63.npy", "--tokens", "numbers"], "JSON list of strings"),
    "endless tokens": (["m63.npy", "--tokens", "/dev/zero"], "no tokens"),
    "gate": (["gate.safetensors"], "gate"),
    "skip": (["m63.npy", "--skip-rows", "64"], "M = 63"),
    "folder": (["empty"], "no dumps"),
    "pictures": (["tree", "--images", "nowhere", "-o", "report"], "no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_with_a_hint(
    run: Run, tmp_path: Path, rng: np.random.Generator, pair: Any, case: str
) -> None:
    from PIL import Image

    run("init", "-o", "w.safetensors", "-q")
    paint(tmp_path / "p.png", (20, 20))
    np.save(tmp_path / "sums.npy", drawn(rng, 2, 3, 4) * np.array([1, 1.5, 1], np.float32)[:, None])
    np.save(tmp_path / "nan.npy", np.full((2, 3, 4), np.nan, np.float32))
    np.save(tmp_path / "flat.npy", np.ones(4, np.float32) / 4)
    np.save(tmp_path / "ints.npy", np.ones((2, 3, 1), np.int64))
    np.save(tmp_path / "m7.npy", drawn(rng, 2, 3, 7))
    np.save(tmp_path / "m63.npy", drawn(rng, 2, 3, 63))
    np.save(tmp_path / "mean.npy", drawn(rng, 3, 4))
    (tmp_path / "four").write_text("a\nb\nc\nd")
    (tmp_path / "broken").write_text('["a", "b"')
    (tmp_path / "numbers").write_text("[1, 2, 3]")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    gates = {"attention": drawn(rng, 2, 3, 4), "gate": np.full(3, np.nan, np.float32)}
    save_file(gates, tmp_path / "gate.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree" / "a.npy", drawn(rng, 2, 3, 4))
    arguments, words = BAD[case]
    told = run("show", *arguments, code=3).stderr.decode()
    assert words in told
    assert "hint: " in told or "wanted" in told or "no such" in told


@pytest.mark.parametrize(
    "options",
    [
        ["--image", "p.png"],
        ["-o", "m.gif"],
        ["-o", "-"],
        ["-o", "a.npy"],
        ["--images", "."],
        ["--head", "0", "--heads", "all"],
        ["-o", "report", "--json"],
        ["--grid", "4"],
        ["--tokens", "words.html", "-o", "words.html"],
        ["--fit", "contain", "-o", "m.html"],
    ],
)
def test_options_that_make_no_sense_are_a_usage_error(run: Run, tmp_path: Path, options: list[str]) -> None:
    plant(tmp_path / "a.npy", [0], 4)
    (tmp_path / "words.html").write_text("red")
    assert "error: " in run("show", "a.npy", *options, code=2).stderr.decode()


def test_float16_dumps_of_many_rows_count_as_sums_of_one(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    for m in (4, 577, 4096):
        np.save(tmp_path / "a.npy", drawn(rng, 4, 5, m).astype(np.float16))
        run("show", "a.npy", "-q")


def test_without_the_extra_the_hint_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fusecli.errors import MissingPackageError
    from fusecli.heatmap.figure import write_figure
    from fusecli.heatmap.picture import load_picture

    plant(tmp_path / "a.npy", [0], 4)
    view = look_at(open_dumps(str(tmp_path / "a.npy")).open(None, Wanted()))
    for package in ("PIL", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as error:
        write_figure(view, str(tmp_path / "m.png"), None, "cover", "token")
    assert error.value.hint == "pip install 'fusecli[plot]'"
    with pytest.raises(MissingPackageError):
        load_picture(str(tmp_path / "p.png"))


@pytest.mark.parametrize("shape", [(2, 2000, 16), (2, 12, 4000), (2, 2000, 256)])
def test_thousands_of_tokens_or_rows_are_shown(run: Run, tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.full(shape, 1 / shape[-1], np.float32))
    for kind in ("truecolor", "pipe"):
        assert run("show", "a.npy", env=terminal(kind)).stdout.count(b"\n") >= shape[1]
    for output in ("m.html", "m.png"):
        run("show", "a.npy", "--grid", {4000: "50x80", 256: "16x16", 16: "4x4"}[shape[-1]], "-o", output, "-q")


@pytest.mark.parametrize("method", ["attention", "gated"])
def test_a_pair_called_attention_is_one_of_many(
    run: Run, tmp_path: Path, rng: np.random.Generator, method: str
) -> None:
    run("init", "-m", method, "-o", "w.safetensors", "--feature-dim", 8, "--num-heads", 2, "-q")
    for side in ("i", "t"):
        sides = {id: rng.standard_normal((4, 8), np.float32) for id in ("attention", "b", "gate")}
        save_file(sides, tmp_path / f"{side}.safetensors")
    both = ("i.safetensors", "t.safetensors", "-o", "o.safetensors", "-a", "a.safetensors", "-w", "w.safetensors")
    run("batch", *both, "-q")
    for id in ("attention", "b", "gate"):
        assert json.loads(run("show", "a.safetensors", "--id", id, "--json").stdout)["id"] == id
    assert b"attention (pairs 3" in run("inspect", "a.safetensors").stdout


def test_what_a_killed_report_left_goes_with_the_next_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    plant(tmp_path / "dumps" / "a.npy", [0], 4)
    for name in (".report.fusecli-1", ".report.fusecli-2", ".report2.fusecli-3"):
        (tmp_path / name / "pairs").mkdir(parents=True)
    held = os.open(tmp_path / ".report.fusecli-2", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # somebody is still at work there
    run("show", "dumps", "-o", "report", "-q")
    os.close(held)
    assert {path.name for path in tmp_path.glob(".*")} == {".report.fusecli-2", ".report2.fusecli-3"}


def test_a_report_leaves_that_of_another_process_of_its_number(tmp_path: Path) -> None:
    from fusecli.cli import _app

    (tmp_path / "dumps").mkdir()
    plant(tmp_path / "dumps" / "a.npy", [0], 4)
    other = tmp_path / f".report.fusecli-{os.getpid()}"  # in another container, say
    other.mkdir()
    held = os.open(other, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    _app("show")(["show", str(tmp_path / "dumps"), "-o", str(tmp_path / "report"), "-q"], standalone_mode=False)
    os.close(held)
    assert other.is_dir()
    assert (tmp_path / "report" / "index.html").is_file()


def test_a_report_never_takes_the_place_of_something_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    plant(tmp_path / "dumps" / "a.npy", [0], 4)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "index.html").write_text("mine")
    run("show", "dumps", "-o", "precious", "--overwrite", code=2)
    assert (tmp_path / "precious" / "index.html").read_text() == "mine"
    run("show", "dumps", "-o", "report/", "-q")
    assert "--overwrite" in run("show", "dumps", "-o", "report", code=2).stderr.decode()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    run("show", "dumps", "-o", "report", "--overwrite", code=2)
    (tmp_path / "report" / "notes.txt").unlink()
    (tmp_path / "report" / "pairs" / "7.html").mkdir()
    run("show", "dumps", "-o", "report", "--overwrite", code=2)
    (tmp_path / "report" / "pairs" / "7.html").rmdir()
    run("show", "../dumps", "-o", ".", "--overwrite", code=2, cwd=tmp_path / "report")
    run("show", "dumps", "-o", "fresh/deep", code=1)
    np.save(tmp_path / "dumps" / "c.npy", np.ones((2, 2, 1), np.float32))
    told = run("show", "dumps", "-o", "report", "--overwrite").stderr.decode()
    assert "1 page, 1 with one image row passed over; open" in told
    (tmp_path / "dumps" / "d.npy").write_bytes(b"no array")
    told = run("show", "dumps", "-o", "report", "--overwrite", code=4).stderr.decode()
    assert "1 page, 1 with one image row passed over, 1 failed; open" in told
    assert len(list((tmp_path / "report" / "pairs").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dumps", "precious", "report"]


def test_a_report_that_fails_halfway_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusecli.errors import OutputError
    from fusecli.heatmap.report import write_report

    plant(tmp_path / "a.npy", [0], 4)
    dumps, output = open_dumps(str(tmp_path / "a.npy")), tmp_path / "report"
    write_report(dumps, str(output), Wanted(), None, "cover")
    before = (output / "index.html").read_bytes()
    rename, calls = os.rename, []

    def second_fails(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputError, match="No space"):
        write_report(dumps, str(output), Wanted(), None, "cover", overwrite=True)
    assert (output / "index.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "report"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_came_while_a_report_was_made_is_left_alone(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path / "a.npy", [0], 4)
    dumps, output = open_dumps(str(tmp_path / "a.npy")), tmp_path / "report"

    def others(ids: list[str]) -> Any:
        output.mkdir()
        (output / "thesis.txt").write_text("important")
        return ids

    from fusecli.heatmap.report import write_report

    with pytest.raises(UsageError, match="left as it is"):
        write_report(dumps, str(output), Wanted(), None, "cover", overwrite=overwrite, counted=others)
    assert os.listdir(output) == ["thesis.txt"]
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "report"]


def test_pictures_are_found_by_id_or_not_at_all(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".hidden/a.png", "c/a.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert pictures_of(str(tmp_path)) == {"a": f"{tmp_path}/a.png", "c/a": f"{tmp_path}/c/a.JPG"}
    (tmp_path / "a.jpg").touch()
    with pytest.raises(FileError, match="two pictures for one id"):
        pictures_of(str(tmp_path))


def test_a_pipe_among_dumps_keeps_nobody_waiting(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    plant(tmp_path / "dumps" / "b.npy", [0], 4)
    os.mkfifo(tmp_path / "dumps" / "a.npy")
    assert b"is a pipe" in run("show", "dumps", "-o", "report", code=4).stderr


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_a_picture_may_come_through_a_pipe(run: Run, tmp_path: Path, suffix: str) -> None:
    plant(tmp_path / "a.npy", [0], 4)
    paint(tmp_path / "p.png", (50, 80))
    run("show", "a.npy", "--image", "/dev/stdin", "-o", f"m.{suffix}", input=(tmp_path / "p.png").read_bytes())
    assert (tmp_path / f"m.{suffix}").stat().st_size > 1000


def test_matplotlib_has_nothing_to_say(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 3, 4), 0.25, np.float32))
    env = {"HOME": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none", "XDG_CONFIG_HOME": "/dev/null/none"}
    assert run("show", "a.npy", "-o", "a.png", "-q", env=env).stderr == b""


def test_a_report_without_pillow_says_what_to_install(run: Run, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "PIL.py").write_text("raise ImportError")
    (tmp_path / "looks").mkdir()
    np.save(tmp_path / "looks" / "a.npy", np.full((2, 3, 4), 0.25, np.float32))
    env = {"PYTHONPATH": f"{tmp_path}/without{os.pathsep}{os.getcwd()}"}
    assert b"fusecli[plot]" in run("show", "looks", "-o", "report", env=env, code=1).stderr
    assert not (tmp_path / "report").exists()
