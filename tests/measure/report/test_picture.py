"""The picture for a README: SVG that is sound XML, PNG of the right size, the same bytes for the same result."""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moe2gguf.errors import HarnessError, OutputError
from moe2gguf.measure.report.picture import require_picture, write_picture
from moe2gguf.measure.results import Comparison

pytest.importorskip("matplotlib")


def drawn(path: Path) -> list[str]:
    """Ids of the groups that matplotlib draws points, lines and texts in."""
    return [group.get("id", "") for group in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}g")]


def points(path: Path) -> int:
    """Markers of scatter plots and lines, legend included."""
    return len(list(ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}use")))


def test_an_svg_has_every_point_and_is_the_same_twice(found: Comparison, tmp_path: Path) -> None:
    """One point per row that was timed, a front and a choice; equal input gives equal bytes; names stay text."""
    write_picture(found, tmp_path / "a.svg")
    write_picture(found, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    fewer = replace(
        found,
        rows=(found.rows[0], found.rows[2]),
        recommendation=replace(found.recommendation, label=found.recommendation.front[0]),  # type: ignore[type-var, union-attr]
    )
    fewer = replace(fewer, recommendation=replace(fewer.recommendation, front=(fewer.recommendation.label,)))  # type: ignore[type-var, union-attr]
    write_picture(fewer, tmp_path / "fewer.svg")
    assert points(tmp_path / "a.svg") > points(tmp_path / "fewer.svg") > 0
    assert any(name.startswith("legend") for name in drawn(tmp_path / "a.svg"))


def test_the_scale_has_plain_numbers(found: Comparison, tmp_path: Path) -> None:
    """File names must not be read as mathematics; so powers of ten would show as source text."""
    write_picture(found, tmp_path / "a.svg")

    words = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text("utf-8"))
    assert "tokens per second" in " ".join(words)
    assert not [text for text in words if "$" in text]


def test_a_png_has_its_size(found: Comparison, tmp_path: Path) -> None:
    """1200 x 750 pixels; nothing else is left in the folder."""
    write_picture(found, tmp_path / "a.PNG")
    data = (tmp_path / "a.PNG").read_bytes()
    assert (b"\x89PNG", (1200, 750)) == (data[:4], struct.unpack(">II", data[16:24]))
    assert ["a.PNG"] == [path.name for path in tmp_path.glob("*a.PNG*")]


def test_without_speeds_it_is_divergence_over_experts(found: Comparison, tmp_path: Path) -> None:
    """No front to draw, but a line over the counts."""
    rows = tuple(replace(row, speed=None) for row in found.rows)
    write_picture(replace(found, rows=rows, recommendation=None, reference_speed=None), tmp_path / "a.svg")
    assert points(tmp_path / "a.svg")
    with pytest.raises(HarnessError, match="nothing to draw"):
        write_picture(replace(found, rows=found.rows[3:], recommendation=None), tmp_path / "none.svg")


def test_what_cannot_be_drawn_is_refused_first(
    found: Comparison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another format, no matplotlib."""
    with pytest.raises(HarnessError, match=r"a picture is \.svg or \.png"):
        require_picture(tmp_path / "a.jpg")
    with pytest.raises(OutputError, match="cannot be written"):
        write_picture(found, tmp_path / "no" / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HarnessError, match="pip install matplotlib"):
        require_picture(tmp_path / "a.svg")
