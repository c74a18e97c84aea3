"""The numpy reference of the graph against llama.cpp's own logits, which a child process computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from reference import reference_logits

N_VOCAB, D_MODEL, N_HEAD = 61, 48, 6
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, N_VOCAB, 64)]
TOLERANCE = 1e-4

RUN_LLAMA = """
import json, sys
import llama_cpp as llama, numpy as np
job = json.loads(sys.argv[1])
llama.llama_backend_init()
for k, out in job["runs"]:
    params = llama.llama_model_default_params()
    if k is not None:
        overrides = (llama.llama_model_kv_override * 2)()
        overrides[0].key, overrides[1].key = b"llama.expert_used_count", b""
        overrides[0].tag, overrides[0].value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, k
        params.kv_overrides = overrides
    model = llama.llama_model_load_from_file(job["path"].encode(), params)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type = 0  # off
    context = llama.llama_init_from_model(model, params)
    n_token = len(job["tokens"])
    batch = llama.llama_batch_init(n_token, 0, 1)
    batch.n_tokens = n_token
    for i, token in enumerate(job["tokens"]):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (job["n_vocab"],)) for i in range(n_token)]
    np.save(out, np.array(rows))
    llama.llama_free(context)
    llama.llama_model_free(model)
"""


def llama_logits(path: Path, counts: Sequence[int | None] = (None,)) -> list[NDArray[np.float32]]:
    """Return llama.cpp's logits (n_token, n_vocab) of TOKENS for each expert-used count (None: the file's own)."""
    files = [path.with_suffix(f".{i}.npy") for i in range(len(counts))]
    runs = [(k, str(file)) for k, file in zip(counts, files, strict=True)]
    job = {"path": str(path), "tokens": TOKENS, "n_vocab": N_VOCAB, "runs": runs}
    child = subprocess.run(
        [sys.executable, "-c", RUN_LLAMA, json.dumps(job)],
        env=os.environ | {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [np.load(file) for file in files]


def write_model(
    path: Path,
    *,
    n_layer: int = 2,
    n_head_kv: int = 2,
    d_head: int = D_MODEL // N_HEAD,
    d_ff: int = 40,
    n_expert: int = 0,
    biases: Sequence[str] = (),
    tied: bool = False,
    scaled: bool = False,
    zero_router: bool = False,
    rope: Mapping[str, str | float] | None = None,
    rope_freqs: NDArray[np.float32] | None = None,
) -> Path:
    """Write an F32 GGUF with random weights; `rope` holds `llama.rope.*` keys without that prefix."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (1.4 * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, D_MODEL).astype(np.float32)

    tensors = {"token_embd.weight": matrix(N_VOCAB, D_MODEL), "output_norm.weight": norm()}
    if not tied:
        tensors["output.weight"] = matrix(N_VOCAB, D_MODEL)
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = rope_freqs
    width = {"attn_q": d_head * N_HEAD, "attn_k": d_head * n_head_kv, "attn_v": d_head * n_head_kv}
    for i in range(n_layer):
        block = {f"{name}.weight": matrix(rows, D_MODEL) for name, rows in width.items()}
        block |= {"attn_output.weight": matrix(D_MODEL, d_head * N_HEAD), "attn_norm.weight": norm()}
        block |= {f"{name}.bias": matrix(1, width.get(name, D_MODEL))[0] for name in biases}
        block |= {"ffn_norm.weight": norm()}
        stack, suffix = ((n_expert,), "_exps") if n_expert else ((), "")
        block |= {f"ffn_{name}{suffix}.weight": matrix(*stack, d_ff, D_MODEL) for name in ("gate", "up")}
        block |= {f"ffn_down{suffix}.weight": matrix(*stack, D_MODEL, d_ff)}
        if n_expert:
            block |= {"ffn_gate_inp.weight": matrix(n_expert, D_MODEL) * np.float32(not zero_router)}
        if scaled:
            scales = ("gate", "up", "down")
            block |= {f"ffn_{name}_exps.scale": rng.uniform(0.5, 2, n_expert).astype(np.float32) for name in scales}
        tensors |= {f"blk.{i}.{name}": data for name, data in block.items()}
    _write(path, tensors, n_layer, n_head_kv, d_head, d_ff, n_expert, rope or {})
    return path


def _write(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    n_layer: int,
    n_head_kv: int,
    d_head: int,
    d_ff: int,
    n_expert: int,
    rope: Mapping[str, str | float],
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_context_length(256)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_rope_dimension_count(d_head)
    writer.add_layer_norm_rms_eps(1e-5)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(min(2, n_expert))
    for name, value in rope.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"llama.rope.{name}", value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(N_VOCAB)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def largest_difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    assert expected.shape == actual.shape == (len(TOKENS), N_VOCAB)
    assert np.abs(expected).max() > 1  # logits worth comparing
    return float(np.abs(expected - actual).max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_head_kv": 1, "tied": True, "d_head": 12},
        {"n_head_kv": N_HEAD, "biases": ("attn_q", "attn_k", "attn_v", "attn_output")},
    ],
    ids=["grouped", "one kv head, tied, wide heads", "all heads, biases"],
)
def test_dense_logits_equal_llama_cpp(tmp_path: Path, options: dict[str, Any]) -> None:
    """A dense model's logits equal llama.cpp's for grouped, single and full key/value heads, tied heads and biases."""
    path = write_model(tmp_path / "dense.gguf", **options)
    assert largest_difference(reference_logits(path, TOKENS), llama_logits(path)[0]) < TOLERANCE


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "expert scales"])
def test_moe_logits_equal_llama_cpp_at_every_k(tmp_path: Path, scaled: bool) -> None:
    """A mixture with a random router gives llama.cpp's logits at every k from 1 to n; k = None is the file's own."""
    counts = [None, *range(1, 8)]
    path = write_model(tmp_path / "moe.gguf", n_expert=7, d_ff=24, scaled=scaled)
    theirs = llama_logits(path, counts)
    ours = [reference_logits(path, TOKENS, k) for k in counts]
    differences = [largest_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(differences) < TOLERANCE, differences
    assert largest_difference(ours[0], ours[2]) == 0  # the file says 2
    assert min(largest_difference(ours[k], ours[k + 1]) for k in range(1, 7)) > 100 * TOLERANCE  # k matters


def test_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    """With a zero router and 16 experts llama.cpp's CPU runs experts 0 to k - 1, and so does the reference."""
    path = write_model(tmp_path / "tied.gguf", n_expert=16, d_ff=8, zero_router=True)
    counts = [1, 5, 16]
    theirs = llama_logits(path, counts)
    assert all(
        largest_difference(reference_logits(path, TOKENS, k), logits) < TOLERANCE
        for k, logits in zip(counts, theirs, strict=True)
    )


LLAMA3_FREQS = np.array([1.0, 1.0, 2.5, 8.0], np.float32)
YARN: dict[str, str | float] = {
    "scaling.type": "yarn",
    "scaling.factor": 4.0,
    "scaling.original_context_length": 16,
    "freq_base": 10000.0,
}


@pytest.mark.parametrize(
    "options",
    [
        {"rope": {"freq_base": 500000.0}, "rope_freqs": LLAMA3_FREQS},
        {"rope": {"scaling.type": "linear", "scaling.factor": 4.0}},
        {"rope": {"scaling.factor": 4.0}},
        {"rope": {"scaling.type": "none", "scaling.factor": 4.0}},
        {"rope": YARN},
        {"rope": YARN | {"scaling.attn_factor": 0.9}, "d_head": 32},
        {"rope": YARN | {"scaling.original_context_length": 4096}, "d_head": 64, "rope_freqs": np.ones(32, np.float32)},
    ],
    ids=["llama3", "linear", "linear by default", "none", "yarn", "yarn, attention factor", "yarn, long"],
)
def test_rope_scaling_equals_llama_cpp(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every kind of rope scaling gives llama.cpp's logits, also at positions beyond the original context."""
    path = write_model(tmp_path / "rope.gguf", **options)
    assert largest_difference(reference_logits(path, TOKENS), llama_logits(path)[0]) < TOLERANCE


def test_rope_scaling_matters(tmp_path: Path) -> None:
    """The kinds of scaling differ far more than the tolerance, so that equality above means something."""
    kinds: dict[str, dict[str, str | float]] = {"none": {}, "linear": {"scaling.factor": 4.0}, "yarn": YARN}
    logits = [reference_logits(write_model(tmp_path / f"{kind}.gguf", rope=kinds[kind]), TOKENS) for kind in kinds]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert min(largest_difference(logits[a], logits[b]) for a, b in pairs) > 1000 * TOLERANCE


def test_unknown_scaling_is_refused(tmp_path: Path) -> None:
    """A scaling type that the reference does not know raises instead of giving other numbers."""
    path = write_model(tmp_path / "longrope.gguf", rope={"scaling.type": "longrope"})
    with pytest.raises(ValueError, match="longrope"):
        reference_logits(path, TOKENS)
