"""compare: what the metrics cost on top of the bare decode loop, in time and memory.

    scripts/bench compare FILE.gguf [--windows 4] [--repeat 3] [--threads N]     (needs moe2gguf[run])

One process does what `moe2gguf compare` does for a row: it computes the windows and every metric, against a reference
on disk (the file itself; any other takes the same time). The clock is split at the calls of llama.cpp: `decode` is the
bare loop, `all` is everything, so that a busy machine slows both alike. Times are wall and processor time per window,
medians of the repeats; memory is the peak of the resident set less the file's mapped pages.
With --vocabulary N the file is first
rewritten with N tokens: more rows in the embedding, and in the output matrix, and unused tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe2gguf.llama.model import Llama
    from moe2gguf.measure.logits import Reference

GOAL = 0.10
N_CONTEXT = 512


@dataclass(frozen=True)
class Result:
    """Seconds per window of one repeat, wall and processor: inside of llama.cpp, and all of it."""

    decode: float
    total: float
    decode_processor: float
    total_processor: float


def main(arguments: Sequence[str]) -> None:
    """Measure one file and print a table."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--vocabulary", type=int, help="rewrite the file with so many tokens first")
    given = parser.parse_args(arguments)
    from moe2gguf.llama.child import run_in_child

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = widen(given.file, given.vocabulary, folder / "wide.gguf") if given.vocabulary else given.file
        results, peak, n_vocab = run_in_child(measure, file, folder, given.windows, given.repeat, given.threads)
    fields = Result.__dataclass_fields__
    middle = {name: statistics.median(getattr(one, name) for one in results) for name in fields}
    more = {kind: middle[f"total{kind}"] / middle[f"decode{kind}"] - 1 for kind in ("", "_processor")}
    print(f"{given.file.name}, {n_vocab:,} tokens in the vocabulary, windows of {N_CONTEXT}, {given.windows} of them")
    print("| per window | decode | all | more |\n|---|--:|--:|--:|")
    for words, kind in (("wall", ""), ("processor", "_processor")):
        print(f"| {words} | {middle[f'decode{kind}']:.3f} s | {middle[f'total{kind}']:.3f} s | {more[kind]:.1%} |")
    print(f"peak private memory {peak / 2**20:.0f} MiB")
    print(f"goal, at most {GOAL:.0%} of wall time: {'reached' if more[''] <= GOAL else 'MISSED'}")


def measure(file: Path, folder: Path, n_window: int, repeat: int, threads: int | None) -> tuple[list[Result], int, int]:
    """Runs in a child process: the repeats, the peak of private memory in bytes, and the size of the vocabulary."""
    from moe2gguf.experts.text import read_text
    from moe2gguf.gguf.system import count_processors
    from moe2gguf.llama.devices import Setup
    from moe2gguf.llama.model import open_model
    from moe2gguf.measure.logits import record_in_process

    setup = Setup(n_context=N_CONTEXT, n_threads=threads or count_processors())
    first = N_CONTEXT // 2
    n_token = n_window * (N_CONTEXT - 1 - first)
    reference = record_in_process(file, setup, read_text().text, n_token, first, folder / "logits", None)
    with open_model(file, setup) as model:
        results = [one_repeat(model, reference) for _ in range(repeat)]
        return results, private_peak(), model.facts.n_vocab


def one_repeat(model: Llama, reference: Reference) -> Result:
    """All windows once, with a clock around every call of llama.cpp."""
    from moe2gguf.measure import metrics
    from moe2gguf.measure.logits import score_window

    windows, feed = reference.windows, model.feed
    inside = [0.0, 0.0]

    def timed(*batch: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        logits = feed(*batch)
        inside[0] += time.perf_counter() - wall
        inside[1] += time.process_time() - processor
        return logits

    model.feed = timed  # type: ignore[method-assign, assignment]
    began = time.perf_counter(), time.process_time()
    with reference.logits.open("rb") as file:
        for window in windows.tokens:
            metrics.join_scores(score_window(model, window, reference, file, metrics.TAIL))
    n = len(windows.tokens)
    total = (time.perf_counter() - began[0]) / n, (time.process_time() - began[1]) / n
    model.feed = feed  # type: ignore[method-assign]
    return Result(inside[0] / n, total[0], inside[1] / n, total[1])


def private_peak() -> int:
    """Bytes of the peak resident set that are not mapped from files now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) * 1024


def widen(source: Path, n_vocab: int, target: Path) -> Path:
    """Write the file again with `n_vocab` tokens; the new rows repeat the old ones."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    arrays = {"tokenizer.ggml.tokens": "[PAD{}]", "tokenizer.ggml.token_type": 5, "tokenizer.ggml.scores": -1000.0}
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.alignment"):
            continue
        value = field.contents()
        if key in arrays:
            more = arrays[key]
            value += [more.format(i) if isinstance(more, str) else more for i in range(len(value), n_vocab)]
        elif key.endswith(".vocab_size"):
            value = n_vocab
        kinds = field.types
        writer.add_key_value(key, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in ("token_embd.weight", "output.weight"):
            data = np.resize(data, (n_vocab, *data.shape[1:]))
        kind = tensor.tensor_type
        plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        writer.add_tensor(tensor.name, data, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
