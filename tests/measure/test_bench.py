"""Speeds of several candidates side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_gguf
from click.testing import CliRunner

from moe2gguf.cli import cli
from moe2gguf.cli.tables_compare import speeds
from moe2gguf.errors import HarnessError
from moe2gguf.measure.bench import Bench, Timing, bench
from moe2gguf.measure.grid import note_other_counts, plan_grid

TIMING = Timing(n_prompt=8, n_generate=4, repeat=2, threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights()
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "moe": tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(dense, 4)),
    }


@pytest.fixture(scope="module")
def timed(files: dict[str, Path]) -> tuple[Bench, list[str]]:
    """A bench with a reference and a count that cannot run, and the order of its runs."""
    order: list[str] = []
    found = bench(
        [files["moe"]],
        used=[4, 9, 1],
        reference=files["dense"],
        timing=TIMING,
        on_run=lambda one, _: order.append(one.label),
    )
    return found, order


def test_rounds_are_interleaved(timed: tuple[Bench, list[str]]) -> None:
    """Every candidate once per round, the refused one never, the reference first."""
    once = ["dense.gguf", "moe.gguf k=4/4", "moe.gguf k=1/4"]
    assert once + once == timed[1]


def test_rows_have_bound_and_ratio(timed: tuple[Bench, list[str]], files: dict[str, Path]) -> None:
    """The bound is bandwidth over active bytes; the ratio is to the reference's median."""
    found = timed[0]
    base, all_on, refused, one_on = found.rows
    assert not found.ok
    assert refused.speed is None
    assert "there are only 4" in refused.reason
    for row in (base, all_on, one_on):
        assert row.speed is not None
        assert base.speed is not None
        assert row.speed.bound == pytest.approx(found.bandwidth / row.config.active_bytes)
        assert row.speed.ratio == pytest.approx(row.speed.generation.median / base.speed.generation.median)
        assert 2 == row.speed.n_run
    assert [2e8 < found.bandwidth, 1.0] == [True, base.speed.ratio if base.speed else None]
    assert plan_grid([files["moe"]], [4])[0] == all_on.config


def test_a_count_that_a_file_was_not_made_for_is_noted(tmp_path: Path) -> None:
    """The figures would mislead without it."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4)
    strings = {"moe2gguf.slicing.amplify": "used"}
    path = tiny_gguf.write_gguf(tmp_path / "half.gguf", weights, n_expert_used=2, strings=strings)
    assert [] == note_other_counts(plan_grid([path]))
    note = bench([path], used=[2, 4], timing=Timing(8, 4, 1, 1)).notes[0]
    assert "in half.gguf the experts are amplified for 2 of them" in note
    assert "with 4 it answers worse" in note


def test_json_and_table(timed: tuple[Bench, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Strict JSON with units in bytes and seconds; a line per row and the reason of the one that has none."""
    values = json.loads(json.dumps(timed[0].to_dict(), allow_nan=False))
    assert [True, True, False, True] == [row["speed"] is not None for row in values["rows"]]
    speeds(timed[0])
    text = capsys.readouterr().out
    assert "moe.gguf k=9/4: 9 experts per token: there are only 4" in text
    assert "median (lowest - highest) of 2 rounds; prompt of 8, generation of 4 tokens, 1 thread\n" in text


def test_a_run_that_fails_is_a_row(files: dict[str, Path]) -> None:
    """Too slow for the limit: no speed, the reason, not ok; without a reference no ratio."""
    found = bench([files["moe"]], timing=Timing(8, 4, 2, 1, timeout=1e-3))
    assert (None, False) == (found.rows[0].speed, found.ok)
    assert "no answer within 0.001 s" in found.rows[0].reason
    alone = bench([files["moe"]], timing=Timing(8, 4, 1, 1)).rows[0].speed
    assert alone is not None
    assert alone.ratio is None


def test_devices_are_checked_first(files: dict[str, Path]) -> None:
    """Nothing runs for a device that does not exist."""
    with pytest.raises(HarnessError, match="no such device: tpu"):
        bench([files["moe"]], devices=["tpu"])


def test_the_command(files: dict[str, Path]) -> None:
    """`moe2gguf bench` prints the same as JSON, and names what is wrong with its arguments."""
    arguments = ["bench", str(files["moe"]), "--used", "4,2", "--prompt", "8", "--generate", "4", "--repeat", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--threads", "1", "--json"])
    assert 0 == done.exit_code, done.output
    assert [4, 2] == [row["n_expert_used"] for row in json.loads(done.stdout)["rows"]]
    bad = CliRunner().invoke(cli, ["bench", str(files["moe"]), "--used", "4;2"])
    assert (2, True) == (bad.exit_code, "not a list of whole numbers such as 8,6,4" in bad.output)


def test_only_refused_runs_are_no_success(files: dict[str, Path]) -> None:
    """Nothing was timed: the reason stands in the row."""
    found = bench([files["moe"]], used=[9], timing=Timing(n_prompt=8, n_generate=4, repeat=1, threads=1))
    assert not found.ok
    assert ["there are only 4" in row.reason for row in found.rows] == [True]
