"""Files at a count of experts against the dense file that they come from: perplexity and speed, each as a ratio."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.counts import read_context_length
from moe2gguf.gguf.shards import read_model
from moe2gguf.measure.bench import Timing, time_grid
from moe2gguf.measure.compare import CompareSettings, Runner
from moe2gguf.measure.grid import Measurement, RunConfig, plan_run
from moe2gguf.measure.intervals import Interval, paired_interval
from moe2gguf.measure.metrics import exp
from moe2gguf.measure.results import Quality
from moe2gguf.measure.speed import Speed

WINDOW = 512
SEARCH = Timing(n_prompt=0, n_generate=64, repeat=3)
FINAL = Timing(n_prompt=256, n_generate=64, repeat=5)


@dataclass(frozen=True)
class Trial:
    """A file at a count, and what was measured of it: the perplexity over the source's, and the speed."""

    config: RunConfig
    perplexity: Interval | None = None
    speed: Speed | None = None

    @property
    def name(self) -> str:
        """Its type, and how many experts it uses: "Q4_0, 12 of 16"."""
        one = self.config
        return f"{one.type}, " + (f"{one.n_expert_used} of {one.n_expert}" if one.n_expert else "dense")


class Trials:
    """Measures files against `source` on a text; `found` has everything that was measured, `notes` what to know of the
    last speeds.

    n_token  scored positions; None: all
    threads  None: all processors
    folder   for the logits of the source, which are computed once
    on_step  is told, in a line each, what is measured and what was found
    """

    def __init__(
        self,
        source: Path,
        text: Text,
        n_token: int | None,
        threads: int | None,
        folder: Path,
        on_step: Callable[[str], None],
    ) -> None:
        file = read_model(source)
        self.source, self._threads, self._on_step = plan_run(file, None), threads, on_step
        n_context = min(WINDOW, read_context_length(file) or WINDOW)
        self._runner = Runner(CompareSettings(text, n_token, n_context, threads=threads), folder)
        self.found: dict[RunConfig, Trial] = {}
        self.notes: tuple[str, ...] = ()

    def score(self, one: RunConfig) -> float:
        """Return the perplexity over the source's. Raises HarnessError where it cannot be measured."""
        if (known := self.found.get(one)) and known.perplexity:
            return known.perplexity.mean
        self._on_step(f"{Trial(one).name}: scoring")
        answer = self._runner.answer(Measurement("quality", self.source, one))
        if isinstance(answer, HarnessError):
            raise answer
        if not isinstance(answer, Quality) or answer.summary.n_bad:
            raise HarnessError(f"{one.label}: its logits are not finite, it cannot be scored")
        log = paired_interval(answer.window_nll, answer.window_nll_base)
        ratio = exp(log.mean)
        self._add(one, f"{ratio:.3f} times the perplexity", perplexity=Interval(ratio, exp(log.low), exp(log.high)))
        return ratio

    def time(self, one: RunConfig, timing: Timing = SEARCH) -> tuple[float, float]:
        """Return the speeds of generation and of prompts over the source's, both timed in turns.

        Raises HarnessError where they cannot be.
        """
        self._on_step(f"{Trial(one).name}: timing, {timing.repeat} runs in turns with the source")
        timed = time_grid([one], self.source, replace(timing, threads=self._threads))
        self.notes, (base, row) = timed.notes, timed.rows
        if not (base.speed and row.speed and row.speed.ratio):
            raise HarnessError(base.reason or row.reason or f"{one.label}: no speed was measured")
        self._add(one, f"{row.speed.ratio:.2f} times the speed", speed=row.speed)
        return row.speed.ratio, row.speed.prompt.median / (base.speed.prompt.median or math.nan)

    def _add(self, one: RunConfig, told: str, **measured: Any) -> None:
        self.found[one] = replace(self.found.get(one, Trial(one)), **measured)
        self._on_step(f"{self.found[one].name}: {told}")
