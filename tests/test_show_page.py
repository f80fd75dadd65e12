"""The page in a real browser: Debian's Chromium, headless, nothing but the file."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusecli.heatmap.page import as_json, filled
from tests.conftest import Run
from tests.planted import DOT, FITS, PICTURES, hot_box, paint, place_of, plant, require_dot_in_hot_cell

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NOT TESTED: no chromium here (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


class Opened:
    """A page, and all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": 1100, "height": 900}, **options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def ready(self) -> Opened:
        self.page.wait_for_selector("html[data-ready=yes]")
        return self

    def canvas(self) -> Any:
        from PIL import Image

        url = self.page.evaluate("document.getElementById('map').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))

    def token(self) -> str:
        return str(self.page.locator("#caption [aria-selected=true]").inner_text())


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Opened] = []

    def open(name: str, **options: Any) -> Opened:
        opened.append(Opened(browser, tmp_path / name, **options))
        return opened[-1].ready()

    yield open
    for one in opened:
        assert one.said == []
        assert len(one.asked) == 1, one.asked
        one.page.close()


@pytest.fixture
def planted(run: Run, tmp_path: Path) -> Path:
    """Three tokens over a 4 x 4 grid, hot at rows 1, 6 and 11; head 1 is hot one row later."""
    plant(tmp_path / "a.npy", [1, 6, 11], 16)
    weights = np.load(tmp_path / "a.npy")
    weights[1] = 0.4 * weights[0] + 0.6 * np.roll(weights[0], 1, -1)  # the mean stays hot where head 0 is
    np.save(tmp_path / "a.npy", weights)
    paint(tmp_path / "p.png", (120, 120))
    (tmp_path / "t").write_text("<s>\n金魚\n🐟")
    run("show", "a.npy", "--tokens", "t", "--image", "p.png", "-o", "m.html", "-q")
    return tmp_path / "m.html"


def hot_cell(pixels: Any, grid: tuple[int, int] = (4, 4)) -> tuple[int, int]:
    top, left, bottom, right = hot_box(pixels)
    height, width = pixels.shape[:2]
    return int((top + bottom) / 2 / height * grid[0]), int((left + right) / 2 / width * grid[1])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
def test_a_planted_patch_is_hot_at_its_place_in_the_picture(
    run: Run, tmp_path: Path, look: Any, shape: str, fit: str, grid: tuple[int, int]
) -> None:
    line, column = map(int, place_of(DOT, PICTURES[shape], grid, fit))
    plant(tmp_path / "a.npy", [0, line * grid[1] + column], grid[0] * grid[1])
    paint(tmp_path / "p.png", PICTURES[shape])
    run("show", "a.npy", "--grid", f"{grid[0]}x{grid[1]}", "--image", "p.png", "--fit", fit, "-o", "m.html", "-q")
    shown = look("m.html")
    shown.page.keyboard.press("ArrowRight")
    require_dot_in_hot_cell(shown.canvas(), (line, column), grid, PICTURES[shape], fit)


def test_arrow_keys_and_the_mouse_move_through_tokens(planted: Path, look: Any) -> None:
    shown = look("m.html")
    steps = [
        ("", "<s>", (0, 1)),
        ("ArrowRight", "金魚", (1, 2)),
        ("ArrowDown", "🐟", (2, 3)),
        ("ArrowRight", "🐟", (2, 3)),
    ]
    for key, word, cell in [*steps, ("Home", "<s>", (0, 1)), ("End", "🐟", (2, 3)), ("ArrowLeft", "金魚", (1, 2))]:
        if key:
            shown.page.keyboard.press(key)
        assert (shown.token(), hot_cell(shown.canvas())) == (word, cell)
    shown.page.get_by_role("option", name="🐟").hover()
    assert hot_cell(shown.canvas()) == (2, 3)
    shown.page.keyboard.press("ArrowLeft")  # goes on from what is seen
    assert (shown.token(), hot_cell(shown.canvas())) == ("金魚", (1, 2))
    shown.page.mouse.move(5, 5)
    assert hot_cell(shown.canvas()) == (1, 2)
    shown.page.get_by_role("option", name="<s>").click()
    assert hot_cell(shown.canvas()) == (0, 1)


def test_sliders_change_the_map(planted: Path, look: Any) -> None:
    shown = look("m.html")
    head, opacity = (shown.page.get_by_role("slider", name=name) for name in ("Head", "Opacity"))
    head.focus()
    assert head.get_attribute("aria-valuetext") == "mean of 2"
    for name, cell in (("head 0", (0, 1)), ("head 1", (0, 2))):
        shown.page.keyboard.press("ArrowRight")
        assert (head.get_attribute("aria-valuetext"), hot_cell(shown.canvas())) == (name, cell)
    assert shown.token() == "<s>"  # the arrows were the slider's
    opacity.fill("0")
    assert np.ptp(shown.canvas().reshape(-1, 3).astype(int), axis=1).max() < 3  # the grey picture alone
    opacity.fill("100")
    assert shown.canvas()[300, 300].tolist() != shown.canvas()[100, 500].tolist()


def test_numbers_stand_where_the_mouse_is(planted: Path, look: Any) -> None:
    shown = look("m.html")
    box = shown.page.locator("#map").bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.1)
    weights = np.load(planted.parent / "a.npy").mean(0)
    assert shown.page.locator("#tip").inner_text() == f"row 1 (0, 1): {weights[0, 1]:.4f}"
    shown.page.keyboard.press("End")  # the number under the mouse is that of the token that is shown
    assert shown.page.locator("#tip").inner_text() == f"row 1 (0, 1): {weights[2, 1]:.4f}"
    shown.page.keyboard.press("Home")
    assert f"{weights[0, 1]:.4f}" in shown.page.get_by_role("status").inner_text()
    assert shown.page.get_by_role("row").nth(1).inner_text().split() == ["1", "0,", "1", f"{weights[0, 1]:.4f}"]


def test_a_tap_shows_the_number_of_a_cell(planted: Path, look: Any) -> None:
    shown = look("m.html", has_touch=True)
    box = shown.page.locator("#map").bounding_box()
    shown.page.touchscreen.tap(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9)
    assert shown.page.locator("#tip").inner_text().startswith("row 15 (3, 3): ")


def test_it_can_be_used_by_keyboard_and_screen_reader(planted: Path, look: Any) -> None:
    shown = look("m.html")
    assert "<s>" in shown.page.get_by_role("img").get_attribute("aria-label")
    assert shown.page.get_by_role("listbox").get_attribute("aria-activedescendant") == "t0"
    reached = set()
    for _ in range(8):
        shown.page.keyboard.press("Tab")
        reached.add(shown.page.evaluate("document.activeElement.id"))
    assert {"caption", "head", "opacity", "scale", "fit"} <= reached
    for control in ("head", "opacity", "scale", "fit"):
        assert shown.page.locator(f"label[for={control}]").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_or_dark_as_the_reader_wants(planted: Path, look: Any, scheme: str) -> None:
    shown = look("m.html", color_scheme=scheme)
    paper, ink = (
        shown.page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    light = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (paper, ink)]
    assert (light[0] > light[1]) == (scheme == "light")
    assert abs(light[0] - light[1]) > 150


def test_words_and_ids_are_text_whatever_they_say(run: Run, tmp_path: Path, look: Any) -> None:
    words = [
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(2)>",
        "&lt;b&gt;",
        "{{data}}",
        "\u2028",
        "\ud800",
    ]
    save_file({"{{title}}<script>alert(3)</script>": np.full((1, 6, 4), 0.25, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "t.json").write_text(json.dumps(words))
    run("show", "a.safetensors", "--tokens", "t.json", "-o", "m.html", "-q")
    shown = look("m.html")
    assert [option.inner_text() for option in shown.page.get_by_role("option").all()][:4] == words[:4]
    assert shown.page.get_by_role("heading", level=1).inner_text() == "{{title}}<script>alert(3)</script>"
    assert shown.page.title() == "{{title}}<script>alert(3)</script>"


def test_a_page_is_small_enough_to_mail(run: Run, tmp_path: Path, look: Any, rng: np.random.Generator) -> None:
    weights = rng.dirichlet(np.full(576, 0.3), (12, 77)).astype(np.float32)
    np.save(tmp_path / "a.npy", weights)
    run("show", "a.npy", "-o", "m.html", "-q")
    assert (tmp_path / "m.html").stat().st_size <= 1_000_000
    shown = look("m.html")
    for head in (-1, 11):
        found = np.array(shown.page.evaluate(f"Array.from(read(76, {head}))"))
        wanted = weights[head, 76] if head >= 0 else weights.mean(0)[76]
        assert np.abs(found - wanted).max() <= wanted.max() / (65535 if head < 0 else 255)


def test_a_row_before_the_grid_that_takes_nearly_all_hides_nothing(
    run: Run, tmp_path: Path, look: Any, rng: np.random.Generator
) -> None:
    weights = rng.dirichlet(np.full(257, 0.3), (4, 5))
    weights[..., 0] = 0
    weights *= 0.0015 / weights.sum(-1, keepdims=True)
    weights[..., 0] = 0.9985
    np.save(tmp_path / "a.npy", weights)
    run("show", "a.npy", "-o", "m.html", "-q")
    shown = look("m.html")
    for head in (-1, 3):
        found = np.array(shown.page.evaluate(f"Array.from(read(4, {head}))"))
        wanted = weights[head, 4] if head >= 0 else weights.mean(0)[4]
        assert np.abs(found - wanted)[1:].max() <= wanted[1:].max() / (65535 if head < 0 else 255)
        assert found[0] == pytest.approx(0.9985)
        bits = -(wanted * np.log2(wanted, out=np.zeros(257), where=wanted > 0)).sum()
        shown.page.evaluate(f"state.head = {head}; choose(4)")
        assert f"4: {bits:.2f} bits" in shown.page.inner_text("#told")


@pytest.mark.parametrize("shape", [(2, 2000, 16), (2, 12, 4000)])
def test_thousands_of_tokens_or_rows_open(run: Run, tmp_path: Path, look: Any, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.full(shape, 1 / shape[-1], np.float32))
    run("show", "a.npy", "--grid", "50x80" if shape[2] == 4000 else "4x4", "-o", "m.html", "-q")
    shown = look("m.html")
    shown.page.keyboard.press("End")
    assert shown.token() == str(shape[1] - 1)


def test_a_report_has_an_index_that_leads_to_pages(run: Run, tmp_path: Path, browser: Any) -> None:
    plant(tmp_path / "even.npy", [0, 1], 4)
    np.save(tmp_path / "even.npy", np.full((2, 2, 16), 1 / 16, np.float32))
    plant(tmp_path / "sharp.npy", [3, 5], 16)
    (tmp_path / "dumps" / "<b>").mkdir(parents=True)
    (tmp_path / "even.npy").rename(tmp_path / "dumps" / "<b>" / "even.npy")
    (tmp_path / "sharp.npy").rename(tmp_path / "dumps" / "sharp.npy")
    (tmp_path / "pictures").mkdir()
    paint(tmp_path / "pictures" / "sharp.png", (50, 80))
    run("show", "dumps", "--images", "pictures", "-o", "report", "-q")
    shown = Opened(browser, tmp_path / "report" / "index.html")
    ids = [item.inner_text().split("\n")[0] for item in shown.page.get_by_role("listitem").all()]
    assert ids == ["<b>/even", "sharp"]
    shown.page.get_by_label("Order").select_option("low")
    assert [item.inner_text().split("\n")[0] for item in shown.page.get_by_role("listitem").all()] == [
        "sharp",
        "<b>/even",
    ]
    assert shown.page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    shown.page.get_by_label("Find").fill("shar")
    assert shown.page.get_by_role("listitem").count() == 1
    shown.page.get_by_role("link").click()
    shown.ready()
    assert hot_cell(shown.canvas()) == (0, 3)
    assert [link.inner_text() for link in shown.page.get_by_role("link").all()] == ["all pairs", "previous"]
    shown.page.get_by_role("link", name="previous").click()
    shown.ready()
    assert shown.page.title() == "<b>/even"
    assert [link.inner_text() for link in shown.page.get_by_role("link").all()] == ["all pairs", "next"]
    shown.page.get_by_role("link", name="all pairs").click()
    assert shown.page.title() == "Attention"
    assert shown.page.get_by_label("Find").input_value() == "shar"
    assert shown.page.get_by_role("listitem").count() == 1
    assert shown.said == []
    assert all(url.startswith((tmp_path.as_uri(), "data:")) for url in shown.asked)
    shown.page.close()


def test_an_index_of_thousands_makes_only_what_is_seen(tmp_path: Path, browser: Any) -> None:
    pairs = [(f"id-{at}", "caption", 1.0, (at * 7919 % 10007) / 10007, f"{at}") for at in range(10000)]
    (tmp_path / "index.html").write_bytes(filled("index.html", {"data": as_json(pairs)}))
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_selector("li")
    assert page.locator("li").count() <= 360
    page.get_by_label("Order").select_option("high")
    first = max(pairs, key=lambda pair: pair[3])
    assert page.locator("li").first.inner_text().startswith(first[0])
    before = page.locator("li").count()
    page.mouse.wheel(0, 100_000)
    page.wait_for_function(f"document.querySelectorAll('li').length > {before}")
    page.close()


def test_scale_all_counts_tokens_that_are_not_on_the_page(run: Run, tmp_path: Path, look: Any) -> None:
    plant(tmp_path / "a.npy", [1, 6], 16)
    weights = np.load(tmp_path / "a.npy")
    weights[1, 0] = np.eye(16)[3]
    np.save(tmp_path / "a.npy", weights)
    run("show", "a.npy", "--token", "1", "--scale", "all", "-o", "m.html", "-q")
    shown = look("m.html")
    for head, most in ((-1, "0.5167"), (0, "0.5000"), (1, "1.0000")):
        shown.page.evaluate(f"state.head = {head}; draw()")
        assert shown.page.locator("#most").inner_text() == most
