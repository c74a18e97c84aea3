"""The reports in a real browser: no error on the console, the pictures are there, a click sorts, dark and small too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe2gguf.measure.expert_usage import ExpertUse, summarize_layers
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.report import expert_usage
from moe2gguf.measure.report.compare import draw_figures, make_page
from moe2gguf.measure.report.page import write_page
from moe2gguf.measure.results import Comparison
from moe2gguf.measure.watch_routing import LayerTally, Tally

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PATIENCE = 120_000  # milliseconds: the machines that run the gate are shared
PHONE = {"width": 390, "height": 844}


def use() -> ExpertUse:
    """Three layers of eight experts, three used, from drawn choices."""
    rng = np.random.default_rng(0)
    tallies = {}
    for i in range(3):
        ran = np.zeros((200, 8), np.int64)
        np.put_along_axis(ran, np.argsort(rng.standard_normal((200, 8)) + np.arange(8) / 4, axis=1)[:, -3:], 1, axis=1)
        words = np.add.reduceat(ran, np.arange(0, 200, 10)).astype(np.uint32)
        tallies[i] = LayerTally(ran.T @ ran, rng.random(8) * 25, 400.0, words)
    tally = Tally(200, 3, [f" w{i}<b>" for i in range(20)], np.full(20, 10), tallies)
    one = RunConfig(Path("a<b>.gguf"), 8, 3, "cpu", "F16", 1, 1, "x")
    return ExpertUse(
        one, 200, summarize_layers(tally), "the file carries no load from a calibration", {"context": 32}, {}
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    pytest.importorskip("plotly", reason="plotly is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def opened(browser: Any, path: Path, **look: Any) -> tuple[Any, list[str]]:
    """The page, drawn, and everything that went wrong on it."""
    page, problems = browser.new_page(**look), []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(path.as_uri())
    page.wait_for_selector(".figure .main-svg")
    return page, problems


def columns(page: Any, number: int) -> list[str]:
    return [row.locator("td").nth(number).inner_text() for row in page.locator("#rows tbody tr").all()]


def test_the_comparison_opens_draws_and_sorts(browser: Any, found: Comparison, tmp_path: Path) -> None:
    """Every figure is drawn, nothing is asked of the network, a heading sorts up and, clicked again, down."""
    write_page(make_page(found, ["prog", "compare"]), tmp_path / "report.html")
    page, problems = opened(browser, tmp_path / "report.html")
    n = len(draw_figures(found))
    assert n == page.locator(".figure").count() == page.locator(".figure svg.main-svg >> nth=0").count() - 1 + n
    for i in range(n):
        assert page.locator(f"#figure{i} .main-svg").count() > 0, i
    assert 3 == page.locator("#figure0 .scatterlayer .point").count()
    ticks = [page.locator(f"#figure{i} .xtick text").all_text_contents() for i in (1, 2)]
    assert [["2", "4", "8"], ["1", "2", "3", "4"]] == ticks
    titles = [head.inner_text() for head in page.locator("#rows th").all()]
    k, kl = titles.index("k"), titles.index("KL mean")
    page.locator("#rows th").nth(k).click()
    assert ["2", "4", "6", "8", "9"] == columns(page, k)
    page.locator("#rows th").nth(k).click()
    assert ["9", "8", "6", "4", "2"] == columns(page, k)
    page.locator("#rows th").nth(kl).click()
    assert ["", ""] == columns(page, kl)[3:]  # what is missing stays at the end
    assert [] == problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_in_both_schemes(
    browser: Any,
    found: Comparison,
    tmp_path: Path,
    scheme: str,
) -> None:
    """Nothing is wider than the screen but the table in its own frame; text and background follow the scheme."""
    write_page(make_page(found, ["prog", "compare"]), tmp_path / "report.html")
    page, problems = opened(browser, tmp_path / "report.html", viewport=PHONE, color_scheme=scheme)
    assert PHONE["width"] == page.evaluate("document.documentElement.scrollWidth")
    back, text = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light, dark = sorted((back, text), key=lambda color: -int(color[4:].split(",")[0]))
    assert (back == light) == (scheme == "light")
    assert light != dark
    tools = page.evaluate("getComputedStyle(document.querySelector('.modebar-group')).backgroundColor")
    assert "rgba(0, 0, 0, 0)" == tools
    assert [] == problems


@pytest.mark.parametrize("width", [390, 1400])
def test_many_files_with_long_names_fit(browser: Any, found: Comparison, tmp_path: Path, width: int) -> None:
    """Legends cover no axis and leave room to the figure; a name takes no more of the table than other columns."""
    names = [f"{i}-{'long-' * 40}name.gguf" for i in range(30)]
    rows = [replace(row, config=replace(row.config, name=name)) for name in names for row in found.rows[:3]]
    many = replace(found, rows=tuple(rows), pairs=(), recommendation=None)
    write_page(make_page(many, ["prog", "compare"]), tmp_path / "report.html")

    page, problems = opened(browser, tmp_path / "report.html", viewport={"width": width, "height": 800})

    for i in range(len(draw_figures(many))):
        legend, frame, title = (
            page.locator(f"#figure{i} {part}").bounding_box() for part in (".legend .bg", ".nsewdrag", ".xtitle")
        )
        assert legend["y"] + legend["height"] <= frame["y"] < frame["y"] + frame["height"] < title["y"]
        assert frame["height"] > 200
        assert legend["x"] + legend["width"] <= width
    assert page.locator("#rows td").first.bounding_box()["width"] < 0.7 * width
    assert width == page.evaluate("document.documentElement.scrollWidth")
    assert [] == problems


def test_without_javascript_the_numbers_are_there(browser: Any, found: Comparison, tmp_path: Path) -> None:
    """A sentence says what is missing, and no empty frames are left."""
    write_page(make_page(found, ["prog", "compare"]), tmp_path / "report.html")
    page = browser.new_page(java_script_enabled=False)
    page.goto((tmp_path / "report.html").as_uri())

    assert "The figures need JavaScript" in page.locator("noscript").inner_text()
    assert 0 == sum(one.bounding_box()["height"] for one in page.locator(".figure").all())
    assert 5 == page.locator("#rows tbody tr").count()


def test_experts_open_draw_and_change_layer(browser: Any, tmp_path: Path) -> None:
    """Three maps; the list of layers redraws the third; the table sorts; a hostile name is only text."""
    write_page(expert_usage.make_page(use(), ["prog", "experts"]), tmp_path / "experts.html")
    page, problems = opened(browser, tmp_path / "experts.html")
    page.wait_for_selector("#figure2 .hm image")
    assert 3 == page.locator(".figure .hm image").count()
    before = page.evaluate("document.getElementById('figure2').data[0].z[0][0]")
    page.locator("#figure2 .updatemenu-header").click()
    page.locator("#figure2 .updatemenu-dropdown-button").nth(2).click()
    after = page.evaluate("document.getElementById('figure2').data[0].z[0][0]")
    assert (use().layers[0].together[0][0], use().layers[2].together[0][0]) == pytest.approx((before, after))
    page.locator("#rows th").nth(2).click()
    loads = [float(value) for value in columns(page, 2)]
    assert sorted(loads) == loads
    assert 0 == page.locator("main b").count()
    assert [] == problems
