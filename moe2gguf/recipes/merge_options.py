"""What a merge is made of, how its experts are chosen, and what became of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from moe2gguf.experts.donor_router import RouterKind


@dataclass(frozen=True)
class Donor:
    """A model whose MLPs become one expert, what it should be chosen for, and (`negative`) what it should not."""

    model: str | Path
    prompts: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeOptions:
    """How experts are chosen.

    router     "regression": whose prompt a token is from, by least squares; "hidden": the mean state of an expert's
               prompts less that of its negative ones; "random"
    attention  attention and norms of the layers: those of the "base", or the "average" of the donors'
    used       experts that run per token
    type       of every matrix; "auto": as stored
    name       the model's name in the metadata; None: made of the base's
    n_token    tokens of each expert's prompts, from all parts of them; 4 * n_layer * d_model bytes are kept of each
    seed       of the random router
    """

    router: RouterKind = "regression"
    attention: Literal["base", "average"] = "base"
    used: int = 2
    type: Literal["auto", "f32", "f16", "bf16"] = "auto"
    name: str | None = None
    n_token: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class LayerRouting:
    """What the router of a layer does, in the merged file, with tokens of prompts that it has not seen.

    first     by expert the share of its own tokens for which it is the first choice; None if none was kept
    runs      by expert the share of its own tokens that run it
    accuracy  mean of `first`; 1/n_expert for a router that guesses
    """

    layer: int
    accuracy: float
    first: tuple[float | None, ...]
    runs: tuple[float | None, ...]


@dataclass(frozen=True)
class Merge:
    """What `merge` did; `layers` is empty where no prompts were kept from the router. `notes` are to be read."""

    path: Path
    experts: tuple[str, ...]
    options: MergeOptions
    layers: tuple[LayerRouting, ...]
    notes: tuple[str, ...]

    @property
    def accuracy(self) -> float | None:
        """The mean over the layers."""
        return fmean(one.accuracy for one in self.layers) if self.layers else None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {**asdict(self), "path": str(self.path), "accuracy": self.accuracy}
