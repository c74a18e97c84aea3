"""scripts/experiments/quality.py: the whole table of rivals, on a tiny trained Qwen2 model."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

from moe2gguf.experts.text import read_text

pytestmark = pytest.mark.real  # a dozen conversions, each scored in a process of its own

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
SIZES = {"vocabulary": 400, "d-model": 32, "d-ff": 80, "layers": 3, "context": 512, "epochs": 1}


def start(module: str, *arguments: object) -> str:
    """What a script prints, run in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.syspath_prepend(str(EXPERIMENTS))
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        __import__(module).main()
    return printed.getvalue()


def test_every_method_scores_a_qwen2_model(tmp_path: Path) -> None:
    """All rows, finite, within reach of the dense model or worse; PyTorch and llama.cpp agree on the dense model."""
    text, out = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(read_text(None).text[:60000], encoding="utf-8")
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", value)]
    start("train_small", tmp_path / "model", "--text", text, *sizes)
    options = ["--text", text, "--tokens", 2048, "--windows", 2, "--threads", 1, "--used", "12", "--json", out]
    printed = start("quality", "--model", tmp_path / "model", "--work", tmp_path / "work", *options, "--shared", "4,6")
    rows = json.loads(out.read_text())["rows"]
    import quality

    names = [method.name for method in quality.METHODS] + ["ours, refit, 4 shared", "ours, refit, 6 shared"]
    assert sorted([*names, "CMoE"]) == sorted(row["method"] for row in rows)
    assert all(0.9 < row["perplexity"] / row["perplexity_dense"] < 100 for row in rows)
    assert all(f"| {name} |" in printed for name in names)
    dense = {row["scored_by"]: row["perplexity_dense"] for row in rows}
    assert dense["PyTorch"] == pytest.approx(dense["llama.cpp"], rel=1e-3)
