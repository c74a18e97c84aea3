"""The words every room shares: dimension names and the frozen records that are handed from room to room.

Glossary (used in every shape in this project; arrays are in numpy order, row-major, outermost axis first):

    n_layer        transformer blocks
    d_model        width of the residual stream
    d_ff           width of the dense MLP
    n_expert       experts per layer (n in formulas)
    n_expert_used  experts that run per token (k in formulas)
    n_shared       shared experts among them, which run for every token
    d_expert       width of one expert, zero padding included
    n_head         query heads
    n_head_kv      key/value heads
    d_head         width of one head
    n_vocab        rows of the embedding
    n_token        tokens in a batch or a text
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

MetadataValue = str | bool | int | float | list[str] | list[int] | list[float]
"""A GGUF metadata value. On disk: str -> STRING, bool -> BOOL, int -> UINT32, float -> FLOAT32;
lists are arrays of STRING, INT32 or FLOAT32."""

Metadata = Mapping[str, MetadataValue]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, in the terms of llama.cpp's `llama.rope.*` keys."""

    theta: float = 10000.0
    kind: Literal["none", "linear", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    attention_factor: float | None = None  # yarn only
    by_tensor: bool = False  # a GGUF file's own tensors divide the frequencies

    @property
    def has_factors(self) -> bool:
        """Whether the frequencies are divided by factors in a tensor."""
        return self.kind == "llama3" or self.by_tensor


@dataclass(frozen=True)
class Model:
    """The hyper-parameters of a checkpoint; names as in the glossary."""

    architecture: str
    n_layer: int
    d_model: int
    d_ff: int
    n_head: int
    n_head_kv: int
    d_head: int
    n_vocab: int
    n_context: int
    rms_epsilon: float
    rope: Rope
    tied_embeddings: bool
    bias_qkv: bool = False
    bias_output: bool = False
    head_norms: bool = False  # queries and keys are normalized head by head
    n_expert: int = 0  # those that a router chooses from; 0: a dense MLP
    n_expert_used: int = 0
    d_expert: int = 0  # width of an expert where that is not d_ff
    n_shared: int = 0  # a shared expert as wide as so many of them is beside them
    leading_dense: int = 0  # so many layers, the first, have a dense MLP all the same


def make_paths(record: object, *names: str) -> None:
    """Replace strings in these fields of a frozen record by paths."""
    for name in names:
        if isinstance(value := getattr(record, name), str):
            object.__setattr__(record, name, Path(value))


class Dimensions(NamedTuple):
    """What the shapes of tensors depend on; names as in the glossary."""

    n_layer: int
    d_model: int
    d_ff: int  # of one expert, if there are experts
    n_head: int
    n_head_kv: int
    d_head: int
    n_vocab: int
    n_expert: int  # those that a router chooses from
    d_expert: int = 0
    d_shared: int = 0  # width of a shared expert beside them


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the terms of llama.cpp's `tokenizer.*` keys.

    `tokens`, `types` and `scores` have one entry per embedding row (n_vocab); `types` are
    `gguf.TokenType` numbers; `scores` is None for BPE; `merges` is None for SentencePiece models.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)  # "bos" -> 1, "eos" -> 2, ...
    flags: Mapping[str, bool] = field(default_factory=dict)  # "add_bos_token" -> True, "add_space_prefix" ...
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # "default" is the unnamed one
    warnings: tuple[str, ...] = ()  # what the tokenizer does and a GGUF file cannot say

    @property
    def first_id(self) -> int | None:
        """The token that every prompt starts with; None where there is none."""
        return self.special_ids.get("bos") if self.flags.get("add_bos_token") else None


@dataclass(frozen=True)
class Method:
    """How neurons are grouped, experts chosen and weights corrected; names as in `moe2gguf.experts.methods`.

    n_shared  experts that the router always picks (shared experts); None takes the default number
    refit     correct the down projection for the experts that do not run, at n_expert_used
    """

    group: str = "contiguous"
    n_shared: int | None = 0
    router: str = "zero"
    refit: bool = False
    amplify: str = "exact"
    seed: int = 0

    @property
    def needs_calibration(self) -> bool:
        """Whether text has to be run through the model."""
        return self != Method(amplify=self.amplify, seed=self.seed) or self.amplify in ("any", "fitted")

    @property
    def needs_target(self) -> bool:
        """Whether something is fitted to what the dense model computes."""
        return self.refit or self.amplify == "fitted"


EXACT = Method()
"""Contiguous slices, a zero router: exactly the dense model with all experts on."""

SPARSE = Method("routed", None, "least-squares", refit=True, amplify="used")
"""For fewer experts than all: what measured best (docs/log/experts.md)."""


@dataclass(frozen=True)
class Slicing:
    """How every MLP is cut into experts: `d_expert * n_expert >= d_ff`; the difference is zero neurons.

    grain         contiguous slices keep so many neighbors together, the block of a quantized source
    scale_tensor  the amplification stands in a tensor of its own (`ffn_down_exps.scale`), not in the weights
    target        the graph that the file is for: a name of `moe2gguf.graphs.GRAPHS`
    in_shared     so many of the experts, the first, are one wide shared expert in the file; 0 where the graph has none
    leading_dense  so many layers, the first, keep their dense MLP
    """

    n_expert: int
    n_expert_used: int
    d_expert: int
    method: Method = EXACT
    align: int = 1
    grain: int = 1
    scale_tensor: bool = False
    target: str = "mixtral"
    in_shared: int = 0
    leading_dense: int = 0

    @property
    def n_routed(self) -> int:
        """Experts that the router of the file chooses from."""
        return self.n_expert - self.in_shared

    @property
    def n_routed_used(self) -> int:
        """How many of them it chooses."""
        return self.n_expert_used - self.in_shared

    @property
    def n_fitted(self) -> int:
        """The number of used experts that groups and router are fitted to.

        Where one file serves every count and all are used by default, it is what the file is good for below.
        """
        if self.in_shared and self.n_expert_used == self.n_expert:
            return max(self.in_shared + 1, self.n_expert * 5 // 8)
        return self.n_expert_used

    @property
    def refit_counts(self) -> tuple[int, ...]:
        """The numbers of used experts that one refit serves, in rising order.

        Where the weights of experts depend on the number it is the one number of the file; else all experts, three
        quarters and half of them, and the file's own.
        """
        n, s = self.n_expert, self.in_shared
        if not s:
            return (self.n_fitted,)
        return tuple(sorted({max(s + 1, n // 2), max(s + 1, n * 3 // 4), n, self.n_expert_used}))


@dataclass(frozen=True)
class Calibration:
    """Which text a model was calibrated on: what to call it (never a path), its SHA-256, and how many tokens of it."""

    label: str
    digest: str
    n_token: int
