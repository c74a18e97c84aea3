"""Tiny but real GGUF files of architecture `llama`: deterministic from a seed, loadable by stock llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]

WORDS = ["the", "he", "th", "in", "an", "er", "and", "to", "of", "is", "▁the", "▁and", "▁of", "▁to", "▁a", "▁t"]
UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece-like vocabulary of 303 tokens: texts, scores and token types."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [*WORDS, *letters, "."]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    scores = [0.0] * (FIRST_BYTE + 256) + [-float(i) for i in range(len(pieces))]
    kinds = [
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.CONTROL,
        *[gguf.TokenType.BYTE] * 256,
        *[gguf.TokenType.NORMAL] * len(pieces),
    ]
    return texts, scores, [int(kind) for kind in kinds]


def dense_weights(
    seed: int = 0, *, n_layer: int = 2, d_model: int = 64, d_ff: int = 96, n_head: int = 4, n_head_kv: int = 2
) -> Weights:
    """Random float32 weights in numpy order, with logits spread widely enough that tokens differ."""
    rng = np.random.default_rng(seed)
    n_vocab, d_head = len(vocabulary()[0]), d_model // n_head

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (gain * rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(
            np.float32
        )
        return values

    weights: Weights = {
        "token_embd.weight": matrix(n_vocab, d_model, 8.0),
        "output.weight": matrix(n_vocab, d_model, 2),
    }
    weights["output_norm.weight"] = np.ones(d_model, np.float32)
    for i in range(n_layer):
        weights |= {
            f"blk.{i}.attn_norm.weight": np.ones(d_model, np.float32),
            f"blk.{i}.attn_q.weight": matrix(d_head * n_head, d_model),
            f"blk.{i}.attn_k.weight": matrix(d_head * n_head_kv, d_model),
            f"blk.{i}.attn_v.weight": matrix(d_head * n_head_kv, d_model),
            f"blk.{i}.attn_output.weight": matrix(d_model, d_head * n_head),
            f"blk.{i}.ffn_norm.weight": np.ones(d_model, np.float32),
            f"blk.{i}.ffn_gate.weight": matrix(d_ff, d_model, 1.5),
            f"blk.{i}.ffn_up.weight": matrix(d_ff, d_model, 1.5),
            f"blk.{i}.ffn_down.weight": matrix(d_model, d_ff, 1.5),
        }
    return weights


def sliced_weights(dense: Weights, n_expert: int, *, router_seed: int | None = None) -> Weights:
    """Contiguous slices, the down projection times n_expert, and a zero router (or a random one from a seed)."""
    rng = np.random.default_rng(router_seed)
    out: Weights = {}
    for name, w in dense.items():
        block, _, rest = name.rpartition(".ffn_")
        part = rest.removesuffix(".weight")
        if part in ("gate", "up"):
            out[f"{block}.ffn_{part}_exps.weight"] = w.reshape(n_expert, -1, w.shape[1])
        elif part == "down":
            stack = n_expert * w.reshape(w.shape[0], n_expert, -1).transpose(1, 0, 2)
            out[f"{block}.ffn_down_exps.weight"] = np.ascontiguousarray(stack, np.float32)
            router = 0 if router_seed is None else rng.standard_normal((n_expert, w.shape[0]))
            out[f"{block}.ffn_gate_inp.weight"] = np.full((n_expert, w.shape[0]), router, np.float32)
        else:
            out[name] = w
    return out


def write_gguf(
    path: Path,
    weights: Weights,
    *,
    n_expert_used: int | None = None,
    f16: bool = False,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_context: int = 512,
    texts: Mapping[int, str] | None = None,
    architecture: str = "llama",
    strings: Mapping[str, str] | None = None,
) -> Path:
    """Write weights in numpy order as a complete file; `n_expert_used` defaults to all experts of a sliced file."""
    d_model = weights["token_embd.weight"].shape[1]
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("blk.")})
    stack = weights.get("blk.0.ffn_down_exps.weight")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(n_context)
    writer.add_embedding_length(d_model)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length((weights["blk.0.ffn_down.weight"] if stack is None else stack).shape[-1])
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d_model // n_head)
    if stack is not None:
        writer.add_expert_count(stack.shape[0])
        writer.add_expert_used_count(stack.shape[0] if n_expert_used is None else n_expert_used)
    for name, value in (strings or {}).items():
        writer.add_string(name, value)
    add_vocabulary(writer, texts, len(weights["token_embd.weight"]))
    for name, w in weights.items():
        keep_f32 = w.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        writer.add_tensor(name, w if keep_f32 or not f16 else w.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def chain_weights(successors: Mapping[int, int], *, d_model: int = 64, seed: int = 0) -> Weights:
    """A model whose most likely next token is `successors[token]`: blocks add nothing, the output is a lookup."""
    weights = dense_weights(seed, n_layer=1, d_model=d_model)
    for name in weights:
        if name.startswith("blk.") and not name.endswith("_norm.weight"):
            weights[name] = np.zeros_like(weights[name])
    output = np.zeros_like(weights["output.weight"])
    for token, following in successors.items():
        output[following] += weights["token_embd.weight"][token]
    weights["output.weight"] = output
    return weights


def add_vocabulary(writer: gguf.GGUFWriter, texts: Mapping[int, str] | None = None, n_vocab: int = 0) -> None:
    """Give a file the vocabulary with these `texts` in place of its own, padded to `n_vocab` tokens."""
    tokens, scores, kinds = vocabulary()
    unused = range(len(tokens), n_vocab)
    tokens += [f"[PAD{i}]" for i in unused]
    scores += [-1000.0 for _ in unused]
    kinds += [int(gguf.TokenType.UNUSED) for _ in unused]
    for token, text in (texts or {}).items():
        tokens[token] = text
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
