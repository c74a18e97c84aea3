"""A comparison with every kind of row, for the pages and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe2gguf.measure import metrics
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.pareto import recommend
from moe2gguf.measure.results import Comparison, Quality, ResultRow, compare_pairs, is_above_noise, summarize_quality
from moe2gguf.measure.speed import Run, summarize_runs

LIMIT = 2e-6


NASTY = "</script><b>&.gguf"


def measured(noise: float) -> Quality:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 30)).astype(np.float32)
    other = base + np.float32(noise) * rng.standard_normal(base.shape).astype(np.float32)
    targets = rng.integers(0, 30, 40, dtype=np.int32)
    parts = [metrics.score_block(base[i : i + 10], other[i : i + 10], targets[i : i + 10]) for i in range(0, 40, 10)]
    return summarize_quality(parts, 1.5)


def candidate(path: Path, k: int, device: str = "cpu") -> RunConfig:
    return RunConfig(path, 8 if k else 0, k, device, "F16", 1000, 500, "x")


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    """Three sound rows with speeds, a refused and a failed one, in files with an awkward name."""
    path = tmp_path / NASTY.replace("/", "_")
    path.write_bytes(b"abc")
    rows = []
    for k, noise, speed in ((8, 0.0, 10.0), (4, 0.1, 20.0), (2, 2.0, 30.0)):
        row = ResultRow(
            candidate(path, k), "ok", quality=measured(noise), speed=summarize_runs([Run(99.0, speed, 0.1, 1.0, 10)])
        )
        rows.append(replace(row, above_noise=is_above_noise(measured(noise), LIMIT)))
    rows.append(ResultRow(candidate(path, 9), "refused", "only <8> & no more"))
    rows.append(ResultRow(candidate(path, 6, "gpu"), "failed", "crashed\n  | here"))
    return Comparison(
        reference=candidate(path, 0),
        rows=tuple(rows),
        pairs=tuple(compare_pairs(rows, LIMIT)),
        noise=measured(0.0),
        kl_limit=LIMIT,
        settings={"context": 512},
        environment={"python": "3"},
        reference_speed=summarize_runs([Run(90.0, 12.0, 0.1, 1.0, 10)]),
        recommendation=recommend(rows),
    )
