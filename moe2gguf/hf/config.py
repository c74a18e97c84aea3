"""config.json -> hyper-parameters, with typed reads that collect every problem instead of stopping at the first."""

import math
import re
from collections.abc import Mapping
from typing import Any

from moe2gguf.graphs import GRAPHS
from moe2gguf.hf.families import FAMILIES, REFUSED, Family
from moe2gguf.hf.json_file import is_number
from moe2gguf.hf.mixtures import ARCHITECTURES, describe_mixture, name_type
from moe2gguf.spec import Metadata, Model, Rope

_LARGEST = 2**31 - 1  # GGUF stores these as 32-bit counts, and llama.cpp reads them into int
_LONGEST = 1 << 16  # numbers in a list of the provenance: layers times experts
_MOST = {"num_hidden_layers": 512, "num_local_experts": 1024, "vocab_size": 1 << 24}
"""Bounds on what multiplies: llama.cpp's LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS
(https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-hparams.h#L11-L12), and 60 times the largest vocabulary
in use, so that a hostile number costs no memory."""


COUNTS = {"n_expert": "num_local_experts", "n_expert_used": "num_experts_per_tok"}
"""Fields of `Model` and their keys, where there are experts."""


class Config:
    """A JSON object read by type; what is missing or wrong is appended to `problems` and read as a default."""

    def __init__(self, values: Mapping[str, Any], problems: list[str], where: str = "config.json") -> None:
        self.values = dict(values)
        self.problems = problems
        self.where = where
        self.has_counts = True  # until one is missing or wrong

    def has(self, key: str) -> bool:
        """Return whether `key` is present and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return an integer from `least` on; `default` where the key is absent, a problem where there is no default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        most = _MOST.get(key, _LARGEST)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.has_counts = False
            return int(self._wrong(key, f"an integer from {least} to {most:,}", least))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above zero."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not is_number(value) or value <= 0:
            return float(self._wrong(key, "a finite number above zero", 1.0))
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; absent is false."""
        value = self.values.get(key, False)
        if value is None or isinstance(value, bool):
            return bool(value)
        return bool(self._wrong(key, "true or false", 0))

    def _wrong(self, key: str, kind: str, default: float) -> float:
        found = "is missing" if key not in self.values else f"is {self.values[key]!r}"
        self.problems.append(f"{self.where}: {key} {found}; expected {kind}")
        return default


def read_family(values: Mapping[str, Any], problems: list[str]) -> Family | None:
    """Find the family named by `architectures`, or None with the reason appended to `problems`."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    foreign = _find_foreign_setting(values) if name == "Glm4MoeForCausalLM" else ""
    if (name not in FAMILIES or foreign) and (mixture := describe_mixture(values)):
        problems.append(f"config.json: {mixture}{foreign}")
        return None
    if name is None:
        problems.append(
            f"config.json: architectures is {names!r}; expected a list with one name such as LlamaForCausalLM"
        )
        return None
    if name not in FAMILIES:
        reason = REFUSED.get(name, "moe2gguf does not know it")
        problems.append(f"config.json: {name} is not supported: {reason}. Supported: {', '.join(FAMILIES)}")
        return None
    kind = name_type(str(values.get("model_type")))
    if kind != name_type(name) and kind in {name_type(other) for other in (*FAMILIES, *REFUSED, *ARCHITECTURES)}:
        problems.append(
            f"config.json: architectures is {name}, but model_type, which counts in transformers, is "
            f"{values['model_type']!r}; change the wrong one"
        )
    return FAMILIES[name]


def _find_foreign_setting(values: Mapping[str, Any]) -> str:
    """Say what shows that a `Glm4MoeForCausalLM` is another one than moe2gguf writes, such as GLM-4.5; else ""."""
    ours = GRAPHS["glm4moe"].keys
    wanted = {
        "norm_topk_prob": ours["expert_weights_norm"],
        "routed_scaling_factor": ours["expert_weights_scale"],
        "n_group": 1,
        "partial_rotary_factor": 1.0,
    }
    other = next((key for key, value in wanted.items() if values.get(key) != value), None)
    return f". It is none that moe2gguf wrote: {other} is {values.get(other)!r}" if other else ""


_PROVENANCE = re.compile(r"moe2gguf(\.[a-z0-9_]{1,40}){1,4}")


def read_provenance(values: Mapping[str, Any]) -> Metadata:
    """Return the `moe2gguf.*` metadata that a folder of ours carries in config.json; what is not plain is left out."""
    found = values.get("moe2gguf")
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if _PROVENANCE.fullmatch(key) and _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Return whether a value is a short text, a flag, a count, a finite number, or a list of such numbers."""
    if isinstance(value, list):
        return len(value) <= _LONGEST and all(isinstance(one, float) and math.isfinite(one) for one in value)
    if isinstance(value, str):
        return len(value) <= 256
    if isinstance(value, bool) or (isinstance(value, int) and 0 <= value <= _LARGEST):
        return True
    return isinstance(value, float) and math.isfinite(value)


def read_model(values: Mapping[str, Any], family: Family, problems: list[str], warnings: list[str]) -> Model | None:
    """Hyper-parameters of `family` from config.json. Appends every refusal to `problems`, every note to `warnings`.

    None where a size is missing or wrong: whatever was compared with the model would be another problem of that.
    """
    config = Config(values, problems)
    _refuse(config)
    d_model, n_head = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_head_kv = config.integer("num_key_value_heads", n_head)
    d_head = config.integer("head_dim", family.d_head or max(d_model // n_head, 1))
    if not config.has("head_dim") and not family.d_head and d_model % n_head:
        problems.append(f"config.json: hidden_size {d_model} is not a multiple of num_attention_heads {n_head}")
    if n_head % n_head_kv:
        problems.append(
            f"config.json: num_attention_heads {n_head} is not a multiple of num_key_value_heads {n_head_kv}"
        )
    if d_head % 2:
        problems.append(f"config.json: head_dim {d_head} is odd; the rotary embedding needs pairs")
    counts: dict[str, Any] = _read_experts(config, family)
    flags = {field: config.flag(key) for field, key in family.config_flags} | dict.fromkeys(family.always, True)
    n_context = config.integer("max_position_embeddings")
    _warn(config, n_context, warnings)
    model = Model(
        architecture=family.architecture,
        n_layer=config.integer("num_hidden_layers"),
        d_model=d_model,
        d_ff=config.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        d_head=d_head,
        n_vocab=config.integer("vocab_size"),
        n_context=n_context,
        rms_epsilon=config.number("rms_norm_eps"),
        rope=read_rope(config, family),
        tied_embeddings=config.flag("tie_word_embeddings"),
        **counts,
        **flags,
    )
    return model if config.has_counts else None


def _read_experts(config: Config, family: Family) -> dict[str, int]:
    """Read the fields of Model that count and size the experts; none of a dense family."""
    if "shared_up" in family.mlp[0].tensors:
        return read_shared(config)
    if "router" not in family.mlp[0].tensors:
        return {}
    if config.has("num_experts"):  # transformers reads it as another name of num_local_experts
        other = config.values["num_experts"]
        n_expert = config.values.setdefault("num_local_experts", other)
        if n_expert != other:
            config.problems.append(
                f"config.json: num_local_experts is {n_expert!r} and num_experts {other!r}; remove one"
            )
    return {name: config.integer(key) for name, key in COUNTS.items()}


def read_shared(config: Config) -> dict[str, int]:
    """The experts of a `Glm4MoeForCausalLM` that moe2gguf wrote."""
    keys = COUNTS | {
        "n_expert": "n_routed_experts",
        "d_expert": "moe_intermediate_size",
        "n_shared": "n_shared_experts",
    }
    counts = {name: config.integer(key) for name, key in keys.items()}
    return {**counts, "leading_dense": config.integer("first_k_dense_replace", least=0)}


def _refuse(config: Config) -> None:
    """Settings that the target graph cannot express."""
    values, problems = config.values, config.problems
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        problems.append(f"config.json: hidden_act is {activation!r}; llama.cpp's expert graph has SiLU only")
    if config.flag("mlp_bias"):
        problems.append("config.json: mlp_bias is true; llama.cpp's expert graph has no MLP biases")
    partial = values.get("partial_rotary_factor", 1.0)
    if partial not in (1, None):
        problems.append(f"config.json: partial_rotary_factor is {partial!r}; arch `llama` rotates whole heads")
    is_glm = values.get("architectures") == ["Glm4MoeForCausalLM"]
    if (config.flag("use_qk_norm") and not is_glm) or config.flag("qk_layernorm"):
        problems.append("config.json: q/k norms are on; llama.cpp's arch `llama` has no tensors for them")


def _warn(config: Config, n_context: int, warnings: list[str]) -> None:
    window = config.values.get("sliding_window")
    off = config.values.get("use_sliding_window") is False
    if isinstance(window, int) and window < n_context and not off:
        warnings.append(
            f"config.json: sliding_window is {window}: llama.cpp's arch `llama` attends to the whole context, "
            f"so answers differ from the original beyond {window} tokens"
        )


def read_rope(config: Config, family: Family) -> Rope:
    """Rotary settings from `rope_theta` + `rope_scaling` (older files) or `rope_parameters` (transformers 5).

    Where both objects are there `rope_scaling` counts, as in transformers 5
    (https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_rope_utils.py,
    `convert_rope_params_to_dict`); two values for one setting are a problem.
    """
    values, problems = config.values, config.problems
    found = {f"config.json: {key}": values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    for where, settings in found.items():
        if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
            problems.append(f"{where} is {settings!r}; expected one flat object for all layers")
            return Rope()
    where = next(iter(found), "config.json")
    scaling: dict[str, Any] = {**found.get(where, {})}
    outer = {"rope_theta": values["rope_theta"]} if config.has("rope_theta") else {}
    used = {"rope_theta": family.rope_theta, **outer, **scaling}
    problems += _find_contradictions(where, used, {"config.json": outer, **found})
    rope = Config(used, problems, where)
    theta = rope.number("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1.0) not in (1, None):
        problems.append(f"{where}: partial_rotary_factor is not 1; arch `llama` rotates whole heads")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", rope.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            rope.number("factor"),
            rope.integer("original_max_position_embeddings", config.integer("max_position_embeddings")),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        return _read_yarn(rope, theta, config)
    problems.append(
        f"{where}: rope type {kind!r} is not supported; llama.cpp's arch `llama` has linear, yarn and llama3"
    )
    return Rope(theta)


def _find_contradictions(where: str, used: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List every setting in one of `places` with another value than in `used`, the settings read from `where` first."""
    kind = used.get("rope_type", used.get("type", "default"))
    used = {"partial_rotary_factor": 1.0, **used, "rope_type": kind, "type": kind}
    return [
        f"{place}: {key} is {value!r}, but {where}, which counts, has {used.get(key, 'none')!r}; remove the wrong one"
        for place, settings in places.items()
        for key, value in settings.items()
        if value not in (None, used.get(key))
        and not (place != where and key in ("rope_type", "type") and value == "default")  # that is: no scaling
    ]


def _read_yarn(rope: Config, theta: float, config: Config) -> Rope:
    for key in ("mscale", "mscale_all_dim"):
        if rope.has(key):
            rope.problems.append(f"{rope.where}: {key} is not supported: arch `llama` reads no such key")
    for key, fixed in (("beta_fast", 32), ("beta_slow", 1)):
        if rope.values.get(key) not in (None, fixed):
            rope.problems.append(f"{rope.where}: {key} is not {fixed}, which is what arch `llama` always uses")
    if rope.values.get("truncate", True) is not True:
        rope.problems.append(f"{rope.where}: truncate is off; llama.cpp always truncates the correction range")

    return Rope(
        theta,
        "yarn",
        rope.number("factor"),
        rope.integer("original_max_position_embeddings", config.integer("max_position_embeddings")),
        attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
    )
