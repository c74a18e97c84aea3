"""moe2gguf.measure.report.calibration: one sound HTML file with pictures and every layer's figures."""

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from click.testing import CliRunner
from flat_options import flat_options
from html_page import Page

from moe2gguf import plan_conversion
from moe2gguf.cli import cli
from moe2gguf.experts.layer import LayerReport
from moe2gguf.measure.report.calibration import draw_figures, make_page, summarize
from moe2gguf.measure.report.page import render_page
from moe2gguf.recipes.convert import Conversion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA."""
    return checkpoints.make(tmp_path_factory.mktemp("report") / "model")


def layer(i: Any, n: Any = 8) -> Any:
    """A layer's report, as `slice_layer` makes it."""
    return LayerReport(
        n_shared=2, shared_rate=1.0, load=[1.0, 1.0, *([0.5] * (n - 2))], constant_min=0.9,
        energy_by_used=[(k + i) / (n + i) for k in range(1, n + 1)], energy_kept=0.4, energy_oracle=0.5, hit_rate=0.6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(folder: Any) -> Any:
    """A conversion that was planned, with made-up figures of three layers."""
    plan = plan_conversion(folder, flat_options(experts=8, used=4))
    return Conversion(Path("script><b>&.gguf"), plan, "0" * 64, tuple(layer(i) for i in range(3)))


def test_the_page_is_sound_and_needs_nothing_else(done: Any) -> None:
    """Balanced tags, no address, all network forbidden; names that look like markup stay text."""
    text = render_page(make_page(done, ["moe2gguf", "convert", "<x>"]), "/* plotly */")
    page = Page(text)

    assert [] == page.open
    assert [] == page.addresses
    assert page.policy.startswith("default-src 'none'")
    assert "script&gt;&lt;b&gt;&amp;.gguf" in text
    assert 4 == text.count('class="figure"')
    assert "`" not in text.partition("<script>")[0]
    assert "D2DMoE" in text  # where the methods come from


def test_every_layer_is_a_row(done: Any) -> None:
    """Its number, then the figures."""
    page = Page(render_page(make_page(done, ["moe2gguf"]), ""))

    rows = [row for row in page.cells if row and row[0] in "012"]
    assert [["0", "2", "1", "0.4", "0.5", "0.6", "0.9"]] == [row for row in rows if row[0] == "0"][:1]


def test_the_pictures_have_the_figures(done: Any) -> None:
    """Heat map layer x expert; energy against every count; the router; the constant direction."""
    load, energy, router, constant = (one.data for one in draw_figures(dict(enumerate(done.layers, 2)), 4))

    assert [one.load for one in done.layers] == load[0]["z"]
    assert [2, 3, 4] == load[0]["y"] == constant[0]["x"]
    best, mean, worst = energy
    assert list(range(1, 9)) == mean["x"]
    assert best["y"][0] == pytest.approx(3 / 10)
    assert worst["y"][0] == pytest.approx(1 / 8)
    assert mean["y"][-1] == pytest.approx(1)
    assert ["hit rate", "energy kept", "best choice"] == [trace["name"] for trace in router]
    assert [0.9, 0.9, 0.9] == constant[0]["y"]


def test_the_words_name_the_weakest_layer(done: Any) -> None:
    """Energy at the file's own count."""
    lines = summarize(done)

    assert "4 of 8 experts per token in 3 layers" in lines[0]
    assert "50.0% in layer 0" in lines[0]


def test_the_command_writes_it_and_the_json_has_the_same(folder: Any, tmp_path: Path) -> None:
    """convert --report, on a real calibration."""
    arguments = ["-e", "8", "-k", "4", "--calibration-tokens", "1024", "--json", "--report", tmp_path / "r.html"]
    ran = CliRunner().invoke(cli, ["convert", str(folder), str(tmp_path / "x.gguf"), *map(str, arguments)])

    assert 0 == ran.exit_code, ran.output
    result = json.loads(ran.stdout)
    match = re.search(r"const FIGURES = (.*);\n", (tmp_path / "r.html").read_text())
    assert match is not None
    figures = json.loads(match[1])
    assert [one["load"] for one in result["layers"]] == figures[0]["data"][0]["z"]


def test_a_report_of_nothing_is_refused(folder: Any, tmp_path: Path) -> None:
    """All experts on need no calibration."""
    ran = CliRunner().invoke(
        cli, ["convert", str(folder), str(tmp_path / "x.gguf"), "--report", str(tmp_path / "r.html")]
    )

    assert 2 == ran.exit_code
    assert "--report shows a calibration" in ran.output
    assert [] == list(tmp_path.iterdir())
