"""config.json and the model card of a `MixtralForCausalLM` folder.

The routing of the class is that of llama.cpp's graph: softmax over all experts, the k largest, renormalized
(https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe2gguf.hf.write_config import hf_config
from moe2gguf.recipes.write_folder import MARK
from moe2gguf.spec import MetadataValue, Model, Slicing

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "initializer_range", "torch_dtype", "dtype")
"""What config.json of the source says that the records of `moe2gguf.spec` do not."""

_FRONT_MATTER = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}


def mixtral_config(
    model: Model, slicing: Slicing, source: Mapping[str, Any], provenance: Mapping[str, MetadataValue]
) -> dict[str, Any]:
    """config.json of the sliced `model`; `source` is that of the dense one, `provenance` the `moe2gguf.*` metadata."""
    n, k = slicing.n_expert, slicing.n_expert_used
    return _config(replace(model, d_ff=slicing.d_expert, n_expert=n, n_expert_used=k), source, provenance)


def llama_config(model: Model, source: Mapping[str, Any], provenance: Mapping[str, MetadataValue]) -> dict[str, Any]:
    """config.json of a dense `model` (d_ff neurons wide); arguments as in `mixtral_config`."""
    return _config(model, source, provenance)


def _config(model: Model, source: Mapping[str, Any], provenance: Mapping[str, MetadataValue]) -> dict[str, Any]:
    kept = {key: source[key] for key in KEPT if source.get(key) is not None}
    return {**hf_config(model), **kept, MARK: dict(provenance)}


def mixtral_card(
    metadata: Mapping[str, MetadataValue],
    slicing: Slicing,
    provenance: Mapping[str, MetadataValue],
    reports: Sequence[Mapping[str, Any]],
) -> str:
    """README.md: what the model is, how it was made, what calibration found. `metadata` has the `general.*` keys."""
    name = str(metadata.get("general.name", "A sliced model"))
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for key, source in _FRONT_MATTER.items():
        if value := metadata.get(f"general.{source}"):
            front[key] = value
    front["tags"] = ["moe2gguf", "mixtral", "moe"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [
        f"# {name}",
        "",
        f"Every MLP of the dense model is cut into {slicing.n_expert} experts, of which {slicing.n_expert_used} run "
        "per token. The weights are those of the dense model but for the down projections, which carry the experts' "
        "amplification, and the routers. `moe2gguf convert` makes a GGUF file of this folder.",
        "",
        "| how it was made | |",
        "|---|---|",
        *(f"| {key.removeprefix('moe2gguf.')} | {value} |" for key, value in provenance.items()),
    ]
    if reports:
        lines += ["", *_layer_table(reports)]
    return "\n".join(lines) + "\n"


def _layer_table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What calibration found, one row per layer; see `moe2gguf.experts.slice_layer.carve` for the figures."""
    figures = ("always_on", "always_on_rate", "energy_kept", "energy_oracle", "hit_rate", "refit_error")
    present = [figure for figure in figures if any(figure in report for report in reports)]
    rows = [
        f"| {i} | " + " | ".join(f"{report[f]:.3f}" if f in report else "" for f in present) + " |"
        for i, report in enumerate(reports)
    ]
    return [
        "| layer | " + " | ".join(figure.replace("_", " ") for figure in present) + " |",
        "|--:|" + "--:|" * len(present),
        *rows,
    ]
