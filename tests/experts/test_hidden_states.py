"""moe2gguf.experts.hidden_states: numbers per token, wherever they are kept."""

from pathlib import Path

import pytest
import torch

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.hidden_states import Made, OnDisk, Shelf, chunks


def test_rows_on_disk_are_what_was_written(tmp_path):
    """Piece by piece, in any order, beside a tensor that takes the same writes; what was not written is zero."""
    expected, rows = torch.zeros(1000, 7), OnDisk(tmp_path / "rows", 1000, 7)
    for part in (slice(300, 950), slice(0, 10), slice(5, 8)):
        value = torch.randn(part.stop - part.start, 7)
        expected[part], rows[part] = value, value

    assert 1000 == len(rows)
    for part in chunks(1000, 64):
        assert torch.equal(expected[part], rows[part])
    assert 1000 * 7 * 4 == (tmp_path / "rows").stat().st_size


def test_pieces_cover_everything_once():
    """Example: 5000 tokens in pieces of 2048."""
    assert [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)] == list(chunks(5000))
    assert [] == list(chunks(0))


def test_made_rows_are_computed_when_asked_for():
    """A piece at a time, each time anew."""
    asked = []
    rows = Made(10, lambda part: asked.append(part) or torch.arange(10)[part])

    assert [3, 4] == rows[slice(3, 5)].tolist()
    assert [slice(3, 5)] == asked


def test_the_limit_decides_where_rows_are_kept(tmp_path):
    """Three stores of 100 x 4 float32: 4800 bytes."""
    assert not Shelf(100, 4, 3, 4800, tmp_path).on_disk
    shelf = Shelf(100, 4, 3, 4799, tmp_path)
    shelf.store("a")

    assert shelf.on_disk
    assert ["a.f32"] == [path.name for path in tmp_path.iterdir()]


def test_a_disk_without_room_is_refused(tmp_path):
    """Before hours of work; the message has the ways out."""
    with pytest.raises(CalibrationError, match="more --calibration-memory, take fewer --calibration-tokens"):
        Shelf(10**9, 10**6, 3, 0, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_rows_on_disk_take_no_memory(tmp_path):
    """A quarter of a gigabyte is written and read through a few megabytes."""
    n_token, width = 2**16, 2**10
    rows = Shelf(n_token, width, 1, 10**6, tmp_path).store("rows")
    piece = torch.ones(2048, width)
    rows[slice(0, 2048)] = piece
    first, most = resident(), 0
    for part in chunks(n_token):
        rows[part] = piece
        assert float(rows[part][-1, -1]) == 1.0
        most = max(most, resident())

    assert most - first < 2**25


def resident():
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
