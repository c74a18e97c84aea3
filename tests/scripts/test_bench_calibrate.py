"""scripts/bench_calibrate.py: the checkpoints it makes, and the line it draws through what it measured."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from flat_options import flat_options

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_calibrate as bench

from moe2gguf import plan_conversion


def test_its_checkpoints_can_be_calibrated(tmp_path: Path) -> None:
    """The plan accepts them, with the sizes that were asked for."""
    size = bench.Size(1024, 1, 128, 256)
    bench.checkpoint(tmp_path / "model", size)

    options = flat_options(experts=16, used=8, refit=True, n_token=1024)
    model = plan_conversion(tmp_path / "model", options).model

    assert (1, 128, 256) == (model.n_layer, model.d_model, model.d_ff)


def test_the_operations_are_those_of_the_products() -> None:
    """One layer, no tokens but what a factorization costs; then per token, by hand: 2 operations per weight used."""
    assert 2 * (2 * 64**3 + 4 * 64**2 * 8) == bench.Size(0, 1, 8, 64).operations()
    one = bench.Size(1, 1, 8, 64).operations() - bench.Size(0, 1, 8, 64).operations()
    assert one == pytest.approx(2 * (8 * 8 * 64 + 8 * 8**2 + (9 / 16 + 3 / 16) * 64**2))
    many = bench.Size(65536, 1, 8, 64).operations() - bench.Size(32768, 1, 8, 64).operations()
    assert many == pytest.approx(2 * 32768 * (8 * 8 * 64 + 8 * 8**2 + 10 / 16 * 64**2))  # as many to regroup by
    assert bench.Size(100, 4, 8, 64).operations() == pytest.approx(4 * bench.Size(100, 1, 8, 64).operations())


def test_the_fit_finds_the_rate() -> None:
    """Rows made with 3 s, 50 billion operations per second, 400 MB and 1.5 bytes per byte give these back."""
    rows = [
        asdict(size)
        | {"cpu_seconds": 3 + size.operations() / 50e9, "peak_bytes": 4e8 + 1.5 * size.memory(), "wall_seconds": 0.0}
        for size in bench.SIZES
    ]

    found = bench.fit(rows)
    assert found is not None

    assert [3, 50e9, 4e8, 1.5] == pytest.approx(
        [found["start_seconds"], found["operations_per_second"], found["base_bytes"], found["bytes_per_known_byte"]]
    )
    assert found["worst_error"] < 1e-6
    big = bench.SEVEN_BILLION.operations()
    assert found["seven_billion"]["cpu_seconds"] == pytest.approx(3 + big / 50e9)
    machine = {"processor": "a processor"}
    assert "hours of processor time" in bench.report({"machine": machine, "threads": 1, "rows": rows, "fit": found})


def test_three_sizes_at_least() -> None:
    """No line through two points."""
    assert bench.fit([asdict(bench.BASE) | {"cpu_seconds": 1.0, "peak_bytes": 1}] * 2) is None
