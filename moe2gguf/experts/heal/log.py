"""The lines of a healing run's log: one per healed layer, per step and per evaluation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias


@dataclass(frozen=True)
class LayerLine:
    """A healed layer: its held-out errors, as shares of the target's energy, and the same by count of experts used.

    before  at the start; refit  after the closed form; after  at the end
    refit_strength  the ridge that the closed form chose; None if the down projections do not train
    """

    stage: ClassVar[str] = "layerwise"
    layer: int
    error_before: float
    counts: Mapping[str, float]
    refit_strength: float | None
    error_refit: float
    error_after: float
    counts_after: Mapping[str, float]


@dataclass(frozen=True)
class StepLine:
    """A step of the whole model: `loss` and its terms in nats per token, `norm` of the gradient before clipping."""

    stage: ClassVar[str] = "steps"
    step: int
    used: int
    norm: float
    loss: float
    kl: float
    next_token: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class ScoreLine:
    """Scores of the held-out text, nats per token, `kl` and `nll` by count of experts used; `best`: so far."""

    stage: ClassVar[str] = "evaluation"
    step: int
    best: bool
    kl: Mapping[str, float]
    nll: Mapping[str, float]
    nll_dense: float

    @property
    def kl_mean(self) -> float:
        """The mean over all counts."""
        return sum(self.kl.values()) / len(self.kl)


LogLine: TypeAlias = LayerLine | StepLine | ScoreLine


def to_dict(line: LogLine) -> dict[str, Any]:
    """A line as JSON-ready values; what there is none of is left out."""
    values = {"stage": line.stage, **{key: value for key, value in asdict(line).items() if value is not None}}
    return values | ({"kl_mean": line.kl_mean} if isinstance(line, ScoreLine) else {})


def from_dict(values: Mapping[str, Any]) -> LogLine:
    """The line that `to_dict` made `values` of. Raises KeyError or TypeError if they are no line of a log."""
    kind = {line.stage: line for line in (LayerLine, StepLine, ScoreLine)}[values["stage"]]
    optional = {LayerLine: "refit_strength", StepLine: "next_token"}
    rest = {key: value for key, value in values.items() if key not in ("stage", "kl_mean")}
    return kind(**({optional[kind]: None} if kind in optional else {}) | rest)
