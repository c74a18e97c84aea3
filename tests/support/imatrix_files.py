"""Importance matrices made without the package under test: GGUF by gguf's writer, `.dat` byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Statistics = Mapping[str, tuple[NDArray[np.float32], Sequence[float]]]
"""Tensor name -> sums of squares (n_mat, width), and a count per matrix or one for all."""


def write_gguf(path: Path, statistics: Statistics, *, chunks: int | None = 3, size: int = 512) -> Path:
    """llama.cpp's newer format; `chunks` None leaves the three keys out."""
    writer = gguf.GGUFWriter(path, "unused")
    del writer.kv_data[0]["general.architecture"]
    writer.add_string("general.type", "imatrix")
    if chunks is not None:
        writer.add_array("imatrix.datasets", ["/home/somebody/secret folder/words.txt"])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", size)
    for name, (sums, counts) in statistics.items():
        writer.add_tensor(name + ".in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(name + ".counts", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat(entries: Mapping[str, tuple[int, NDArray[np.float32]]], *, end: bytes | None = None) -> bytes:
    """The older format: name -> (calls, values, which are averages times calls)."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        raw = name.encode()
        data += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    label = rb"C:\Users\somebody\words.txt"
    return data + (struct.pack("<ii", 7, len(label)) + label if end is None else end)


def statistics_for(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, skip: Sequence[str] = ("token_embd", "output.weight")
) -> dict[str, tuple[NDArray[np.float32], list[float]]]:
    """Plausible numbers for every matrix: a few columns dominate, experts have seen different numbers of tokens."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or "norm" in name or "ffn_gate_inp" in name or name.startswith(tuple(skip)):
            continue
        n = shape[0] if len(shape) == 3 else 1
        counts = [float(c) for c in rng.integers(500, 1500, n)]
        means = rng.random((n, shape[-1])) ** 6 * 10
        result[name] = ((means * np.array(counts)[:, None]).astype(np.float32), counts)
    return result
