"""moe2gguf.limits against llama.cpp itself: every point runs in a process of its own, which may abort."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe2gguf.graphs import GRAPHS, Graph
from moe2gguf.limits import (
    DEFAULT,
    MAX_EXPERTS,
    QUANTIZED_CACHE,
    SEPARATE_STREAMS,
    Setting,
    Size,
    check_expert_counts,
    expert_count_warnings,
    max_experts_used,
)

N_VOCAB = 40
ABORTED = (-signal.SIGABRT, 3)  # POSIX, Windows

RUN_LLAMA = """
import json, sys
import llama_cpp as llama
path, run = sys.argv[1].encode(), json.loads(sys.argv[2])
llama.llama_backend_init()
model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
params = llama.llama_context_default_params()
params.n_ctx = 64 * run["n_seq"]
params.n_batch = params.n_ubatch = 64
params.n_threads = params.n_threads_batch = 1
params.n_seq_max = run["n_seq"]
params.flash_attn_type = run["flash"]
params.type_k = params.type_v = run["cache"]
context = llama.llama_init_from_model(model, params)
batch = llama.llama_batch_init(4 * run["n_seq"], 0, 1)
batch.n_tokens = 4 * run["n_seq"]
for i in range(batch.n_tokens):
    batch.token[i], batch.pos[i], batch.logits[i] = i % 7, i % 4, True
    batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // 4
assert llama.llama_decode(context, batch) == 0
print("decoded")
"""

ONE_STREAM = {"flash": 0, "n_seq": 1, "cache": int(gguf.GGMLQuantizationType.F16)}
RUNS = {
    DEFAULT: [ONE_STREAM, ONE_STREAM | {"flash": 1}, ONE_STREAM | {"flash": 1, "n_seq": 4}],
    SEPARATE_STREAMS: [ONE_STREAM | {"n_seq": 4}],
    QUANTIZED_CACHE: [{"flash": 1, "n_seq": 4, "cache": int(gguf.GGMLQuantizationType.Q8_0)}],
}
"""Ways to run llama.cpp that each setting speaks for; the first is the most demanding."""


@dataclass(frozen=True)
class Shape:
    n_layer: int
    biases: tuple[str, ...] = ()
    n_scale: int = 0
    tied: bool = False
    rope_freqs: bool = False
    target: str = "mixtral"
    n_norm: int = 0
    n_dense: int = 0

    @property
    def graph(self) -> Graph:
        return GRAPHS[self.target]

    @property
    def n_tensor(self) -> int:
        per_layer = self.graph.layer_tensors + len(self.biases) + self.n_scale + self.n_norm
        fewer = self.n_dense * self.graph.more_with_experts
        return self.n_layer * per_layer - fewer + 2 + (not self.tied) + self.rope_freqs

    def limit(self, setting: Setting = DEFAULT) -> int:
        size = Size(self.n_layer, self.n_tensor, self.n_scale, self.n_norm, self.graph, self.n_dense)
        return max_experts_used(size, setting)


PLAIN = Shape(16)  # the pool binds
HASHED = Shape(12)  # the hash table binds
QWEN = Shape(24, biases=("attn_q", "attn_k", "attn_v"), tied=True)
SCALED = Shape(14, n_scale=1, biases=("attn_q", "attn_k", "attn_v", "attn_output"), rope_freqs=True)
GLM = Shape(16, target="glm4moe")
GLM_TIED = Shape(30, tied=True, target="glm4moe")
GLM_QWEN2 = Shape(24, biases=("attn_q", "attn_k", "attn_v"), tied=True, target="glm4moe")
GLM_QWEN3 = Shape(28, tied=True, target="glm4moe", n_norm=2)
DEEPSEEK = Shape(16, target="deepseek")
STEP = Shape(16, rope_freqs=True, target="step35")
STEP_28 = Shape(28, rope_freqs=True, target="step35")


def dense_mlp(d_model: int, d_ff: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's dense MLP."""
    inner: dict[str, tuple[int, ...]] = {f"ffn_{name}.weight": (d_ff, d_model) for name in ("gate", "up")}
    return inner | {"ffn_down.weight": (d_model, d_ff)}


def experts(shape: Shape, k: int, d_model: int, d_expert: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's router and k experts, with all that belongs to them."""
    block: dict[str, tuple[int, ...]] = {"ffn_gate_inp.weight": (k, d_model)}
    block |= {f"ffn_{name}_exps.weight": (k, d_expert, d_model) for name in ("gate", "up")}
    block |= {"ffn_down_exps.weight": (k, d_model, d_expert)}
    if shape.graph.has_shared:
        block |= {f"ffn_{name}_shexp.weight": (d_expert, d_model) for name in ("gate", "up")}
        block |= {"ffn_down_shexp.weight": (d_model, d_expert)}
    return block | ({"exp_probs_b.bias": (k,)} if shape.graph.has_selection_bias else {})


def write_zeros(path: Path, shape: Shape, k: int) -> None:
    """Write a GGUF of zeros with two heads of 64 and k experts, all used, and a shared one where the graph has it."""
    architecture = shape.graph.architecture
    d_model, d_head, d_expert = 128, 64, 4
    tensors = {"token_embd.weight": (N_VOCAB, d_model), "output_norm.weight": (d_model,)}
    if not shape.tied:
        tensors["output.weight"] = (N_VOCAB, d_model)
    if shape.rope_freqs:
        tensors["rope_freqs.weight"] = (d_head // 2,)
    outputs = {"attn_q": d_model, "attn_k": d_head, "attn_v": d_head, "attn_output": d_model}
    for i in range(shape.n_layer):
        block: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, d_model) for name, rows in outputs.items()}
        block |= {f"{name}.bias": (outputs[name],) for name in shape.biases}
        block |= {"attn_norm.weight": (d_model,), "ffn_norm.weight": (d_model,)}
        block |= dense_mlp(d_model, d_expert) if i < shape.n_dense else experts(shape, k, d_model, d_expert)
        if shape.target == "glm4moe":
            block |= {"post_attention_norm.weight": block.pop("ffn_norm.weight")}
        block |= {f"attn_{name}_norm.weight": (d_head,) for name in ("q", "k")[: shape.n_norm]}
        block |= {f"ffn_{name}_exps.scale": (k,) for name in ("down", "up", "gate")[: shape.n_scale]}
        tensors |= {f"blk.{i}.{name}": size for name, size in block.items()}
    assert len(tensors) == shape.n_tensor
    writer = gguf.GGUFWriter(path, architecture)
    if shape.graph.has_shared:
        writer.add_expert_feed_forward_length(d_expert)
        writer.add_expert_shared_count(1)
        writer.add_expert_shared_feed_forward_length(d_expert)
        for key, value in ({**shape.graph.keys, **shape.graph.describe_leading_dense(shape.n_dense)}).items():
            kind = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
            writer.add_key_value(f"{architecture}.{key}", value, kind[type(value)])
    writer.add_block_count(shape.n_layer + shape.graph.empty_layer)
    if shape.graph.empty_layer:
        writer.add_nextn_predict_layers(1)
        writer.add_sliding_window(256)
        writer.add_sliding_window_pattern([False] * shape.n_layer + [True])
        writer.add_rope_dimension_count(2 * d_head)
        writer.add_rope_dimension_count_swa(d_head)
    writer.add_context_length(256)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_expert)
    writer.add_head_count(d_model // d_head)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(k)
    writer.add_expert_used_count(k)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(N_VOCAB)
    for name, size in tensors.items():
        writer.add_tensor(name, np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(path: Path, run: dict[str, int]) -> str:
    """Load and decode in a child process; return "decoded", or "aborted" when abort() ended the process."""
    child = subprocess.run(
        [sys.executable, "-c", RUN_LLAMA, str(path), json.dumps(run)],
        env=os.environ | {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    if child.returncode == 0:
        return child.stdout.strip().splitlines()[-1]
    assert child.returncode in ABORTED, child.stderr[-2000:]
    return "aborted"


@pytest.mark.parametrize(
    ("shape", "setting", "limit"),
    [
        (PLAIN, DEFAULT, 16),
        (HASHED, DEFAULT, 12),
        (QWEN, DEFAULT, 26),
        (SCALED, DEFAULT, 32),
        (PLAIN, SEPARATE_STREAMS, 15),
        (HASHED, QUANTIZED_CACHE, 7),
        (GLM, DEFAULT, 30),
        (GLM_TIED, DEFAULT, 31),
        (GLM_QWEN2, DEFAULT, 41),
        (GLM_QWEN3, DEFAULT, 36),
        (DEEPSEEK, DEFAULT, 28),
        (STEP, DEFAULT, 30),
        (STEP_28, QUANTIZED_CACHE, 26),
    ],
)
def test_llama_cpp_runs_the_limit_and_aborts_above(tmp_path: Path, shape: Shape, setting: Setting, limit: int) -> None:
    """llama.cpp decodes at the limit in every way the setting speaks for, and one more expert aborts the process."""
    assert shape.limit(setting) == limit
    path = tmp_path / "zeros.gguf"
    write_zeros(path, shape, limit)
    runs = RUNS[setting] if shape is PLAIN else RUNS[setting][:1]
    assert [run_llama(path, run) for run in runs] == ["decoded"] * len(runs)
    write_zeros(path, shape, limit + 1)
    assert run_llama(path, RUNS[setting][0]) == "aborted"


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        (Shape(6, QWEN.biases, target="glm4moe", n_dense=1), 48),
        (Shape(24, QWEN.biases, tied=True, target="glm4moe", n_dense=3), 39),
        (Shape(16, target="deepseek", n_dense=1), 27),
        (Shape(16, QWEN.biases, target="step35", n_dense=4), 28),
    ],
)
def test_llama_cpp_runs_the_limit_behind_dense_layers(tmp_path: Path, shape: Shape, limit: int) -> None:
    """Which may be lower than it must be: a dense layer counts as one with experts."""
    assert shape.limit() == limit
    write_zeros(tmp_path / "zeros.gguf", shape, limit)
    assert run_llama(tmp_path / "zeros.gguf", ONE_STREAM) == "decoded"


def test_limits_over_depth() -> None:
    """Without biases the limit is 16, except for shallow models (more) and where the hash table is nearly full."""
    limits = {n_layer: Shape(n_layer).limit() for n_layer in (1, 2, 4, 8, 11, 12, 22, 23, 24, 25, 30, 32, 50, 80, 126)}
    expected = {1: 476, 2: 223, 4: 96, 8: 33, 11: 15, 12: 12, 22: 16, 23: 14, 24: 12, 25: 10, 30: 16, 32: 16}
    assert limits == expected | {50: 10, 80: 16, 126: 16}


def test_limit_never_exceeds_what_a_layer_may_hold() -> None:
    """Many unused tensors enlarge the pool, but never the limit beyond MAX_EXPERTS; an overfull graph gives 0."""
    assert max_experts_used(Size(1, 100_000)) == MAX_EXPERTS
    assert max_experts_used(Size(100, 103)) == 0


def test_sound_counts_are_accepted() -> None:
    """No refusal from 1 of 1 expert up to 16 of 16, nor for many experts of which few run."""
    accepted = [(1, 1), (3, 2), (8, 8), (16, 16), (60, 4), (1024, 1)]
    refusals = [check_expert_counts(n, k, Size(30, 302)) for n, k in accepted]
    assert refusals == [[]] * len(accepted)


def test_used_above_the_limit_is_refused_with_the_reason_and_the_fix() -> None:
    """The refusal names the number, the limit, why, and the way out."""
    assert check_expert_counts(32, 32, Size(30, 302)) == [
        "32 experts per token: llama.cpp can run 16 in this model of 30 layers and 302 tensors. Its graph has room for "
        "about 8 nodes per tensor and each used expert costs 2 per layer; above the limit the process aborts. "
        "Use 16 or fewer."
    ]


@pytest.mark.parametrize(
    ("n_expert", "n_expert_used", "sentences"),
    [
        (0, 1, ["0 experts: a layer needs at least 1."]),
        (8, 0, ["0 experts per token: at least 1 must run."]),
        (8, 9, ["9 experts per token: there are only 8. Use 8 or fewer."]),
        (
            1025,
            1,
            [
                "1025 experts: llama.cpp loads at most 1024 per layer (older builds 60 to 512) and aborts above. "
                "Make 1024 or fewer."
            ],
        ),
    ],
)
def test_impossible_counts_are_refused(n_expert: int, n_expert_used: int, sentences: list[str]) -> None:
    """Each impossible count has its own sentence."""
    assert check_expert_counts(n_expert, n_expert_used, Size(30, 302)) == sentences


def test_all_refusals_come_at_once() -> None:
    """Too many experts, and more used than there are, for which the limit that counts is named."""
    too_many, used = check_expert_counts(2000, 3000, Size(30, 302))
    assert too_many.startswith("2000 experts: llama.cpp loads at most 1024")
    assert used == "3000 experts per token: there are only 2000. Use 16 or fewer."


def test_warnings_name_the_settings_that_would_abort() -> None:
    """8 of 8 is free of warnings at 30 layers; 16 is warned about for separate caches and for a quantized cache."""
    assert expert_count_warnings(8, Size(30, 302)) == []
    warnings = expert_count_warnings(16, Size(30, 302))
    assert [SEPARATE_STREAMS.name in warnings[0], QUANTIZED_CACHE.name in warnings[1]] == [True, True]
    assert ["Use 15" in warnings[0], "Use 11" in warnings[1]] == [True, True]
