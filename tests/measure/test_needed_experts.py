"""How many experts a token needs: against a numpy version from llama.cpp's logits at every count."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import moe_files
import numpy as np
import pytest
import tiny_gguf
from command import moe2gguf
from flat_options import flat_options
from llama_logits import llama_logits_at

from moe2gguf import convert
from moe2gguf.errors import HarnessError
from moe2gguf.experts.text import Text
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.measure.needed_experts import (
    FixedCount,
    NeededExperts,
    find_need,
    measure_needed_experts,
    name_kind,
)

CONTEXT, N, SHARED, LIMIT = 64, 8, 2, 0.5
COUNTS = [3, 4, 5, 6, 7, 8]
TEXT = Text("the man and 12 inner themes, of it\nis to mend a thin and rather other 7 thing in the tan. " * 3, "tan")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needed")
    source = checkpoints.make(folder / "hf", "llama")
    return convert(source, folder / "moe.gguf", flat_options(N, target="glm4moe", n_shared=SHARED)).path


@pytest.fixture(scope="module")
def found(file: Path) -> NeededExperts:
    return measure_needed_experts(file, limit=LIMIT, text=TEXT, n_token=1, n_context=CONTEXT, threads=1)


def _tokens(path: Path) -> list[int]:
    with open_model(path, Setup(n_threads=1)) as model:
        start = [] if (bos := model.bos()) is None else [bos]
        return [*start, *(int(t) for t in model.tokenize(TEXT.text)[len(start) :])][:CONTEXT]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_each_token_needs_what_numpy_finds(file: Path, found: NeededExperts) -> None:
    """Counts, divergences, shares and groups are those of llama.cpp's logits with the count overridden."""
    tokens = run_in_child(_tokens, file)
    scored = slice(CONTEXT // 2, CONTEXT - 1)
    logits = llama_logits_at(file, tokens, COUNTS)
    ln = [_log_softmax(one[scored].astype(np.float64)) for one in logits]
    kl = np.array([(np.exp(ln[-1]) * (ln[-1] - one)).sum(axis=1) for one in ln])
    needed = np.array([next(k for k, row in zip(COUNTS, kl, strict=True) if row[t] <= LIMIT) for t in range(31)])
    assert len(set(needed)) > 2

    need = found.need

    assert 31 == found.n_token
    assert COUNTS == [one.count for one in found.fixed]
    assert kl.mean(axis=1) == pytest.approx([one.kl for one in found.fixed], rel=1e-3, abs=1e-6)
    assert [(needed == k).mean() for k in COUNTS] == pytest.approx(need.shares)
    assert needed.mean() == pytest.approx(need.mean)
    assert kl[needed - 3, np.arange(31)].mean() == pytest.approx(need.kl, rel=1e-3)
    assert need.mean <= need.lasting
    entropy = -(np.exp(ln[-1]) * ln[-1]).sum(axis=1)
    easy = entropy <= np.quantile(entropy, 1 / 3)
    assert (easy.sum(), pytest.approx(needed[easy].mean())) == need.groups["prediction"]["easy"]
    for groups in need.groups.values():
        assert sum(n_token * mean for n_token, mean in groups.values()) / 31 == pytest.approx(need.mean)


def test_bytes_are_those_of_the_tensors(file: Path, found: NeededExperts) -> None:
    """The MLPs of the dense model at all experts; each routed expert less is one part of the routed ones less."""
    router = 3 * (N - SHARED) * 64 * 4
    mlp = 3 * 3 * 64 * 96 * 4
    assert [k / N * mlp + router for k in COUNTS] == pytest.approx([one.mlp_bytes for one in found.fixed])
    assert found.fixed[-1].total_bytes < file.stat().st_size


def test_an_oracle_of_known_divergences() -> None:
    """First and lasting counts, and the fixed count whose mean divergence lies between two others."""
    kl = np.array([[0.0, 0.9, 0.3, 0.9], [0.5, 0.9, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]])
    fixed = [FixedCount(k, row.mean(), 0, 0, 10 * k, 100 + 10 * k) for k, row in zip((2, 3, 4), kl, strict=True)]

    need = find_need(0.1, kl, fixed, {"half": ["a", "b", "a", "b"]})

    assert (3.0, 3.5) == (need.mean, need.lasting)  # 2 4 3 3, and 4 4 3 3
    assert (0.25, 0.5, 0.25) == need.shares
    assert 0.025 == pytest.approx(need.kl)
    assert 4 - 0.025 / 0.375 == pytest.approx(need.same_kl)
    assert need.same_kl / 3 == pytest.approx(need.mlp_gain)
    assert (100 + 10 * need.same_kl) / 130 == pytest.approx(need.gain)
    assert {"half": {"a": (2, 2.5), "b": (2, 3.5)}} == need.groups


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" sea", "start of a word"),
        ("ing", "rest of a word"),
        (" é", "start of a word"),
        ("7", "digits"),
        (" 12", "digits"),
        (".\n", "line break"),
        (" (", "punctuation"),
        (" ", "punctuation"),
        ("", "control token"),
    ],
)
def test_kinds_of_tokens(piece: str, kind: str) -> None:
    """Each by its text."""
    assert kind == name_kind(piece)


def test_files_without_such_counts_are_refused(tmp_path: Path) -> None:
    """Dense, renormalised, or of another origin: each with its reason and what to do."""
    dense = tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights())
    with pytest.raises(HarnessError, match="is dense, every token needs all of it; slice"):
        measure_needed_experts(dense, text=TEXT)
    moe = tiny_gguf.write_gguf(tmp_path / "moe.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4))
    with pytest.raises(HarnessError, match="in llama the weight of an expert depends on how many are used"):
        measure_needed_experts(moe, text=TEXT)
    with pytest.raises(HarnessError, match="was not sliced here"):
        measure_needed_experts(moe_files.make(tmp_path / "glm.gguf", "glm4moe"), text=TEXT)


def test_the_command(file: Path, tmp_path: Path) -> None:
    """Tables, or JSON; options without effect and limits that are none are refused."""
    (tmp_path / "text").write_text(TEXT.text)
    words = [
        "expert-usage",
        file,
        "--needed",
        "--text",
        tmp_path / "text",
        "--tokens",
        1,
        "--context",
        CONTEXT,
        "-t",
        1,
    ]
    done = moe2gguf(*words, "--divergence", "0.5")
    assert 0 == done.returncode, done.stderr
    assert "31 tokens need" in done.stdout
    assert "start of a word" in done.stdout
    again = moe2gguf(*words, "--json")
    assert 0.1 == json.loads(again.stdout)["need"]["limit"]
    for wrong, message in ((["--used", 4], "no effect with --needed"), (["--divergence", "0"], "not in the range")):
        refused = moe2gguf(*words, *wrong)
        assert (2, True) == (refused.returncode, message in refused.stderr)
