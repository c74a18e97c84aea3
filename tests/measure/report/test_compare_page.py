"""The report: one sound HTML file, nothing from elsewhere, with the rows and the words in it."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparisons import LIMIT, NASTY, candidate, measured
from html_page import Page

from moe2gguf.cli.tables_compare import write_csv
from moe2gguf.errors import HarnessError, OutputError
from moe2gguf.measure import metrics
from moe2gguf.measure.report import page as pages
from moe2gguf.measure.report.compare import draw_figures, make_page, summarize
from moe2gguf.measure.report.page import draw_line, label_axes, plotly_script, render_page, write_page
from moe2gguf.measure.results import Comparison, Quality, compare_pairs, is_above_noise, summarize_quality


def test_the_page_is_sound_and_complete(found: Comparison) -> None:
    """Balanced tags, a line per row with its numbers, one place per picture, and hostile names as text only."""
    page = Page(render_page(make_page(found, ["prog", "compare", "a b.gguf"]), "/* plotly */"))
    assert [] == page.open
    assert 6 == page.tags["h2"] - 2 == len(draw_figures(found))
    assert 1 == page.tags["script"]
    assert page.tags["b"] == 1  # the recommendation's, none from the file's name
    rows = [cells for cells in page.cells if "F16" in cells]
    assert [["ok", "8"], ["ok", "4"], ["ok", "2"], ["refused", "9"], ["failed", "6"]] == [[c[5], c[2]] for c in rows]
    assert f"{found.rows[1].quality.summary.kl_mean:.4g}" in rows[1]  # type: ignore[union-attr]
    assert NASTY.replace("/", "_") == rows[0][0]


def test_nothing_comes_from_elsewhere(found: Comparison) -> None:
    """No address in any attribute, a policy that forbids the network, and with plotly inside still so."""
    plotly = pages.plotly_script() if _has_plotly() else "/* plotly */"
    page = Page(render_page(make_page(found, ["prog"]), plotly))
    assert [] == page.addresses
    assert page.policy.startswith("default-src 'none'")
    assert "http" not in page.policy


def test_data_cannot_end_the_script(found: Comparison) -> None:
    """Figures are strict JSON in which no tag can be written."""
    text = render_page(make_page(found, ["prog"]), "")
    data = re.search(r"const FIGURES = (.*);\n", text)
    assert data is not None
    assert "<" not in data[1]
    assert len(draw_figures(found)) == len(json.loads(data[1]))


def test_the_words_come_first(found: Comparison) -> None:
    """What to take, how many ran, what is the reference itself, what failed and why."""
    lines = summarize(found)
    text = "\n".join(lines)
    assert lines[0].startswith("<b>Take <code>")
    assert lines[2].startswith("3 of 5 runs completed. The reference, <code>")
    assert "the same model as the reference: <code>&lt;_script&gt;&lt;b&gt;&amp;.gguf k=8/8</code>." in text
    assert "<b>Take <code>&lt;_script&gt;&lt;b&gt;&amp;.gguf k=4/8</code></b>: of 3 the fastest within" in text
    assert "refused: only &lt;8&gt; &amp; no more" in text
    page = render_page(make_page(found, ["prog"]), "")
    assert page.index("runs completed") < page.index('id="figure0"') < page.index('id="rows"')


def test_of_many_names_the_first_are_shown(found: Comparison) -> None:
    """In sentences a dozen; the table has a row for each. In a legend a long name keeps its start and its end."""
    rows = [replace(found.rows[0], config=replace(found.rows[0].config, name=f"{i}.gguf")) for i in range(40)]
    many = replace(found, rows=tuple(rows), pairs=(), recommendation=None)

    assert "<code>11.gguf k=8/8</code> and 28 more." in "\n".join(summarize(many))
    assert 40 == render_page(make_page(many, ["prog"]), "").count("<tr><td>", 0) - 3
    name = draw_line("start-" + "x" * 300 + " (F16) k=8", [], [])["name"]
    assert (48, True, True) == (len(name), name.startswith("start-"), name.endswith(" (F16) k=8"))


def test_pictures_hold_the_numbers(found: Comparison) -> None:
    """Quality over speed with the front, divergence over k in order with the noise limit, a line of windows each."""
    figures: dict[str, Any] = {one.title: {"data": one.data} for one in draw_figures(found)}
    points, front = figures["Quality and generation speed"]["data"]
    assert ([10.0, 20.0, 30.0], ["8", "4", "2"]) == (points["x"], points["text"])
    assert [30.0, 20.0, 10.0] == front["x"]
    (line,) = figures["KL divergence and experts used"]["data"]
    kl = [row.quality.summary.kl_mean for row in found.rows[:3] if row.quality]
    assert [2, 4, 8] == line["x"]
    assert [kl[2], kl[1], LIMIT / 10] == pytest.approx(line["y"])
    windows = figures["KL divergence window by window"]["data"]
    assert [[1, 2, 3, 4]] * 3 == [trace["x"] for trace in windows]
    assert list(found.rows[1].quality.window_kl) == pytest.approx(windows[1]["y"])  # type: ignore[union-attr]
    reference, *losses = figures["Loss window by window"]["data"]
    assert list(found.rows[0].quality.window_nll_base) == reference["y"]  # type: ignore[union-attr]
    assert list(found.rows[2].quality.window_nll) == losses[2]["y"]  # type: ignore[union-attr]
    by_position = figures["KL divergence by position in the window"]["data"][2]
    assert list(found.rows[2].quality.position_kl) == by_position["y"]  # type: ignore[union-attr]
    assert (256, 511) < (by_position["x"][0], by_position["x"][-1])
    assert by_position["x"][-1] < 511
    assert 10 == len(figures["Loss by position in the window"]["data"][0]["y"])


def test_a_file_has_one_color_and_a_count_one_dash(found: Comparison) -> None:
    """On the whole page; the names of lines say the type; counts are ticks; every figure says what good is."""
    figures = {one.title: one for one in draw_figures(found)}
    series = [one for title, one in figures.items() if " by " in title]
    lines = [trace["line"] for one in series for trace in one.data if trace["name"] != "reference"]
    assert 1 == len({line["color"] for line in lines})
    assert [{"solid", "dash", "dot"}] * 4 == [
        {trace["line"]["dash"] for trace in one.data if trace["name"] != "reference"} for one in series
    ]
    by_count = figures["KL divergence and experts used"]
    assert lines[0]["color"] == by_count.data[0]["line"]["color"]
    assert by_count.data[0]["name"].endswith(" (F16)")
    assert [2, 4, 8] == by_count.layout["xaxis"]["tickvals"]
    assert all(one.words for one in figures.values())
    assert ["better" in one.layout["yaxis"]["title"]["text"] for one in figures.values()] == [True] * 6
    assert [0, 4] == label_axes("x", "y", counts=range(48))["xaxis"]["tickvals"][:2]


def test_plotly_is_packed_to_less_than_half() -> None:
    """It is most of a page, and comes out as it went in."""
    script = "const x = 'é';" * 1000
    page = render_page(pages.Page("", "", [], [], pages.Table("", "", [], []), ["prog"], []), script)
    packed = re.search(r'const PLOTLY = "(.*)"', page)
    assert packed is not None
    assert gzip.decompress(base64.b64decode(packed[1])).decode() == script
    assert 2 * len(page) < len(script)


def test_details_are_means_over_windows_and_over_positions() -> None:
    """Spans of equal length; the mean over spans, over windows and over tokens is one number."""
    rng = np.random.default_rng(1)
    base, other = rng.standard_normal((2, 3 * 130, 12)).astype(np.float32)
    scores = metrics.score_block(base, other, rng.integers(0, 12, 390, dtype=np.int32))
    parts = [metrics.score_block(base[i : i + 130], other[i : i + 130], np.zeros(130, np.int32)) for i in (0, 130, 260)]
    found = summarize_quality(parts, 0.0)
    assert (64, 3) == (len(found.position_kl), len(found.window_kl))
    table = scores.kl.reshape(3, 130)
    np.testing.assert_allclose(found.window_kl, table.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.position_kl[0], table[:, :3].mean(), rtol=1e-12)  # 130 = 2 * 3 + 62 * 2
    np.testing.assert_allclose(found.position_kl[-1], table[:, -2:].mean(), rtol=1e-12)
    again = Quality.from_dict(json.loads(json.dumps(metrics.as_json(found))))
    assert again == found


def test_how_it_was_measured(found: Comparison) -> None:
    """The command to repeat it, digests of the files, versions."""
    text = render_page(make_page(found, ["/usr/bin/prog", "compare", "a b.gguf"]), "")
    assert "moe2gguf compare &#x27;a b.gguf&#x27;" in text
    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in text  # of "abc": FIPS 180-4
    found.reference.path.unlink()
    assert "not readable any more" in render_page(make_page(found, ["prog"]), "")


def test_without_speeds_or_rows_there_is_a_report_too(found: Comparison) -> None:
    """Fewer pictures, the same words, no empty columns."""
    quiet = tuple(replace(row, speed=None) for row in found.rows)
    silent = replace(found, rows=quiet, recommendation=None, reference_speed=None)
    assert 5 == len(draw_figures(silent))
    assert "generation t/s" not in render_page(make_page(silent, ["prog"]), "")
    assert "of 3 the smallest within 0.05 nats per token of the reference: " in summarize(silent)[0]
    nothing = replace(silent, rows=found.rows[3:], pairs=(), noise=None)
    assert [] == draw_figures(nothing)
    assert Page(render_page(make_page(nothing, ["prog"]), "")).open == []
    dense = replace(silent, rows=(replace(quiet[0], config=candidate(found.reference.path, 0)),), pairs=())
    assert "KL divergence and experts used" not in [one.title for one in draw_figures(dense)]


def test_infinite_intervals_and_bad_numbers_are_left_out(found: Comparison) -> None:
    """One window has no interval; a row with NaN has no picture and empty cells."""
    first = found.rows[0]
    assert first.quality is not None
    one = replace(first, quality=replace(first.quality, window_kl=(0.5,), window_nll=(1.0,), window_top1=(1.0,)))
    bad = replace(
        first,
        status="failed",
        above_noise=None,
        quality=replace(first.quality, summary=replace(first.quality.summary, kl_mean=math.nan)),
    )
    text = render_page(make_page(replace(found, rows=(one, bad), pairs=(), recommendation=None), ["prog"]), "")
    assert "NaN" not in text.split("const FIGURES")[1].split("\n")[0]
    assert ">nan<" not in text


def test_writing_is_all_or_nothing(found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file appears whole, or an error says why not."""
    monkeypatch.setattr(pages, "plotly_script", lambda: "/* plotly */")
    write_page(make_page(found, ["prog"]), tmp_path / "out.html")
    assert ["out.html"] == [path.name for path in tmp_path.glob("*out.html*")]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\)"):
        write_page(make_page(found, ["prog"]), tmp_path / "file" / "out.html")
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(make_page(found, ["prog"]), tmp_path / "no" / "out.html")


def test_a_path_that_is_no_utf_8(found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is UTF-8 all the same; the table has the name's own bytes."""
    monkeypatch.setattr(pages, "plotly_script", lambda: "/* plotly */")
    odd = [replace(row, config=replace(row.config, name="caf\udce9.gguf")) for row in found.rows]
    odd_found = replace(found, rows=tuple(odd), pairs=(), recommendation=None)

    write_page(make_page(odd_found, ["prog", "caf\udce9.gguf"]), tmp_path / "out.html")
    write_csv(odd_found, tmp_path / "out.csv")

    assert "caf?.gguf" in (tmp_path / "out.html").read_text("utf-8")
    assert b"caf\xe9.gguf" in (tmp_path / "out.csv").read_bytes()


def test_without_plotly_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(HarnessError, match="pip install plotly"):
        plotly_script()


def _has_plotly() -> bool:
    from importlib.util import find_spec

    return find_spec("plotly") is not None


@pytest.mark.parametrize(
    ("windows", "above"), [((8.0, 0.5), True), ((8.0,), True), ((0.0,), False), ((8.0, 0.0), False), ((1.0,) * 9, True)]
)
def test_two_windows_far_above_the_noise_are_above_it(windows: tuple[float, ...], above: bool) -> None:
    """Their confidence interval holds zero, but no window is near it; one window in the noise is not told apart."""
    assert above == is_above_noise(replace(measured(1.0), window_kl=windows), LIMIT)


def test_a_row_in_the_noise_is_told_apart_from_one_above_it(found: Comparison) -> None:
    """Two windows make a wide interval, yet one row is the reference and the other is not; two others stay open."""
    far = replace(measured(1.0), window_kl=(7.0, 1.0))
    rows = [
        replace(found.rows[0], quality=replace(measured(0.0), window_kl=(0.0, 0.0)), above_noise=False),
        replace(found.rows[1], quality=far, above_noise=True),
        replace(found.rows[2], quality=replace(far, window_kl=(5.0, 2.0)), above_noise=True),
    ]
    assert [True, True, False] == [pair.different for pair in compare_pairs(rows, LIMIT)]
    assert not any(pair.kl.excludes_zero for pair in compare_pairs(rows, LIMIT))
