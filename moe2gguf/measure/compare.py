"""The recipe: what each file, expert count and device costs in quality, against one dense reference."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.devices import reference_device, require_devices
from moe2gguf.llama.machine import environment, package_version
from moe2gguf.measure.bench import Timing, time_grid
from moe2gguf.measure.check import KL_LIMIT, NOISE_FACTOR
from moe2gguf.measure.cluster import measure_on_workers, require_workers
from moe2gguf.measure.grid import RunConfig, plan_grid, plan_run
from moe2gguf.measure.journal import Journal, key
from moe2gguf.measure.pareto import recommend
from moe2gguf.measure.results import Agreement, Comparison, Quality, ResultRow, compare_pairs, is_above_noise
from moe2gguf.measure.speed import Run, Speed
from moe2gguf.measure.workbench import Answer, CompareSettings, Measurement, measure_here

__all__ = ["CompareSettings", "compare", "settings_from"]


def settings_from(
    text: Path | None, n_token: int | None, *, context: int, memory: int | None, room: int | None, **options: Any
) -> CompareSettings:
    """Return the command line's settings: a text file, and sizes in MiB. Raises HarnessError for an unread text."""
    return CompareSettings(
        text=read_text(text),
        n_token=n_token,
        n_context=context,
        memory_limit=memory and memory * 2**20,
        room=room and room * 2**20,
        **options,
    )


def read_text(path: Path | None) -> str | None:
    """Return a text file's words, whatever is not UTF-8 replaced. Raises HarnessError for one that cannot be read."""
    try:
        return None if path is None else path.read_text("utf-8", "replace")
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read: {error.strerror}") from error


def compare(
    files: Sequence[Path],
    reference: Path,
    *,
    used: Sequence[int] = (),
    devices: Sequence[str] = ("cpu",),
    settings: CompareSettings | None = None,
    timing: Timing | None = None,
    on_row: Callable[[ResultRow], None] = lambda _: None,
    on_run: Callable[[RunConfig, Run], None] = lambda *_: None,
) -> Comparison:
    """Compare every file at every `used` count on every device with the dense file `reference`.

    Each run is a child process: a crash, a kill or a time-out is a row with its reason, and the next one starts.
    Finished rows are kept in the journal and not measured again. `on_row` hears of each row as it is done. With
    several devices, each file and k is also compared with itself on the first of them. With `timing` the rows that
    ran are timed too, here, and the result names a choice; `on_run` hears of each run.

    Raises:
        GGUFError: a file's header is not sound.
        HarnessError: a device, the cluster or a file on one of its workers is not there, or the reference itself
            cannot be run on this text.
    """
    settings = settings or CompareSettings()
    if timing and settings.scheduler:
        raise HarnessError("speeds are those of one machine: leave out the scheduler, or the speed")
    if settings.scheduler:  # workers have another current folder
        files, reference = [path.absolute() for path in files], reference.absolute()
    settings = replace(settings, text=settings.words)
    wanted = plan_grid(files, used, devices)
    base = plan_run(read_model(reference), 0, reference_device(devices))
    machine = environment()
    if settings.scheduler:
        machine["workers"] = require_workers(settings.scheduler, [base, *wanted], devices)
    else:
        require_devices(devices)
    sweep = _Sweep(settings)
    noise, rows = _rows(sweep, base, wanted, on_row)
    kl_limit = max(KL_LIMIT, NOISE_FACTOR * noise.summary.kl_mean) if noise else KL_LIMIT
    rows = [_judged(row, kl_limit) for row in rows]
    agreements = _agreements(sweep, [row.config for row in rows if row.status == "ok"])
    reference_speed = None
    if timing:
        rows, reference_speed = _timed(rows, base, timing, on_run)
    return Comparison(
        reference=base,
        rows=tuple(rows),
        pairs=tuple(compare_pairs(rows, kl_limit)),
        noise=noise,
        kl_limit=kl_limit,
        settings={**sweep.facts, "journal": str(sweep.journal.path)},
        environment=machine,
        agreements=agreements,
        reference_speed=reference_speed,
        recommendation=recommend(rows),
    )


def _rows(
    sweep: _Sweep, base: RunConfig, wanted: Sequence[RunConfig], on_row: Callable[[ResultRow], None]
) -> tuple[Quality | None, list[ResultRow]]:
    """Return the noise floor, None if nothing can run, and a row for every candidate, in their order."""
    noise = None
    rows = {one: ResultRow(one, "refused", one.refusal) for one in wanted if one.refusal}
    for row in rows.values():
        on_row(row)
    jobs = [Measurement("quality", base, one) for one in wanted if not one.refusal]
    for job, answer, resumed in sweep.answers([Measurement("noise", base, base), *jobs] if jobs else []):
        if job.what == "noise":
            noise = _sound(base, answer)
        else:
            rows[job.one] = _row(job.one, answer, resumed)
            on_row(rows[job.one])
    return noise, [rows[one] for one in wanted]


def _row(one: RunConfig, answer: Answer, resumed: bool) -> ResultRow:
    if isinstance(answer, HarnessError):
        return ResultRow(one, "failed", str(answer))
    if answer.summary.n_bad:
        return ResultRow(one, "failed", f"{answer.summary.n_bad} logits are NaN or infinite", answer)
    return ResultRow(one, "ok", quality=answer, resumed=resumed)


def _sound(base: RunConfig, answer: Answer) -> Quality:
    if isinstance(answer, HarnessError):
        raise answer
    if answer.summary.n_bad:
        raise HarnessError(f"{base.path}: {answer.summary.n_bad} logits of the reference are not finite: use another")
    return answer


def _agreements(sweep: _Sweep, sound: Sequence[RunConfig]) -> tuple[Agreement, ...]:
    """Compare every file and k with itself on the first device it ran on."""
    first: dict[tuple[Path, int], RunConfig] = {}
    for one in sound:
        first.setdefault((one.path, one.n_expert_used), one)
    pairs = [(first[one.path, one.n_expert_used], one) for one in sound]
    jobs = [Measurement("devices", base, one) for base, one in pairs if base != one]
    answers = {job: answer for job, answer, _ in sweep.answers(jobs)}
    return tuple(Agreement.of(job.base, job.one, answers[job]) for job in jobs)


def _timed(
    rows: Sequence[ResultRow], base: RunConfig, timing: Timing, on_run: Callable[[RunConfig, Run], None]
) -> tuple[list[ResultRow], Speed | None]:
    """Return the rows with the speeds of those that ran, and the reference's speed."""
    sound = [row.config for row in rows if row.status == "ok"]
    if not sound:
        return list(rows), None
    found = time_grid(sound, base, timing, on_run)
    speeds = {row.config: row.speed for row in found.rows[1:]}
    return [replace(row, speed=speeds.get(row.config)) for row in rows], found.rows[0].speed


class _Sweep:
    """The jobs of one comparison: taken from the journal, or measured, here or on a cluster, and put there."""

    def __init__(self, settings: CompareSettings) -> None:
        self.settings = settings
        self.facts = {
            "text_sha256": hashlib.sha256(settings.words.encode("utf-8", "replace")).hexdigest(),
            "tokens": settings.n_token,
            "context": settings.n_context,
            "room": settings.room,
        }
        self.journal = Journal(settings.journal or cache_folder() / "compare.jsonl")

    def answers(self, jobs: Sequence[Measurement]) -> Iterator[tuple[Measurement, Answer, bool]]:
        """Yield every job with its answer, as they come, and whether the journal had it."""
        kept = {job: found for job in jobs if (found := self._kept(job))}
        for job, found in kept.items():
            yield job, found, True
        for job, answer in self._measured([job for job in jobs if job not in kept]):
            if isinstance(answer, Quality) and not answer.summary.n_bad:
                self.journal.put(self._key(job), answer.to_dict())
            yield job, answer, False

    def _measured(self, jobs: Sequence[Measurement]) -> Iterator[tuple[Measurement, Answer]]:
        if not jobs:
            return iter(())
        if self.settings.scheduler:
            return measure_on_workers(jobs, self.settings)
        return measure_here(jobs, self.settings)

    def _kept(self, job: Measurement) -> Quality | None:
        values = None if self.settings.fresh else self.journal.get(self._key(job))
        try:
            return Quality.from_dict(values) if values else None
        except (KeyError, TypeError, ValueError):  # another version's row, or an edited one: measure again
            return None

    def _key(self, job: Measurement) -> str:
        return key(
            what=job.what,
            files=[[one.identity, one.n_expert_used, one.device] for one in (job.base, job.one)],
            versions=[package_version("moe2gguf"), package_version("llama-cpp-python")],
            **self.facts,
        )


def _judged(row: ResultRow, kl_limit: float) -> ResultRow:
    if row.status == "ok" and row.quality:
        return replace(row, above_noise=is_above_noise(row.quality, kl_limit))
    return row


def cache_folder() -> Path:
    """Return the folder of journals and of what is made for a comparison: $MOE2GGUF_CACHE, or in the user's cache."""
    chosen = os.environ.get("MOE2GGUF_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe2gguf"
