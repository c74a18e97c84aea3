"""One measurement after the other, each complete in itself, on this machine."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from moe2gguf.errors import HarnessError
from moe2gguf.llama.devices import Setup, place_on_device
from moe2gguf.llama.library import processors
from moe2gguf.measure.check import default_text, reorder_sums
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.logits import Reference, record_reference, score_file
from moe2gguf.measure.results import Quality, summarize_quality

TIMEOUT = 600.0
"""Seconds that one window may take before its row is given up."""

_ROOM = 8 * 2**30

Answer = Quality | HarnessError
"""What a job comes to."""


@dataclass(frozen=True)
class CompareSettings:
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
    scheduler  address of a Dask cluster that measures; None: this machine does
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
    scheduler: str | None = None

    @property
    def words(self) -> str:
        """The text that is read."""
        return default_text(64 * ((self.n_token or 0) + 4096)) if self.text is None else self.text


@dataclass(frozen=True)
class Measurement:
    """One measurement that any machine can make that sees the files.

    what  "quality": `one` against the reference `base` on the whole text; "noise": `base` against itself, computed in
          another order; "devices": `one` against the same file on another device, `base`. The last two take the
          first window only.
    """

    what: Literal["quality", "noise", "devices"]
    base: RunConfig
    one: RunConfig


def measure_here(jobs: Sequence[Measurement], settings: CompareSettings) -> Iterator[tuple[Measurement, Answer]]:
    """Yield every job with its answer, in order."""
    with tempfile.TemporaryDirectory(prefix="moe2gguf-") as folder:
        bench = Runner(settings, Path(folder))
        for job in jobs:
            yield job, bench.answer(job)


class Runner:
    """Measures jobs; a reference's logits are computed when the first job needs them, and stay in `folder`."""

    def __init__(self, settings: CompareSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self._references: dict[tuple[RunConfig, bool], Reference] = {}

    def answer(self, job: Measurement) -> Answer:
        """Return what a job comes to: scores, or why there are none."""
        try:
            return self._measured(job, self._reference(job.base, whole=job.what != "devices"))
        except HarnessError as error:
            return error

    def _measured(self, job: Measurement, reference: Reference) -> Quality:
        began = time.perf_counter()
        setup = self._setup(job.one)
        setup = reorder_sums(setup) if job.what == "noise" else setup
        limits: dict[str, Any] = {"timeout": self.settings.timeout, "memory_limit": self.settings.memory_limit}
        with closing(score_file(job.one.path, setup, reference, **limits)) as windows:
            parts = list(islice(windows, None if job.what == "quality" else 1))
        return summarize_quality(parts, time.perf_counter() - began)

    def _reference(self, base: RunConfig, whole: bool) -> Reference:
        """Return the logits of `base` on the whole text or on its first window."""
        key = base, whole
        if key not in self._references:
            room = self.settings.room or min(_ROOM, shutil.disk_usage(self.folder).free // 2)
            n_token, first = self.settings.n_token if whole else 1, self.settings.n_context // 2
            target = self.folder / f"logits-{len(self._references)}"
            setup = self._setup(base)
            self._references[key] = record_reference(
                base.path, setup, self.settings.words, n_token, first, target, room
            )
        return self._references[key]

    def _setup(self, one: RunConfig) -> Setup:
        setup = Setup(n_context=self.settings.n_context, n_threads=self.settings.threads or processors())
        return replace(place_on_device(setup, one.device), n_expert_used=one.n_expert_used if one.n_expert else None)
