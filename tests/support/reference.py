"""The graphs of `llama`, `glm4moe` and `deepseek` in plain numpy float64, dense or with experts: llama.cpp's textbook.

It shares no code with the package and reads the file with the gguf package, so it is an independent oracle for both.
Shapes use the glossary of `moe2gguf.spec`; arrays are in numpy order, so a matrix is (rows out, columns in).
The source it follows:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp#L98 (the graph), glm4-moe.cpp and deepseek.cpp
beside it,
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2007 (the experts),
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-cpu/ops.cpp#L6180 (rope and yarn).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_WEIGHT_SUM = 6.103515625e-5  # the smallest normal float16
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0  # architecture `llama` reads neither from the file


def reference_logits(path: str | Path, tokens: Sequence[int], n_expert_used: int | None = None) -> Array:
    """Return the logits (n_token, n_vocab) of `tokens` at positions 0, 1, 2, ...

    `n_expert_used` replaces the file's own count, like llama.cpp's `--override-kv llama.expert_used_count`: a shared
    expert is not counted.
    """
    return _run(_Model(path), tokens, n_expert_used)


def reference_routing(
    path: str | Path, tokens: Sequence[int], n_expert_used: int | None = None
) -> tuple[Array, NDArray[np.int64]]:
    """Return the router's probabilities (n_layer, n_token, n_expert) and the experts chosen (n_layer, n_token, k)."""
    model = _Model(path)
    _run(model, tokens, n_expert_used)
    probabilities, chosen = zip(*model.routed, strict=True)
    return np.stack(probabilities), np.stack(chosen)


def reference_answers(path: str | Path, tokens: Sequence[int]) -> Array:
    """Return the Euclidean length of every expert's weighted answer (n_layer, n_token, n_expert), 0 if not chosen."""
    model = _Model(path)
    _run(model, tokens, None)
    return np.stack(model.answers)


def reference_inputs(path: str | Path, tokens: Sequence[int]) -> Array:
    """Return what goes into the MLP of every layer, (n_layer, n_token, d_model)."""
    model = _Model(path)
    _run(model, tokens, None)
    return np.stack(model.inputs)


def _run(model: _Model, tokens: Sequence[int], n_expert_used: int | None) -> Array:
    k = model.key("expert_used_count", 0) if n_expert_used is None else n_expert_used
    rotation = _rope_rotation(model, len(tokens))
    x = model["token_embd.weight"][list(tokens)]
    for i in range(model.key("block_count") - model.key("nextn_predict_layers", 0)):
        block = f"blk.{i}."
        x = x + _attention(model, block, _rms_norm(model, x, block + "attn_norm.weight"), rotation)
        norm = "ffn_norm" if block + "ffn_norm.weight" in model else "post_attention_norm"
        x = x + _mlp(model, block, _rms_norm(model, x, f"{block}{norm}.weight"), k)
    head = "output.weight" if "output.weight" in model else "token_embd.weight"
    return _rms_norm(model, x, "output_norm.weight") @ model[head].T


class _Model:
    """Metadata and float64 tensors of a GGUF file."""

    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(path)
        self._metadata = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.routed: list[tuple[Array, NDArray[np.int64]]] = []
        self.answers: list[Array] = []
        self.inputs: list[Array] = []

    def key(self, name: str, default: Any = None) -> Any:
        """Return `ARCHITECTURE.<name>`, or the default; a key without default must be there."""
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise KeyError(name)
        return value

    @property
    def architecture(self) -> str:
        return str(self._metadata["general.architecture"])

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float64)

    def linear(self, name: str, x: Array) -> Array:
        """Return W x + b, where the bias is optional: x (n_token, columns) -> (n_token, rows)."""
        y = x @ self[name + ".weight"].T
        return np.asarray(y + self[name + ".bias"]) if name + ".bias" in self else np.asarray(y)

    @property
    def d_head(self) -> int:
        return int(self.key("attention.key_length", self.key("embedding_length") // self.key("attention.head_count")))


def _rms_norm(model: _Model, x: Array, weight: str) -> Array:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(mean_square + float(model.key("attention.layer_norm_rms_epsilon")))
    return np.asarray(x * scale * model[weight])


def _attention(model: _Model, block: str, x: Array, rotation: NDArray[np.complex128]) -> Array:
    """Causal attention with grouped queries: query head h reads key/value head h // (n_head / n_head_kv)."""
    n_token, n_head = len(x), model.key("attention.head_count")
    n_head_kv = model.key("attention.head_count_kv", n_head)
    q, k, v = (
        model.linear(block + name, x).reshape(n_token, heads, model.d_head)
        for name, heads in (("attn_q", n_head), ("attn_k", n_head_kv), ("attn_v", n_head_kv))
    )
    if block + "attn_q_norm.weight" in model:
        q, k = (_rms_norm(model, x, f"{block}attn_{name}_norm.weight") for x, name in ((q, "q"), (k, "k")))
    rotate = _rotate_halves if model.architecture in ("glm4moe", "qwen3", "step35") else _rotate
    q, k = rotate(q, rotation), rotate(k, rotation)
    k, v = (np.repeat(part, n_head // n_head_kv, axis=1) for part in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(model.d_head)
    scores[:, ~np.tri(n_token, dtype=bool)] = -np.inf
    mixed = np.einsum("hts,shd->thd", _softmax(scores), v)
    return model.linear(block + "attn_output", mixed.reshape(n_token, -1))


def _mlp(model: _Model, block: str, x: Array, n_expert_used: int) -> Array:
    """SwiGLU, or its mixture: the router's probabilities, the k likeliest, their weights, the weighted sum."""
    model.inputs.append(x)
    if block + "ffn_gate_inp.weight" not in model:
        return _swiglu(x, *(model[f"{block}ffn_{name}.weight"] for name in ("gate", "up", "down")))
    logits = x @ model[block + "ffn_gate_inp.weight"].T  # (n_token, n_expert)
    is_sigmoid = model.architecture in ("glm4moe", "step35") and model.key("expert_gating_func", 2) == 2
    probabilities = 1 / (1 + np.exp(-logits)) if is_sigmoid else _softmax(logits)
    preferred = probabilities
    if block + "exp_probs_b.bias" in model:
        preferred = probabilities + model[block + "exp_probs_b.bias"]
    chosen = np.argsort(-preferred, axis=1, kind="stable")[:, :n_expert_used]  # ties: the lower index
    model.routed.append((probabilities, chosen))
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    if model.architecture == "llama" or model.key("expert_weights_norm", False):
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), SMALLEST_WEIGHT_SUM)
    weights *= model.key("expert_weights_scale", 1.0) or 1.0
    gate, up, down = (_experts(model, f"{block}ffn_{name}_exps") for name in ("gate", "up", "down"))
    y, lengths = np.zeros_like(x), np.zeros_like(probabilities)
    if block + "ffn_up_shexp.weight" in model:
        y += _swiglu(x, *(model[f"{block}ffn_{name}_shexp.weight"] for name in ("gate", "up", "down")))
    for expert in range(len(gate)):
        token, rank = np.nonzero(chosen == expert)
        answers = weights[token, rank, None] * _swiglu(x[token], gate[expert], up[expert], down[expert])
        lengths[token, expert] = np.linalg.norm(answers, axis=1)
        y[token] += answers
    model.answers.append(lengths)
    return y


def _experts(model: _Model, name: str) -> Array:
    """Return an expert stack (n_expert, rows, columns), times its optional scale (n_expert,)."""
    stack = model[name + ".weight"]
    return stack * model[name + ".scale"][:, None, None] if name + ".scale" in model else stack


def _swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    g = x @ gate.T
    return np.asarray((g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _rotate(x: Array, rotation: NDArray[np.complex128]) -> Array:
    """Turn each interleaved pair (x[2j], x[2j + 1]) of every head (n_token, heads, d_head) by its angle."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * rotation[:, None, :]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def _rotate_halves(x: Array, rotation: NDArray[np.complex128]) -> Array:
    """The same with element j and j + d_head / 2 for a pair."""
    first, second = np.split(x, 2, axis=-1)
    pairs = (first + 1j * second) * rotation[:, None, :]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _rope_rotation(model: _Model, n_token: int) -> NDArray[np.complex128]:
    """Return cos + i sin of every position and pair, (n_token, d_head / 2), times yarn's magnitude."""
    kind = model.key("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope scaling type {kind} is not part of this reference")
    d_head, base = model.d_head, model.key("rope.freq_base", 10000.0)
    factor = 1.0 if kind == "none" else model.key("rope.scaling.factor", 0.0) or 1.0
    pair = np.arange(d_head // 2)
    unscaled = base ** (-2 * pair / d_head)  # angle per position
    if "rope_freqs.weight" in model:
        unscaled = unscaled / model["rope_freqs.weight"]
    frequency, magnitude = unscaled / factor, model.key("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        low, high = _yarn_range(
            d_head, base, model.key("rope.scaling.original_context_length", 0) or model.key("context_length")
        )
        keep = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)  # 1: fast pairs stay as they were trained
        frequency = frequency * (1 - keep) + unscaled * keep
        magnitude *= 1 + 0.1 * np.log(max(factor, 1.0))
    return np.asarray(magnitude * np.exp(1j * np.arange(n_token)[:, None] * frequency))


def _yarn_range(d_head: int, base: float, original_context: int) -> tuple[float, float]:
    """The first and last pair of yarn's ramp: pairs that turn 32 times, and once, over the original context."""
    fast, slow = (
        d_head * np.log(original_context / (turns * 2 * np.pi)) / (2 * np.log(base))
        for turns in (YARN_BETA_FAST, YARN_BETA_SLOW)
    )
    return max(0.0, np.floor(fast)), min(d_head - 1.0, np.ceil(slow))
