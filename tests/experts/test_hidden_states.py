"""moe2gguf.experts.hidden_states: numbers per token, wherever they are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.hidden_states import CHUNK, KeptRows, LazyRows, RowsOnDisk, allocate, chunks, sample_rows


def test_rows_on_disk_are_what_was_written(tmp_path: Path) -> None:
    """Piece by piece, in any order, beside a tensor that takes the same writes; what was not written is zero."""
    expected, rows = torch.zeros(1000, 7), RowsOnDisk(tmp_path / "rows", 1000, 7)
    for part in (slice(300, 950), slice(0, 10), slice(5, 8)):
        value = torch.randn(part.stop - part.start, 7)
        expected[part], rows[part] = value, value

    assert 1000 == len(rows)
    for part in chunks(1000, 64):
        assert torch.equal(expected[part], rows[part])
    assert 1000 * 7 * 4 == (tmp_path / "rows").stat().st_size


def test_pieces_cover_everything_once() -> None:
    """Example: 5000 tokens in pieces of 2048."""
    assert [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)] == list(chunks(5000))
    assert [] == list(chunks(0))


def test_lazy_rows_are_computed_when_asked_for() -> None:
    """A piece at a time, each time anew."""
    asked = []
    rows = LazyRows(10, lambda part: asked.append(part) or torch.arange(10)[part])

    assert [3, 4] == rows[slice(3, 5)].tolist()
    assert [slice(3, 5)] == asked


def test_sampled_rows_are_spread_over_all() -> None:
    """At equal distances, across the pieces in which rows are read; all where there are few."""
    rows = torch.arange(3.0 * CHUNK - 5)[:, None]

    assert torch.equal(rows[::3], sample_rows(rows, CHUNK - 2)[slice(0, CHUNK)])
    assert rows is sample_rows(rows, 2 * CHUNK)


def test_rows_are_kept_up_to_the_limit() -> None:
    """Two of three pieces fit: at the second reading only the third is computed again, and all is the same."""
    asked: list[int] = []
    values = torch.randn(3 * CHUNK - 5, 2)
    rows = KeptRows(LazyRows(len(values), lambda part: asked.append(part.start) or values[part]), 2 * CHUNK * 2 * 4)

    read = [torch.cat([rows[part] for part in chunks(len(rows))]) for _ in range(2)]

    assert all(torch.equal(values, found) for found in read)
    assert [0, CHUNK, 2 * CHUNK, 2 * CHUNK] == asked
    assert torch.equal(values[:7], rows[slice(0, 7)])


def test_the_limit_decides_where_rows_are_kept(tmp_path: Path) -> None:
    """Three stores of 100 x 4 float32: 4800 bytes."""
    assert all(isinstance(rows, torch.Tensor) for rows in allocate(dict.fromkeys("abc", 100), 4, 4800, tmp_path))
    assert [] == list(tmp_path.iterdir())

    allocate(dict.fromkeys("abc", 100), 4, 4799, tmp_path)

    assert ["a.f32", "b.f32", "c.f32"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    """Before hours of work; the message has the ways out."""
    with pytest.raises(CalibrationError, match=r"take fewer --calibration-tokens, .*--calibration-memory"):
        allocate(dict.fromkeys("abc", 10**9), 10**6, 0, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_rows_on_disk_take_no_memory(tmp_path: Path) -> None:
    """A quarter of a gigabyte is written and read through a few megabytes."""
    n_token, width = 2**16, 2**10
    rows = allocate({"rows": n_token}, width, 10**6, tmp_path)[0]
    piece = torch.ones(2048, width)
    rows[slice(0, 2048)] = piece
    first, most = resident(), 0
    for part in chunks(n_token):
        rows[part] = piece
        assert float(rows[part][-1, -1]) == 1.0
        most = max(most, resident())

    assert most - first < 2**25


def resident() -> Any:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
