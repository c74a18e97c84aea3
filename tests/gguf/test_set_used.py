"""moe2gguf.gguf.set_used: the used count, in place."""

from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
from flat_options import flat_options
from llama_logits import llama_logits, llama_logits_at

from moe2gguf import convert, verify
from moe2gguf.errors import GGUFError
from moe2gguf.gguf.set_used import set_used

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA."""
    return checkpoints.make(tmp_path_factory.mktemp("edit") / "model")


def test_the_count_changes_and_nothing_else(folder: Any, tmp_path: Path) -> None:
    """llama.cpp runs the new count by default; the rest of the file keeps its bytes."""
    path = convert(folder, tmp_path / "x.gguf", flat_options(experts=8)).path
    before = path.read_bytes()

    note = set_used(path, 3)

    assert note == "in x.gguf the router is zero, it cannot choose among the 8 experts; with 3 it answers worse"
    fields = gguf.GGUFReader(path).fields
    assert [3, 3] == [
        fields[key].contents() for key in ("llama.expert_used_count", "moe2gguf.slicing.expert_used_count")
    ]
    after = path.read_bytes()
    assert len(before) == len(after)
    assert 2 == sum(a != b for a, b in zip(before, after, strict=True))
    assert () == verify(path).problems
    assert np.array_equal(llama_logits_at(path, TOKENS, [3])[0], llama_logits(path, TOKENS))


def test_any_shard_names_its_set(folder: Any, tmp_path: Path) -> None:
    """The count stands in the first shard, and is checked against the tensors of all."""
    path = convert(folder, tmp_path / "x.gguf", flat_options(experts=8, shard_size=200_000)).path
    shards = sorted(tmp_path.glob("x-*.gguf"))

    set_used(shards[-1], 3)

    assert len(shards) > 1
    assert 3 == gguf.GGUFReader(path).fields["llama.expert_used_count"].contents()
    assert () == verify(path).problems


@pytest.mark.parametrize(("k", "words"), [(0, "at least 1"), (9, "there are only 8")])
def test_counts_that_cannot_run_are_refused(folder: Any, tmp_path: Path, k: int, words: str) -> None:
    """They would abort llama.cpp."""
    path = convert(folder, tmp_path / "x.gguf", flat_options(experts=8)).path

    with pytest.raises(GGUFError, match=words):
        set_used(path, k)


def test_files_made_for_one_count_are_refused_with_the_reason(folder: Any, tmp_path: Path) -> None:
    """Amplified for 4 of 8: another count would be too loud or too quiet."""
    options = flat_options(experts=8, used=4, group="activations", n_shared=0, refit=False, n_token=2048)
    path = convert(folder, tmp_path / "x.gguf", options).path

    with pytest.raises(GGUFError, match=r"amplified for 4 of them.*--used 6"):
        set_used(path, 6)
    assert "" == set_used(path, 4)


def test_a_dense_file_has_no_count(folder: Any, tmp_path: Path) -> None:
    """And says so."""
    path = convert(folder, tmp_path / "x.gguf", flat_options(dense=True)).path

    with pytest.raises(GGUFError, match="has no experts"):
        set_used(path, 1)
