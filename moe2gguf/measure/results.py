"""The results of a comparison: one row per run, and how they compare with each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe2gguf.errors import HarnessError
from moe2gguf.measure.drafts import DraftGains
from moe2gguf.measure.expert_usage import ExpertUse
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.intervals import Interval, mean_interval, paired_interval
from moe2gguf.measure.metrics import Summary, TokenScores, as_json, join_scores, summarize
from moe2gguf.measure.speed import Speed
from moe2gguf.measure.tasks import TaskScores

Status = Literal["ok", "failed", "refused"]


@dataclass(frozen=True)
class Quality:
    """The scores of one run against the reference.

    window_*     means of every window, in order: KL divergence and losses (the reference's is `nll_base`) in nats per
                 token, share of equal top tokens
    position_*   the same over all windows, by position: up to N_POSITION equal spans of the scored part
    seconds                              wall time, load included
    worker                               the worker of a cluster that measured it; empty: this machine
    """

    summary: Summary
    window_kl: tuple[float, ...]
    window_nll: tuple[float, ...]
    window_top1: tuple[float, ...]
    seconds: float
    window_nll_base: tuple[float, ...] = ()
    position_kl: tuple[float, ...] = ()
    position_nll: tuple[float, ...] = ()
    position_nll_base: tuple[float, ...] = ()
    worker: str = ""

    @property
    def kl_interval(self) -> Interval:
        """The mean KL divergence with its confidence interval over windows."""
        return mean_interval(self.window_kl)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quality:
        """Return what `as_json` was made of. Raises KeyError or TypeError for anything else."""
        windows = {name: tuple(math.nan if x is None else float(x) for x in values[name]) for name in _SERIES}
        worker = str(values.get("worker", ""))
        return cls(Summary.from_dict(values["summary"]), **windows, seconds=float(values["seconds"]), worker=worker)


_SERIES = tuple(name for name in Quality.__dataclass_fields__ if name.startswith(("window_", "position_")))

N_POSITION = 64

Answer = Quality | TaskScores | HarnessError
"""What a measurement comes to: scores, which for the measurement "tasks" are `TaskScores`, or why there are none."""


@dataclass(frozen=True)
class ResultRow:
    """One line of the result; `summarize_quality` is there unless the status is "refused" or the run failed.

    reason   why it was refused or failed, empty otherwise
    above_noise   whether the KL divergence is more than the noise floor explains; None without quality
    resumed  taken from the journal of an earlier run
    speed    what `bench` found, if it was asked
    draft    what the file gives as a draft of the reference, if the speed of both is known
    tasks    which tasks the file solves, if it was asked
    """

    config: RunConfig
    status: Status
    reason: str = ""
    quality: Quality | None = None
    above_noise: bool | None = None
    resumed: bool = False
    speed: Speed | None = None
    draft: DraftGains | None = None
    tasks: TaskScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return {
            **self.config.to_dict(),
            "status": self.status,
            "reason": self.reason,
            "above_noise": self.above_noise,
            "resumed": self.resumed,
            "quality": as_json(self.quality),
            "speed": as_json(self.speed),
            "draft": as_json(self.draft),
            "tasks": self.tasks and self.tasks.to_dict(),
        }

    def flat(self) -> dict[str, Any]:
        """Return the row as one level of names and plain values, for tables."""
        values = {**self.config.to_dict(), "status": self.status, "reason": self.reason}
        values["above_noise"] = self.above_noise
        if self.quality:
            summary = as_json(self.quality.summary)
            percentiles = summary.pop("kl_percentiles")
            values |= as_json({name: getattr(self.quality.summary, name) for name in ("ratio", "ratio_error")})
            values |= summary | {f"kl_{name}%": value for name, value in percentiles.items()}
            values |= {"seconds": self.quality.seconds, "worker": self.quality.worker}
        if self.speed:
            values |= {
                "prompt_speed": self.speed.prompt.median,
                "generation_speed": self.speed.generation.median,
                "first_token": self.speed.first_token.median,
                "peak_memory": self.speed.peak_memory,
                "speed_bound": self.speed.bound,
                "speed_ratio": self.speed.ratio,
            }
        for name, gain in (("greedy", self.draft.greedy), ("sampled", self.draft.sampled)) if self.draft else ():
            values |= {f"draft_{name}_speed_up": gain.speed_up, f"draft_{name}_length": gain.n_draft}
        return values | (self.tasks.flat() if self.tasks else {})


@dataclass(frozen=True)
class Pair:
    """Two rows on the same windows: differences first - second with confidence intervals.

    kl          of the mean KL divergence, nats per token
    log_ratio   of ln perplexity
    different   whether the KL divergences differ by more than chance and more than the noise floor, or one row is the
                reference as far as the noise floor can tell and the other is not
    """

    first: str
    second: str
    kl: Interval
    log_ratio: Interval
    different: bool


@dataclass(frozen=True)
class Agreement:
    """One file and k on two devices: the logits on `second` against those on `first`, over the first window.

    first, second   labels of the two rows
    quality   None if it could not be measured, for `reason`
    """

    first: str
    second: str
    quality: Quality | None
    reason: str = ""

    @classmethod
    def of(cls, first: RunConfig, second: RunConfig, answer: Quality | HarnessError) -> Agreement:
        """Return the agreement of an answer."""
        if isinstance(answer, HarnessError):
            return cls(first.label, second.label, None, str(answer))
        return cls(first.label, second.label, answer)


@dataclass(frozen=True)
class Recommendation:
    """The rows nothing else beats in both quality and speed, by label, fastest first, and the one to take."""

    front: tuple[str, ...]
    label: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    perplexity   of the reference over the same tokens, None if no row ran
    noise        the reference against itself, computed in another order, over the first window; None if nothing ran
    kl_limit     mean KL divergence in nats per token that the noise explains
    agreements   of the same file and k on several devices
    settings, environment   JSON-ready facts: what was asked for; versions and machine
    reference_speed, recommendation   with speed measured: the reference's, and which row to take
    reference_tasks   which tasks the reference solves, if it was asked
    experts      where it was asked for: which experts run, of every sound row that does not run all
    notes        sentences that a reader of the figures must know
    """

    reference: RunConfig
    rows: tuple[ResultRow, ...]
    pairs: tuple[Pair, ...]
    noise: Quality | None
    kl_limit: float
    settings: dict[str, Any]
    environment: dict[str, Any]
    agreements: tuple[Agreement, ...] = ()
    reference_speed: Speed | None = None
    reference_tasks: TaskScores | None = None
    recommendation: Recommendation | None = None
    experts: tuple[ExpertUse, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row ran: a script that asked for one which was refused has no figures for it."""
        return all(row.status == "ok" for row in self.rows)

    @property
    def base(self) -> Summary | None:
        """The summary of the first sound row, which holds the reference's perplexity too."""
        return next((row.quality.summary for row in self.rows if row.status == "ok" and row.quality), None)

    @property
    def tasks(self) -> dict[str, TaskScores]:
        """By label, the reference first, which tasks each solves; empty where nobody asked."""
        if self.reference_tasks is None:
            return {}
        rows = {row.config.label: row.tasks for row in self.rows if row.tasks}
        return {f"reference {self.reference.label}": self.reference_tasks} | rows

    def flat(self) -> list[dict[str, Any]]:
        """Return a line of names and plain values for every row, and one for the reference where it has tasks."""
        lines = [row.flat() for row in self.rows]
        if self.reference_tasks:
            lines.append({**self.reference.to_dict(), "status": "reference", **self.reference_tasks.flat()})
        return lines

    @property
    def not_told_apart(self) -> dict[str, list[str]]:
        """By label of a row, the labels of all later rows that this text does not tell apart from it."""
        found: dict[str, list[str]] = {}
        for pair in self.pairs:
            if not pair.different:
                found.setdefault(pair.first, []).append(pair.second)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "ok": self.ok,
            "notes": list(self.notes),
            "reference": {
                **self.reference.to_dict(),
                "perplexity": self.base.perplexity_base if self.base else None,
                "perplexity_error": as_json(self.base.perplexity_base_error) if self.base else None,
                "tasks": self.reference_tasks and self.reference_tasks.to_dict(),
            },
            "reference_speed": as_json(self.reference_speed),
            "recommendation": as_json(self.recommendation),
            "settings": self.settings,
            "environment": self.environment,
            "noise": as_json(self.noise),
            "kl_limit": self.kl_limit,
            "rows": [row.to_dict() for row in self.rows],
            "pairs": as_json(self.pairs),
            "devices": as_json(self.agreements),
            "experts": [one.to_dict() for one in self.experts],
        }


def summarize_quality(windows: Iterable[TokenScores], seconds: float) -> Quality:
    """Return the scores of all windows, at least one, as one record."""
    parts = list(windows)
    spans = np.array_split(np.arange(len(parts[0])), min(N_POSITION, len(parts[0])))

    def by_position(name: str) -> tuple[float, ...]:
        mean = np.mean([getattr(part, name) for part in parts], axis=0)
        return tuple(float(mean[span].mean()) for span in spans)

    return Quality(
        summary=summarize(join_scores(parts)),
        window_kl=tuple(float(np.mean(part.kl)) for part in parts),
        window_nll=tuple(float(np.mean(part.nll)) for part in parts),
        window_top1=tuple(float(np.mean(part.same_top)) for part in parts),
        seconds=seconds,
        window_nll_base=tuple(float(np.mean(part.nll_base)) for part in parts),
        position_kl=by_position("kl"),
        position_nll=by_position("nll"),
        position_nll_base=by_position("nll_base"),
    )


def describe_drafts(rows: Iterable[ResultRow]) -> dict[str, str]:
    """Return by label, in words, what the rows give that make the reference faster as a draft.

    Where none does it is the best of them; where none was measured there is nothing.
    """
    drafts = {row.config.label: (row.draft, row.quality.summary) for row in rows if row.draft and row.quality}
    faster = [label for label, (draft, _) in drafts.items() if draft.best > 1]
    best = max(drafts, key=lambda label: drafts[label][0].best, default=None)
    words = {}
    for label in faster or [one for one in (best,) if one]:
        draft, summary = drafts[label]
        parts = [
            f"{how} {share:.1%} accepted, {gain.speed_up:.2f} x its speed with {gain.n_draft} drafted"
            for how, share, gain in (
                ("greedy", summary.top1, draft.greedy),
                ("sampled", summary.acceptance, draft.sampled),
            )
        ]
        words[label] = "; ".join([*parts, *([] if faster else ["so no file here makes it faster as a draft"])])
    return words


def is_above_noise(measured: Quality, kl_limit: float) -> bool:
    """Return whether the mean KL divergence lies above `kl_limit`: its confidence interval as a whole, or every window.

    Over a few windows the interval is wide, however large all of them are; over one there is none.
    """
    low = measured.kl_interval.low
    return min(measured.window_kl) > kl_limit or (math.isfinite(low) and low > kl_limit)


def compare_pairs(rows: Iterable[ResultRow], kl_limit: float) -> list[Pair]:
    """Return every pair of rows that ran soundly, in the order of the rows."""
    sound = [(row.config.label, row.quality, row.above_noise) for row in rows if row.status == "ok" and row.quality]
    pairs = []
    for i, (first, a, a_above) in enumerate(sound):
        for second, b, b_above in sound[i + 1 :]:
            kl = paired_interval(a.window_kl, b.window_kl)
            different = a_above is not b_above or (kl.excludes_zero and abs(kl.mean) > kl_limit)
            pairs.append(Pair(first, second, kl, paired_interval(a.window_nll, b.window_nll), different))
    return pairs
