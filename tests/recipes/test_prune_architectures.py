"""Pruning in every architecture that stacks its experts: llama.cpp names the tensors, loads the result, and agrees."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import moe_files
import numpy as np
import pytest
from llama_logits import llama_logits_of
from script_modules import ROOT

from moe2gguf import PruneOptions, prune
from moe2gguf.experts.text import Text
from moe2gguf.gguf.expert_tensors import STACKED

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 16)]
NEVER = (1, 4)
TEXT = Text("".join(np.random.default_rng(1).choice([*"abcdefghijklmnopqrstuvwxyz "], 1000)), "a text")


@pytest.mark.parametrize("architecture", STACKED)
def test_experts_that_never_run_are_found_and_not_missed(architecture: str, tmp_path: Path) -> None:
    """Without them llama.cpp computes the same; the tensors have the shapes that it wants for so few experts."""
    keys = {**moe_files.KEYS, **moe_files.MORE[architecture]}
    n_kept = moe_files.N_EXPERT - len(NEVER)
    fewer = moe_files.write(tmp_path / "fewer.gguf", architecture, keys | {"expert_count": n_kept}, {})
    shapes, wanted = moe_files.list_tensors(moe_files.write(tmp_path / "keys.gguf", architecture, keys, {}), fewer)
    weights = moe_files.make_weights(shapes, NEVER)
    whole = moe_files.write(tmp_path / "whole.gguf", architecture, keys, weights)
    n_shared = keys.get("expert_shared_count", keys.get("expert_shared_feed_forward_length", 0) // moe_files.D_EXPERT)

    done = prune(whole, tmp_path / "out.gguf", PruneOptions(n_kept + n_shared, n_token=256, n_context=32), TEXT)

    assert [[0, 2, 3, 5]] * len(done.kept) == [*done.kept.values()]
    assert all(share == 0 for share in done.dropped.values())
    found = {one.name: tuple(map(int, one.shape[::-1])) for one in gguf.GGUFReader(done.path).tensors}
    assert {name: wanted[name] for name in found} == found
    before, after = llama_logits_of([whole, done.path], TOKENS)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_a_layer_that_does_not_run_is_cut_too(tmp_path: Path) -> None:
    """The layer that GLM-4.5 adds to guess a second token: llama.cpp checks its shapes, and the report says so."""
    keys = moe_files.KEYS | moe_files.MORE["glm4moe"]
    (shapes,) = moe_files.list_tensors(moe_files.write(tmp_path / "keys.gguf", "glm4moe", keys, {}))
    layer = {name: shape for name, shape in shapes.items() if name.startswith("blk.1.") and "scale" not in name}
    more = {name.replace("blk.1", "blk.2"): shape for name, shape in layer.items()}
    d = moe_files.D_MODEL
    more |= {
        "blk.2.nextn.eh_proj.weight": (d, 2 * d),
        "blk.2.nextn.enorm.weight": (d,),
        "blk.2.nextn.hnorm.weight": (d,),
    }
    weights = moe_files.make_weights(shapes | more, NEVER)
    keys |= {"block_count": 3, "nextn_predict_layers": 1}
    whole = moe_files.write(tmp_path / "whole.gguf", "glm4moe", keys, weights)

    done = prune(whole, tmp_path / "out.gguf", PruneOptions(5, n_token=256, n_context=32), TEXT)

    assert {0: [0, 2, 3, 5], 1: [0, 2, 3, 5], 2: [0, 1, 2, 3]} == done.kept
    assert ("layer 2 did not run, so its experts have no score: the first ones stay",) == done.notes
    before, after = llama_logits_of([whole, done.path], TOKENS)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_the_documentation_names_every_architecture() -> None:
    """And no other."""
    page = (ROOT / "docs" / "how-to" / "prune.md").read_text()
    listed = page.partition("Architectures by the names in `general.architecture`: ")[2].partition(".\n")[0]

    assert sorted(STACKED) == re.findall(r"`(.+?)`", listed)
