"""Collecting an importance matrix in llama.cpp: the right sums, unchanged logits, continued to the same bytes."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imatrix_files
import numpy as np
import pytest
import reference
import tiny_gguf

from moe2gguf.errors import CalibrationError, HarnessError, ImportanceError, OutputError
from moe2gguf.experts import text as texts
from moe2gguf.gguf.resume import Interrupted
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.llama.watch_inputs import Sums, Watcher
from moe2gguf.measure import imatrix as harness
from moe2gguf.measure.imatrix import collect_imatrix
from moe2gguf.quant.imatrix import read_imatrix

WORDS = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. "
CONTEXT = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights(n_layer=2)
    routed = tiny_gguf.sliced_weights(dense, 4, router_seed=1)
    (folder / "words.txt").write_text(WORDS * 8)
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "routed": tiny_gguf.write_gguf(folder / "routed.gguf", routed, n_expert_used=2),
        "text": folder / "words.txt",
    }


def collected(files: Any, name: Any, out: Any, **options: Any) -> Any:
    return collect_imatrix(files[name], out, files["text"], n_context=CONTEXT, threads=1, **options)


def tokens_of(path: Any, text: Any) -> Any:
    """Runs in a child process."""
    with open_model(path, Setup(n_context=8, n_threads=1)) as model:
        return model.tokenize(text)


def expected(path: Any, windows: Any, n_expert_used: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sums and counts by the numpy graph in float64, whose matrix products are listened to."""
    squares: dict[str, Any] = {}
    counts: dict[str, Any] = {}

    def add(name: Any, x: Any, expert: Any = 0, n_expert: Any = 1) -> None:
        squares.setdefault(name, np.zeros((n_expert, x.shape[-1])))[expert] += (x * x).sum(axis=0)
        counts.setdefault(name, np.zeros(n_expert, int))[expert] += len(x)

    linear, mlp, swiglu = reference._Model.linear, reference._mlp, reference._swiglu
    state: dict[str, Any] = {}

    def heard_linear(model: Any, name: Any, x: Any) -> Any:
        add(name + ".weight", x)
        return linear(model, name, x)

    def heard_mlp(model: Any, block: Any, x: Any, k: Any) -> Any:
        routed = block + "ffn_gate_inp.weight" in model
        if routed:
            add(block + "ffn_gate_inp.weight", x)
        state.update(block=block, suffix="_exps" if routed else "", experts=itertools.count())
        return mlp(model, block, x, k)

    def heard_swiglu(x: Any, gate: Any, up: Any, down: Any) -> Any:
        e, n = next(state["experts"]), 4 if state["suffix"] else 1
        g = x @ gate.T
        names = [f"{state['block']}ffn_{part}{state['suffix']}.weight" for part in ("gate", "up", "down")]
        for name, value in zip(names, (x, x, g / (1 + np.exp(-g)) * (x @ up.T)), strict=True):
            add(name, value, e, n)
        return swiglu(x, gate, up, down)

    monkeypatch.setattr(reference._Model, "linear", heard_linear)
    monkeypatch.setattr(reference, "_mlp", heard_mlp)
    monkeypatch.setattr(reference, "_swiglu", heard_swiglu)
    for window in windows:
        reference.reference_logits(path, window, n_expert_used)
    return squares, counts


@pytest.mark.parametrize(("name", "used"), [("dense", None), ("routed", None), ("routed", "all"), ("routed", 1)])
def test_the_sums_are_the_numpy_graphs(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, used: Any
) -> None:
    """Every matrix of every layer, the last one too; per expert, the tokens that chose it and no others."""
    done = collected(files, name, tmp_path / "m.gguf", n_token=3 * CONTEXT + 5, n_expert_used=used)
    tokens = run_in_child(tokens_of, files[name], WORDS * 8)[: 3 * CONTEXT].reshape(3, CONTEXT)
    tokens[:, 0] = tiny_gguf.BOS

    squares, counts = expected(files[name], tokens, {None: None, "all": 4, 1: 1}[used], monkeypatch)

    found = read_imatrix(tmp_path / "m.gguf")
    assert squares.keys() == found.entries.keys()
    for key, entry in found.entries.items():
        assert counts[key].tolist() == entry.counts.tolist(), key
        np.testing.assert_allclose(squares[key].reshape(-1), entry.sums, rtol=2e-3, atol=1e-3, err_msg=key)
    assert (("words.txt",), 3, CONTEXT) == (found.datasets, found.chunk_count, found.chunk_size)
    assert (3 * CONTEXT, 0) == (done.n_token, done.n_resumed)
    assert str(tmp_path).encode() not in (tmp_path / "m.gguf").read_bytes()
    assert ["m.gguf"] == [path.name for path in tmp_path.iterdir()]


def logits_with_and_without(path: Any, text: Any) -> Any:
    """Runs in a child process."""
    results = []
    for watched in (False, True):
        with open_model(path, Setup(n_context=0, n_batch=16, n_threads=1)) as model:
            watcher = Watcher(model.lib, Sums(), vocabulary=True)
            model.start(CONTEXT, watcher.callback if watched else None)
            results.append(model.logits(model.tokenize(text)[:CONTEXT]))
            watcher.finish()
    return *results, sorted(watcher.sums.squares)


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_collecting_does_not_change_the_logits(files: Any, name: str) -> None:
    """Bit for bit; and asked for, the output matrix is watched too."""
    without, with_it, names = run_in_child(logits_with_and_without, files[name], WORDS)

    np.testing.assert_array_equal(without, with_it)
    assert "output.weight" in names


def test_a_stopped_collection_tells_what_was_there(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows that an earlier run had done are counted."""
    monkeypatch.setattr(harness, "SAVE_EVERY", 0)

    @contextlib.contextmanager
    def progress(stage: Any, total: Any) -> Iterator[Any]:
        told = []

        def advance(n: Any) -> None:
            told.append(n)
            if sum(told) == 2 * CONTEXT:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(Interrupted, match=r"out.gguf.work keeps what is finished \(1 piece\)"):
        collected(files, "routed", tmp_path / "out.gguf", n_token=4 * CONTEXT, progress=progress)
    assert ["out.gguf.work"] == [path.name for path in tmp_path.iterdir()]

    done = collected(files, "routed", tmp_path / "out.gguf", n_token=4 * CONTEXT)

    assert (4 * CONTEXT, 2 * CONTEXT) == (done.n_token, done.n_resumed)


def test_of_a_long_text_only_the_start_is_read(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matrix as from a text that ends there; a context beyond the model's training is mentioned."""
    long, read = tmp_path / "long" / "words.txt", []
    long.parent.mkdir()
    long.write_text(WORDS * 8 + "the tan " * 100_000)
    read_text = texts.read_text
    monkeypatch.setattr(harness, "read_text", lambda *given: read.append(read_text(*given)) or read[-1])
    options: dict[str, Any] = {"n_token": 2 * CONTEXT, "n_context": CONTEXT, "threads": 1}

    short = collect_imatrix(files["dense"], tmp_path / "a.gguf", files["text"], **options)
    same = collect_imatrix(files["dense"], tmp_path / "b.gguf", long, **options)
    wide = collect_imatrix(files["dense"], tmp_path / "c.gguf", long, n_token=1024, n_context=1024, threads=1)

    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert 10 * 2 * CONTEXT < len(read[1].text) < 200_000
    assert [(), ()] == [short.notes, same.notes]
    assert ("a context of 1024 tokens is longer than the model was trained on: dense.gguf (512)",) == wide.notes
    assert list(wide.notes) == wide.to_dict()["notes"]


def test_matrices_merge(files: Any, tmp_path: Path) -> None:
    """Collected in two parts and added, or merged without a text; one of another model is refused."""
    once = collected(files, "dense", tmp_path / "a.gguf", n_token=2 * CONTEXT)
    both = collected(files, "dense", tmp_path / "b.gguf", n_token=2 * CONTEXT, merged=[tmp_path / "a.gguf"])
    plain = collect_imatrix(
        files["dense"], tmp_path / "c.gguf", None, merged=[tmp_path / "a.gguf"] * 2, n_context=CONTEXT
    )

    for found in (both, plain):
        assert (4, 1) == (found.matrix.chunk_count, len(found.matrix.datasets))
        for name, entry in once.matrix.entries.items():
            np.testing.assert_array_equal(2 * entry.sums, found.matrix.entries[name].sums)
            np.testing.assert_array_equal(2 * entry.counts, found.matrix.entries[name].counts)
    with pytest.raises(ImportanceError, match="nothing to collect"):
        collect_imatrix(files["dense"], tmp_path / "d.gguf", None)
    assert not (tmp_path / "d.gguf").exists()


def statistics(done: Any) -> dict[str, Any]:
    return {name: (entry.sums[None], entry.counts) for name, entry in done.matrix.entries.items()}


def test_a_matrix_of_another_model_is_not_merged(files: Any, tmp_path: Path) -> None:
    """Before anything is collected: another tensor, one layer less, and (in our own files) other norms."""
    weights = tiny_gguf.dense_weights(n_layer=2)
    weights["blk.1.attn_norm.weight"] = weights["blk.1.attn_norm.weight"] * np.float32(1.5)
    twin = {**files, "twin": tiny_gguf.write_gguf(tmp_path / "twin.gguf", weights)}
    found = statistics(collected(twin, "twin", tmp_path / "other.gguf", n_token=CONTEXT))
    first = {name: value for name, value in found.items() if name.startswith("blk.0.")}
    imatrix_files.write_gguf(tmp_path / "shallow.gguf", first)
    imatrix_files.write_gguf(tmp_path / "foreign.gguf", {**found, "x.weight": (np.ones((1, 4)), [1])})  # type: ignore[dict-item]
    reasons = {
        "other": "it was collected from a model with other norms",
        "shallow": "it has nothing for 1 of the layers, such as 1",
        "foreign": "x.weight has another shape there or is missing",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImportanceError) as refused:
            collect_imatrix(files["dense"], tmp_path / "d.gguf", tmp_path / "none", merged=[tmp_path / f"{name}.gguf"])
        assert f"{tmp_path / name}.gguf: 1 problem:\n  - is not of {files['dense']}: {reason}" == str(refused.value)
    assert not (tmp_path / "d.gguf").exists()


def test_a_matrix_that_does_not_say_its_model_is_merged_with_a_warning(files: Any, tmp_path: Path) -> None:
    """One of llama.cpp's own; ours are of the model in whatever type it is stored."""
    f16 = tiny_gguf.write_gguf(tmp_path / "f16.gguf", tiny_gguf.dense_weights(n_layer=2), f16=True)
    own = collected({**files, "f16": f16}, "f16", tmp_path / "own.gguf", n_token=CONTEXT)
    imatrix_files.write_gguf(tmp_path / "theirs.gguf", statistics(own))

    done = collect_imatrix(
        files["dense"], tmp_path / "d.gguf", None, merged=[tmp_path / "own.gguf", tmp_path / "theirs.gguf"]
    )

    assert [f"{tmp_path / 'theirs.gguf'}: does not say of which model it is"] == [
        note.partition(";")[0] for note in done.notes
    ]
    assert done.matrix.model == own.matrix.model == read_imatrix(tmp_path / "d.gguf").model != ""


def test_all_experts_of_a_dense_file_are_no_choice(files: Any, tmp_path: Path) -> None:
    """The option changes nothing, and that is said."""
    done = collected(files, "dense", tmp_path / "d.gguf", n_token=CONTEXT, n_expert_used="all")
    assert (f"--used all: no effect, for {files['dense']} has no experts",) == done.notes


def test_experts_without_tokens_are_named(files: Any, tmp_path: Path) -> None:
    """One token of context in one window with one expert per token: most see nothing, and the advice says so."""
    done = collected(files, "routed", tmp_path / "m.gguf", n_token=CONTEXT, n_expert_used=1)

    counts = done.matrix.entries["blk.1.ffn_up_exps.weight"].counts
    values = done.to_dict()
    assert counts.tolist() == [one["tokens"] for one in values["scarce_experts"] if one["layer"] == "blk.1"]
    assert "8 experts saw fewer than 64 tokens" in values["advice"]
    assert "--imatrix-repair" in values["advice"]
    json.dumps(values)


def test_wrong_inputs(files: Any, tmp_path: Path) -> None:
    """Too short a text, an empty one, an existing target: each before anything is written."""
    (tmp_path / "short.txt").write_text("the")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(HarnessError, match=r"the text has 2 tokens, fewer than a window of 512"):
        collect_imatrix(files["dense"], tmp_path / "m", tmp_path / "short.txt")
    with pytest.raises(CalibrationError, match="empty"):
        collect_imatrix(files["dense"], tmp_path / "m", tmp_path / "empty.txt")
    with pytest.raises(OutputError, match="would replace"):
        collect_imatrix(files["dense"], files["dense"], files["text"], force=True)
    (tmp_path / "m").write_text("old")
    with pytest.raises(OutputError, match="--force"):
        collect_imatrix(files["dense"], tmp_path / "m", files["text"])
