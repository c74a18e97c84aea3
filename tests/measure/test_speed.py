"""Speed in llama.cpp: what is counted, what is timed, and what a machine can do at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.generate import make_setup
from moe2gguf.llama.model import open_model
from moe2gguf.measure import speed
from moe2gguf.measure.speed import Run, measure_bandwidth, run_once, spread_of, summarize_runs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    small = tiny_gguf.dense_weights()
    large = tiny_gguf.dense_weights(d_model=256, d_ff=4096, n_layer=4)
    return {
        "small": tiny_gguf.write_gguf(folder / "small.gguf", tiny_gguf.sliced_weights(small, 4)),
        "large": tiny_gguf.write_gguf(folder / "large.gguf", tiny_gguf.sliced_weights(large, 4)),
    }


def fed(path: Path, n_prompt: int, n_generate: int) -> list[tuple[int, int, int, bool]]:
    """Runs in a child process: every batch as (position, tokens, scored, starts with BOS)."""
    batches = []

    class Watched(speed.Llama):  # type: ignore[misc, name-defined]
        def feed(self, tokens: Any, scored: Any) -> Any:
            batches.append((self.n_past, len(tokens), int(np.sum(scored)), int(tokens[0]) == tiny_gguf.BOS))
            return super().feed(tokens, scored)

    with open_model(path, make_setup(None, "cpu", 1)) as model:
        model.__class__ = Watched
        model.start(1024)
        rng = np.random.default_rng(0)
        if n_prompt:
            speed._time_prompt(model, speed._draw_tokens(model, n_prompt, rng))
        if n_generate:
            speed._time_generation(model, speed._draw_tokens(model, n_generate, rng))
    return batches


def test_tokens_are_fed_as_llama_bench_does(files: dict[str, Path]) -> None:
    """A prompt in batches of 512 with logits of its last token; a generation one by one; both from an empty cache."""
    batches = run_in_child(fed, files["small"], 600, 3)
    assert [(0, 512, 0, True), (512, 88, 1, False)] == [(*b[:3], b[3] and b[0] == 0) for b in batches[:2]]
    assert [(0, 1, 1), (1, 1, 1), (2, 1, 1)] == [b[:3] for b in batches[2:]]
    assert batches[2][3]


def test_more_experts_take_longer(files: dict[str, Path]) -> None:
    """Four of four wide experts are slower than one of four, prompt and generation."""
    slow = [run_once(files["large"], make_setup(4, "cpu", 1), 64, 16, seed=i) for i in range(3)]
    quick = [run_once(files["large"], make_setup(1, "cpu", 1), 64, 16, seed=i) for i in range(3)]
    for name in ("prompt_speed", "generation_speed"):
        assert max(getattr(run, name) for run in slow) < max(getattr(run, name) for run in quick)


def test_a_run_is_in_its_units(files: dict[str, Path]) -> None:
    """Tokens per second, seconds and bytes; what was not asked for is zero."""
    run = run_once(files["large"], make_setup(None, "cpu", 1), 64, 0)
    assert run.prompt_speed == pytest.approx(64 / run.first_token)
    assert 0.0 == run.generation_speed
    assert 0 < run.load < 60
    assert files["large"].stat().st_size < run.peak_memory < 2**31
    assert 0.0 == run_once(files["small"], make_setup(None, "cpu", 1), 0, 2).prompt_speed


def test_verification_is_timed_where_it_is_asked_for(files: dict[str, Path]) -> None:
    """A time for every draft length, of more tokens a longer one, and less than the tokens take one by one."""
    run = run_once(files["large"], make_setup(None, "cpu", 1), 8, 16, verify=True)
    assert len(speed.DRAFT_LENGTHS) == len(run.verification)
    assert 0 < run.verification[0] < run.verification[-1] < (speed.DRAFT_LENGTHS[-1] + 1) / run.generation_speed
    found = summarize_runs([run, run, run])
    assert run.verification == found.verification
    assert () == run_once(files["small"], make_setup(None, "cpu", 1), 1, 1).verification


def test_time_and_file_errors_are_clear(files: dict[str, Path], tmp_path: Path) -> None:
    """A run that takes too long is stopped; a file that is not there is named."""
    with pytest.raises(HarnessError, match="no answer within"):
        run_once(files["large"], make_setup(None, "cpu", 1), 64, 16, timeout=1e-3)
    with pytest.raises(HarnessError, match="nowhere"):
        run_once(tmp_path / "nowhere", make_setup(None, "cpu", 1), 1, 1)


def test_settings_are_those_people_run_with() -> None:
    """Unlike the ones for measuring quality."""
    setup = make_setup(2, "cpu", 3)
    assert ("f16", True, True, 3, 2) == (
        setup.kv_type,
        setup.flash_attention,
        setup.repack,
        setup.n_threads,
        setup.n_expert_used,
    )
    assert isinstance(setup, Setup)


def test_memory_bandwidth_is_plausible() -> None:
    """Between a very old machine and the largest accelerator."""
    assert 2e8 < measure_bandwidth() < 1e13


def test_spreads() -> None:
    """Median, lowest, highest; memory is the largest."""
    runs = [Run(10.0 * i, 5.0 * i, 1 / i, 0.5, 100 * i) for i in (3, 1, 2, 10)]
    found = summarize_runs(runs)
    assert (25.0, 10.0, 100.0) == (found.prompt.median, found.prompt.low, found.prompt.high)
    assert (12.5, 1000, 4) == (found.generation.median, found.peak_memory, found.n_run)
    assert (2.0, 1.0, 3.0) == (spread_of([3, 1, 2]).median, spread_of([3, 1, 2]).low, spread_of([3, 1, 2]).high)
