"""scripts/bench_types.py: the table of types."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from moe2gguf.quant.rules import MIXES, PLAIN

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [1, 5, 9, 30, 2, 7, 7, 60, 11]


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def row(file: Any, kind: Any, bits: Any, kl: Any) -> Any:
    return {
        "file": file, "type": kind, "bits_per_weight": bits, "bytes": 10**7, "perplexity": 20.0, "kl_mean": kl,
        "kl_error": 0.0, "top1": 0.9,
    }  # fmt: skip


def test_the_table_has_a_line_per_type_and_what_is_published() -> None:
    """Large to small; a file that was not measured leaves its cells empty; below, how the divergences compare."""
    import bench_types as bench

    rows = [row("dense", "q4_0", 4.55, 0.14), row("dense", "q8_0", 8.5, 0.004), row("sliced", "q4_0", 4.6, 0.28)]
    host = {"processor": "cpu"}

    printed = bench.report({"model": "m", "machine": host, "settings": {"tokens": 9, "windows": 2}, "rows": rows})

    lines = printed.splitlines()
    assert "| q8_0 | 8.50 | 10 | 20.00 | 0.0040 | 90.0% | 0.0014 |  |  |  |  |  |" == lines[3]
    assert lines[4].startswith("| q4_0 | 4.55 | 10 | 20.00 | 0.1400 | 90.0% | 0.0719 | 4.60 | 10 | 20.00 | 0.2800 |")
    assert "m, importance matrix of 9 tokens, 510 scored tokens" in printed
    assert "- divergence over that of Llama 3 8B: 1.95 (q4_0) to 2.95 (q8_0), median 2.45" in printed
    assert "- divergence with experts over the dense file's: 2.00 (q4_0) to 2.00 (q4_0), median 2.00" in printed


def test_published_names_are_types_that_are_offered() -> None:
    """A misspelled one would never be compared."""
    import bench_types as bench

    assert set(bench.PUBLISHED) <= {*MIXES, *PLAIN}


@pytest.mark.real
def test_a_small_run_from_checkpoint_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense and in experts, an importance matrix between; what was measured is not measured again."""
    import bench_types as bench

    model = checkpoints.make(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(
        "the man and an inner theme of it is to mend a thin and rather other thing. " * 500
    )
    arguments = ["--model", model, "--text", tmp_path / "text.txt", "--tokens", 1024, "--windows", 1, "--threads", 1]
    arguments += ["--only", "q4_0", "iq2_xxs", "--work", tmp_path / "work", "--json", tmp_path / "result.json"]

    bench.main([str(argument) for argument in arguments])

    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    kinds = ["f16", "q4_0", "iq2_xxs"]
    assert {(file, kind) for file in ("dense", "sliced") for kind in kinds} == {(r["file"], r["type"]) for r in rows}
    assert "| iq2_xxs |" in capsys.readouterr().out
    kl = {(r["file"], r["type"]): r["kl_mean"] for r in rows}
    assert kl["dense", "q4_0"] < kl["dense", "iq2_xxs"]
