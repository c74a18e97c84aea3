"""Which experts of a file run: how much each does, with which others, for which tokens, and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.experts.text import Text, read_text
from moe2gguf.gguf.counts import ExpertCounts, read_counts
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.metadata import CALIBRATION_LOAD
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup, place_on_device, require_devices
from moe2gguf.llama.machine import describe_machine
from moe2gguf.measure.grid import RunConfig, list_notes, plan_grid
from moe2gguf.measure.metrics import as_json
from moe2gguf.measure.watch_routing import LayerTally, Tally, tally_routing


def measure_expert_usage(
    path: str | Path,
    *,
    used: int | None = None,
    text: Text | None = None,
    n_token: int | None = 4096,
    n_context: int = 512,
    device: str = "cpu",
    threads: int | None = None,
    timeout: float | None = None,
) -> ExpertUse:
    """Run a text through the file and count which experts every layer runs, and for which tokens.

    Args:
        path: a GGUF file with experts, of any origin.
        used: experts per token; None: the file's own count.
        text: what is read; None: the built-in text.
        n_token: how much of it, rounded up to whole windows of `n_context`; None: all.
        device: one of `llama.devices.DEVICES`.
        threads: None: all processors.
        timeout: seconds for all of it.

    Raises:
        GGUFError: the file's header is not sound.
        HarnessError: the file is dense, the count or the device is not possible, the text is too short, or llama.cpp
            cannot run the file.
    """
    path = Path(path)
    require_devices([device])
    file = read_model(path)
    (one,) = plan_grid([path], [] if used is None else [used], [device])
    if not one.n_expert:
        raise HarnessError(f"{path}: is dense, it has no experts to count; name a file that `moe2gguf convert` made")
    if one.refusal:
        raise HarnessError(f"{path}: {one.refusal}")
    text = text or read_text()
    setup = Setup(n_expert_used=one.n_expert_used, n_context=n_context, n_threads=threads)
    tally = tally_in_child(path, place_on_device(setup, device), text.text, n_token, timeout)
    expected, why = read_calibration_load(file, read_counts(file), one.n_expert_used)
    return ExpertUse(
        config=one,
        n_token=tally.n_token,
        layers=summarize_layers(tally, expected),
        calibration=why,
        settings={"text_sha256": text.digest, "context": n_context},
        environment=describe_machine(),
        notes=tuple(list_notes([path], text, n_context)),
    )


def read_calibration_load(
    file: GGUFFile, counts: ExpertCounts, n_expert_used: int
) -> tuple[NDArray[np.float64] | None, str]:
    """Return the load that calibration saw at this count, or None; and a sentence about it.

    It is (layers with experts, n_routed).
    """
    values, n_expert = file.metadata.get(CALIBRATION_LOAD), counts.n_expert
    n_layer = counts.size.n_layer - counts.size.n_dense
    numbers = values if isinstance(values, list) and all(isinstance(v, float) for v in values) else []
    load = np.array(numbers, np.float64)
    if not load.size or load.size != n_layer * n_expert or not np.isfinite(load).all():
        return None, "the file carries no load from a calibration"
    load = load.reshape(n_layer, n_expert)
    k = round(load.sum() / n_layer)  # every token runs k experts; `set-used` does not change what calibration saw
    if k != n_expert_used:
        return None, f"the load of calibration is that of {k} experts per token, not of {n_expert_used}"
    return load[
        :, counts.n_shared :
    ], f"compared with the load in calibration ({file.metadata.get('moe2gguf.calibration.text', 'a text')})"


Floats = NDArray[np.float64]

ALWAYS = 0.99
"""Share of tokens from which on an expert counts as always on."""

DEAD = 0.01
"""An expert is dead below this part of its fair share: what the always-on experts leave, divided by the others."""

OVERLOADED = 2.0
"""An expert is overloaded above this many fair shares."""

N_TYPICAL = 8
"""Tokens named per expert."""

MIN_COUNT = 3
"""Times that a token must occur to be named."""


@dataclass(frozen=True)
class TypicalToken:
    """A token that runs an expert more often than others do: its text, how often it occurs, the share that runs it."""

    text: str
    count: int
    share: float


@dataclass(frozen=True)
class LayerUse:
    """One layer; arrays over experts are tuples of n_expert.

    load            share of tokens that run the expert; sums to n_expert_used
    probability     mean of the router's softmax
    router_entropy  mean entropy of that softmax, nats; ln n_expert for a router that only orders
    effective       exp of the entropy of the load: as many equally busy experts would be as evenly used
    together        share of tokens that run both, one tuple per expert
    always_on, dead, overloaded   experts, by the limits of this module
    pair            the two chosen experts that most often come together, beyond chance; None where nothing is chosen
    correlation     theirs, over tokens: 1 if always together
    moved           share of choices that fell elsewhere in calibration; None if unknown
    words           the tokens typical of each expert
    """

    layer: int
    load: tuple[float, ...]
    probability: tuple[float, ...]
    router_entropy: float
    effective: float
    together: tuple[tuple[float, ...], ...]
    always_on: tuple[int, ...]
    dead: tuple[int, ...]
    overloaded: tuple[int, ...]
    pair: tuple[int, int] | None
    correlation: float | None
    moved: float | None
    words: tuple[tuple[TypicalToken, ...], ...]


@dataclass(frozen=True)
class ExpertUse:
    """What `measure_expert_usage` returns.

    calibration   a sentence: what the load was compared with, or why it was not
    notes         sentences that a reader of the figures must know
    """

    config: RunConfig
    n_token: int
    layers: tuple[LayerUse, ...]
    calibration: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    def named(self, kind: str) -> list[str]:
        """Return the experts of a kind ("always_on", "dead", "overloaded") as LAYER.EXPERT."""
        return [f"{one.layer}.{expert}" for one in self.layers for expert in getattr(one, kind)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            **self.config.to_dict(),
            "tokens": self.n_token,
            "calibration": self.calibration,
            "notes": list(self.notes),
            "settings": self.settings,
            "environment": self.environment,
            "always_on": self.named("always_on"),
            "dead": self.named("dead"),
            "overloaded": self.named("overloaded"),
            "layers": as_json(self.layers),
        }


def tally_in_child(path: Path, setup: Setup, text: str, n_token: int | None, timeout: float | None = None) -> Tally:
    """Count in a child process which experts run; see `tally_routing`. `timeout` is in seconds, for all of it."""
    return run_in_child(tally_routing, path, setup, text, n_token, what=f"running {path}", timeout=timeout)


def summarize_layers(tally: Tally, expected: Floats | None = None) -> tuple[LayerUse, ...]:
    """Return every layer's use from the sums; `expected` (layers with experts, n_expert) is the load in calibration."""
    return tuple(
        _summarize_layer(i, one, tally, None if expected is None else expected[row])
        for row, (i, one) in enumerate(sorted(tally.layers.items()))
    )


def _summarize_layer(i: int, one: LayerTally, tally: Tally, expected: Floats | None) -> LayerUse:
    together = one.together / tally.n_token
    load = np.diagonal(together)
    always_on, dead, overloaded = classify_experts(load, tally.n_expert_used)
    pair = find_closest_pair(together, always_on)
    return LayerUse(
        layer=i,
        load=_tuple(load),
        probability=_tuple(one.probability / tally.n_token),
        router_entropy=one.entropy / tally.n_token,
        effective=count_effective_experts(load),
        together=tuple(_tuple(row) for row in together),
        always_on=always_on,
        dead=dead,
        overloaded=overloaded,
        pair=pair[:2] if pair else None,
        correlation=pair[2] if pair else None,
        moved=None if expected is None else float(np.abs(load - expected).sum() / 2 / tally.n_expert_used),
        words=tuple(find_typical_tokens(one.words[:, e], tally.counts, load[e], tally.texts) for e in range(len(load))),
    )


def classify_experts(load: Floats, n_expert_used: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the experts (always on, dead, overloaded) of a layer with this load (n_expert,); none where all run."""
    n_expert = len(load)
    if n_expert_used >= n_expert:
        return (), (), ()
    on = load >= ALWAYS
    fair = (n_expert_used - int(on.sum())) / max(1, n_expert - int(on.sum()))
    dead, busy = (load < DEAD * fair) | (load == 0), (load > OVERLOADED * fair) & ~on
    if fair <= 0:  # the always-on experts take every place: nothing is left to be chosen
        busy = np.zeros_like(on)
    return tuple(tuple(int(e) for e in np.flatnonzero(mask)) for mask in (on, dead, busy))  # type: ignore[return-value]


def count_effective_experts(load: Floats) -> float:
    """Return exp of the entropy of the load (n_expert,): from 1 to n_expert."""
    share = load[load > 0] / load.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def find_closest_pair(together: Floats, always_on: Sequence[int]) -> tuple[int, int, float] | None:
    """Return the two experts, of those not always on, with the largest correlation over tokens (phi coefficient)."""
    load = np.diagonal(together)
    spread = np.sqrt(load * (1 - load))
    chosen = spread > 0
    chosen[[*always_on]] = False
    if chosen.sum() < 2:
        return None
    phi = np.full_like(together, -math.inf)
    some = np.ix_(chosen, chosen)
    phi[some] = (together[some] - np.outer(load, load)[some]) / np.outer(spread, spread)[some]
    phi[np.tril_indices(len(load))] = -math.inf
    i, j = np.unravel_index(int(np.argmax(phi)), phi.shape)
    return int(i), int(j), float(phi[i, j])


def find_typical_tokens(
    ran: NDArray[Any], counts: NDArray[np.int64], load: float, texts: Sequence[str]
) -> tuple[TypicalToken, ...]:
    """Return the tokens most typical of an expert: the largest n ln(share / load) of n uses, all above chance.

    That is a token's part of the mutual information between tokens and expert. `ran` and `counts` are (n_word,).
    """
    if not 0 < load < 1:
        return ()
    n = ran.astype(np.float64)
    share = n / counts
    score = n * np.log(np.where(n > 0, share, load) / load) * (counts >= MIN_COUNT)
    best = np.argsort(-score, kind="stable")[:N_TYPICAL]
    return tuple(TypicalToken(texts[w], int(counts[w]), float(share[w])) for w in best if score[w] > 0)


def _tuple(values: Floats) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
