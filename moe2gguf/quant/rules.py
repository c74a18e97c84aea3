"""Which type each tensor gets: an ordered list of (pattern, type), from presets, files and the command line.

A pattern is a regular expression that must match a tensor's whole name; the first that matches decides. Patterns are
tried on the tensors that may be quantized at all, the matrices; norms, biases and routers stay as they are.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from moe2gguf.errors import PlanError, name_odd_file
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType, quote_text
from moe2gguf.quant.presets import OWN_RULES, PRESETS, Network, Preset
from moe2gguf.spec import make_paths

AUTO = "auto"
VOCABULARY = r"(token_embd|output)\.weight"
MAX_FILE = 1 << 20  # bytes of a file of type rules


@dataclass(frozen=True)
class TypeOptions:
    """What the user says about types.

    type            "auto" (as stored), a preset (q4_k_m) or a tensor type (q4_k); upper or lower case
    tensor_types    "PATTERN=TYPE", tried first, in this order
    type_rules     a TOML or JSON file of rules, tried next
    pure            `type` for every matrix, those of the vocabulary included
    allow_fallback  where a type's blocks do not fit the rows, take llama.cpp's substitute instead of refusing
    llama_cpp_mix   treat a file with experts as llama.cpp does, instead of like its dense parent
    imatrix         an importance matrix: which columns' errors matter
    target_size     bytes of the file, target_bpw bits per weight: choose the types with the least error under it
    imatrix_repair  what it has no data for is refused ("none"), or all its columns count alike ("ones"), as llama.cpp
                    does
    """

    type: str = AUTO
    tensor_types: tuple[str, ...] = ()
    type_rules: Path | None = None
    pure: bool = False
    allow_fallback: bool = False
    llama_cpp_mix: bool = False
    imatrix: Path | None = None
    imatrix_repair: str = "none"
    target_size: int | None = None
    target_bpw: float | None = None

    def __post_init__(self) -> None:
        make_paths(self, "type_rules", "imatrix")

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [path for path in (self.type_rules, self.imatrix) if path]

    @property
    def chooses(self) -> bool:
        """Whether any tensor may get another type than it is stored in, or blocks need not stay whole."""
        return self != TypeOptions(imatrix=self.imatrix, imatrix_repair=self.imatrix_repair, pure=self.pure)

    @property
    def has_target(self) -> bool:
        """Whether types are to be chosen for a size."""
        return self.target_size is not None or self.target_bpw is not None


@dataclass(frozen=True)
class Rule:
    """Tensors whose whole name matches `pattern` get `type`; `origin` is the option or file that says so."""

    pattern: str
    type: TensorType
    origin: str

    def matches(self, name: str) -> bool:
        """Return whether the rule is about the tensor `name`."""
        return re.fullmatch(self.pattern, name) is not None


def make_preset_rules(name: str, network: Network, *, mix: bool = False) -> tuple[Rule, ...]:
    """Return the rules of llama.cpp's file type `name` (upper case) for `network`; the last decides all that remains.

    Experts get the types of the dense parent's MLP; `mix` gives what llama.cpp itself would choose for them.
    """
    preset = PRESETS[name]
    kind = types.find_type(preset.type)
    if kind in types.FLOATS:
        return (Rule(".*", kind, name),)
    # By default experts are treated as the dense parent's MLP; MXFP4_MOE is about experts.
    seen = network if mix or name == "MXFP4_MOE" else dataclasses.replace(network, n_expert=0)
    if mix:
        seen = dataclasses.replace(seen, n_layer=seen.n_layer + seen.n_empty)
    rules = [_make_head_rule(name, seen)]
    # Of the rows about one role the first that fits a layer decides it.
    decided: dict[str, set[int]] = {}
    for row in preset.rows:
        if not row.when(seen):
            continue
        done = decided.setdefault(row.role, set())
        present = seen.list_layers(row.role)
        layers = [i for at, i in enumerate(present) if i not in done and row.layers(at, len(present))]
        done.update(layers)
        if layers:
            pattern = _make_pattern(row.role, layers, seen.n_layer)
            rules.append(Rule(pattern, _raise_for_70b(row.role, row.type, preset, seen), name))
    if _raise_for_70b("attn_v", preset.type, preset, seen) != kind:
        rules.append(Rule(_make_pattern("attn_v", range(seen.n_layer), seen.n_layer), types.find_type("Q5_K"), name))
    return (*rules, Rule(".*", kind, name))


def _make_head_rule(name: str, network: Network) -> Rule:
    """Return the rule of the matrix that makes logits: Q8_0 where the preset's blocks do not fit the model's width."""
    preset, pattern = PRESETS[name], r"token_embd\.weight" if network.tied_embeddings else r"output\.weight"
    fits = network.d_model % types.block_size(types.find_type(preset.type)) == 0
    return Rule(pattern, types.find_type(preset.head if fits else "Q8_0"), name)


def _raise_for_70b(role: str, name: str, preset: Preset, network: Network) -> TensorType:
    """Return the type `name`, or more bits: a 70B model shares each value matrix among eight heads."""
    raised = role == "attn_v" and network.is_70b and not preset.tiny and name in ("Q3_K", "Q4_K")
    return types.find_type("Q5_K" if raised else name)


def _make_pattern(role: str, layers: Iterable[int], n_layer: int) -> str:
    """Return a regular expression for the weight of a role in these layers, experts included."""
    if role == "token_embd":
        return r"token_embd\.weight"
    listed = [*layers]
    numbers = r"\d+" if len(listed) == n_layer else f"({'|'.join(map(str, listed))})"
    named = "attn_(v|qkv|kv_b)" if role == "attn_v" else rf"{role}(_\w+)?" if role.startswith("ffn_") else role
    return rf"blk\.{numbers}\.{named}\.weight"


def make_base_rules(options: TypeOptions, network: Network) -> tuple[Rule, ...]:
    """Return the rules that `--type` stands for; none for "auto"."""
    name = options.type.upper()
    if name == AUTO.upper():
        return ()
    if options.pure:
        main = "MXFP4" if name == "MXFP4_MOE" else PRESETS[name].type if name in PRESETS else name
        return (Rule(".*", types.find_type(main), f"type {options.type}"),)
    if name in PRESETS:
        is_known = network.n_layer and network.architecture not in OWN_RULES
        if not is_known and types.find_type(PRESETS[name].type) not in types.FLOATS:
            why = (
                f"is not known here for {quote_text(network.architecture)}"
                if network.n_layer
                else "needs a block_count"
            )
            raise PlanError([f"type {options.type}: llama.cpp's choice of types {why}; use --pure, or --type-rules"])
        return make_preset_rules(name, network, mix=options.llama_cpp_mix)
    kind = types.find_type(name)
    origin = f"type {options.type}"
    return (Rule(VOCABULARY, types.find_type("Q8_0"), origin), Rule(".*", kind, origin))


MIXES = tuple(preset.lower() for preset in PRESETS)
"""What `--type` takes for llama.cpp's choice of types, large to small."""

PLAIN = tuple(kind for kind in types.NAMES if kind not in MIXES)
"""What it takes besides: one type for all matrices alike."""


def refuse_type(name: str) -> list[str]:
    """Return a sentence if there is no type `name`, or nothing."""
    if name.lower() in (AUTO, *MIXES, *PLAIN):
        return []
    return [f"type {name}: unknown; {_suggest(name, [AUTO, *MIXES, *PLAIN], MIXES)}"]


def _suggest(name: str, known: Iterable[str], otherwise: Iterable[str]) -> str:
    """Return what to choose: the names of `known` that are nearest to `name`, or any `otherwise` if none is near."""
    near = get_close_matches(name.lower().replace("-", "_"), list(known), cutoff=0.5)
    return f"choose {' or '.join(near)}" if near else f"choose one of {', '.join(otherwise)}"


def read_own_rules(options: TypeOptions) -> tuple[Rule, ...]:
    """Read the user's rules. Raises PlanError with everything that is wrong with them, and with `--type`."""
    pairs = [(*text.rpartition("=")[::2], f"--tensor-type {text}") for text in options.tensor_types]
    refusals = refuse_type(options.type)
    if options.type_rules is not None:
        try:
            pairs += [(pattern, kind, str(options.type_rules)) for pattern, kind in read_type_rules(options.type_rules)]
        except PlanError as error:
            refusals += error.refusals
    rules = []
    for pattern, kind, origin in pairs:
        if problem := _find_problem(pattern, kind):
            refusals.append(f"{origin}: {problem}")
        else:
            rules.append(Rule(pattern, types.find_type(kind), origin))
    if refusals:
        raise PlanError(refusals)
    return tuple(rules)


def _find_problem(pattern: str, kind: str) -> str | None:
    if not pattern:
        return r"write PATTERN=TYPE, such as blk\..*\.attn_v\.weight=q6_k"
    if kind.lower() not in types.NAMES:
        return f"{kind!r} is not a type; {_suggest(kind, types.NAMES, types.NAMES)}"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a regular expression ({error})"
    return None


def read_type_rules(path: Path) -> list[tuple[str, str]]:
    """Read the (pattern, type) pairs of a rules file: a list `rules` of tables with `pattern` and `type`, nothing else.

    Raises:
        PlanError: it cannot be read, is neither TOML nor JSON (by its suffix), or has another content.
    """
    if what := name_odd_file(path):
        raise PlanError([f"{path}: {what}"])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise PlanError([f"{path}: a file of rules of more than {MAX_FILE} bytes"])
        content = tomllib.loads(data.decode()) if path.suffix.lower() == ".toml" else json.loads(data)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: broken UTF-8, TOML or JSON
        raise PlanError([f"{path}: cannot be read as type rules ({error})"]) from error
    rules = content.get("rules") if isinstance(content, dict) and set(content) == {"rules"} else None
    if not isinstance(rules, list) or not all(map(_is_rule, rules)):
        raise PlanError([f'{path}: must hold "rules", a list of tables with "pattern" and "type", and nothing else'])
    return [(rule["pattern"], rule["type"]) for rule in rules]


def _is_rule(entry: object) -> bool:
    return isinstance(entry, dict) and set(entry) == {"pattern", "type"} and {*map(type, entry.values())} == {str}
