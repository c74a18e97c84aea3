"""What a merge is made of, from files: prompts as texts, or a recipe in YAML as mergekit has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe2gguf.errors import PlanError
from moe2gguf.experts.text import bytes_to_read, read_text
from moe2gguf.gguf.file import shown
from moe2gguf.hf.json_file import read_bytes
from moe2gguf.hf.yaml_text import load_yaml
from moe2gguf.recipes.merge_options import Donor

MAX_BYTES = 4 << 20

_ROUTERS = ("hidden", "random", "regression")
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_KEYS = {"base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture"}
_EXPERT_KEYS = {"source_model", "positive_prompts", "negative_prompts"}


class Recipe(NamedTuple):
    """A recipe: the base, the donors, and the fields of `MergeOptions` that it gives."""

    base: str
    donors: list[Donor]
    options: dict[str, Any]


def read_donors(models: Sequence[Path], prompts: Sequence[Path], n_token: int) -> list[Donor]:
    """The donors with the first `n_token` tokens, and ample more, of the file of prompts of each, if there are any.

    Raises:
        PlanError: there are not as many files as models.
        CalibrationError: a file cannot be read as text.
    """
    if prompts and len(prompts) != len(models):
        raise PlanError(
            [f"{len(prompts)} files of prompts for {len(models)} experts: give one for each, in their order"]
        )
    texts = [read_text(path, bytes_to_read(n_token)).text for path in prompts]
    return [Donor(model, tuple(texts[i : i + 1])) for i, model in enumerate(models)]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe in the form of mergekit-moe; paths in it are relative to the current folder.

    https://github.com/arcee-ai/mergekit/blob/47344876f0fbb2b2a9d7a91b1615c46f62b6d6e2/mergekit/moe/config.py

    Raises:
        CheckpointError: it cannot be read, or is too large.
        PlanError: it is no recipe, or asks for what is not done here; every reason is listed.
    """
    try:
        found = load_yaml(read_bytes(path, max_bytes=MAX_BYTES).decode("utf-8-sig"))
    except ValueError as error:
        raise PlanError([f"{path}: {error}"]) from error
    values: dict[Any, Any] = found if isinstance(found, dict) else {}
    experts = values.get("experts")
    rows: list[dict[Any, Any]] = (
        [one if isinstance(one, dict) else {} for one in experts] if isinstance(experts, list) else []
    )
    if problems := [*_refuse(values), *(p for i, row in enumerate(rows) for p in _refuse_expert(i, row))]:
        raise PlanError([f"{path}: {problem}" for problem in problems])
    donors = [
        Donor(row["source_model"], *(tuple(row.get(f"{kind}_prompts") or ()) for kind in ("positive", "negative")))
        for row in rows
    ]
    options = {"router": values.get("gate_mode", "hidden"), "used": values.get("experts_per_token", 2)}
    return Recipe(
        values["base_model"], donors, options | ({"type": _TYPES[kind]} if (kind := values.get("dtype")) else {})
    )


def _refuse(values: dict[Any, Any]) -> Iterator[str]:
    """What is wrong with the recipe itself."""
    if unknown := [shown(str(key)) for key in values if key not in _KEYS]:
        yield f"{', '.join(unknown)}: not done here; known are {', '.join(sorted(_KEYS))}"
    if not isinstance(values.get("base_model"), str) or not isinstance(values.get("experts"), list):
        yield "needs base_model, a name, and experts, a list"
    if (mode := values.get("gate_mode", "hidden")) not in _ROUTERS:
        yield f"gate_mode {shown(str(mode))}: there are {', '.join(_ROUTERS)}"
    if (kind := values.get("dtype")) is not None and kind not in _TYPES:
        yield f"dtype {shown(str(kind))}: there are {', '.join(_TYPES)}, or none to keep what is stored"
    if type(count := values.get("experts_per_token", 2)) is not int or count < 1:
        yield f"experts_per_token {shown(str(count))}: a number from 1 on"
    if values.get("architecture") not in (None, "mixtral"):
        yield f"architecture {shown(str(values['architecture']))}: only mixtral is written"


def _refuse_expert(i: int, row: dict[Any, Any]) -> Iterator[str]:
    """What is wrong with the expert of this number."""
    if not isinstance(row.get("source_model"), str):
        yield f"expert {i}: needs source_model, a name"
    if unknown := [shown(str(key)) for key in row if key not in _EXPERT_KEYS]:
        yield f"expert {i}: {', '.join(unknown)}: not done here"
    for key in ("positive_prompts", "negative_prompts"):
        prompts = row.get(key) or []
        if not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
            yield f"expert {i}: {key} is a list of texts"
