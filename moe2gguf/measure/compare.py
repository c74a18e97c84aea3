"""What each file, expert count and device costs in quality, against one dense reference."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.experts.text import Text, bytes_to_read, read_text
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.system import temporary_folder
from moe2gguf.llama.devices import Setup, choose_reference_device, place_on_device, require_devices
from moe2gguf.llama.machine import describe_machine
from moe2gguf.measure.bench import Bench, Timing, time_grid
from moe2gguf.measure.check import KL_LIMIT, NOISE_FACTOR, reorder_sums, require_llama
from moe2gguf.measure.cluster import measure_on_workers, require_workers
from moe2gguf.measure.drafts import DraftGains, find_best_draft
from moe2gguf.measure.grid import Measurement, RunConfig, list_notes, note_other_counts, plan_grid, plan_run
from moe2gguf.measure.journal import MeasurementJournal
from moe2gguf.measure.logits import Reference, record_reference, require_tokens, score_file
from moe2gguf.measure.pareto import recommend
from moe2gguf.measure.results import (
    Agreement,
    Answer,
    Comparison,
    Quality,
    ResultRow,
    compare_pairs,
    is_above_noise,
    summarize_quality,
)
from moe2gguf.measure.speed import DRAFT_LENGTHS, Run, Speed
from moe2gguf.measure.tasks import Prompt, TaskScores, make_prompts, solve_tasks
from moe2gguf.measure.token_ids import vocabulary_file
from moe2gguf.recipes.source import Source

TIMEOUT = 600.0
"""Seconds that one window may take before its row is given up."""

_ROOM = 8 * 2**30


@dataclass(frozen=True)
class CompareSettings:
    """How a comparison is made.

    text       what is scored; the built-in one by default
    n_token    scored positions, rounded up to whole windows; None: the whole text
    n_context  tokens of a window; its second half is scored, as llama.cpp's perplexity tool does
    threads    None: all processors
    tasks      also find out which tasks each file solves: see `moe2gguf.measure.tasks`
    timeout    seconds per window, and per task
    memory_limit  bytes of private memory of each run (Linux); None: no limit
    room       bytes of disk for the reference's logits before they take the compact form; None: 8 GiB or half of
               what is free, the smaller
    journal    file of finished rows; None: one in the user's cache folder
    resume     take from the journal what it has; False: measure it again
    scheduler  address of a Dask cluster that measures; None: this machine does
    """

    text: Text = field(default_factory=read_text)
    n_token: int | None = 2048
    n_context: int = 512
    tasks: bool = False
    threads: int | None = None
    timeout: float = TIMEOUT
    memory_limit: int | None = None
    room: int | None = None
    journal: Path | None = None
    resume: bool = True
    scheduler: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the scores of a text depend on besides the files."""
        return {
            "text_sha256": self.text.digest,
            "tokens": self.n_token,
            "context": self.n_context,
            "room": self.room,
        }


def make_settings(text: Path | None, n_token: int | None, *, n_context: int, **options: Any) -> CompareSettings:
    """Return the command line's settings; `text` None is the built-in text.

    Raises CalibrationError for a text that cannot be read.
    """
    n_byte = bytes_to_read(n_token and 3 * n_token + n_context)  # about half of a window is scored
    return CompareSettings(text=read_text(text, n_byte), n_token=n_token, n_context=n_context, **options)


def compare(
    files: Sequence[Path],
    reference: Path,
    *,
    used: Sequence[int] = (),
    devices: Sequence[str] = ("cpu",),
    settings: CompareSettings | None = None,
    timing: Timing | None = None,
    journal: MeasurementJournal | None = None,
    on_row: Callable[[ResultRow], None] = lambda _: None,
    on_run: Callable[[RunConfig, Run], None] = lambda *_: None,
) -> Comparison:
    """Compare every file at every `used` count on every device with `reference`; one with experts runs at its own.

    Each run is a child process: a crash, a kill or a time-out is a row with its reason, and the next one starts.
    Finished rows are kept in the journal and not measured again; `journal` is the one of the settings where it is open
    already: see `open_journal`. `on_row` receives each row as it is done. With several devices, each file and count is
    also compared with itself on the first of them. With `timing` the rows that ran are timed too, on this machine, and
    the result recommends one; `on_run` receives each timed run. It also tells what each row gives as a draft of the
    reference: see `moe2gguf.measure.drafts`.

    Raises:
        GGUFError: a file's header is not sound.
        HarnessError: a device, the cluster or a file on one of its workers is not there, or the reference itself
            cannot be run on this text.
    """
    settings = settings or CompareSettings()
    if settings.scheduler:  # workers have another current folder
        files, reference = [path.absolute() for path in files], reference.absolute()

    grid = plan_grid(files, used, devices)
    base = plan_run(read_model(reference), None, choose_reference_device(devices))
    machine = _require_machine([base, *grid], devices, settings, timing)
    runs = _Runs(settings, journal or open_journal(settings))

    with runs.journal.interruptible():
        noise, rows = _measure_quality(runs, base, grid, on_row)
        kl_limit = max(KL_LIMIT, NOISE_FACTOR * noise.summary.kl_mean) if noise else KL_LIMIT
        rows = [replace(row, above_noise=_above_noise(row, kl_limit)) for row in rows]
        agreements = _compare_devices(runs, rows)
        rows, tasks = _solve_tasks(runs, rows, base, on_row) if settings.tasks else (rows, None)
        rows, timed = _time_rows(rows, base, timing, on_run) if timing else (rows, None)

    return Comparison(
        reference=base,
        rows=tuple(rows),
        pairs=tuple(compare_pairs(rows, kl_limit)),
        noise=noise,
        kl_limit=kl_limit,
        settings={**settings.facts, "journal": str(runs.journal.path)},
        environment=machine,
        agreements=agreements,
        reference_speed=timed.rows[0].speed if timed else None,
        reference_tasks=tasks,
        recommendation=recommend(rows),
        notes=(
            *list_notes(files, settings.text, settings.n_context),
            *note_other_counts(grid),
            *(timed.notes if timed else ()),
        ),
    )


def _require_machine(
    configs: Sequence[RunConfig], devices: Sequence[str], settings: CompareSettings, timing: Timing | None
) -> dict[str, Any]:
    """Return versions and machine, those of the workers too. Raises HarnessError for what cannot run as asked."""
    if not settings.scheduler:
        require_devices(devices)
        return describe_machine()
    if timing:
        raise HarnessError("speeds are those of one machine: leave out the scheduler, or the speed")
    return describe_machine() | {"workers": require_workers(settings.scheduler, configs, devices)}


def _measure_quality(
    runs: _Runs, base: RunConfig, grid: Sequence[RunConfig], on_row: Callable[[ResultRow], None]
) -> tuple[Quality | None, list[ResultRow]]:
    """Return the noise floor, None if nothing can run, and a row for every run of the grid, in its order."""
    noise = None
    rows = {one: ResultRow(one, "refused", one.refusal) for one in grid if one.refusal}
    for row in rows.values():
        on_row(row)
    wanted = [Measurement("quality", base, one) for one in grid if not one.refusal]
    for measurement, answer, resumed in runs.answers([Measurement("noise", base, base), *wanted] if wanted else []):
        if measurement.what == "noise":
            noise = _require_sound(base, answer)
        else:
            rows[measurement.one] = _make_row(measurement.one, answer, resumed)
            on_row(rows[measurement.one])
    return noise, [rows[one] for one in grid]


def _make_row(one: RunConfig, answer: Quality | HarnessError, resumed: bool) -> ResultRow:
    if isinstance(answer, HarnessError):
        return ResultRow(one, "failed", str(answer))
    if answer.summary.n_bad:
        return ResultRow(one, "failed", f"{answer.summary.n_bad} logits are NaN or infinite", answer)
    return ResultRow(one, "ok", quality=answer, resumed=resumed)


def _require_sound(base: RunConfig, answer: Quality | HarnessError) -> Quality:
    if isinstance(answer, HarnessError):
        raise answer
    if answer.summary.n_bad:
        raise HarnessError(f"{base.path}: {answer.summary.n_bad} logits of the reference are not finite: use another")
    return answer


def _above_noise(row: ResultRow, kl_limit: float) -> bool | None:
    return is_above_noise(row.quality, kl_limit) if row.status == "ok" and row.quality else None


def _compare_devices(runs: _Runs, rows: Sequence[ResultRow]) -> tuple[Agreement, ...]:
    """Compare every file and count with itself on the first device it ran on."""
    sound = [row.config for row in rows if row.status == "ok"]
    first: dict[tuple[Path, int], RunConfig] = {}
    for one in sound:
        first.setdefault((one.path, one.n_expert_used), one)
    pairs = [(first[one.path, one.n_expert_used], one) for one in sound]
    wanted = [Measurement("devices", base, one) for base, one in pairs if base != one]
    answers = {measurement: answer for measurement, answer, _ in runs.answers(wanted)}
    return tuple(Agreement.of(one.base, one.one, answers[one]) for one in wanted)


def _solve_tasks(
    runs: _Runs, rows: Sequence[ResultRow], base: RunConfig, on_row: Callable[[ResultRow], None]
) -> tuple[list[ResultRow], TaskScores | None]:
    """Return the rows with the tasks that those that ran solve, and those that the reference does."""
    solved = {row.config: row for row in rows if row.status == "ok"}
    scores = None
    wanted = dict.fromkeys(Measurement("tasks", base, one) for one in (base, *solved)) if solved else ()
    for measurement, answer, _ in runs.answers([*wanted]):
        one, failed = measurement.one, isinstance(answer, HarnessError)
        if one == base and failed:
            raise answer
        scores = answer if one == base else scores
        if one in solved:
            found = {"status": "failed", "reason": str(answer)} if failed else {"tasks": answer}
            solved[one] = replace(solved[one], **found)
            on_row(solved[one])
    return [solved.get(row.config, row) for row in rows], scores


def _time_rows(
    rows: Sequence[ResultRow], base: RunConfig, timing: Timing, on_run: Callable[[RunConfig, Run], None]
) -> tuple[list[ResultRow], Bench | None]:
    """Return the rows with the speeds of those that ran, and all that was timed, the reference first."""
    sound = [row.config for row in rows if row.status == "ok"]
    if not sound:
        return list(rows), None
    found = time_grid(sound, base, timing, on_run, verify=True)
    speeds = {row.config: row.speed for row in found.rows[1:]}
    rows = [replace(row, speed=speeds.get(row.config)) for row in rows]
    return [replace(row, draft=_find_gains(row, found.rows[0].speed)) for row in rows], found


def _find_gains(row: ResultRow, target: Speed | None) -> DraftGains | None:
    """Return what a row gives as a draft of the reference; None where a speed is missing."""
    if not (row.quality and row.speed and target and target.generation.median and row.speed.generation.median):
        return None
    times = 1 / row.speed.generation.median, 1 / target.generation.median
    verification = dict(zip(DRAFT_LENGTHS, target.verification, strict=True))
    accepted = row.quality.summary.top1, row.quality.summary.acceptance
    return DraftGains(*(find_best_draft(share, *times, verification) for share in accepted))


class _Runs:
    """The measurements of one comparison: taken from the journal, or made, here or on a cluster, and put there."""

    def __init__(self, settings: CompareSettings, journal: MeasurementJournal) -> None:
        self.settings, self.journal = settings, journal

    def answers(self, wanted: Sequence[Measurement]) -> Iterator[tuple[Measurement, Any, bool]]:
        """Yield every measurement with its answer (see `Answer`), as they come, and whether the journal had it."""
        kept = {one: found for one in wanted if (found := self.journal.get(one))} if self.settings.resume else {}
        for one, found in kept.items():
            yield one, found, True
        for one, answer in self._measure([one for one in wanted if one not in kept]):
            if isinstance(answer, TaskScores) or (isinstance(answer, Quality) and not answer.summary.n_bad):
                self.journal.put(one, answer)
            yield one, answer, False

    def _measure(self, wanted: Sequence[Measurement]) -> Iterator[tuple[Measurement, Answer]]:
        if not wanted:
            return iter(())
        if self.settings.scheduler:
            return measure_on_workers(self.settings.scheduler, Runner, self.settings, wanted)
        return _measure_here(wanted, self.settings)


def _measure_here(wanted: Sequence[Measurement], settings: CompareSettings) -> Iterator[tuple[Measurement, Answer]]:
    """Yield every measurement with its answer, in order."""
    with temporary_folder() as folder:
        runner = Runner(settings, folder)
        for one in wanted:
            yield one, runner.answer(one)


class Runner:
    """Makes measurements; a reference's logits are computed when the first one needs them, and stay in `folder`."""

    def __init__(self, settings: CompareSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self._references: dict[tuple[RunConfig, bool], Reference] = {}
        self._prompts: dict[Path, dict[str, list[Prompt]]] = {}

    def answer(self, wanted: Measurement) -> Answer:
        """Return the scores, or why there are none."""
        try:
            if wanted.what == "tasks":
                return self._solve(wanted.one, wanted.base.path)
            return self._measure(wanted, self._reference(wanted.base, whole=wanted.what != "devices"))
        except HarnessError as error:
            return error

    def _measure(self, wanted: Measurement, reference: Reference) -> Quality:
        began = time.perf_counter()
        setup = self._setup(wanted.one)
        setup = reorder_sums(setup) if wanted.what == "noise" else setup
        with closing(score_file(wanted.one.path, setup, reference, **self._limits)) as windows:
            parts = list(islice(windows, None if wanted.what == "quality" else 1))
        return summarize_quality(parts, time.perf_counter() - began)

    def _solve(self, one: RunConfig, base: Path) -> TaskScores:
        if base not in self._prompts:
            self._prompts[base] = make_prompts(read_model(base))
        return solve_tasks(one.path, self._setup(one), self._prompts[base], **self._limits)

    @property
    def _limits(self) -> dict[str, Any]:
        return {"timeout": self.settings.timeout, "memory_limit": self.settings.memory_limit}

    def _reference(self, base: RunConfig, whole: bool) -> Reference:
        """Return the logits of `base` on the whole text or on its first window."""
        key = base, whole
        if key not in self._references:
            room = self.settings.room or min(_ROOM, shutil.disk_usage(self.folder).free // 2)
            n_token, first = self.settings.n_token if whole else 1, self.settings.n_context // 2
            target = self.folder / f"logits-{len(self._references)}"
            text, setup = self.settings.text.text, self._setup(base)
            self._references[key] = record_reference(base.path, setup, text, n_token, first, target, room)
        return self._references[key]

    def _setup(self, one: RunConfig) -> Setup:
        setup = Setup(n_context=self.settings.n_context, n_threads=self.settings.threads)
        return replace(place_on_device(setup, one.device), n_expert_used=one.n_expert_used if one.n_expert else None)


def require_comparison(settings: CompareSettings, source: Source) -> None:
    """Find out, before files of a source are made, whether they could be compared.

    Raises:
        HarnessError: llama.cpp is not installed, or the text is too short.
        OutputError: there is no place for finished rows or temporary files.
    """
    require_llama()
    open_journal(settings)
    require_text(settings, source)


def require_text(settings: CompareSettings, source: Source) -> None:
    """Raise HarnessError where the text is too short, and OutputError where there is no place for temporary files."""
    n_byte = None if settings.n_token else bytes_to_read(settings.n_context)  # all of it: one window is enough
    n_context, text = settings.n_context, settings.text.text[:n_byte]
    with vocabulary_file(source) as path, temporary_folder():
        require_tokens(path, text, settings.n_token, n_context, n_context // 2)


def open_journal(settings: CompareSettings) -> MeasurementJournal:
    """Return the journal of finished rows. Raises OutputError for a file that is none, or cannot be written."""
    return MeasurementJournal(settings.journal or cache_folder() / "compare.jsonl", settings.facts)


def cache_folder() -> Path:
    """Return the folder of journals and of what is made for a comparison: $MOE2GGUF_CACHE, or in the user's cache."""
    chosen = os.environ.get("MOE2GGUF_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe2gguf"
