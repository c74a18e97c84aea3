"""llama.cpp's file types (Q4_K_M and the like) as data: which tensors of a network get which type.

The choices are those of llama.cpp's quantizer, which goes by the names of tensors and hardly by architectures:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-quant.cpp#L445-L714
It decides tensor by tensor, with counters; the layer's number says the same where every layer has one of each matrix.
Matrices of values are missing in layers without attention: those that there are count. Where a layer has
several down projections, such as that of a shared expert, its six smallest file types raise the first eighth of the
tensors; here it is the first eighth of the layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

OWN_RULES = ("falcon",)
"""The architecture for which llama.cpp's quantizer has rules of its own."""


@dataclass(frozen=True)
class Network:
    """What the choices depend on. `n_expert` is 0 for a dense file; `importance`: an importance matrix is used.

    `with_values` are the layers with a matrix of values; None: all of them. `n_empty` are declared layers without any
    tensor, which llama.cpp's quantizer counts.
    """

    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    d_model: int
    tied_embeddings: bool
    n_expert: int = 0
    importance: bool = False
    with_values: tuple[int, ...] | None = None
    n_empty: int = 0

    def list_layers(self, role: str) -> Sequence[int]:
        """Return the layers that have a matrix of this role."""
        return range(self.n_layer) if role != "attn_v" or self.with_values is None else self.with_values

    @property
    def n_gqa(self) -> int:
        """Query heads per key/value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes the (dense) network for a 70B model:
        https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp#L28
        """
        is_meant = self.architecture == "qwen2" or (self.architecture == "llama" and self.n_head != self.n_head_kv)
        return self.n_layer == 80 and is_meant


Layers = Callable[[int, int], bool]
"""Whether a row means layer i of n."""

Condition = Callable[[Network], bool]


def everywhere(_i: int, _n: int) -> bool:
    """All layers."""
    return True


def first_eighth(i: int, n: int) -> bool:
    """As many layers as an eighth, rounded down."""
    return i < n // 8


def middle(i: int, n: int) -> bool:
    """All layers but the first and the last eighth."""
    return n // 8 <= i < 7 * n // 8


def more_bits(i: int, n: int) -> bool:
    """The first and the last eighth, and every third layer between:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-quant.cpp#L451
    """
    return not middle(i, n) or (i - n // 8) % 3 == 2


def always(_network: Network) -> bool:
    """Any network."""
    return True


def grouped(network: Network) -> bool:
    """At least four query heads share a value head, whose matrix is therefore small."""
    return network.n_gqa >= 4


def unguided(network: Network) -> bool:
    """No importance matrix is used."""
    return not network.importance


def guided(network: Network) -> bool:
    """An importance matrix is used."""
    return network.importance


def dense(network: Network) -> bool:
    """Not the eight experts that llama.cpp treats apart."""
    return network.n_expert != 8


def eight(network: Network) -> bool:
    """The eight experts that llama.cpp treats apart."""
    return network.n_expert == 8


def several(network: Network) -> bool:
    """Experts at all."""
    return network.n_expert > 1


@dataclass(frozen=True)
class Row:
    """Tensors of a `role` get `type` in these layers of these networks; the first row that fits decides."""

    role: str
    type: str
    layers: Layers = everywhere
    when: Condition = always


@dataclass(frozen=True)
class Preset:
    """A file type: the type of most tensors, and the rows for the others.

    `head` is the type of the output matrix, or of the embedding where it serves as one.
    """

    type: str
    rows: tuple[Row, ...] = ()
    head: str = "Q6_K"
    tiny: bool = False  # under three bits: other rules throughout, and an importance matrix is a must


def _tiny(base: str, other: str, embedding: str, output: tuple[Row, ...] = ()) -> Preset:
    """One of the six smallest; `other` is what the value and first down projections get."""
    rows = (
        Row("token_embd", embedding),
        Row("attn_v", "Q4_K", when=lambda network: grouped(network) or network.n_expert >= 4),
        Row("attn_v", other),
        Row("attn_k", "Q4_K", when=eight),
        Row("ffn_down", other, first_eighth),
        Row("attn_output", "Q5_K", when=eight),
        *output,
    )
    return Preset(base, rows, head="Q5_K", tiny=True)


def _mix(base: str, *rows: Row, head: str = "Q6_K", eight_output: bool = True) -> Preset:
    """A preset above three bits; with eight experts the attention gets more bits in all of them."""
    apart = [Row("attn_v", "Q8_0", when=eight), Row("attn_k", "Q8_0", when=eight)]
    apart += [Row("attn_output", "Q5_K", when=eight)] if eight_output else []
    return Preset(base, (*apart, *rows), head)


PRESETS: dict[str, Preset] = {
    "F32": Preset("F32", head="F32"),
    "BF16": Preset("BF16", head="BF16"),
    "F16": Preset("F16", head="F16"),
    "Q8_0": _mix("Q8_0", head="Q8_0", eight_output=False),
    "Q6_K": _mix("Q6_K", eight_output=False),
    "Q5_K_M": _mix("Q5_K", Row("attn_v", "Q6_K", more_bits), Row("ffn_down", "Q6_K", more_bits), eight_output=False),
    "Q5_K_S": _mix("Q5_K", eight_output=False),
    "Q5_1": _mix("Q5_1", eight_output=False),
    "Q5_0": _mix("Q5_0", Row("ffn_down", "Q5_1", first_eighth, guided), eight_output=False),
    "Q4_K_M": _mix("Q4_K", Row("attn_v", "Q6_K", more_bits), Row("ffn_down", "Q6_K", more_bits)),
    "Q4_K_S": _mix("Q4_K", Row("attn_v", "Q5_K", lambda i, _: i < 4), Row("ffn_down", "Q5_K", first_eighth)),
    "Q4_1": _mix("Q4_1", eight_output=False),
    "Q4_0": _mix("Q4_0", Row("ffn_down", "Q4_1", first_eighth, guided), eight_output=False),
    "IQ4_NL": _mix("IQ4_NL", Row("attn_v", "Q5_K", when=grouped), Row("ffn_down", "Q5_K", first_eighth, unguided)),
    "IQ4_XS": _mix("IQ4_XS", Row("attn_v", "Q5_K", when=grouped), Row("ffn_down", "Q5_K", first_eighth, unguided)),
    "MXFP4_MOE": Preset(
        "Q8_0", tuple(Row(role, "MXFP4", when=several) for role in ("ffn_.*_exps", "attn_[kv]_b")), head="Q8_0"
    ),
    "Q3_K_L": _mix(
        "Q3_K",
        Row("attn_v", "Q5_K"),
        Row("ffn_down", "Q5_K"),
        Row("attn_output", "Q5_K", when=dense),
        eight_output=False,
    ),
    "Q3_K_M": _mix(
        "Q3_K",
        Row("attn_v", "Q5_K", lambda i, _: i < 2),
        Row("attn_v", "Q4_K"),
        Row("ffn_down", "Q5_K", lambda i, n: i < n // 16),
        Row("ffn_down", "Q4_K"),
        Row("attn_output", "Q4_K"),
    ),
    "Q3_K_S": _mix("Q3_K"),
    "IQ3_M": _mix(
        "IQ3_S",
        Row("attn_v", "Q4_K"),
        Row("ffn_down", "Q4_K", first_eighth),
        Row("ffn_down", "Q4_K", more_bits, eight),
        Row("attn_output", "Q4_K"),
    ),
    "IQ3_S": _mix("IQ3_S", Row("attn_v", "Q4_K", when=grouped)),
    "IQ3_XS": _mix(
        "IQ3_S",
        Row("attn_v", "Q4_K", when=grouped),
        Row("attn_k", "IQ3_XXS"),
        Row("attn_q", "IQ3_XXS"),
        Row("ffn_gate", "IQ3_XXS", middle),
        Row("ffn_up", "IQ3_XXS", middle),
    ),
    "IQ3_XXS": _mix(
        "IQ3_XXS",
        Row("token_embd", "IQ3_S"),
        Row("attn_v", "Q4_K", when=grouped),
        Row("attn_v", "IQ3_S", when=unguided),
        Row("attn_k", "IQ2_S"),
        Row("attn_q", "IQ2_S"),
        Row("ffn_down", "Q4_K", first_eighth, unguided),
        Row("ffn_down", "Q3_K", when=unguided),
        Row("attn_output", "IQ3_S"),
        head="Q5_K",
    ),
    "Q2_K": _mix(
        "Q2_K",
        Row("attn_v", "Q4_K", when=grouped),
        Row("attn_v", "Q3_K"),
        Row("ffn_down", "Q3_K"),
        Row("attn_output", "Q3_K"),
    ),
    "Q2_K_S": _mix(
        "Q2_K", Row("attn_v", "Q4_K", when=grouped), Row("ffn_down", "Q4_K", first_eighth), eight_output=False
    ),
    "IQ2_M": _tiny("IQ2_S", "IQ3_S", "IQ3_S", (Row("attn_output", "IQ3_S"),)),
    "IQ2_S": _tiny("IQ2_XS", "IQ3_S", "IQ3_S", (Row("attn_output", "IQ3_S"),)),
    "IQ2_XS": _tiny("IQ2_XS", "Q2_K", "Q2_K"),
    "IQ2_XXS": _tiny("IQ2_XXS", "Q2_K", "Q2_K"),
    "Q2_0": _mix("Q2_0", Row("token_embd", "Q4_K"), eight_output=False),
    "TQ2_0": _mix("TQ2_0", Row("token_embd", "Q4_K"), eight_output=False),
    "TQ1_0": _mix("TQ1_0", Row("token_embd", "Q4_K"), eight_output=False),
    "IQ1_M": _tiny("IQ1_M", "Q2_K", "Q2_K", (Row("attn_output", "IQ2_XXS"),)),
    "IQ1_S": _tiny("IQ1_S", "Q2_K", "Q2_K", (Row("attn_output", "IQ2_XXS"),)),
    "Q1_0": _mix("Q1_0", eight_output=False),
}
"""Large to small; the names are llama.cpp's."""

FILE_TYPE_NAMES = {name: "ALL_F32" if name == "F32" else f"MOSTLY_{name}" for name in PRESETS}
"""What llama.cpp calls each preset in `general.file_type`."""
