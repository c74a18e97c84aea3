"""llama.cpp's own quantizer, the oracle: what it would choose (dry run) and what it writes."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path
from typing import Any

import gguf
from llama_cpp import llama_cpp as lib

_lines: list[str] = []


@lib.llama_log_callback
def _keep(_level: int, text: bytes, _data: Any) -> None:
    _lines.append(text.decode("utf-8", "replace"))


def hollow(
    path: Path,
    *,
    n_layer: int,
    n_head_kv: int = 2,
    tied: bool = False,
    n_expert: int = 0,
    d_model: int = 256,
    d_ff: int = 256,
    architecture: str = "llama",
    fused: bool = False,
) -> Path:
    """A file whose tensors are f16 zeros that take no room on disk; 8 heads."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(d_model)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(8)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(16)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(1)
    half = gguf.GGMLQuantizationType.F16
    size = 0

    def tensor(name: str, *shape: int) -> None:
        nonlocal size
        writer.add_tensor_info(name, shape, "float16", 2 * _product(shape), raw_dtype=half)
        size += -(-2 * _product(shape) // 32) * 32

    tensor("token_embd.weight", 16, d_model)
    if not tied:
        tensor("output.weight", 16, d_model)
    tensor("output_norm.weight", d_model)
    d_kv = d_model // 8 * n_head_kv
    for i in range(n_layer):
        parts = {"attn_qkv": d_model + 2 * d_kv} if fused else {"attn_q": d_model, "attn_k": d_kv, "attn_v": d_kv}
        for name, rows in (*parts.items(), ("attn_output", d_model)):
            tensor(f"blk.{i}.{name}.weight", rows, d_model)
        tensor(f"blk.{i}.ffn_norm.weight", d_model)
        stack, suffix = ((n_expert,), "_exps") if n_expert else ((), "")
        if n_expert:
            tensor(f"blk.{i}.ffn_gate_inp.weight", n_expert, d_model)
        tensor(f"blk.{i}.ffn_gate{suffix}.weight", *stack, d_ff, d_model)
        tensor(f"blk.{i}.ffn_up{suffix}.weight", *stack, d_ff, d_model)
        tensor(f"blk.{i}.ffn_down{suffix}.weight", *stack, d_model, d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + size)
    return path


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def quantize(source: Path, target: Path, ftype: int, **settings: Any) -> list[str]:
    """Run llama_model_quantize; the lines of its log."""
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, ftype
    for name, value in settings.items():
        setattr(params, name, value)
    lib.llama_log_set(_keep, None)
    _lines.clear()
    status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError("".join(_lines[-20:]))
    return "".join(_lines).split("\n")


def chosen_types(source: Path, ftype: int, *, importance: bool = False, **settings: Any) -> dict[str, str]:
    """Name -> type of every tensor that llama.cpp's quantizer would change, from a dry run."""
    if importance:
        entries = (lib.llama_model_imatrix_data * 1)()
        settings["imatrix"] = entries
    lines = quantize(source, source.with_suffix(".none"), ftype, dry_run=True, **settings)
    found = re.findall(r"^\[ *\d+/ *\d+\] (\S+) .*->.*\((\w+)\)$", "\n".join(lines), re.MULTILINE)
    return {name: kind.upper() for name, kind in found}


def file_type_of(path: Path) -> int:
    """general.file_type, read without the package under test."""
    data = path.read_bytes()
    at = data.index(b"general.file_type") + len(b"general.file_type") + 4
    return int(struct.unpack_from("<I", data, at)[0])
