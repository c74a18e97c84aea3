"""Pruning: fewer experts in a file, and every byte of the others as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import moe_files
import numpy as np
import pytest
import tiny_gguf
from command import moe2gguf
from flat_options import flat_options
from llama_logits import llama_logits, llama_logits_of
from reference import reference_answers, reference_logits

from moe2gguf import (
    CompareSettings,
    Donor,
    MergeOptions,
    PruneOptions,
    compare,
    convert,
    densify,
    merge,
    prune,
    quantize,
    verify,
)
from moe2gguf.errors import GGUFError, OutputError, PlanError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.llama.score_experts import LayerSums, sum_answers
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.prune import keep_best, score_layers

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 16)]
WORDS = "".join(np.random.default_rng(1).choice([*"abcdefghijklmnopqrstuvwxyz "], 2000))
TEXT = Text(WORDS, "a text")
N, CONTEXT, N_WINDOW = 8, 32, 4
SHARED = {"mixtral": 0, "glm4moe": 2}


@pytest.fixture(scope="module", params=SHARED)
def target(request: pytest.FixtureRequest) -> str:
    """The graph of the file."""
    return str(request.param)


@pytest.fixture(scope="module")
def sliced(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sliced model of 8 experts, with a calibration in it."""
    folder = tmp_path_factory.mktemp(target)
    source = checkpoints.make(folder / "hf", "llama", intermediate_size=N * 32)
    (folder / "text.txt").write_text(WORDS)
    options = flat_options(
        N, target=target, n_shared=SHARED[target], refit=False, text=folder / "text.txt", n_token=1024
    )
    return convert(source, folder / "moe.gguf", options).path


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts of which two run, chosen by a random router."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), N, router_seed=3)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("routed") / "moe.gguf", weights, n_expert_used=2)


@pytest.mark.parametrize("type_", ["f16", "q4_0"])
def test_what_stays_is_copied_byte_for_byte(sliced: Path, target: str, tmp_path: Path, type_: str) -> None:
    """Tensors with a row per expert lose rows, all else is the same; one rule gives experts a type of their own."""
    quantize(sliced, tmp_path / "whole.gguf", TypeOptions("q8_0", tensor_types=(rf".*_exps\.weight={type_}",)))
    done = prune(tmp_path / "whole.gguf", tmp_path / "out.gguf", PruneOptions(keep=5, score="random", seed=1))
    assert () == verify(done.path).problems
    n_shared = SHARED[target]
    small = {one.name for one in read_gguf(done.path).tensors.values() if one.type.name == type_.upper()}
    assert small == {f"blk.{i}.ffn_{role}_exps.weight" for i in range(3) for role in ("gate", "up", "down")}
    whole, out = gguf.GGUFReader(tmp_path / "whole.gguf"), gguf.GGUFReader(done.path)
    tensors = {one.name: one.data for one in whole.tensors}
    assert [*tensors] == [one.name for one in out.tensors]
    n_cut = 0
    for one in out.tensors:
        _, layer, *rest = one.name.split(".")
        expected = tensors[one.name]
        if rest and rest[0].removeprefix("ffn_") in ("gate_inp", "gate_exps", "up_exps", "down_exps", "exp_probs_b"):
            expected = expected[done.kept[int(layer)]]
            n_cut += 1
        np.testing.assert_array_equal(expected.view(np.uint8), one.data.view(np.uint8), one.name)
    assert n_cut == 3 * (4 if target == "mixtral" else 5)
    arch = read_gguf(done.path).metadata["general.architecture"]
    before, after = ({k: f.contents() for k, f in reader.fields.items()} for reader in (whole, out))
    changed = {
        f"{arch}.expert_count": 5 - n_shared,
        f"{arch}.expert_used_count": 5 - n_shared,
        "moe2gguf.slicing.expert_count": 5,
        "moe2gguf.slicing.expert_used_count": 5,
    }
    gone = {
        "general.size_label",
        "moe2gguf.calibration.load",
        "moe2gguf.slicing.padding",
        "moe2gguf.slicing.dense_feed_forward_length",
    }
    expected = {k: v for k, v in (before | changed).items() if k not in gone and not k.startswith("GGUF.")}
    own = {k: after.pop(k) for k in [*after] if k.startswith("moe2gguf.prune.")}
    assert expected == {k: v for k, v in after.items() if not k.startswith("GGUF.")}
    assert [one for ids in done.kept.values() for one in ids] == own["moe2gguf.prune.kept"]
    assert ("random", 1, N) == tuple(own[f"moe2gguf.prune.{key}"] for key in ("score", "seed", "expert_count"))


def test_llama_cpp_computes_the_cut_graph(sliced: Path, tmp_path: Path) -> None:
    """The logits are those of the graph in numpy, with the experts that stay."""
    done = prune(sliced, tmp_path / "out.gguf", PruneOptions(keep=6, used=4, score="random"))

    np.testing.assert_allclose(llama_logits(done.path, TOKENS), reference_logits(done.path, TOKENS), atol=2e-3)


@pytest.mark.parametrize(("graph", "louder"), [("mixtral", 8 / 5), ("deepseek", 6 / 3), ("glm4moe", 1)])
def test_slices_that_become_louder_are_told(tmp_path: Path, graph: str, louder: float) -> None:
    """A weight may be a share of fewer, chosen or all: llama.cpp's answers grow by as much as the note says."""
    source = checkpoints.make(tmp_path / "hf", "llama", intermediate_size=N * 32, num_key_value_heads=4)
    n_shared = 0 if graph == "mixtral" else 2
    whole = convert(source, tmp_path / "moe.gguf", flat_options(N, target=graph, n_shared=n_shared)).path

    done = prune(whole, tmp_path / "out.gguf", PruneOptions(keep=5, score="random"))

    assert [f"weighs {louder:.2f} times" in note for note in done.notes] == [True] * (louder > 1)
    before, after = (_sum(path)[0].lengths for path in (whole, done.path))
    assert after == pytest.approx(louder * before[done.kept[0]], rel=1e-3)


def test_other_experts_may_share_what_others_leave(routed: Path, tmp_path: Path) -> None:
    """A router that was not made for slices divides the weight among those that run."""
    assert () == prune(routed, tmp_path / "out.gguf", PruneOptions(keep=1, score="random")).notes


def test_a_merged_file_loses_a_donor(tmp_path: Path) -> None:
    """Its experts are pruned by what a text needs, and llama.cpp computes the graph of those that stay."""
    base = tiny_gguf.dense_weights()
    weights = [{name: w + 0.2 * i * tiny_gguf.dense_weights(i)[name] for name, w in base.items()} for i in range(4)]
    files = [tiny_gguf.write_gguf(tmp_path / f"{i}.gguf", one) for i, one in enumerate(weights)]
    merged = merge(files[0], [*map(Donor, files[1:])], tmp_path / "merged.gguf", MergeOptions("random", used=2))

    done = prune(merged.path, tmp_path / "out.gguf", PruneOptions(keep=2, n_token=64, n_context=CONTEXT), TEXT)

    assert (3, 2, ()) == (done.n_expert, done.n_used, verify(done.path).problems)
    np.testing.assert_allclose(llama_logits(done.path, TOKENS), reference_logits(done.path, TOKENS), atol=2e-3)


def test_a_second_cut_keeps_the_first_numbers(routed: Path, tmp_path: Path) -> None:
    """The metadata names experts as the first file did, and two cuts are the one that keeps the same."""
    once = prune(routed, tmp_path / "once.gguf", PruneOptions(keep=6, score="random", seed=1))
    twice = prune(once.path, tmp_path / "twice.gguf", PruneOptions(keep=3, score="random", seed=2))

    metadata = read_gguf(twice.path).metadata
    names = np.array(metadata["moe2gguf.prune.kept"]).reshape(2, 3)
    assert [[once.kept[i][one] for one in twice.kept[i]] for i in (0, 1)] == names.tolist()
    assert N == metadata["moe2gguf.prune.expert_count"]
    whole = {one.name: one.data for one in gguf.GGUFReader(routed).tensors}
    for one in gguf.GGUFReader(twice.path).tensors:
        if one.name == "blk.1.ffn_up_exps.weight":
            np.testing.assert_array_equal(whole[one.name][names[1]], one.data)


def test_sums_are_those_of_numpy(routed: Path) -> None:
    """Counts and lengths of all answers, from the whole graph in numpy."""
    tokens = run_in_child(_tokens, routed)[: CONTEXT * N_WINDOW].reshape(N_WINDOW, CONTEXT)
    tokens[:, 0] = tiny_gguf.BOS
    lengths = np.concatenate([reference_answers(routed, [int(t) for t in window]) for window in tokens], axis=1)

    found = _sum(routed)

    assert [0, 1] == sorted(found)
    for i, sums in found.items():
        np.testing.assert_array_equal((lengths[i] > 0).sum(axis=0), sums.counts)
        np.testing.assert_allclose(lengths[i].sum(axis=0), sums.lengths, rtol=1e-4)


def _sum(path: Path) -> dict[int, LayerSums]:
    setup = Setup(n_context=CONTEXT, n_threads=1)
    sums: Any = run_in_child(sum_answers, path, setup, WORDS, CONTEXT * N_WINDOW)
    return dict(sums)


def _tokens(path: Path) -> np.ndarray:
    with open_model(path, Setup(n_threads=1)) as model:
        return model.tokenize(WORDS)


def test_each_score_keeps_the_best() -> None:
    """The mean length, their sum, or the count; of every group equally many; of equals the first."""
    sums = {0: LayerSums(np.array([10, 1, 0, 5]), np.array([10.0, 3.0, 0.0, 9.0]))}
    tensors: Any = type("Tensors", (), {"layers": [0], "n_expert": 4})

    assert [1, 3] == keep_best(score_layers(tensors, sums, PruneOptions(2))[0], 2)
    assert [0, 3] == keep_best(score_layers(tensors, sums, PruneOptions(2, score="frequency"))[0], 2)
    assert [0, 3] == keep_best(score_layers(tensors, sums, PruneOptions(2, score="total"))[0], 2)
    assert [0] == keep_best(score_layers(tensors, sums, PruneOptions(1, score="total"))[0], 1)
    assert [0, 2, 4] == keep_best(np.array([0, 0, 1, 0, 9, 8.0]), 3, 3)
    assert [0, 1] == keep_best(np.zeros(4), 2)


def test_frequency_and_reap_come_from_the_text(routed: Path, tmp_path: Path) -> None:
    """Another score keeps other experts; what is reported as lost is the share of what did not stay."""
    kept = {}
    for score in ("reap", "frequency"):
        options = PruneOptions(keep=4, score=score, n_token=CONTEXT * N_WINDOW, n_context=CONTEXT)
        done = prune(routed, tmp_path / f"{score}.gguf", options, TEXT)
        for i, one in _sum(routed).items():
            value = one.lengths / np.maximum(one.counts, 1) if score == "reap" else one.counts
            assert sorted(np.argsort(-value, kind="stable")[:4]) == done.kept[i]
            assert done.dropped[i] == pytest.approx(1 - one.lengths[done.kept[i]].sum() / one.lengths.sum())
        assert "a text" == read_gguf(done.path).metadata["moe2gguf.prune.text"]
        kept[score] = done.kept
    assert kept["reap"] != kept["frequency"]


def test_experts_in_groups_stay_in_groups(tmp_path: Path) -> None:
    """Where the router chooses among groups, each keeps as many; other numbers are refused."""
    keys = {**moe_files.KEYS, **moe_files.MORE["deepseek2"], "expert_group_count": 2, "expert_group_used_count": 1}
    (shapes,) = moe_files.list_tensors(moe_files.write(tmp_path / "keys.gguf", "deepseek2", keys, {}))
    weights = moe_files.make_weights(shapes, never=(1, 4))
    whole = moe_files.write(tmp_path / "whole.gguf", "deepseek2", keys, weights)

    options = PruneOptions(keep=5, n_token=256, n_context=CONTEXT)  # one is shared
    done = prune(whole, tmp_path / "out.gguf", options, TEXT)

    assert [[0, 2, 3, 5]] * 2 == [*done.kept.values()]
    before, after = llama_logits_of([whole, done.path], TOKENS)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    for seed in range(6):
        random = prune(whole, tmp_path / f"{seed}.gguf", PruneOptions(keep=5, score="random", seed=seed))
        assert [2, 2] * 2 == [sum(e // 3 == group for e in ids) for ids in random.kept.values() for group in (0, 1)]
    with pytest.raises(PlanError, match="2 groups of one size"):
        prune(whole, tmp_path / "other.gguf", PruneOptions(keep=4), TEXT)
    with pytest.raises(PlanError, match="4 per token are more than the 1 chosen groups"):
        prune(whole, tmp_path / "other.gguf", PruneOptions(keep=5, used=4), TEXT)


def test_the_result_is_compared_with_the_whole_file(routed: Path, tmp_path: Path) -> None:
    """A reference with experts runs at its own count."""
    done = prune(routed, tmp_path / "out.gguf", PruneOptions(keep=7, score="random"))
    settings = CompareSettings(n_token=60, n_context=CONTEXT, resume=False, journal=tmp_path / "rows", threads=1)

    found = compare([routed, done.path], routed, settings=settings)

    assert ["ok", "ok"] == [row.status for row in found.rows]
    same, fewer = (row.quality.summary.kl_mean for row in found.rows if row.quality)
    assert same < 1e-6 < fewer


def test_another_count_leaves_the_width_of_an_expert(tmp_path: Path) -> None:
    """llama.cpp divides a width by the count where the file does not say how wide an expert is; so it is said."""
    keys = {key: value for key, value in moe_files.KEYS.items() if key != "expert_feed_forward_length"}
    (shapes,) = moe_files.list_tensors(moe_files.write(tmp_path / "keys.gguf", "qwen3moe", keys, {}))
    whole = moe_files.write(tmp_path / "whole.gguf", "qwen3moe", keys, moe_files.make_weights(shapes))

    done = prune(whole, tmp_path / "out.gguf", PruneOptions(keep=4, used=1, score="random"))

    assert np.isfinite(llama_logits(done.path, TOKENS)).all()


def test_a_sliced_file_stays_one(sliced: Path, target: str, tmp_path: Path) -> None:
    """`densify` makes one MLP of the experts that stay."""
    done = prune(sliced, tmp_path / "out.gguf", PruneOptions(keep=6, score="random"))

    dense = read_gguf(densify(done.path, tmp_path / "dense.gguf").path)

    assert 6 * 32 == dense.metadata[f"{dense.metadata['general.architecture']}.feed_forward_length"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PruneOptions(keep=8), "keep 1 to 7"),
        (PruneOptions(keep=0), "keep 1 to 7"),
        (PruneOptions(keep=3, used=4), "there are only 3"),
    ],
)
def test_counts_that_make_no_sense_are_refused(routed: Path, tmp_path: Path, options: PruneOptions, words: str) -> None:
    """Before anything is run or written."""
    with pytest.raises((PlanError, GGUFError), match=words):
        prune(routed, tmp_path / "out.gguf", options, TEXT)
    assert [] == [*tmp_path.iterdir()]


def test_files_that_cannot_be_pruned_are_refused(routed: Path, tmp_path: Path) -> None:
    """Dense, of an unknown architecture, with tensors that do not fit, or made for another count; each is named."""
    out, options = tmp_path / "out.gguf", PruneOptions(keep=3, score="random")
    dense = tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights())
    with pytest.raises(PlanError, match="has no experts"):
        prune(dense, out, options)
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), N)
    all_run = tiny_gguf.write_gguf(tmp_path / "all.gguf", weights)
    with pytest.raises(PlanError, match="frequency cannot tell"):
        prune(all_run, out, PruneOptions(keep=3, score="frequency"), TEXT)
    other = moe_files.write(
        tmp_path / "other.gguf",
        "grovemoe",
        moe_files.KEYS,
        {"blk.0.ffn_up_chexps.weight": weights["token_embd.weight"]},
    )
    with pytest.raises(PlanError, match="'grovemoe': which of its tensors have a row per expert is known for llama, "):
        prune(other, out, options)
    strange = {
        "blk.0.ffn_up_exps.weight": np.zeros((5, 4, 4), np.float32),
        "blk.1.ffn_gate_tid2eid.weight": np.zeros(4, np.float32),
    }
    other = moe_files.write(tmp_path / "odd.gguf", "olmoe", moe_files.KEYS, strange)
    with pytest.raises(PlanError) as error:
        prune(other, out, options)
    assert "expected 6 experts, found the shape (5, 4, 4)" in str(error.value)
    assert "'blk.1.ffn_gate_tid2eid.weight': whether it has a row per expert is not known" in str(error.value)
    assert "layer 0: has experts, but no tensor blk.0.ffn_gate_inp.weight" in str(error.value)
    strings = {"moe2gguf.slicing.amplify": "used"}
    fixed = tiny_gguf.write_gguf(tmp_path / "fixed.gguf", weights, n_expert_used=4, strings=strings)
    assert 4 == prune(fixed, out, PruneOptions(keep=5, score="random")).n_used
    with pytest.raises(GGUFError, match="amplified for 4 of them"):
        prune(fixed, out, options, force=True)
    with pytest.raises(OutputError, match="would replace"):
        prune(routed, routed, options, force=True)


def test_the_command_says_what_it_did(routed: Path, tmp_path: Path) -> None:
    """A sentence, or JSON; with a set of shards where that is wanted; wrong use is one message."""
    out = tmp_path / "out.gguf"
    done = moe2gguf("prune", routed, out, "--keep", 6, "--tokens", 64, "--context", 32, "-t", 1)
    assert 0 == done.returncode, done.stderr
    assert f"wrote {out}: 6 of 8 experts, 2 used per token" in done.stdout
    assert "% of all answers to this text, by length" in done.stdout
    again = moe2gguf(
        "prune", routed, out, "--keep", 6, "--score", "random", "--json", "--force", "--shard-size", "100KB"
    )
    assert 0 == again.returncode, again.stderr
    shown = json.loads(again.stdout)
    assert (8, 6, 2, "random") == tuple(shown[key] for key in ("experts", "kept", "used", "score"))
    assert shown["path"].endswith("out-00001-of-00005.gguf")
    assert () == verify(shown["path"]).problems
    joined = prune(shown["path"], tmp_path / "joined.gguf", PruneOptions(keep=3, score="random"))
    assert (6, 3) == (joined.n_expert, read_gguf(joined.path).metadata["llama.expert_count"])
    refused = moe2gguf("prune", routed, out, "--keep", 6)
    assert (1, "exists") == (refused.returncode, "exists" if "exists" in refused.stderr else refused.stderr)
