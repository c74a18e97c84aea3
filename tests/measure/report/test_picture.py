"""The picture for a README: SVG that is sound XML, PNG of the right size, the same bytes for the same result."""

from __future__ import annotations

import re
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from comparisons import measured

from moe2gguf.errors import HarnessError, OutputError
from moe2gguf.measure.report.picture import require_picture, write_picture
from moe2gguf.measure.results import Comparison

pytest.importorskip("matplotlib")


def drawn(path: Path) -> list[str]:
    """Ids of the groups that matplotlib draws points, lines and texts in."""
    return [group.get("id", "") for group in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}g")]


def words_of(path: Path) -> list[str]:
    """Every text, in the order of drawing."""
    return re.findall(r"<!-- (.*?) -->", path.read_text("utf-8"))


def place(path: Path, name: str) -> tuple[float, ...]:
    """Left, top, right and bottom of the frame of the axes or of the legend."""
    group = next(one for one in ElementTree.parse(path).iter() if one.get("id") == name)
    frame = next(one for one in group.iter() if one.tag.endswith("path"))
    numbers = [float(one) for one in re.findall(r"[\d.]+", frame.get("d", ""))]
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


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


@pytest.mark.parametrize("noise", [2.0, 0.11])
def test_the_scale_has_plain_numbers(found: Comparison, tmp_path: Path, noise: float) -> None:
    """File names must not be read as mathematics; so powers of ten would show as source text. Also within a decade."""
    rows = (found.rows[1], replace(found.rows[2], quality=measured(noise)))
    write_picture(replace(found, rows=rows, recommendation=None), tmp_path / "a.svg")

    words = words_of(tmp_path / "a.svg")
    assert "mean KL divergence" in " ".join(words)
    assert not [text for text in words if "$" in text]
    assert 2 <= sum(bool(re.fullmatch(r"[\d.]+(e.\d+)?", text)) for text in words)


def test_dense_files_are_no_counts(found: Comparison, tmp_path: Path) -> None:
    """Where nothing was timed they are lines across, beside the sliced files; the counts alone are ticks."""
    rows = [replace(row, speed=None) for row in found.rows]
    dense = replace(rows[0], config=replace(rows[0].config, n_expert=0, n_expert_used=0, name="dense.gguf"))
    untimed = replace(found, rows=(*rows, dense), recommendation=None, reference_speed=None)

    write_picture(untimed, tmp_path / "a.svg")

    words = words_of(tmp_path / "a.svg")
    assert ["2", "4", "8"] == words[:3]
    assert "dense.gguf (F16)" in words


@pytest.mark.parametrize("n_file", [1, 40])
def test_the_legend_leaves_room(found: Comparison, tmp_path: Path, n_file: int) -> None:
    """It stands below the figure, which keeps its size, however many files and long names there are."""
    names = [f"{i}-{'long-' * 40}name.gguf" for i in range(n_file)]
    rows = [replace(row, config=replace(row.config, name=name)) for name in names for row in found.rows[:3]]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_picture(replace(found, rows=tuple(rows), recommendation=None), tmp_path / "a.svg")

    frame, legend = (place(tmp_path / "a.svg", name) for name in ("axes_1", "legend_1"))
    page = ElementTree.parse(tmp_path / "a.svg").getroot().get("viewBox", "").split()
    assert frame[3] < legend[1]
    assert frame[3] - frame[1] > 250
    assert legend[2] < float(page[2])
    assert legend[3] < float(page[3])
    assert n_file == sum("…" in text for text in words_of(tmp_path / "a.svg"))


def test_a_png_has_its_size(found: Comparison, tmp_path: Path) -> None:
    """1200 x 750 pixels and two rows of the legend; nothing else is left in the folder."""
    write_picture(found, tmp_path / "a.PNG")
    data = (tmp_path / "a.PNG").read_bytes()
    assert (b"\x89PNG", (1200, 810)) == (data[:4], struct.unpack(">II", data[16:24]))
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
