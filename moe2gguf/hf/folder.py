"""A Hugging Face folder, opened: hyper-parameters, vocabulary, and lazy tensors, with every problem found at once."""

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import CheckpointError, PlanError, VocabularyError, list_names
from moe2gguf.hf import card, config
from moe2gguf.hf.causes import find_cause
from moe2gguf.hf.families import EMBEDDING, HEAD, MLP, Family, is_derived, list_expected_tensors
from moe2gguf.hf.json_file import read_json
from moe2gguf.hf.paths import find_origin, links_out_of, resolve_inside
from moe2gguf.hf.safetensors import ADAPTER, ADAPTER_CONFIG, DTYPES, MERGE, StoredTensor, read_headers
from moe2gguf.hf.tokenizer.vocabulary import read_vocabulary
from moe2gguf.spec import Metadata, Model, Vocabulary

T = TypeVar("T")

SOURCE_REPOSITORY = "moe2gguf.source.repository"
SOURCE_REVISION = "moe2gguf.source.revision"
"""Where on the Hugging Face Hub a model is from: OWNER/NAME, and the commit."""

_WEIGHTS = re.compile(
    r"(pytorch_model|tf_model|flax_model|model|consolidated).*\.(bin|h5|msgpack|pt|ckpt)"
    r"|(?!adapter_model).+\.safetensors|(?!rng_state).+\.pth"
)
"""Files that may be a model: not an adapter, nor what a training leaves beside (training_args.bin, optimizer.pt)."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose description is complete and consistent."""

    folder: Path
    model: Model
    mlp: MLP
    tensors: Mapping[str, StoredTensor]
    vocabulary: Vocabulary
    card: Metadata
    warnings: tuple[str, ...] = field(default=())
    provenance: Metadata = field(default_factory=dict)  # its `moe2gguf.*` keys: of a folder of ours, and its origin

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def own_files(self) -> tuple[Path, ...]:
        """The files that must not be written over: all of the folder."""
        return (*self.files, *(path for path in self.folder.iterdir() if path.is_file()))

    def read(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.generic]:
        """Return a tensor in its storage type, or only these of its rows."""
        whole = self.tensors[name].read()
        return whole if rows is None else whole[rows]


def open_checkpoint(
    folder: Path, *, name: str | None = None, headers: Mapping[str, StoredTensor] | None = None
) -> Checkpoint:
    """Open the Hugging Face folder `folder`; `name` overrides the model's name in the metadata.

    `headers` are its tensors where they are known already, because the weights are not there.

    Raises:
        CheckpointError: there is no such folder or no config.json in it.
        PlanError: everything else that is wrong, all of it in one list.
    """
    if not folder.is_dir():
        found = "neither a Hugging Face model folder nor a GGUF file" if folder.exists() else "no such file or folder"
        raise CheckpointError(
            f"{folder}: {found}; name a model's folder or file, or OWNER/NAME on the Hugging Face Hub"
        )
    _require_config(folder)
    values = read_json(resolve_inside(folder, "config.json"))
    problems: list[str] = []
    warnings = [*_name_links(folder), *_name_adapter(folder)]
    family = config.read_family(values, problems)
    if family is None:
        raise PlanError(problems)
    model = config.read_model(values, family, problems, warnings)
    tensors: Mapping[str, StoredTensor] | None = _attempt(
        lambda: headers or read_headers(folder, functools.partial(is_derived, model)), problems
    )
    if model is None:
        raise PlanError(problems)
    mlp = family.mlp[0]
    if tensors is not None:
        warnings += _name_unread(folder, tensors)
        model, tensors = _untie(model, tensors, warnings)
        mlp = _choose_layout(family, model, tensors)
        compared: list[str] = []
        needed = _compare(model, mlp, tensors, compared)
        problems += find_cause(values, model, mlp, tensors, warnings) or compared
        tensors = needed
    vocabulary = _attempt(lambda: read_vocabulary(folder, model.n_vocab), problems)
    metadata = _attempt(lambda: card.read_card(folder, values, tensors or {}, name, warnings), problems)
    if problems or tensors is None or vocabulary is None or metadata is None:
        raise PlanError(problems)
    warnings += vocabulary.warnings
    made_by = {**config.read_provenance(values), **_describe_origin(folder)}
    return Checkpoint(folder, model, mlp, tensors, vocabulary, metadata, tuple(warnings), made_by)


def _require_config(folder: Path) -> None:
    """Raise CheckpointError for a folder that has what is no model in the place of config.json."""
    if os.path.lexists(folder / "config.json"):
        return
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder}: {ADAPTER}")
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        raise CheckpointError(f"{folder}: has no config.json, but GGUF files; name one of them: {list_names(files)}")
    raise CheckpointError(f"{folder}: has no config.json, so it is no model; name a Hugging Face folder or a GGUF file")


def _describe_origin(folder: Path) -> Metadata:
    """Return the keys that say of which repository and commit of the Hub a folder of its cache is."""
    origin = find_origin(folder)
    return {SOURCE_REPOSITORY: origin.repository, SOURCE_REVISION: origin.revision} if origin else {}


def _name_links(folder: Path) -> list[str]:
    """Return a warning that names the files which lie elsewhere; none where there are none."""
    links = links_out_of(folder)
    return [f"{folder}: {len(links)} files are links to other places: {list_names(links)}"] if links else []


def _name_adapter(folder: Path) -> list[str]:
    """Return a warning of an adapter beside the weights of its base model, which transformers would add to them."""
    names = [ADAPTER_CONFIG, *(path.name for path in sorted(folder.glob("adapter_model.*")))]
    found = next((name for name in names if (folder / name).exists()), None)
    if found is None:
        return []
    return [
        f"{folder}: the adapter beside the model ({found}) is left out; to have it in the file, merge it first: {MERGE}"
    ]


def _name_unread(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return a warning that names other files with weights than those that are read; none where there are none."""
    read = sorted({tensor.file.name for tensor in tensors.values()})
    others = sorted(path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in read)
    if not others or not read:
        return []
    return [f"{folder}: not read are {list_names(others)}; the weights are those of {list_names(read)}"]


def _attempt(step: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return step()
    except (CheckpointError, VocabularyError) as error:
        problems.append(str(error))
        return None


def _untie(
    model: Model, tensors: Mapping[str, StoredTensor], warnings: list[str]
) -> tuple[Model, Mapping[str, StoredTensor]]:
    """`model` and `tensors` as they are where embeddings are said to be tied and a head is stored as well.

    As in transformers 5 a head of other numbers than the embedding is used, and a head without an embedding is both.
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_utils.py (`tie_weights`)
    """
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if not model.tied_embeddings or head is None:
        return model, tensors
    if embedding is None:
        rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
        return model, {**rest, EMBEDDING: replace(head, name=EMBEDDING)}
    if not head.file.exists():
        warnings.append(f"{HEAD} is stored although config.json ties it: `convert` compares it with the embedding")
        return model, tensors
    if head.equals(embedding):
        warnings.append(f"{HEAD} is ignored: it equals the embedding, to which config.json ties it")
        return model, tensors
    warnings.append(
        f"{HEAD} is written although config.json says tie_word_embeddings: true: its numbers are not the embedding's "
        "(transformers 5 does the same)"
    )
    return replace(model, tied_embeddings=False), tensors


def _choose_layout(family: Family, model: Model, tensors: Mapping[str, Any]) -> MLP:
    """Return the layout of the family's MLP tensors that the checkpoint has the most names of."""
    return max(family.mlp, key=lambda mlp: len(list_expected_tensors(model, mlp).keys() & tensors.keys()))


def _compare(
    model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor], problems: list[str]
) -> dict[str, StoredTensor]:
    """Return the tensors the model needs; missing, unexpected and mis-shaped ones are all appended to `problems`."""
    wanted = list_expected_tensors(model, mlp)
    for name in wanted.keys() - tensors.keys():
        hint = " (config.json does not say tie_word_embeddings: true)" if name == HEAD else ""
        problems.append(f"missing tensor: {name} {wanted[name]}{hint}")
    for name in tensors.keys() - wanted.keys():
        if not is_derived(model, name):
            problems.append(f"unexpected tensor: {name} {tensors[name].shape} has no place in a {model.architecture}")
    found = {name: tensors[name] for name in wanted if name in tensors}
    for name, tensor in found.items():
        if tensor.shape != wanted[name]:
            problems.append(f"wrong shape: {name} is {tensor.shape}, config.json says {wanted[name]}")
        if tensor.dtype not in DTYPES:
            problems.append(f"wrong type: {name} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    problems.sort(key=_order_problem)
    return found


def _order_problem(problem: str) -> tuple[bool, str]:
    """Sorts tensor problems by kind and name, after all others, which keep their order."""
    kinds = ("missing tensor", "unexpected tensor", "wrong shape", "wrong type")
    return (True, problem) if problem.startswith(kinds) else (False, "")
