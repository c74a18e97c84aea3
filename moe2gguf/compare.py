"""The recipe: what each file, expert count and device costs in quality, against one dense reference."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from moe2gguf.bench import Timing, time_candidates
from moe2gguf.errors import HarnessError
from moe2gguf.export.reader import read_gguf
from moe2gguf.harness.candidates import Candidate
from moe2gguf.harness.check import KL_LIMIT, NOISE_FACTOR, default_text, disturbed
from moe2gguf.harness.devices import placed, require_devices
from moe2gguf.harness.front import choose
from moe2gguf.harness.journal import Journal, key
from moe2gguf.harness.library import processors
from moe2gguf.harness.llama import Setup
from moe2gguf.harness.logits import Reference, measure, record
from moe2gguf.harness.machine import environment, package_version
from moe2gguf.harness.rows import Comparison, Quality, Row, is_above_noise, pair_up, quality
from moe2gguf.harness.speed import Run, Speed
from moe2gguf.sweep import candidate, candidates

TIMEOUT = 600.0
"""Seconds that one window may take before its row is given up."""

_ROOM = 8 * 2**30


@dataclass(frozen=True)
class Settings:
    """How a comparison is made.

    text       what is read; None: Python's own documentation, which differs between Python versions
    n_token    scored positions, rounded up to whole windows; None: the whole text
    n_context  tokens of a window; its second half is scored, as llama.cpp's perplexity tool does
    threads    None: all processors
    timeout    seconds per window
    memory_limit  bytes of private memory of each run (Linux); None: no limit
    room       bytes of disk for the reference's logits before they take the compact form; None: 8 GiB or half of
               what is free, the smaller
    journal    file of finished rows; None: one in the user's cache folder
    fresh      measure again what the journal has
    """

    text: str | None = None
    n_token: int | None = 2048
    n_context: int = 512
    threads: int | None = None
    timeout: float = TIMEOUT
    memory_limit: int | None = None
    room: int | None = None
    journal: Path | None = None
    fresh: bool = False


def settings_from(
    text: Path | None, n_token: int | None, *, context: int, memory: int | None, room: int | None, **options: Any
) -> Settings:
    """Return the command line's settings: a text file, and sizes in MiB. Raises HarnessError for an unread text."""
    return Settings(
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
    settings: Settings | None = None,
    timing: Timing | None = None,
    on_row: Callable[[Row], None] = lambda _: None,
    on_run: Callable[[Candidate, Run], None] = lambda *_: None,
) -> Comparison:
    """Compare every file at every `used` count on every device with the dense file `reference`.

    Each run is a child process: a crash, a kill or a time-out is a row with its reason, and the next one starts.
    Finished rows are kept in the journal and not measured again. `on_row` hears of each row as it is done. With
    `timing` the rows that ran are timed too, and the result names a choice; `on_run` hears of each run.

    Raises:
        GGUFError: a file's header is not sound.
        HarnessError: a device is not there, or the reference itself cannot be run on this text.
    """
    settings = settings or Settings()
    require_devices(devices)
    wanted = candidates(files, used, devices)
    base = candidate(read_gguf(reference), 0)
    with tempfile.TemporaryDirectory(prefix="moe2gguf-") as folder:
        sweep = _Sweep(base, settings, Path(folder))
        noise = sweep.noise() if any(not c.refusal for c in wanted) else None
        kl_limit = max(KL_LIMIT, NOISE_FACTOR * noise.summary.kl_mean) if noise else KL_LIMIT
        rows = []
        for one in wanted:
            rows.append(_judged(sweep.row(one), kl_limit))
            on_row(rows[-1])
    reference_speed = None
    if timing:
        rows, reference_speed = _timed(rows, base, timing, on_run)
    return Comparison(
        reference=base,
        rows=tuple(rows),
        pairs=tuple(pair_up(rows, kl_limit)),
        noise=noise,
        kl_limit=kl_limit,
        settings={**sweep.facts, "journal": str(sweep.journal.path)},
        environment=environment(),
        reference_speed=reference_speed,
        choice=choose(rows),
    )


def _timed(
    rows: Sequence[Row], base: Candidate, timing: Timing, on_run: Callable[[Candidate, Run], None]
) -> tuple[list[Row], Speed | None]:
    """Return the rows with the speeds of those that ran, and the reference's speed."""
    sound = [row.candidate for row in rows if row.status == "ok"]
    if not sound:
        return list(rows), None
    found = time_candidates(sound, base, timing, on_run)
    speeds = {row.candidate: row.speed for row in found.rows[1:]}
    return [replace(row, speed=speeds.get(row.candidate)) for row in rows], found.rows[0].speed


class _Sweep:
    """One reference, one text; the reference's logits are computed when the first row needs them."""

    def __init__(self, base: Candidate, settings: Settings, folder: Path) -> None:
        self.base = base
        self.settings = settings
        self.folder = folder
        n_token = settings.n_token
        self.text = default_text(64 * ((n_token or 0) + 4096)) if settings.text is None else settings.text
        self.setup = Setup(n_context=settings.n_context, n_threads=settings.threads or processors())
        self.facts = {
            "text_sha256": hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest(),
            "tokens": n_token,
            "context": settings.n_context,
            "room": settings.room,
        }
        self.journal = Journal(settings.journal or cache_folder() / "compare.jsonl")
        self._reference: Reference | None = None

    def row(self, one: Candidate) -> Row:
        """Return the row of a candidate: refused, from the journal, or measured now."""
        if one.refusal:
            return Row(one, "refused", one.refusal)
        kept = self._kept(self._key(one, "quality"))
        if kept:
            return Row(one, "ok", quality=kept, resumed=True)
        reference = self.reference()
        k = one.n_expert_used if one.n_expert else None
        try:
            measured = self._measured(one.path, replace(placed(self.setup, one.device), n_expert_used=k), reference)
        except HarnessError as error:
            return Row(one, "failed", str(error))
        if measured.summary.n_bad:
            return Row(one, "failed", f"{measured.summary.n_bad} logits are NaN or infinite", measured)
        self.journal.put(self._key(one, "quality"), measured.to_dict())
        return Row(one, "ok", quality=measured)

    def noise(self) -> Quality:
        """Return the reference against itself over the first window, token by token and on half the threads."""
        name = self._key(self.base, "noise")
        kept = self._kept(name)
        if kept:
            return kept
        measured = self._measured(self.base.path, disturbed(self.setup), self.reference(), n_window=1)
        if measured.summary.n_bad:
            n_bad = measured.summary.n_bad
            raise HarnessError(f"{self.base.path}: {n_bad} logits of the reference are NaN or infinite: use another")
        self.journal.put(name, measured.to_dict())
        return measured

    def reference(self) -> Reference:
        """Return the reference's logits."""
        if self._reference is None:
            free = shutil.disk_usage(self.folder).free
            room = self.settings.room or min(_ROOM, free // 2)
            n_token, first = self.settings.n_token, self.settings.n_context // 2
            self._reference = record(
                self.base.path, self.setup, self.text, n_token, first, self.folder / "logits", room
            )
        return self._reference

    def _measured(self, path: Path, setup: Setup, reference: Reference, n_window: int | None = None) -> Quality:
        began = time.perf_counter()
        limits: dict[str, Any] = {"timeout": self.settings.timeout, "memory_limit": self.settings.memory_limit}
        with closing(measure(path, setup, reference, **limits)) as windows:
            parts = list(islice(windows, n_window))
        return quality(parts, time.perf_counter() - began)

    def _kept(self, name: str) -> Quality | None:
        values = None if self.settings.fresh else self.journal.get(name)
        try:
            return Quality.from_dict(values) if values else None
        except (KeyError, TypeError, ValueError):  # another version's row, or an edited one: measure again
            return None

    def _key(self, one: Candidate, what: str) -> str:
        return key(
            what=what,
            file=one.identity,
            n_expert_used=one.n_expert_used,
            device=one.device,
            reference=self.base.identity,
            versions=[package_version("moe2gguf"), package_version("llama-cpp-python")],
            **self.facts,
        )


def _judged(row: Row, kl_limit: float) -> Row:
    if row.status == "ok" and row.quality:
        return replace(row, above_noise=is_above_noise(row.quality, kl_limit))
    return row


def cache_folder() -> Path:
    """Return the folder of journals and of what is made for a comparison: $MOE2GGUF_CACHE, or in the user's cache."""
    chosen = os.environ.get("MOE2GGUF_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe2gguf"
