"""The recipe of `moe2gguf densify`: a model with experts becomes the dense model whose MLPs hold all of them."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.counts import find_graph, read_counts
from moe2gguf.gguf.dense_model import replace_prefix
from moe2gguf.gguf.expected import check_architecture, is_sliced, read_dimensions
from moe2gguf.gguf.file import Findings, GGUFFile, TensorType, list_problems
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.outputs import check_target
from moe2gguf.gguf.rotary import halves_to_pairs
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.gguf.writer import OutputTensor, write_model
from moe2gguf.graphs import DENSE_GRAPHS
from moe2gguf.hf.families import DENSE, MLPPlace, lay_out_tensors
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.safetensors import DTYPES
from moe2gguf.hf.write_config import describe_config
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.hf_output import copy_tensor, make_config
from moe2gguf.recipes.tensors_hf import expert_stacks
from moe2gguf.recipes.write_folder import check_folder_target, write_hf_folder

Array = NDArray[Any]
Experts = tuple[Array, Array, Array]
BLOCK_BYTES = 1 << 24
ROLES = ("gate", "up", "down")
FACTORS = "moe2gguf.densify.factors"
"""The metadata key that tells how the factors are known."""

DENSE_WIDTH = "moe2gguf.slicing.dense_feed_forward_length"

ReadLayer = Callable[[int], dict[str, Array]]
"""The number of a layer -> its joined projections by role."""


@dataclass(frozen=True)
class Densified:
    """What `densify` did; `apart` has, by layer, how far averaged experts are from their mean, over their own length.

    `how` is where the factors come from: "known" (the metadata), "even" (zero routers), "one" (a single expert), or
    "average".
    """

    path: Path
    how: str
    apart: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "factors": self.how, "apart": self.apart}


def densify(
    source: str | Path, out: str | Path, *, average: bool = False, force: bool = False, progress: Progress = silent
) -> Densified:
    """Write the model with experts `source` as the dense model `out`: a folder as a folder, a GGUF file as one file.

    The experts' gate and up rows are put one behind the other, bit for bit. Their down columns are too, each times the
    weight that the router gives every expert: one over the amplification that the metadata tells (the model comes
    back exactly, and bit for bit where that is a power of two), or 1/n where all routers are zero. Zero neurons that
    padded the experts are left out. In a file, projections of block types become F32.

    Experts that are whole MLPs have no such sum, unless there is one; `average` makes their mean, which is another
    model.

    Raises:
        PlanError: the model has no experts, its routers weigh experts by the input, it has scales that are not ours, or
            the average of slices was wanted.
        OutputError, CorruptWeightError, CheckpointError, GGUFError: as in `moe2gguf.recipes.convert.convert`.
    """
    source, out = Path(source), Path(out)
    model = MoeFolder(open_checkpoint(source)) if source.is_dir() else MoeFile(read_model(source))
    how, factor = ("average", 1.0) if average else known_factor(model)
    if average:
        require_whole_experts(model)
    model.check_target(out, force=force)
    d_ff, apart = model.d_expert if average else dense_width(model), dict[int, float]()
    # the projections of one layer follow each other, so that each layer is joined once
    read_layer = functools.lru_cache(maxsize=1)(
        functools.partial(average_layer, model, apart)
        if average
        else functools.partial(join_layer, model, factor, d_ff)
    )
    tensors = [
        make_projection(model, part, d_ff, read_layer) if isinstance(part, Part) else part for part in model.parts()
    ]
    model.write(out, tensors, d_ff, how, progress)
    return Densified(out, how, apart)


class Part(NamedTuple):
    """One projection of the dense model: its name there, the layer and role it belongs to, and its type."""

    name: str
    i: int
    role: str
    type: TensorType
    sources: tuple[str, ...] = ()


class MoeFolder:
    """A Mixtral folder; `metadata` is its provenance, sizes are named as in `moe2gguf.spec`.

    `adds_up`: whether the weights of the chosen experts add up to one.
    """

    adds_up = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, model = checkpoint, checkpoint.model
        if not model.n_expert:
            raise PlanError([f"{checkpoint.folder}: is dense already"])
        if model.n_shared:
            raise PlanError([f"{checkpoint.folder}: a folder with a shared expert; convert it, and densify the file"])
        self.path, self.metadata = checkpoint.folder, checkpoint.provenance
        self.n_expert, self.d_expert, self.d_model = model.n_expert, model.d_ff, model.d_model
        role = "gate" if "gate" in checkpoint.mlp.tensors else "gate_up"
        self._type = types.find_float(DTYPES[checkpoint.tensors[self._name(role, 0)].dtype])

    def _name(self, role: str, i: int) -> str:
        return self._checkpoint.mlp.tensors[role][0].format(i=i, e=0)

    @property
    def weight_of_expert(self) -> float:
        """The weight of every expert, all used, where the router prefers none."""
        return 1 / self.n_expert

    def routers_are_zero(self) -> bool:
        """Whether no router of any layer prefers an expert."""
        return all(
            self._checkpoint.tensors[self._name("router", i)].is_zero() for i in range(self._checkpoint.model.n_layer)
        )

    def check_target(self, out: Path, *, force: bool) -> None:
        """Refuse an `out` that is the model itself, that exists (without `force`), or that cannot be written."""
        check_folder_target(out, [self.path], force=force)

    def read_experts(self, i: int) -> Experts:
        """Gate and up (n_expert, d_expert, d_model) and down (n_expert, d_model, d_expert) of layer `i`."""
        stacks = expert_stacks(self._checkpoint, i)
        gate, up, down = (stacks[role].astype(types.FLOATS[self._type]) for role in ROLES)
        return gate, up, down

    def read_scales(self, _i: int) -> Array:
        """By what the experts of a layer are multiplied: (n_expert,), or (1,) for all."""
        return np.ones(1, np.float32)

    def parts(self) -> Iterator[Part | OutputTensor]:
        """Every tensor of the dense model, in order: a projection to be joined, or a tensor that is copied."""
        for place in lay_out_tensors(self._checkpoint.model):
            if isinstance(place, MLPPlace):
                for role in ROLES:
                    yield Part(DENSE.tensors[role][0].format(i=place.i), place.i, role, self._type)
            else:
                rule, i = place
                yield copy_tensor(self._checkpoint.tensors[rule.source.format(i=i)])

    def write(self, out: Path, tensors: Sequence[OutputTensor], d_ff: int, how: str, progress: Progress) -> None:
        """Write the dense model of d_ff neurons per layer."""
        dense = replace(self._checkpoint.model, d_ff=d_ff, n_expert=0, n_expert_used=0)
        config = make_config(self._checkpoint, describe_config(dense), self._type, {**self.metadata, FACTORS: how})
        write_hf_folder(out, tensors, self.path, lambda: {"config.json": config}, progress=progress)


class MoeFile:
    """A GGUF file, or a set of shards, of a target graph; the same attributes and methods as `MoeFolder`."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, counts = file, read_counts(file)
        graph = find_graph(str(file.metadata.get("general.architecture")))
        if graph is None or not counts.n_expert:
            raise PlanError([f"{file.path}: has no expert_count; only a file with experts can become dense"])
        scales = [name for name in file.tensors if "_exps." in name and name.endswith("scale")]
        if odd := [name for name in scales if counts.n_shared or not name.endswith("ffn_down_exps.scale")]:
            raise PlanError([f"{file.path}: has scales such as {odd[0]}; use the dense model it was made from"])
        check_architecture(file, found := Findings())
        if found.problems:
            raise GGUFError(list_problems(file.path, found.problems))
        if graph.empty_layer and not is_sliced(file):
            raise PlanError([f"{file.path}: {graph.architecture} was not sliced here, and no dense graph computes it"])
        self.path, self.metadata, self.n_expert = file.path, file.metadata, counts.n_expert
        self.graph, self.in_shared, self.adds_up = graph, counts.n_shared, graph.gating == "renormalized"
        self.dense = DENSE_GRAPHS["qwen3" if "blk.0.attn_q_norm.weight" in file.tensors else "llama"]
        first = counts.size.n_dense
        _, self.d_expert, self.d_model = file.tensors[f"blk.{first}.ffn_gate_exps.weight"].shape

    @property
    def weight_of_expert(self) -> float:
        """As `MoeFolder.weight_of_expert`."""
        return self.graph.weight_of_expert(self.n_expert - self.in_shared) if self.in_shared else 1 / self.n_expert

    def routers_are_zero(self) -> bool:
        """As `MoeFolder.routers_are_zero`."""
        names = [name for name in self._file.tensors if name.endswith("ffn_gate_inp.weight")]
        return not any(self._tensor(name).read().any() for name in names)

    def check_target(self, out: Path, *, force: bool) -> None:
        """As `MoeFolder.check_target`."""
        check_target(out, self._file.files, force=force)

    def read_experts(self, i: int) -> Experts:
        """As `MoeFolder.read_experts`."""
        gate, up, down = (self._tensor(f"blk.{i}.ffn_{role}_exps.weight").read_numbers() for role in ROLES)
        if not self.in_shared:
            return gate, up, down
        # The shared expert as so many experts of the others' width, down divided as theirs are going to be.
        shared = [self._tensor(f"blk.{i}.ffn_{role}_shexp.weight").read_numbers() for role in ROLES]
        apart = [part.reshape(self.in_shared, self.d_expert, -1) for part in shared[:2]]
        columns = shared[2].reshape(self.d_model, self.in_shared, self.d_expert).transpose(1, 0, 2)
        columns = (columns.astype(np.float32) / self.graph.weight_of_expert(len(gate))).astype(down.dtype)
        joined = zip([*apart, columns], [gate, up, down], strict=True)
        gate, up, down = (np.concatenate(pair) for pair in joined)
        return gate, up, down

    def read_scales(self, i: int) -> Array:
        """As `MoeFolder.read_scales`."""
        name = f"blk.{i}.ffn_down_exps.scale"
        return self._tensor(name).read() if name in self._file.tensors else np.ones(1, np.float32)

    def parts(self) -> Iterator[Part | OutputTensor]:
        """As `MoeFolder.parts`."""
        for name, info in self._file.tensors.items():
            if re.fullmatch(r"blk\.\d+\.(ffn_\w+_shexp\.weight|exp_probs_b\.bias|ffn_down_exps\.scale)", name):
                continue
            if name == "output.weight" and self.graph.needs_output and self._repeats_embedding():
                continue
            if match := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", name):
                kind = info.type if info.type in types.FLOATS else GGMLType.F32
                yield Part(name.replace("_exps", ""), int(match[1]), match[2], kind, (name,))
            elif not name.endswith("ffn_gate_inp.weight"):
                dense_name = name.replace(".post_attention_norm.", ".ffn_norm.")
                yield OutputTensor(dense_name, info.shape, info.type, (name,), self._choose_reader(name))

    def _repeats_embedding(self) -> bool:
        """Whether the output matrix is the embedding, of which such a graph needs a copy."""
        pieces = (self._tensor(name).blocks(BLOCK_BYTES) for name in ("output.weight", "token_embd.weight"))
        return all(np.array_equal(one, other) for one, other in zip_longest(*pieces))

    def _choose_reader(self, name: str) -> Callable[[], Iterator[Array]]:
        """What reads a tensor outside of the MLPs: as it is, or with its rows in the dense graph's rotary layout."""
        part = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
        if self.graph.rotates_halves == self.dense.rotates_halves or not part:
            return functools.partial(self._tensor(name).blocks, BLOCK_BYTES)
        rows = self._file.tensors[name].shape[0]
        d_head = read_dimensions(self._file, self.graph, []).d_head
        order = halves_to_pairs(rows // d_head, d_head)
        return lambda: iter([self._tensor(name).read()[order]])

    def _tensor(self, name: str) -> SourceTensor:
        return SourceTensor(self._file, self._file.tensors[name])

    def write(self, out: Path, tensors: Sequence[OutputTensor], d_ff: int, how: str, progress: Progress) -> None:
        """As `MoeFolder.write`."""
        name = self.dense.architecture
        dense = replace_prefix(self._file, self.graph.architecture, name)
        of_experts = f"{name}.expert_", f"{name}.leading_dense_"
        kept = {key: value for key, value in dense.metadata.items() if not key.startswith(of_experts)}
        kept |= {f"{name}.feed_forward_length": d_ff, FACTORS: how}
        if self.graph.empty_layer:
            sizes = read_dimensions(self._file, self.graph, [])
            for key in self.graph.describe_layers(sizes.n_layer, sizes.d_head, 0):
                del kept[f"{name}.{key}"]
            kept |= {f"{name}.block_count": sizes.n_layer, f"{name}.rope.dimension_count": sizes.d_head}
        kinds = {key: kind for key, kind in dense.types.items() if key in kept}
        layout = lay_out(kept, tensors, kinds)
        write_model(out, [(tensors, layout)], threads=1, progress=progress)


def known_factor(model: MoeFolder | MoeFile) -> tuple[str, float]:
    """(how it is known, the weight that the router gives every expert).

    Raises:
        PlanError: the weight depends on the input: no dense model computes the same.
    """
    metadata, amplification = model.metadata, model.metadata.get("moe2gguf.slicing.amplification")
    is_healed = any(key.startswith("moe2gguf.heal.") for key in metadata)
    if not is_healed and isinstance(amplification, float | int) and amplification > 0:
        return "known", 1 / amplification
    if model.n_expert == 1 and model.adds_up:
        return "one", 1.0
    if model.routers_are_zero():
        return "even", model.weight_of_expert
    raise PlanError(
        [
            f"{model.path}: its experts do not add up to one MLP (healed, amplified as any or fitted, or made by "
            "another program), so no dense model computes the same; use the dense model it was made from"
        ]
    )


def require_whole_experts(model: MoeFolder | MoeFile) -> None:
    """Raise PlanError unless each expert is an MLP of its own, and could stand for all."""
    if "moe2gguf.slicing.expert_count" in model.metadata:
        raise PlanError([f"{model.path}: its experts are slices of one MLP; without --average they are joined"])
    if not model.adds_up:
        raise PlanError(
            [f"{model.path}: the weights of its chosen experts do not add up to one, so no mean is like them"]
        )


def dense_width(model: MoeFolder | MoeFile) -> int:
    """d_ff of the dense model: all neurons of the experts but the padding, where the metadata tells it."""
    n_neuron = model.n_expert * model.d_expert
    d_ff = model.metadata.get(DENSE_WIDTH)
    return d_ff if type(d_ff) is int and 0 < d_ff <= n_neuron else n_neuron


def make_projection(model: MoeFolder | MoeFile, part: Part, d_ff: int, read_layer: ReadLayer) -> OutputTensor:
    """The tensor of a projection; its layer is joined when it is asked for."""
    shape = (model.d_model, d_ff) if part.role == "down" else (d_ff, model.d_model)
    return OutputTensor(part.name, shape, part.type, part.sources, functools.partial(_read_role, read_layer, part))


def _read_role(read_layer: ReadLayer, part: Part) -> Iterator[Array]:
    yield read_layer(part.i)[part.role]


def average_layer(model: MoeFolder | MoeFile, apart: dict[int, float], i: int) -> dict[str, Array]:
    """The mean of the experts of layer `i` by role; `apart` gets how far they are from it, over their own length."""
    result, far, length = dict[str, Array](), 0.0, 0.0
    for role, stack in zip(ROLES, model.read_experts(i), strict=True):
        experts = stack.astype(np.float32) * (model.read_scales(i)[:, None, None] if role == "down" else 1)
        mean = experts.mean(axis=0)
        far += float(np.square(experts - mean).sum())
        length += float(np.square(experts).sum())
        result[role] = mean.astype(stack.dtype)
    apart[i] = (far / length) ** 0.5 if length else 0.0
    return result


def join_layer(model: MoeFolder | MoeFile, factor: float, d_ff: int, i: int) -> dict[str, Array]:
    """The projections of layer `i` by role; see `join_experts`."""
    return join_experts(*model.read_experts(i), model.read_scales(i).astype(np.float64) * factor, d_ff)


def join_experts(gate: Array, up: Array, down: Array, factors: Array, d_ff: int) -> dict[str, Array]:
    """One MLP of d_ff neurons by role: gate and up (d_ff, d_model), down (d_model, d_ff) times `factors`.

    There is a factor for each expert, or one for all. The experts are gate and up (n_expert, d_expert, d_model) and
    down (n_expert, d_model, d_expert). The product is rounded once, to the weights' type. Zero neurons beyond d_ff are
    left out, from the last one on.

    Raises:
        PlanError: fewer neurons are zero than have to be left out.
    """
    d_model = gate.shape[-1]
    gate, up = gate.reshape(-1, d_model), up.reshape(-1, d_model)
    # (n_expert, d_model, d_expert) -> (d_model, n_expert * d_expert): columns in the order of the rows of gate and up
    down = (down * factors.astype(np.float32)[:, None, None]).astype(down.dtype)
    down = down.transpose(1, 0, 2).reshape(d_model, -1)
    zero = ~(gate.any(1) | up.any(1) | down.any(0))
    dropped = np.flatnonzero(zero)[::-1][: len(gate) - d_ff]
    kept = np.setdiff1d(np.arange(len(gate)), dropped)
    if len(kept) != d_ff:
        kept_least = len(gate) - len(dropped)
        raise PlanError([f"{DENSE_WIDTH}: says {d_ff}, but {kept_least} neurons of the experts are not zero"])
    return {"gate": gate[kept], "up": up[kept], "down": np.ascontiguousarray(down[:, kept])}
