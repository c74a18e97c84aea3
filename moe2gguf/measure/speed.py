"""How fast a file runs, and how fast this machine could run it at most; all of it measured in child processes.

Prompt and generation are llama-bench's tests `pp` and `tg`: random tokens after BOS where the file wants it, an empty
cache before each, one warm-up of each, whole batches timed:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/llama-bench/llama-bench.cpp#L2168
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from moe2gguf.gguf.system import count_processors
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.generate import N_BATCH
from moe2gguf.llama.model import Llama, open_model

DRAFT_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Numbers of drafted tokens whose verification is timed."""

_VERIFICATIONS = 3
_READ_BYTES = 2**30  # several times the largest caches
_READS = 4


@dataclass(frozen=True)
class Run:
    """One run of one file in a process of its own.

    prompt_speed, generation_speed   tokens per second; 0 where no token was asked for
    first_token   seconds from the prompt to the most likely next token, the model being loaded
    load          seconds to load the file and make a context
    peak_memory   bytes; the largest resident set of the process, memory-mapped weights included
    verification  seconds for g + 1 tokens in one batch, each with its logits, for every g of DRAFT_LENGTHS; empty
                  unless it was asked for
    """

    prompt_speed: float
    generation_speed: float
    first_token: float
    load: float
    peak_memory: int
    verification: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spread:
    """The median of repeated runs, and the lowest and highest of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """The runs of one configuration, as spreads; units as in `Run`. bound and ratio are None where they are not known.

    bound   tokens per second of generation if reading the active weights from memory were the only cost
    ratio   generation speed over the reference's
    verification   medians
    """

    prompt: Spread
    generation: Spread
    first_token: Spread
    load: Spread
    peak_memory: int
    n_run: int
    bound: float | None = None
    ratio: float | None = None
    verification: tuple[float, ...] = ()


def run_once(
    path: Path,
    setup: Setup,
    n_prompt: int,
    n_generate: int,
    *,
    seed: int = 0,
    timeout: float | None = None,
    verify: bool = False,
) -> Run:
    """Load a file, warm it up, and time one prompt and one generation; `seed` draws the tokens.

    With `verify` the verification of drafts is timed too, in the middle of such a generation.

    Raises HarnessError if llama.cpp cannot run it, or took longer than `timeout` seconds for all of it.
    """
    wanted = (n_prompt, n_generate, seed, verify)
    return run_in_child(_run_once, path, setup, *wanted, what=f"running {path}", timeout=timeout)


def measure_bandwidth() -> float:
    """Return the bytes per second that all processors together read from memory, the best of several readings."""
    return run_in_child(_measure_bandwidth, what="measuring the memory bandwidth")


def summarize_runs(runs: list[Run]) -> Speed:
    """Return the spreads of at least one run."""
    return Speed(
        prompt=spread_of([run.prompt_speed for run in runs]),
        generation=spread_of([run.generation_speed for run in runs]),
        first_token=spread_of([run.first_token for run in runs]),
        load=spread_of([run.load for run in runs]),
        peak_memory=max(run.peak_memory for run in runs),
        n_run=len(runs),
        verification=tuple(map(median, zip(*(run.verification for run in runs), strict=True))),
    )


def spread_of(values: list[float]) -> Spread:
    """Return median, lowest and highest of at least one value."""
    return Spread(median(values), min(values), max(values))


def _run_once(path: Path, setup: Setup, n_prompt: int, n_generate: int, seed: int, verify: bool) -> Run:
    began = time.perf_counter()
    with open_model(path, setup) as model:
        model.start(max(n_prompt, n_generate, n_generate // 2 + DRAFT_LENGTHS[-1] + 1 if verify else 1))
        load = time.perf_counter() - began
        rng = np.random.default_rng(seed)
        for n, test in ((n_prompt, _time_prompt), (min(n_generate, 1), _time_generation)):
            if n:
                test(model, _draw_tokens(model, n, rng))
        prompt = _time_prompt(model, _draw_tokens(model, n_prompt, rng)) if n_prompt else 0.0
        generation = _time_generation(model, _draw_tokens(model, n_generate, rng)) if n_generate else 0.0
        verification = _time_verification(model, n_generate // 2, rng) if verify else ()
    return Run(
        prompt_speed=n_prompt / prompt if prompt else 0.0,
        generation_speed=n_generate / generation if generation else 0.0,
        first_token=prompt,
        load=load,
        peak_memory=_peak_memory(),
        verification=verification,
    )


def _time_prompt(model: Llama, tokens: NDArray[np.int32]) -> float:
    """Return the seconds from an empty cache to the most likely token after `tokens`."""
    model.clear()
    began = time.perf_counter()
    for start in range(0, len(tokens), N_BATCH):
        piece = tokens[start : start + N_BATCH]
        logits = model.feed(piece, [start + i == len(tokens) - 1 for i in range(len(piece))])
    logits[0].argmax()  # the first answer is there when it has been read
    return time.perf_counter() - began


def _time_generation(model: Llama, tokens: NDArray[np.int32]) -> float:
    """Return the seconds that `tokens` take one after the other, each with its logits."""
    model.clear()
    began = time.perf_counter()
    for token in tokens:
        model.feed([int(token)], [True])
    return time.perf_counter() - began


def _time_verification(model: Llama, n_past: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Return the seconds that g + 1 tokens take in one batch after `n_past` others, for every g of DRAFT_LENGTHS."""
    times: list[list[float]] = [[] for _ in DRAFT_LENGTHS]
    for _ in range(_VERIFICATIONS):
        for g, seconds in zip(DRAFT_LENGTHS, times, strict=True):
            tokens = _draw_tokens(model, n_past + g + 1, rng)
            model.clear()
            if n_past:
                model.feed(tokens[:n_past], [False] * n_past)
            began = time.perf_counter()
            model.feed(tokens[n_past:], [True] * (g + 1))
            seconds.append(time.perf_counter() - began)
    return tuple(map(median, times))


def _draw_tokens(model: Llama, n: int, rng: np.random.Generator) -> NDArray[np.int32]:
    tokens = rng.integers(0, model.facts.n_vocab, n, dtype=np.int32)
    bos = model.bos()
    if bos is not None:
        tokens[0] = bos
    return tokens


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure_bandwidth() -> float:
    """Look for the largest of equal bytes, one thread per processor: they read it once and do little else."""
    n = count_processors()
    parts = np.array_split(np.ones(_READ_BYTES, np.uint8), n)
    best = 0.0
    with ThreadPoolExecutor(n) as pool:
        for _ in range(_READS):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _READ_BYTES / (time.perf_counter() - began))
    return best
