"""scripts/quality.py: the whole table of rivals, on a tiny trained Qwen2 model."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from llama_tokens import LlamaTokens

from moe2gguf.experts.text import read_text

pytestmark = pytest.mark.real  # a dozen conversions, each scored in a process of its own

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocabulary": 400, "d-model": 32, "d-ff": 80, "layers": 3, "context": 512, "epochs": 1}


def start(module: str, *arguments: object) -> str:
    """What a script prints, run in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        __import__(module).main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(rows, what was printed, folder) of a run at 12 of 16."""
    folder = tmp_path_factory.mktemp("quality")
    text, out = folder / "text.txt", folder / "rows.json"
    text.write_text(read_text(None).text[:60000], encoding="utf-8")
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", value)]
    start("train_small", folder / "model", "--text", text, *sizes)
    options = ["--text", text, "--tokens", 2048, "--windows", 2, "--threads", 1, "--used", "12", "--json", out]
    printed = start("quality", "--model", folder / "model", "--work", folder / "work", *options, "--always-on", "4,6")
    return json.loads(out.read_text())["rows"], printed, folder


def test_every_method_scores_a_qwen2_model(table):
    """All rows, finite, within reach of the dense model or worse; in one table."""
    import quality

    rows, printed, _ = table

    names = [method.name for method in quality.METHODS] + ["ours, refit, 4 always on", "ours, refit, 6 always on"]
    assert sorted([*names, "CMoE"]) == sorted(row["method"] for row in rows)
    assert all(0.9 < row["perplexity"] / row["perplexity_dense"] < 100 for row in rows)
    assert all(f"| {name} |" in printed for name in names)


def test_both_programs_score_the_same_text(table):
    """The dense perplexity of transformers and of llama.cpp agree."""
    rows, _, _ = table

    dense = {row["scored_by"]: row["perplexity_dense"] for row in rows}

    assert dense["PyTorch"] == pytest.approx(dense["llama.cpp"], rel=1e-3)


def test_pytorch_s_windows_are_llama_cpp_s_tokens(table):
    """Window after window of the held-out text, and no token in front that llama.cpp does not put there."""
    import quality

    _, _, folder = table
    options = {"text": folder / "text.txt", "work": folder / "again", "model": folder / "model"}
    run = quality.prepare(argparse.Namespace(**options, tokens=2048, windows=2, threads=1))

    found = quality.held_out_ids(run, None)

    with LlamaTokens(folder / "work" / "dense.gguf") as llama:
        assert llama.encode(run.held_out)[:1024] == found.flatten().tolist()
