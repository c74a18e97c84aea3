"""A dense GGUF file as the model that a conversion starts from.

Arch `llama` is taken as it is. Arch `qwen2` computes the same but for the rotary layout, in which element j of a head
is rotated with j + d_head / 2 instead of its neighbor, and arch `qwen3` normalizes queries and keys besides; whole rows
of q and k change places where the target's layout is another: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L3052-L3117
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gguf import GGUFValueType as Kind

from moe2gguf.errors import PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.expected import check_architecture, read_dimensions
from moe2gguf.gguf.file import Findings, GGUFFile, ValueType, quote_text, refuse_alignment
from moe2gguf.gguf.metadata import yarn_attention
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.graphs import DENSE_GRAPHS, EXPERT_COMMANDS, MIXTRAL
from moe2gguf.spec import Dimensions, MetadataValue, Model, Rope

_MLP_EXTRA = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.(bias|scale|input_scale)")


@dataclass(frozen=True)
class DenseFile:
    """A dense GGUF file (or set of shards) whose description is complete; no tensor has been read.

    `file` has the keys and names of arch `llama`; `rotates_halves` where q and k have the rows of arch `qwen2`.
    """

    file: GGUFFile
    model: Model
    rotates_halves: bool
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file, or the first shard."""
        return self.file.path

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return self.file.files

    @property
    def own_files(self) -> tuple[Path, ...]:
        """The files that must not be written over."""
        return self.file.files

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor, by name, in the file's order."""
        return {name: SourceTensor(self.file, info) for name, info in self.file.tensors.items()}


def open_dense(path: Path, *, name: str | None = None) -> DenseFile:
    """Open the dense GGUF file `path`, or the set of shards that it belongs to; `name` replaces the model's name.

    Raises:
        GGUFError: not a sound GGUF file, or a set of shards that is not whole.
        PlanError: every reason why its model cannot be converted.
    """
    file = read_model(path)
    architecture = file.metadata.get("general.architecture")
    if count := read_counts(file).n_expert:
        raise PlanError([f"{path}: has {count} experts already; `moe2gguf {EXPERT_COMMANDS}` work on such a file"])
    if not isinstance(architecture, str) or architecture not in DENSE_GRAPHS:
        what = quote_text(architecture) if isinstance(architecture, str) else "none"
        raise PlanError(
            [
                f"{path}: its architecture is {what}; of GGUF files, those of {', '.join(DENSE_GRAPHS)} can be "
                "converted, as llama.cpp computes others in another way"
            ]
        )
    found, graph = Findings(), DENSE_GRAPHS[architecture]
    check_architecture(file, found)
    file = _rename(replace_prefix(file, architecture, "llama"), name)
    if problems := _refusals(file):
        raise PlanError(problems)
    dimensions = read_dimensions(file, MIXTRAL, [])
    if dimensions.d_head % 2:
        found.problems.append(f"heads of {dimensions.d_head}: the rotary embedding needs pairs")
    model = _model(file, dimensions, architecture, found.problems)
    if found.problems:
        raise PlanError([f"{path}: {problem}" for problem in found.problems])
    return DenseFile(file, model, graph.rotates_halves, tuple(found.notes))


def replace_prefix(file: GGUFFile, old: str, new: str) -> GGUFFile:
    """The same file with the keys of the architecture `new` in place of those of `old`."""

    def rename(key: str) -> str:
        return f"{new}." + key.removeprefix(f"{old}.") if key.startswith(f"{old}.") else key

    metadata: dict[str, MetadataValue] = {rename(key): value for key, value in file.metadata.items()}
    kinds = {rename(key): kind for key, kind in file.types.items()}
    return replace(file, metadata={**metadata, "general.architecture": new}, types=kinds)


def _rename(file: GGUFFile, name: str | None) -> GGUFFile:
    if name is None:
        return file
    kinds = {**file.types, "general.name": ValueType(Kind.STRING)}
    return replace(file, metadata={**file.metadata, "general.name": name}, types=kinds)


def _refusals(file: GGUFFile) -> list[str]:
    """What makes the file no dense model that can be cut."""
    found = []
    if (kind := file.metadata.get("general.type", "model")) != "model":
        found.append(f"{file.path}: its general.type is {quote_text(str(kind))}; only a model can be cut")
    if extra := [name for name in file.tensors if _MLP_EXTRA.fullmatch(name)]:
        found.append(f"{file.path}: experts have no place for {len(extra)} tensors of its MLPs, such as {extra[0]}")
    odd = [t.name for t in file.tensors.values() if t.type not in (*types.FLOATS, *types.BLOCKS)]
    if odd:
        kinds = ", ".join(sorted({file.tensors[name].type.name for name in odd}))
        found.append(f"{file.path}: {kinds} is no type of weights, but that of {quote_text(odd[0])}")
    return found + refuse_alignment(file)


def _model(file: GGUFFile, it: Dimensions, architecture: str, problems: list[str]) -> Model:
    """The hyper-parameters, of which `check_architecture` has reported those that are missing or wrong."""
    context = file.metadata.get("llama.context_length")
    epsilon = file.metadata.get("llama.attention.layer_norm_rms_epsilon")
    n_context = context if isinstance(context, int) else 0

    def biased(*names: str) -> bool:
        return any(name.endswith(names) for name in file.tensors)

    return Model(
        architecture=architecture,
        n_layer=it.n_layer,
        d_model=it.d_model,
        d_ff=it.d_ff,
        n_head=it.n_head,
        n_head_kv=it.n_head_kv,
        d_head=it.d_head,
        n_vocab=it.n_vocab,
        n_context=n_context,
        rms_epsilon=epsilon if isinstance(epsilon, float) else 0.0,
        rope=replace(
            _rope(file, n_context, problems), by_tensor=any(name.startswith("rope_") for name in file.tensors)
        ),
        tied_embeddings="output.weight" not in file.tensors,
        bias_qkv=biased("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias"),
        bias_output=biased("attn_output.bias"),
        head_norms=biased("attn_q_norm.weight"),
    )


def _rope(file: GGUFFile, n_context: int, problems: list[str]) -> Rope:
    """Rotary settings as arch `llama` reads them: no type means linear, no factor (or 0) that nothing is scaled.

    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L1410-L1431 and, for yarn's attn_factor, to
    which llama.cpp adds its own, https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-context.cpp#L177-L214
    """

    def number(key: str, default: float) -> float:
        value = file.metadata.get(f"llama.rope.{key}", default)
        if isinstance(value, float) and math.isfinite(value) and (value > 0 or value == default):
            return value
        problems.append(
            f"metadata llama.rope.{key}: expected a finite number above zero, found {quote_text(str(value))}"
        )
        return 1.0

    theta, kind = number("freq_base", 10000.0), file.metadata.get("llama.rope.scaling.type", "linear")
    factor = number("scaling.factor", number("scale_linear", 0.0)) or 1.0
    attention = number("scaling.attn_factor", 1.0)
    if kind == "yarn":
        original = file.metadata.get("llama.rope.scaling.original_context_length")
        whole = original if isinstance(original, int) and original > 0 else n_context
        return Rope(
            theta,
            "yarn",
            factor,
            whole,
            attention_factor=yarn_attention(factor) * attention if attention != 1 else None,
        )
    return Rope(theta, "linear", factor) if kind == "linear" and factor != 1 else Rope(theta)


def carried_metadata(
    dense: DenseFile, changes: Mapping[str, MetadataValue], architecture: str
) -> tuple[dict[str, MetadataValue], dict[str, ValueType]]:
    """The file's metadata in its order with `changes`, for `architecture`, and how what is unchanged was stored."""
    file = replace_prefix(dense.file, "llama", architecture)
    metadata = {**file.metadata, **changes}
    return metadata, file.kinds_of(metadata)


def largest_block(dense: DenseFile, d_expert: int, n_expert: int) -> int:
    """How many neurons must stay together so that as many down projections as possible keep their blocks.

    1 where no expert of `d_expert` neurons holds whole blocks, or there are fewer blocks than experts.
    """
    downs = (tensor for name, tensor in dense.tensors.items() if name.endswith(".ffn_down.weight"))
    sizes = sorted({tensor.block for tensor in downs}, reverse=True)
    return next((n for n in sizes if d_expert % n == 0 and dense.model.d_ff // n >= n_expert), 1)
