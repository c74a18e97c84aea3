"""Every command on files of every architecture with stacked experts that llama.cpp runs, not only our own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from command import moe2gguf
from moe_files import KEYS, MORE, make

from moe2gguf import TypeOptions, collect_imatrix, compare, inspect, measure_expert_usage, quantize, set_used
from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.limits import max_experts_used
from moe2gguf.llama.devices import Setup
from moe2gguf.measure.compare import CompareSettings
from moe2gguf.measure.expert_usage import tally_in_child
from moe2gguf.recipes.convert import plan_conversion

WORDS = "the theory of the island and the other land " * 40
TEXT = Text(WORDS, "words")

everywhere = pytest.mark.parametrize("architecture", MORE)


def count_shared(architecture: str) -> int:
    """The experts that a shared one is as wide as, by its keys."""
    keys = {**KEYS, **MORE[architecture]}
    width: int = keys.get("expert_shared_feed_forward_length", 0)
    return int(keys.get("expert_shared_count", width // keys["expert_feed_forward_length"]))


def list_stacks(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that hold experts, by gguf's reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        one.name: tuple(map(int, one.shape[::-1])) for one in tensors if "_exps." in one.name and "norm" not in one.name
    }


@everywhere
def test_inspect_counts_experts_and_what_a_token_uses(tmp_path: Path, architecture: str) -> None:
    """Of 6 experts 2 run; shared ones count with both, and dense layers with neither. `convert` names the commands."""
    path, shared = make(tmp_path / "moe.gguf", architecture), count_shared(architecture)
    found, stacks = inspect(path), list_stacks(path)
    stacked = sum(int(np.prod(shape)) for shape in stacks.values())

    assert found.experts is not None
    assert (6 + shared, 2 + shared, shared) == (found.experts.count, found.experts.used, found.experts.shared)
    assert found.experts.d_expert == next(shape[2] for name, shape in stacks.items() if "down_exps.weight" in name)
    assert found.n_active == found.n_parameters - stacked * 4 // 6
    with pytest.raises(PlanError, match="experts already; `moe2gguf inspect, expert-usage"):
        plan_conversion(path)


@everywhere
def test_set_used_changes_the_count_that_llama_cpp_runs(tmp_path: Path, architecture: str) -> None:
    """Every layer with experts runs as many, and what its router chose sums to them; shared ones are not chosen."""
    path, shared = make(tmp_path / "moe.gguf", architecture), count_shared(architecture)
    set_used(path, 3 + shared)
    use = measure_expert_usage(path, text=TEXT, n_token=64, n_context=32, threads=1)

    layers = sorted({int(name.split(".")[1]) for name in list_stacks(path)})
    assert [one.layer for one in use.layers] == layers
    for one in use.layers:
        assert sum(one.load) == pytest.approx(3)
        assert sum(one.probability) == pytest.approx(1)
        assert 0 < one.router_entropy <= np.log(6)
    with pytest.raises(GGUFError, match="there are only"):
        set_used(path, 7 + shared)


@everywhere
def test_the_largest_count_that_is_allowed_runs(tmp_path: Path, architecture: str) -> None:
    """The room in llama.cpp's graph is never thought larger than it is; one more aborts the process or is refused."""
    path = make(tmp_path / "moe.gguf", architecture, 6, expert_count=100)
    counts = read_counts(read_gguf(path))
    limit = max_experts_used(counts.size) + counts.n_shared
    assert limit < counts.n_expert
    setup = Setup(n_expert_used=limit, n_context=32, n_batch=32, n_threads=1, flash_attention=False)

    assert tally_in_child(path, setup, WORDS, 32).n_expert_used == limit - counts.n_shared
    with pytest.raises(GGUFError, match=f"Use {limit} or fewer"):
        set_used(path, limit + 1)


@everywhere
def test_a_quantized_file_is_compared_with_its_source(tmp_path: Path, architecture: str) -> None:
    """An importance matrix of the file, a smaller type by it, and a comparison at the count of the source."""
    path, out = make(tmp_path / "moe.gguf", architecture), tmp_path / "small.gguf"
    (tmp_path / "text").write_text(WORDS)
    found = collect_imatrix(path, tmp_path / "imatrix", tmp_path / "text", n_token=128, n_context=64, threads=1)
    stacks = {name for name in list_stacks(path) if name.endswith("exps.weight")}
    assert stacks <= {*found.matrix.entries}
    for name in stacks:
        assert found.matrix.entries[name].counts.sum() == 2 * 128
    options = TypeOptions("q4_0", imatrix=tmp_path / "imatrix", imatrix_repair="ones", allow_fallback=True)
    quantize(path, out, options, threads=1)
    settings = CompareSettings(TEXT, n_token=32, n_context=32, threads=1, journal=tmp_path / "journal")
    rows = compare([path, out], path, settings=settings).rows

    assert [row.status for row in rows] == ["ok", "ok"]
    same, small = (row.quality.summary.kl_mean for row in rows if row.quality)
    assert same < 1e-6 < small < 1


@pytest.mark.parametrize("architecture", ["gpt-oss", "deepseek2", "lfm2moe"])
def test_bench_times_other_attentions_too(tmp_path: Path, architecture: str) -> None:
    """Sinks, latent attention, and layers without attention; a file with experts may be the reference."""
    path = make(tmp_path / "moe.gguf", architecture)
    short = ("--prompt", 16, "--generate", 4, "--repeat", 1, "--threads", 1)
    done = moe2gguf("bench", path, "--reference", path, *short)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moe.gguf k=") >= 2
