"""The check of a sliced file against its dense parent."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf

from moe2gguf.errors import HarnessError
from moe2gguf.measure.check import KL_LIMIT, compare_with_dense


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights()
    sliced = tiny_gguf.sliced_weights(dense, 4)
    damaged = {name: array.copy() for name, array in sliced.items()}
    damaged["blk.1.ffn_down_exps.weight"][3] *= 1.5
    poisoned = {name: array.copy() for name, array in sliced.items()}
    poisoned["output.weight"][200] = np.nan
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "sliced": tiny_gguf.write_gguf(folder / "sliced.gguf", sliced, n_expert_used=2),
        "damaged": tiny_gguf.write_gguf(folder / "damaged.gguf", damaged),
        "poisoned": tiny_gguf.write_gguf(folder / "poisoned.gguf", poisoned),
        "other_words": tiny_gguf.write_gguf(folder / "other.gguf", sliced, texts={259: "hte"}),
    }


def test_a_sliced_file_is_its_dense_model(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all experts, whatever count the file names, the check passes, in JSON too, and leaves no file behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = compare_with_dense(files["sliced"], files["dense"], n_token=100, n_context=64, threads=1)
    assert (result.difference.n_token, result.n_expert, result.n_expert_used) == (126, 4, 4)
    assert result.ok
    assert result.difference.kl_mean <= 1e-6
    assert result.difference.max_difference <= 1e-3
    assert result.difference.top1 >= 0.99
    assert result.difference.perplexity == pytest.approx(result.difference.perplexity_base, rel=1e-6)
    assert result.kl_limit == max(KL_LIMIT, 3 * result.noise.kl_mean)
    assert "the same model" in result.reason
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["ok"] is True
    assert list(tmp_path.iterdir()) == []


def test_fewer_experts_are_another_model(files: dict[str, Path]) -> None:
    """With k < n the check fails, and says that this is expected."""
    result = compare_with_dense(files["sliced"], files["dense"], n_expert_used=2, n_token=50, n_context=64, threads=1)
    assert not result.ok
    assert result.reason.endswith("another model, as expected with 2 of 4 experts")


def test_one_damaged_expert_is_found(files: dict[str, Path]) -> None:
    """One expert of one layer with a wrong scale makes the check fail."""
    result = compare_with_dense(files["damaged"], files["dense"], n_token=50, n_context=64, threads=1)
    assert (result.ok, result.reason.endswith("another model")) == (False, True)


def test_bad_numbers_fail_the_check(files: dict[str, Path]) -> None:
    """NaN logits fail the check, are counted in words, and are null in JSON."""
    result = compare_with_dense(files["poisoned"], files["dense"], n_token=50, n_context=64, threads=1)
    assert (result.ok, result.reason) == (False, "63 logits are NaN or infinite")
    assert result.to_dict()["kl_mean"] is None


def test_files_that_do_not_belong_together(files: dict[str, Path]) -> None:
    """Different vocabularies, and an expert count out of range, are errors and not results."""
    with pytest.raises(HarnessError, match="different vocabularies"):
        compare_with_dense(files["other_words"], files["dense"], n_token=50, n_context=64, threads=1)
    with pytest.raises(HarnessError, match="has 4 experts, 0 cannot be used"):
        compare_with_dense(files["sliced"], files["dense"], n_expert_used=0, n_token=50, n_context=64, threads=1)


def test_a_short_text_is_refused(files: dict[str, Path]) -> None:
    """A text that cannot fill the windows is an error that says how much is missing."""
    with pytest.raises(HarnessError, match="takes 64 tokens of text, this one has"):
        compare_with_dense(files["sliced"], files["dense"], n_token=50, n_context=64, text="the man", threads=1)


def test_check_is_frozen(files: dict[str, Path]) -> None:
    """The result cannot be changed, only copied with a change."""
    result = compare_with_dense(files["sliced"], files["dense"], n_token=10, n_context=16, threads=1)
    assert replace(result, noise=result.difference).noise is result.difference
    with pytest.raises(AttributeError):
        result.noise = result.difference  # type: ignore[misc]
