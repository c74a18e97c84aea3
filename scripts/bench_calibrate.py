"""calibrate: how time and memory of a calibration grow with tokens, layers, d_model and d_ff; what 7B would take.

Synthetic LLaMA-shaped checkpoints of several sizes, each calibrated and refitted (16 experts, 8 used) by a process of
its own, on the default text with a byte-level tokenizer made here. The figures are processor time, not wall time,
and peak memory; a line through the counted operations gives the rate, and an estimate for a model of 7 billion weights.
Needs a Python with moe2gguf, torch and transformers (scripts/check makes .venv/check).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from environment import ROOT, fail
from measure import machine, run, table, write_json

N_EXPERT, N_EXPERT_USED = 16, 8
N_VOCAB, D_HEAD, N_CONTEXT = 1024, 64, 512


@dataclass(frozen=True)
class Size:
    """A model and the tokens it is calibrated on."""

    n_token: int
    n_layer: int
    d_model: int
    d_ff: int

    def operations(self) -> float:
        """Multiplications and additions, from the matrix products of one calibration with a refit.

        Per token and layer, in units of d_model * d_ff: the dense MLP 3, activations 2, the refit's missing output and
        right-hand side 2, the sliced output 1; attention 8 d_model^2 (both models, four square projections); the sum
        of d_ff x d_ff at 9/16 of the full product, energies at 1/n of it; twice these for the 8,192 to 16,383 tokens
        that regrouping sees. Per layer: six factorizations, one solution and five of an eighth of the outputs.
        """
        wide, square = self.d_model * self.d_ff, self.d_ff**2
        regrouping = 2 / N_EXPERT * square * (self.n_token // max(self.n_token // 8192, 1))
        per_token = 8 * wide + 8 * self.d_model**2 + (9 / 16 + 1 / N_EXPERT) * square
        per_layer = 2 * self.d_ff**3 + 4 * square * self.d_model
        return 2.0 * self.n_layer * (self.n_token * per_token + regrouping + per_layer)

    def memory(self) -> float:
        """Bytes that are known to be needed: hidden states, one layer, its activations and its sums, in float32."""
        states = 3 * self.n_token * self.d_model
        neurons = min(self.n_token * self.d_ff, 2**29)
        layer = 4 * self.d_model**2 + 2 * 3 * self.d_model * self.d_ff
        return 4.0 * (states + neurons + layer + 5 * self.d_ff**2)


BASE = Size(4096, 2, 256, 1024)
SIZES = (
    BASE,
    replace(BASE, n_token=16384),
    replace(BASE, n_layer=8),
    replace(BASE, d_ff=3072),
    replace(BASE, d_model=512),
    Size(8192, 4, 512, 2048),
)
SEVEN_BILLION = Size(65536, 32, 4096, 11008)


def main(arguments: Sequence[str]) -> None:
    """Measure every size, fit, estimate, report."""
    options = parse(arguments)
    needed = [name for name in ("moe2gguf", "torch", "transformers") if not importlib.util.find_spec(name)]
    if needed:
        fail(f"this Python has no {', '.join(needed)}; run it with .venv/check/bin/python, which scripts/check makes")
    sizes = SIZES[:1] if options.quick else SIZES
    with tempfile.TemporaryDirectory(prefix="moe2gguf-", dir=options.work) as folder:
        rows = [measure_size(size, Path(folder) / str(i), options.threads) for i, size in enumerate(sizes)]
    result = {"machine": machine(), "threads": options.threads, "rows": rows, "fit": fit(rows)}
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `scripts/bench calibrate`."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size only: whether it runs")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where checkpoints are made (default: the system's)")
    return parser.parse_args(arguments)


def measure_size(size: Size, folder: Path, threads: int) -> dict[str, Any]:
    """Make a checkpoint of this size, calibrate it in a process of its own; processor seconds and peak bytes."""
    checkpoint(folder, size)
    out = folder.with_suffix(".gguf")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = [
        "-e",
        N_EXPERT,
        "-k",
        N_EXPERT_USED,
        "--refit",
        "--calibration-tokens",
        size.n_token,
        "--threads",
        threads,
    ]
    program = "import sys, torch; torch.set_num_threads(int(sys.argv.pop())); from moe2gguf.cli import main; main()"
    done = run(
        [sys.executable, "-c", program, "convert", folder, out, *map(str, options), str(threads)],
        folder.with_suffix(".log"),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    out.unlink()
    print(f"  {asdict(size)}: {seconds:.1f} s, {done.peak_bytes / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return asdict(size) | {"cpu_seconds": seconds, "wall_seconds": done.seconds, "peak_bytes": done.peak_bytes}


def checkpoint(folder: Path, size: Size) -> None:
    """A LLaMA-shaped float32 checkpoint with random weights, whose inputs share a constant part as trained ones do."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    random, d = np.random.default_rng(0), size.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (d, d),
        "self_attn.v_proj": (d, d),
    }
    shapes |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (size.d_ff, d), "mlp.up_proj": (size.d_ff, d)}
    shapes |= {"mlp.down_proj": (d, size.d_ff), "input_layernorm": (d,), "post_attention_layernorm": (d,)}
    names: dict[str, tuple[int, ...]]
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(size.n_layer) for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (N_VOCAB, d), "model.norm.weight": (d,)}
    weights = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(d))
        for name, shape in names.items()
    }
    weights["model.embed_tokens.weight"][:, 0] = 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(size)))
    tokenizer(folder)


def config(size: Size) -> dict[str, Any]:
    """config.json of a size."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": N_VOCAB,
        "hidden_size": size.d_model, "intermediate_size": size.d_ff, "num_hidden_layers": size.n_layer,
        "num_attention_heads": size.d_model // D_HEAD, "num_key_value_heads": size.d_model // D_HEAD,
        "max_position_embeddings": N_CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with LLaMA 3's splitting, trained on nothing: bytes alone."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_tokenizers import byte_level_bpe

    byte_level_bpe(folder, pre="llama-bpe")


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Lines through processor time and memory by least squares, how far they are off, and what they say of 7B."""
    if len(rows) < 3:
        return None
    sizes = [Size(row["n_token"], row["n_layer"], row["d_model"], row["d_ff"]) for row in rows]
    work, seconds = [size.operations() for size in sizes], [row["cpu_seconds"] for row in rows]
    slope, start = statistics.linear_regression(work, seconds)
    known, peak = [size.memory() for size in sizes], [row["peak_bytes"] for row in rows]
    growth, base = statistics.linear_regression(known, peak)
    off = max(abs(start + slope * w - s) / s for w, s in zip(work, seconds, strict=True))
    off_memory = max(abs(base + growth * m - p) / p for m, p in zip(known, peak, strict=True))
    return {
        "start_seconds": start,
        "operations_per_second": 1 / slope,
        "worst_error": off,
        "base_bytes": base,
        "bytes_per_known_byte": growth,
        "worst_memory_error": off_memory,
        "seven_billion": asdict(SEVEN_BILLION)
        | {
            "cpu_seconds": start + slope * SEVEN_BILLION.operations(),
            "peak_bytes": base + growth * SEVEN_BILLION.memory(),
        },
    }


def report(result: dict[str, Any]) -> str:
    """The Markdown: a table, the fit in words, the estimate."""
    header = ["", "tokens", "layers", "d_model", "d_ff", "CPU s", "peak MB"]
    lines = [
        [
            str(i),
            *(str(row[key]) for key in ("n_token", "n_layer", "d_model", "d_ff")),
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for i, row in enumerate(result["rows"], 1)
    ]
    text = ["", table(header, lines), "", f"{result['machine']['processor']}, {result['threads']} thread(s)."]
    if found := result["fit"]:
        big = found["seven_billion"]
        rate, memory = found["operations_per_second"] / 1e9, found["bytes_per_known_byte"]
        text += [
            "",
            f"CPU time: {found['start_seconds']:.1f} s and {rate:.0f} billion operations per second, at most "
            f"{found['worst_error']:.0%} off. Peak memory: {found['base_bytes'] / 1e6:.0f} MB and {memory:.2f} "
            f"bytes per byte counted, at most {found['worst_memory_error']:.0%} off.",
            f"By arithmetic, {big['n_layer']} layers of {big['d_model']} x {big['d_ff']} with {big['n_token']:,} "
            f"tokens: {big['cpu_seconds'] / 3600:.0f} hours of processor time at that rate, "
            f"{big['peak_bytes'] / 1e9:.1f} GB (3.2 of it hidden states, which --calibration-memory can put on disk).",
        ]
    return "\n".join(text)
