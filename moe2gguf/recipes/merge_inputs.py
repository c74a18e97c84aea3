"""What a merge is made of, from files: prompts as texts, or a recipe in YAML as mergekit has it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe2gguf.errors import PlanError
from moe2gguf.experts.text import bytes_to_read, read_text
from moe2gguf.gguf.file import quote_text
from moe2gguf.hf.json_file import read_bytes
from moe2gguf.hf.yaml_text import load_yaml
from moe2gguf.limits import MAX_EXPERTS
from moe2gguf.recipes.merge_options import Donor

MAX_BYTES = 4 << 20

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", None: "auto"}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "gate_mode": ("hidden", "random", "regression"),
    "dtype": tuple(_TYPES),
    "experts_per_token": tuple(range(1, MAX_EXPERTS)),
    "architecture": ("mixtral", None),
}
"""What a key may be."""


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
    except UnicodeDecodeError as error:
        raise PlanError([f"{path}: not readable as UTF-8 text ({error}); save it as UTF-8"]) from error
    except ValueError as error:
        raise PlanError([f"{path}: {error}"]) from error
    values = found if isinstance(found, dict) else {}
    if problems := [*_refuse(values)]:
        raise PlanError([f"{path}: {problem}" for problem in problems])
    donors = [
        Donor(one["source_model"], *(tuple(one.get(f"{kind}_prompts") or ()) for kind in ("positive", "negative")))
        for one in values["experts"]
    ]
    router, used = values.get("gate_mode", "hidden"), values.get("experts_per_token", 2)
    return Recipe(values["base_model"], donors, {"router": router, "used": used, "type": _TYPES[values.get("dtype")]})


def _refuse(values: dict[Any, Any]) -> Iterator[str]:
    yield from _refuse_keys(values)
    experts = values.get("experts")
    if not isinstance(values.get("base_model"), str) or not isinstance(experts, list):
        yield "needs base_model, a name, and experts, a list"
    for i, one in enumerate(experts if isinstance(experts, list) else []):
        yield from (f"expert {i}: {problem}" for problem in _refuse_expert(one if isinstance(one, dict) else {}))


def _refuse_keys(values: dict[Any, Any]) -> Iterator[str]:
    """What a recipe says besides its models that is not known, or not one of what may be said."""
    if unknown := [quote_text(str(key)) for key in values if key not in ("base_model", "experts", *_CHOICES)]:
        yield f"{', '.join(unknown)}: not done here"
    for key, choices in _CHOICES.items():
        if key in values and not any(type(one) is type(values[key]) and one == values[key] for one in choices):
            words = [str(one) for one in choices[:3] if one] + ["..."][: len(choices) > len(_TYPES)]
            yield f"{key} {quote_text(str(values[key]))}: expected {', '.join(words)}"


def _refuse_expert(row: dict[Any, Any]) -> Iterator[str]:
    if not isinstance(row.get("source_model"), str):
        yield "needs source_model, a name"
    for key, value in row.items():
        if key in ("positive_prompts", "negative_prompts"):
            texts = value or []
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                yield f"{key} is a list of texts"
        elif key != "source_model":
            yield f"{quote_text(str(key))}: not done here"
