"""GGUF files made byte by byte, good and hostile; shares no code with the package under test or with gguf's writer.

The numbers are those of the format: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/gguf.h
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

KINDS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "arr": 9}
KINDS |= {"u64": 10, "i64": 11, "f64": 12}
CODES = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "B"}
CODES |= {"u64": "Q", "i64": "q", "f64": "d"}
F32, F16, Q4_0, Q8_0, I8, I32, I64, BF16 = 0, 1, 2, 8, 24, 26, 27, 30


class Tensor(NamedTuple):
    """One tensor; `dims` and `offset` override what the header would say, `data` is what is written."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: bytes
    dims: Sequence[int] | None = None
    offset: int | None = None


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def scalar(kind: str, value: object) -> bytes:
    return text(value) if isinstance(value, str | bytes) else struct.pack("<" + CODES[kind], value)


def key(name: str | bytes, kind: str, value: object) -> bytes:
    """A metadata pair of a scalar."""
    return text(name) + u32(KINDS[kind]) + scalar(kind, value)


def array(name: str, kind: str, values: Sequence[object], n: int | None = None) -> bytes:
    """A metadata pair of an array; `n` overrides the length that is written."""
    items = b"".join(scalar(kind, value) for value in values)
    return text(name) + u32(9) + u32(KINDS[kind]) + u64(len(values) if n is None else n) + items


def info(name: str | bytes, dims: Iterable[int], kind: int, offset: int, n_dims: int | None = None) -> bytes:
    """An entry of the tensor list; `dims` in the file's order (fastest first)."""
    dims = list(dims)
    packed = b"".join(u64(n % 2**64) for n in dims)
    return text(name) + u32(len(dims) if n_dims is None else n_dims) + packed + u32(kind) + u64(offset)


def header(n_tensors: int, n_keys: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + u32(version) + u64(n_tensors % 2**64) + u64(n_keys % 2**64)


def pad(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def gguf(keys: Sequence[bytes] = (), tensors: Sequence[Tensor] = (), *, version: int = 3, alignment: int = 32) -> bytes:
    """A whole file. `alignment` is only used, not declared: add the key yourself."""
    infos, data = [], b""
    for tensor in tensors:
        dims = tensor.shape[::-1] if tensor.dims is None else tensor.dims
        infos.append(info(tensor.name, dims, tensor.kind, len(data) if tensor.offset is None else tensor.offset))
        data = pad(data + tensor.data, alignment)
    head = header(len(tensors), len(keys), version) + b"".join(keys) + b"".join(infos)
    return pad(head, alignment) + data if tensors else head


def f32(name: str, shape: tuple[int, ...], values: np.ndarray | None = None) -> Tensor:
    """An F32 tensor, of small numbers unless given."""
    return Tensor(name, shape, F32, _values(shape, values).astype("<f4").tobytes())


def f16(name: str, shape: tuple[int, ...], values: np.ndarray | None = None) -> Tensor:
    return Tensor(name, shape, F16, _values(shape, values).astype("<f2").tobytes())


def bf16(name: str, shape: tuple[int, ...], values: np.ndarray | None = None) -> Tensor:
    """A BF16 tensor: the upper halves of the f32 numbers."""
    bits = _values(shape, values).astype("<f4").view("<u4") >> 16
    return Tensor(name, shape, BF16, bits.astype("<u2").tobytes())


def _values(shape: tuple[int, ...], values: np.ndarray | None) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape) if values is None else np.asarray(values)


@dataclass
class LlamaFile:
    """A tiny, sound model of arch llama whose pieces a test may change before taking `bytes()`."""

    n_expert: int = 0  # 0: dense
    n_used: int = 2
    n_layer: int = 2
    d_model: int = 16
    d_ff: int = 24
    n_head: int = 4
    n_head_kv: int = 2
    n_vocab: int = 10
    biases: bool = False
    tied: bool = True
    make: Callable[[str, tuple[int, ...]], Tensor] = f32  # for the matrices: f32, f16 or bf16
    keys: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.set("general.architecture", "str", "llama")
        self.set("general.name", "str", "Tiny")
        counts = {"block_count": self.n_layer, "context_length": 64, "embedding_length": self.d_model}
        counts |= {"feed_forward_length": self.d_ff, "attention.head_count": self.n_head}
        counts |= {"attention.head_count_kv": self.n_head_kv, "rope.dimension_count": self.d_model // self.n_head}
        counts |= {"expert_count": self.n_expert, "expert_used_count": self.n_used} if self.n_expert else {}
        for name, n in counts.items():
            self.set(f"llama.{name}", "u32", n)
        self.set("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5)
        self.set("tokenizer.ggml.model", "str", "gpt2")
        self.set_array("tokenizer.ggml.tokens", "str", [f"t{i}" for i in range(self.n_vocab)])
        self.set_array("tokenizer.ggml.token_type", "i32", [1] * self.n_vocab)
        self.add_tensors()

    def set(self, name: str, kind: str, value: object) -> LlamaFile:
        self.keys[name] = key(name, kind, value)
        return self

    def set_array(self, name: str, kind: str, values: Sequence[object]) -> LlamaFile:
        self.keys[name] = array(name, kind, values)
        return self

    def put(self, tensor: Tensor) -> LlamaFile:
        self.tensors[tensor.name] = tensor
        return self

    def add_tensors(self) -> None:
        d, d_ff, n, make = self.d_model, self.d_ff, self.n_expert, self.make
        kv = d // self.n_head * self.n_head_kv
        self.put(make("token_embd.weight", (self.n_vocab, d)))
        self.put(f32("output_norm.weight", (d,)))
        if not self.tied:
            self.put(make("output.weight", (self.n_vocab, d)))
        for i in range(self.n_layer):
            for name, rows in {"attn_q": d, "attn_k": kv, "attn_v": kv, "attn_output": d}.items():
                self.put(make(f"blk.{i}.{name}.weight", (rows, d)))
                if self.biases:
                    self.put(f32(f"blk.{i}.{name}.bias", (rows,)))
            self.put(f32(f"blk.{i}.attn_norm.weight", (d,)))
            self.put(f32(f"blk.{i}.ffn_norm.weight", (d,)))
            stack, end = ((n,), "_exps") if n else ((), "")
            if n:
                self.put(f32(f"blk.{i}.ffn_gate_inp.weight", (n, d)))
            self.put(make(f"blk.{i}.ffn_gate{end}.weight", (*stack, d_ff, d)))
            self.put(make(f"blk.{i}.ffn_up{end}.weight", (*stack, d_ff, d)))
            self.put(make(f"blk.{i}.ffn_down{end}.weight", (*stack, d, d_ff)))

    def bytes(self) -> bytes:
        return gguf(list(self.keys.values()), list(self.tensors.values()))
