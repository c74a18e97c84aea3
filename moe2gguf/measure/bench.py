"""The recipe: how fast each file, expert count and device runs, rounds interleaved so that noise hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.devices import place_on_device, reference_device, require_devices
from moe2gguf.llama.library import processors
from moe2gguf.llama.machine import environment
from moe2gguf.measure.grid import RunConfig, plan_grid, plan_run
from moe2gguf.measure.speed import Run, Speed, benchmark_setup, memory_bandwidth, run_once, summarize_runs

TIMEOUT = 1800.0
"""Seconds that one run may take, load and warm-up included."""


@dataclass(frozen=True)
class Timing:
    """How speed is measured: tokens of a prompt and of a generation, runs of each candidate, threads, seconds a run."""

    n_prompt: int = 512
    n_generate: int = 128
    repeat: int = 5
    threads: int | None = None
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class BenchRow:
    """One line: a candidate and its speed, or the reason why there is none."""

    config: RunConfig
    speed: Speed | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        speed = self.speed.to_dict() if self.speed else None
        return {**self.config.to_dict(), "reason": self.reason, "speed": speed}


@dataclass(frozen=True)
class Bench:
    """What `bench` returns; `bandwidth` in bytes per second; the reference, if any, is the first row."""

    rows: tuple[BenchRow, ...]
    bandwidth: float
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every candidate that can run did."""
        return all(row.speed or row.config.refusal for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "ok": self.ok,
            "settings": self.settings,
            "environment": self.environment,
            "memory_bandwidth": self.bandwidth,
            "rows": [row.to_dict() for row in self.rows],
        }


def bench(
    files: Sequence[Path],
    *,
    used: Sequence[int] = (),
    devices: Sequence[str] = ("cpu",),
    reference: Path | None = None,
    timing: Timing | None = None,
    on_run: Callable[[RunConfig, Run], None] = lambda *_: None,
) -> Bench:
    """Time every file at every `used` count on every device, and the dense `reference` on the CPU (on RPC
    servers where all devices are such).

    In each of `timing.repeat` rounds every candidate runs once, in a process of its own. `on_run` hears of each run.

    Raises:
        GGUFError: a file's header is not sound.
        HarnessError: a device is not there.
    """
    timing = timing or Timing()
    require_devices(devices)
    base = plan_run(read_model(reference), 0, reference_device(devices)) if reference else None
    return time_grid(plan_grid(files, used, devices), base, timing, on_run)


def time_grid(
    others: Sequence[RunConfig],
    base: RunConfig | None,
    timing: Timing,
    on_run: Callable[[RunConfig, Run], None] = lambda *_: None,
) -> Bench:
    """Time candidates, and `base` before them, round by round; see `bench`."""
    wanted = ([base] if base else []) + list(others)
    reasons = {i: one.refusal for i, one in enumerate(wanted) if one.refusal}
    runs: dict[int, list[Run]] = {i: [] for i in range(len(wanted))}
    bandwidth = memory_bandwidth()
    for number in range(timing.repeat):
        for i, one in enumerate(wanted):
            if i in reasons:
                continue
            try:
                runs[i].append(_run(one, timing, seed=number))
                on_run(one, runs[i][-1])
            except HarnessError as error:
                reasons[i] = str(error)
        bandwidth = max(bandwidth, memory_bandwidth())
    speeds = {i: summarize_runs(done) for i, done in runs.items() if done and i not in reasons}
    normal = speeds[0].generation.median if base and 0 in speeds else None
    return Bench(
        rows=tuple(
            BenchRow(one, _rated(speeds.get(i), one, bandwidth, normal), reasons.get(i, ""))
            for i, one in enumerate(wanted)
        ),
        bandwidth=bandwidth,
        settings={
            "prompt": timing.n_prompt,
            "generate": timing.n_generate,
            "repeat": timing.repeat,
            "threads": timing.threads or processors(),
        },
        environment=environment(),
    )


def _run(one: RunConfig, timing: Timing, seed: int) -> Run:
    setup = place_on_device(benchmark_setup(timing.threads, one.n_expert_used if one.n_expert else None), one.device)
    return run_once(one.path, setup, timing.n_prompt, timing.n_generate, seed=seed, timeout=timing.timeout)


def _rated(speed: Speed | None, one: RunConfig, bandwidth: float, normal: float | None) -> Speed | None:
    """Return a speed with its bound, which is the CPU's and so only known there, and its ratio to the reference."""
    if speed is None:
        return None
    bound = bandwidth / one.active_bytes if one.device == "cpu" and one.active_bytes else None
    return replace(speed, bound=bound, ratio=speed.generation.median / normal if normal else None)
