"""The model card: who made the model, under which licence -> `general.*` metadata.

The reading of README.md's front matter and of names such as "org/Model-7B-Instruct" is the gguf package's, as in
llama.cpp's own converter. The name is the card's, else that of config.json's `_name_or_path` (never a path in it), else
that of the model's repository on the Hub or of its folder.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from moe2gguf.hf.json_file import is_number, read_bytes, read_json
from moe2gguf.hf.paths import find_origin, resolve_inside
from moe2gguf.hf.safetensors import StoredTensor
from moe2gguf.hf.yaml_text import load_yaml
from moe2gguf.spec import Metadata, MetadataValue

_MAX_CARD_BYTES = 4 << 20
_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}


def read_card(
    folder: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    name: str | None,
    warnings: list[str],
) -> Metadata:
    """`general.*` keys (name, basename, size label, licence, languages, base models ...) of a model.

    `values` is config.json, `tensors` those of the model (their parameters make the size label), `name` an override.
    llama.cpp drops spaces behind special tokens where the name has "phi3" or "phi-3", whatever the tokenizer says: such
    a name is used only if `name` or the card says so, with a warning; from elsewhere it becomes "Phi 3".
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-vocab.cpp (`LLAMA_TOKEN_ATTR_RSTRIP`)

    Raises:
        CheckpointError: README.md cannot be read, or generation_config.json is not JSON.
    """
    n_parameter = sum(math.prod(tensor.shape) for tensor in tensors.values())
    readme = _front_matter(folder, warnings)
    config = {**values, "_name_or_path": _PHI3.sub("Phi-3", _find_model_id(folder, values))}
    try:
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), readme, config, None, n_parameter)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        warnings.append(f"{folder}: README.md is skipped: its front matter makes no sense ({error!r})")
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {}, config, None, n_parameter)
    found.name = name or found.name
    if _PHI3.search(str(found.name)):
        warnings.append(
            f"the name {found.name!r} makes llama.cpp drop the spaces behind special tokens, as Phi-3 wants it; give "
            "another one with --name if this model's tokenizer keeps them"
        )
    found.size_label = found.size_label or gguf.size_label(n_parameter, 0, 0, 0)
    return {**_sampling(folder), **_general(found)}


def _find_model_id(folder: Path, values: Mapping[str, Any]) -> str:
    """Return what config.json, the Hub's cache or the folder calls the model: "OWNER/NAME" or "NAME"."""
    named = values.get("_name_or_path")
    if isinstance(named, str) and _MODEL_ID.fullmatch(named):
        return named
    origin = find_origin(folder)
    return origin.repository if origin else re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(folder)).name)


def _front_matter(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """Read the YAML block at the head of README.md; {} where there is none, or (with a warning) none that is sound."""
    path = resolve_inside(folder, "README.md")
    if not path.is_file():
        return {}
    text = read_bytes(path, max_bytes=_MAX_CARD_BYTES).decode("utf-8", errors="replace")
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    if not match:
        return {}
    try:
        values = load_yaml(match[1].replace("\t", "  ").replace("- no\n", '- "no"\n'))
    except ValueError as error:
        warnings.append(f"{path} is skipped: its front matter is {error}")
        return {}
    if isinstance(values, dict):
        return values
    if values is not None:
        warnings.append(f"{path} is skipped: its front matter is a {type(values).__name__}, not names with values")
    return {}


def _sampling(folder: Path) -> dict[str, MetadataValue]:
    """Recommended sampling settings from generation_config.json, under llama.cpp's `general.sampling.*` keys."""
    path = resolve_inside(folder, "generation_config.json")
    values = read_json(path) if path.is_file() else {}
    result: dict[str, MetadataValue] = {}
    for source, target in _SAMPLING.items():
        value = values.get(source)
        if is_number(value):
            result[f"general.sampling.{target}"] = max(int(value), 0) if source == "top_k" else float(value)
    return result


_PLAIN = (
    "name", "author", "version", "organization", "finetune", "basename", "description", "size_label", "license",
    "license_name", "license_link", "source_url", "source_doi", "source_uuid", "source_repo_url",
)  # fmt: skip
_KEYS = {field: field.replace("_", ".", 1) for field in _PLAIN if field.startswith(("license_", "source_"))}


def _general(found: gguf.Metadata) -> dict[str, MetadataValue]:
    """gguf.Metadata -> keys, as `set_gguf_meta_model` of the gguf package writes them."""
    result: dict[str, MetadataValue] = {}
    for field in _PLAIN:
        if text := _text(getattr(found, field)):
            result[f"general.{_KEYS.get(field, field)}"] = text
    result |= _number_entries("base_model", found.base_models or []) | _number_entries("dataset", found.datasets or [])
    for key in ("tags", "languages"):
        if texts := [text for value in getattr(found, key) or [] if (text := _text(value))]:
            result[f"general.{key}"] = texts
    return result


def _number_entries(kind: str, entries: list[Any]) -> dict[str, MetadataValue]:
    """Return the keys of a list of models or data sets: how many there are, and what is known of each."""
    named = [entry for entry in entries if isinstance(entry, dict) and entry]
    result: dict[str, MetadataValue] = {f"general.{kind}.count": len(named)} if named else {}
    for i, entry in enumerate(named):
        result |= {f"general.{kind}.{i}.{key}": text for key, value in sorted(entry.items()) if (text := _text(value))}
    return result


def _text(value: object) -> str:
    """Return a metadata string; lists are joined as llama.cpp's converter joins several licences."""
    if isinstance(value, list):
        return ",".join(item for item in value if isinstance(item, str) and item)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
