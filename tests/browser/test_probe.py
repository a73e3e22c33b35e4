"""A report of `hymba probe` in a real browser, opened from the disk as a person would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the browser's tests: make test-browser")
from playwright.sync_api import Locator, Page, expect  # noqa: E402

from hymba.eval.probe import report  # noqa: E402
from hymba.eval.probe.run import Limits, measure, probe  # noqa: E402
from hymba.eval.probe.texts import Text  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

HOSTILE = "to be </script><img src=x onerror=alert(1)> <b>or</b> not to be\n"
CONTROLS = "button, input, select, a, summary, [tabindex='0']"


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("probe")
    (place / "plain.txt").write_text("to be or not to be, that is the question\n" * 9)
    (place / "hostile.txt").write_text(HOSTILE * 5)
    files = [str(place / "plain.txt"), str(place / "hostile.txt")]
    result, maps = probe(str(folder), files, Limits(tokens=48, channels=4, shown=30), "cpu", ["x"])
    report.write(place / "out", result, maps)
    return place / "out"


@pytest.fixture(scope="module")
def maps(out: Path) -> dict[str, Any]:
    return json.loads((out / "maps.json").read_text())["texts"]


@pytest.fixture
def page(visit: Callable[..., Page], out: Path) -> Page:
    page = visit((out / "index.html").as_uri())
    expect(chosen(page)).to_have_count(1)
    return page


def chosen(page: Page) -> Locator:
    return page.locator("#tokens [aria-selected='true']")


def shades(page: Page, where: str) -> list[float]:
    """The weights that the colours of tokens stand for."""
    found = page.locator(f"#{where} span").evaluate_all(
        "all => all.map(x => Number(x.style.getPropertyValue('--w')))"
    )
    return [shade**2 for shade in found]


def check_row(page: Page, picture: list[list[float]], row: int) -> None:
    """What is coloured is a row of maps.json."""
    want = picture[row]
    got = [*shades(page, "meta"), *shades(page, "tokens")][: len(want)]
    assert got == pytest.approx(want, abs=0.006)


def test_a_pointer_and_the_keys_choose_a_token(page: Page, maps: dict[str, Any]) -> None:
    first = maps["plain"]["attention"][0]
    check_row(page, first["mean"], 29)
    page.locator("#token-7").hover()
    expect(chosen(page)).to_have_id("token-7")
    check_row(page, first["mean"], 7)
    expect(page.locator("#said")).to_contain_text("Token 7")
    expect(page.locator("#said")).to_contain_text("meta tokens")
    page.mouse.move(0, 0)
    page.locator("#token-7").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-8")).to_be_focused()
    check_row(page, first["mean"], 8)
    page.keyboard.press("Home")
    expect(page.locator("#token-0")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(chosen(page)).to_have_id("token-0")
    page.keyboard.press("End")
    expect(page.locator("#token-29")).to_be_focused()
    page.keyboard.press("PageDown")
    expect(page.get_by_role("slider", name="Layer")).to_have_value("1")
    check_row(page, maps["plain"]["attention"][1]["mean"], 29)


def test_controls_change_the_picture(page: Page, maps: dict[str, Any]) -> None:
    page.get_by_label("Layer", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#layer-name")).to_contain_text("layer 1 of 2")
    check_row(page, maps["plain"]["attention"][1]["mean"], 29)
    page.get_by_label("Which", exact=True).select_option("head 2")
    check_row(page, maps["plain"]["attention"][1]["heads"][2], 29)
    page.get_by_label("Heads", exact=True).select_option("SSM seen as attention")
    expect(page.get_by_label("Which", exact=True)).to_have_value("0")
    check_row(page, maps["plain"]["ssm"][1]["mean"], 29)
    page.get_by_label("Text", exact=True).select_option("hostile")
    check_row(page, maps["hostile"]["ssm"][1]["mean"], 29)


def test_a_layer_that_has_none_of_these_heads(
    visit: Callable[..., Page], tmp_path: Path, lively: Any, tiny: Any
) -> None:
    """Samba: an SSM, then attention, by turns."""
    text = Text("a", list(range(20)), [str(i) for i in range(20)], True)
    result, maps = measure(lively(tiny("samba")), [text], Limits(channels=4, heads=False))
    about = {"model": "samba", "parameters": 1, "meta_tokens": 2, "date": "", "device": "cpu"}
    about |= {"command": "", "versions": {"hymba": "0"}, "channels": "4", "texts": []}
    windows = [layer.window for layer in tiny("samba").layers]
    report.write(tmp_path / "out", about | {"windows": windows} | result, maps)
    page = visit((tmp_path / "out/index.html").as_uri())
    layer = page.get_by_role("slider", name="Layer")
    expect(page.get_by_text("This layer has none")).to_be_visible()
    expect(page.locator("#picture")).to_be_hidden()
    layer.press("ArrowRight")
    expect(page.locator("#layer-name")).to_have_text("layer 1 of 4, window 5")
    check_row(page, report.plain(maps)["texts"]["a"]["attention"][1]["mean"], 19)
    page.locator("#token-19").focus()
    page.keyboard.press("PageDown")
    expect(layer).to_be_focused()
    page.get_by_label("Heads", exact=True).select_option("SSM seen as attention")
    expect(page.locator("#picture")).to_be_visible()


def test_what_a_text_says_stays_text(page: Page) -> None:
    page.get_by_label("Text", exact=True).select_option("hostile")
    written = "".join(page.locator("#tokens span").all_inner_texts())
    assert "</script><img" in written.replace("·", " ")
    assert page.locator("img").count() == 0
    assert page.locator("#tokens b").count() == 0


def test_every_control_has_a_name_and_the_keys_reach_it(page: Page) -> None:
    for control in page.locator(CONTROLS).filter(visible=True).all():
        snapshot = control.aria_snapshot()
        assert re.search(r'"[^"]+"|: \S', snapshot), f"nameless: {snapshot}"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"text", "branch", "head", "layer", "token-29"} <= reached


def test_figures_say_what_they_are(page: Page) -> None:
    figures = page.locator("figure")
    assert figures.count() == 9
    for figure in figures.all():
        assert len(figure.locator("svg").get_attribute("aria-label") or "") > 20
        assert len(figure.locator("figcaption").inner_text()) > 20
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("details table").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(visit: Callable[..., Page], out: Path, scheme: str) -> None:
    """Nothing is wider than the screen but what scrolls by itself."""
    size = {"width": 360, "height": 700}
    page = visit((out / "index.html").as_uri(), viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    pixel = "c => [...c.getContext('2d').getImageData(c.width - 1, 1, 1, 1).data]"
    ground = sum(page.locator("#map").evaluate(pixel)[:3])
    assert (ground > 600) == (scheme == "light")
