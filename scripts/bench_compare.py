"""compare: what the metrics cost on top of the bare decode loop, in time and memory.

    scripts/bench compare FILE.gguf [--windows 4] [--repeat 3] [--threads N]     (needs moe2gguf[run])

In one process, interleaved: `bare` computes the windows and throws the logits away, `compare` is what moe2gguf's own
compare runs for a row: every metric, against a reference on disk (the file itself; any other takes the same time).
Both ask for logits of the scored half of every window only. Times are wall and processor time per window, medians of
the repeats; memory is the peak of the resident set less the file's mapped pages. With --vocabulary N the file is first
rewritten with N tokens: more rows in the embedding, and in the output matrix, and unused tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe2gguf.harness.llama import Llama
    from moe2gguf.harness.logits import Reference

GOAL = 0.10
N_CONTEXT = 512


@dataclass(frozen=True)
class Result:
    """Seconds per window of the two loops, wall and processor, of one repeat."""

    bare: float
    compare: float
    bare_processor: float
    compare_processor: float


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
    from moe2gguf.harness.child import run_in_child

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = widened(given.file, given.vocabulary, folder / "wide.gguf") if given.vocabulary else given.file
        results, peak, n_vocab = run_in_child(measure, file, folder, given.windows, given.repeat, given.threads)
    middle = [statistics.median(getattr(one, field) for one in results) for field in Result.__dataclass_fields__]
    bare, compare, bare_processor, compare_processor = middle
    print(f"{given.file.name}, {n_vocab:,} tokens in the vocabulary, windows of {N_CONTEXT}, {given.windows} of them")
    print("| per window | bare | compare | more |\n|---|--:|--:|--:|")
    for words, a, b in (("wall", bare, compare), ("processor", bare_processor, compare_processor)):
        print(f"| {words} | {a:.3f} s | {b:.3f} s | {b / a - 1:.1%} |")
    print(f"peak private memory {peak / 2**20:.0f} MiB")
    print(f"goal, at most {GOAL:.0%} of wall time: {'reached' if compare / bare - 1 <= GOAL else 'MISSED'}")


def measure(file: Path, folder: Path, n_window: int, repeat: int, threads: int | None) -> tuple[list[Result], int, int]:
    """Runs in a child process: the repeats, the peak of private memory in bytes, and the size of the vocabulary."""
    from moe2gguf.harness.check import default_text
    from moe2gguf.harness.library import processors
    from moe2gguf.harness.llama import Setup, open_model
    from moe2gguf.harness.logits import record_here

    setup = Setup(n_context=N_CONTEXT, n_threads=threads or processors())
    first = N_CONTEXT // 2
    n_token = n_window * (N_CONTEXT - 1 - first)
    reference = record_here(
        file, setup, default_text(64 * N_CONTEXT * n_window), n_token, first, folder / "logits", None
    )
    with open_model(file, setup) as model:
        results = [one_repeat(model, reference) for _ in range(repeat)]
        return results, private_peak(), model.facts.n_vocab


def one_repeat(model: Llama, reference: Reference) -> Result:
    """Both loops over all windows."""
    from moe2gguf.harness import metrics
    from moe2gguf.harness.logits import compare_window

    windows = reference.windows

    def bare() -> None:
        for window in windows.tokens:
            for _ in model.blocks(window, windows.first, len(window) - 1):
                pass

    def compare() -> None:
        with reference.logits.open("rb") as file:
            for window in windows.tokens:
                metrics.join(compare_window(model, window, reference, file, metrics.TAIL))

    (a, b), (c, d) = timed(bare), timed(compare)
    n = len(windows.tokens)
    return Result(a / n, c / n, b / n, d / n)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def private_peak() -> int:
    """Bytes of the peak resident set that are not mapped from files now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) * 1024


def widened(source: Path, n_vocab: int, target: Path) -> Path:
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
