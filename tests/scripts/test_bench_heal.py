"""scripts/bench_heal.py: what each way starts from, the control it trains, and the table it prints."""

from argparse import Namespace
from pathlib import Path

import pytest

from moe2gguf.cli import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_every_way_starts_from_what_was_made_before() -> None:
    """And no two have a name, or a folder, in common."""
    import bench_heal as bench

    made = [bench.START]
    for way in bench.WAYS:
        assert way.start in made
        made.append(way.name)
    assert len(made) == len(set(made))


def test_the_table_has_perplexity_over_the_dense_model_s() -> None:
    """A way that was scored at one count leaves the other cells empty."""
    import bench_heal as bench

    cost = {"seconds": 99.0, "processor_seconds": 120.0, "peak": 2_500_000_000, "perplexity_dense": 10.0}
    rows = [
        {"name": "a", "n_expert_used": 16, "perplexity": 10.3, **cost},
        {"name": "a", "n_expert_used": 4, "perplexity": 24.0, **cost},
        {"name": "dense, trained", "n_expert_used": 0, "perplexity": 9.0, **cost},
    ]

    printed = bench.report({"model": "m", "settings": {"tokens": 2048}, "rows": rows}).splitlines()

    assert "| a | 1.03 |  |  | 2.40 | 2 | 2.5 |" in printed
    assert "| dense, trained | 0.90 |  |  |  | 2 | 2.5 |" in printed
    assert "m, tokens 2,048; dense perplexity 10.00." in printed


def test_every_way_s_options_are_those_of_the_command(tmp_path: Path) -> None:
    """`moe2gguf heal` takes each of them."""
    import bench_heal as bench

    text = tmp_path / "text.txt"
    text.touch()
    given = [tmp_path, tmp_path / "out", "--teacher", tmp_path, "--text", text]
    for way in bench.WAYS:
        options = way.options(Namespace(steps=1, long=2))
        context = cli.commands["heal"].make_context("heal", [str(part) for part in (*given, *options)])
        assert 0 in (context.params["layerwise"], context.params["steps"])
