"""How fast each file, expert count and device runs; rounds are interleaved, so that noise hits all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe2gguf.errors import CrashError, HarnessError
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.system import count_processors
from moe2gguf.llama.devices import choose_reference_device, require_devices
from moe2gguf.llama.generate import make_setup
from moe2gguf.llama.machine import describe_load, describe_machine
from moe2gguf.llama.repack import explain_retry, leave_weights_alone
from moe2gguf.measure.grid import RunConfig, note_other_counts, plan_grid, plan_run
from moe2gguf.measure.metrics import as_json
from moe2gguf.measure.speed import Run, Speed, measure_bandwidth, run_once, summarize_runs

TIMEOUT = 1800.0
"""Seconds that one run may take, load and warm-up included."""


@dataclass(frozen=True)
class Timing:
    """How speed is measured: tokens of a prompt and of a generation, runs of each, threads, seconds a run."""

    n_prompt: int = 512
    n_generate: int = 128
    repeat: int = 5
    threads: int | None = None
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class BenchRow:
    """One line: what ran and its speed, or the reason why there is none."""

    config: RunConfig
    speed: Speed | None
    reason: str = ""


@dataclass(frozen=True)
class Bench:
    """What `bench` returns; the reference, if any, is the first row.

    `bandwidth` is in bytes per second, 0 where nothing can run; `notes` are sentences that a reader must know.
    """

    rows: tuple[BenchRow, ...]
    bandwidth: float
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row ran."""
        return all(row.speed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "ok": self.ok,
            "notes": list(self.notes),
            "settings": self.settings,
            "environment": self.environment,
            "memory_bandwidth": self.bandwidth,
            "rows": [{**row.config.to_dict(), "reason": row.reason, "speed": as_json(row.speed)} for row in self.rows],
        }


@dataclass
class Timed:
    """A run of the grid while it is timed: its runs so far, why there are no more, and what changed its settings.

    `verify`: whether it is timed as the target of drafts too.
    """

    config: RunConfig
    reason: str
    runs: list[Run] = field(default_factory=list)
    repack: bool = True
    note: str = ""
    verify: bool = False

    def time_once(self, timing: Timing, seed: int, on_run: Callable[[RunConfig, Run], None]) -> None:
        """Time one run, unless it cannot run or failed before; `seed` draws its tokens.

        After a crash with rearranged weights this run and all others are timed without them.
        """
        if self.reason:
            return
        one = self.config
        setup = make_setup(one.n_expert_used if one.n_expert else None, one.device, timing.threads)
        setup = replace(setup, repack=self.repack)
        try:
            limits: dict[str, Any] = {"seed": seed, "timeout": timing.timeout, "verify": self.verify}
            run = run_once(one.path, setup, timing.n_prompt, timing.n_generate, **limits)
        except HarnessError as error:
            if isinstance(error, CrashError) and leave_weights_alone(setup, error):
                self.repack, self.note = False, f"{one.label}: {explain_retry(error)}"
                self.runs.clear()
                self.time_once(timing, seed, on_run)
            else:
                self.reason = str(error)
        else:
            self.runs.append(run)
            on_run(one, run)

    def speed(self, bandwidth: float) -> Speed | None:
        """Return the spreads of its runs with their bound, which is known for the CPU only; None if it failed."""
        if self.reason or not self.runs:
            return None
        one = self.config
        bound = bandwidth / one.active_bytes if one.device == "cpu" and one.active_bytes else None
        return replace(summarize_runs(self.runs), bound=bound)


def bench(
    files: Sequence[str | Path],
    *,
    used: Sequence[int] = (),
    devices: Sequence[str] = ("cpu",),
    reference: str | Path | None = None,
    timing: Timing | None = None,
    on_run: Callable[[RunConfig, Run], None] = lambda *_: None,
) -> Bench:
    """Time every file at every `used` count on every device, and the dense `reference` on the CPU (on RPC
    servers where all devices are such).

    In each of `timing.repeat` rounds everything runs once, in a process of its own. `on_run` receives each run.

    Raises:
        GGUFError: a file's header is not sound.
        HarnessError: a device is not there.
    """
    reference = None if reference is None else Path(reference)
    require_devices(devices)
    base = plan_run(read_model(reference), None, choose_reference_device(devices)) if reference else None
    grid = plan_grid(map(Path, files), used, devices)
    found = time_grid(grid, base, timing or Timing(), on_run)
    return replace(found, notes=(*note_other_counts(grid), *found.notes))


def time_grid(
    grid: Sequence[RunConfig],
    base: RunConfig | None,
    timing: Timing,
    on_run: Callable[[RunConfig, Run], None] = lambda *_: None,
    *,
    verify: bool = False,
) -> Bench:
    """Time the runs of a grid, and `base` before them, round by round; see `bench`.

    With `verify` the time that `base` takes to verify drafts is measured too.
    """
    timed = [Timed(one, one.refusal) for one in grid]
    if base:
        timed.insert(0, Timed(base, base.refusal, verify=verify))
    can_run = any(not one.reason for one in timed)
    bandwidth = measure_bandwidth() if can_run else 0.0
    for number in range(timing.repeat if can_run else 0):
        for one in timed:
            one.time_once(timing, number, on_run)
        bandwidth = max(bandwidth, measure_bandwidth())
    reference = timed[0].speed(bandwidth) if base else None
    return Bench(
        rows=tuple(BenchRow(one.config, _add_ratio(one.speed(bandwidth), reference), one.reason) for one in timed),
        bandwidth=bandwidth,
        settings={
            "prompt": timing.n_prompt,
            "generate": timing.n_generate,
            "repeat": timing.repeat,
            "threads": timing.threads or count_processors(),
        },
        environment=describe_machine(),
        notes=tuple(note for note in (*(one.note for one in timed), describe_load()) if note),
    )


def _add_ratio(speed: Speed | None, reference: Speed | None) -> Speed | None:
    if speed is None or reference is None:
        return speed
    return replace(speed, ratio=speed.generation.median / reference.generation.median)
