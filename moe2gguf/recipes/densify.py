"""The way back: a model with experts becomes a dense one, of the form it came in (a folder, or a GGUF file)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import PlanError
from moe2gguf.experts.text import read_text, windows
from moe2gguf.gguf import types
from moe2gguf.gguf.file import GGUFFile, TensorInfo
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.metadata import BIAS_NEURON
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.gguf.writer import OutputTensor, check_target, write_model
from moe2gguf.hf.companions import copy_companions
from moe2gguf.hf.families import DENSE, MLPPlace, lay_out_tensors
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.json_file import read_json
from moe2gguf.hf.paths import inside
from moe2gguf.hf.safetensors import DTYPES
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.mixtral import llama_config
from moe2gguf.recipes.tensors_hf import expert_stacks
from moe2gguf.recipes.write_folder import check_folder_target, replacing_folder, write_json, write_shards
from moe2gguf.spec import Metadata, Model

Array = NDArray[Any]
BLOCK_BYTES = 1 << 24
ROLES = ("gate", "up", "down")
DROPPED = ("llama.expert_count", "llama.expert_used_count")


@dataclass(frozen=True)
class Densified:
    """What `densify` did: how the factors were found ("known", "even", "least squares"), and the errors by layer."""

    path: Path
    how: str
    errors: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "factors": self.how, "errors": list(self.errors)}


def densify(
    source: Path,
    out: Path,
    *,
    text: Path | None = None,
    used: int | None = None,
    n_token: int = 8192,
    force: bool = False,
    progress: Progress = silent,
) -> Densified:
    """Write the model with experts `source` as the dense model `out`: a folder as a folder, a GGUF file as one.

    Gate and up projections are put one behind the other, bit for bit. The down projections too, each multiplied by a
    constant that stands for the weight the router gave it: one over the amplification where the metadata tells it
    (slices by this program: exact, and bit for bit where it is a power of two), 1/n where all routers are zero, and
    else the least-squares constant per expert on a `text`, at `used` experts per token (folders only). Zero neurons
    that padded the experts are left out.

    Raises:
        PlanError: no experts, or factors that only a text can tell; every reason is listed.
        OutputError, CorruptWeightError, CheckpointError, GGUFError, CalibrationError: as in
            `moe2gguf.recipes.convert.convert`.
    """
    if source.is_dir():
        return _densify_folder(open_checkpoint(source), out, text, used, n_token, force, progress)
    if text or used:
        raise PlanError([f"{source}: --text and --used need the Hugging Face folder of the model; densify that"])
    return _densify_file(read_model(source), out, force, progress)


def known_factor(metadata: Metadata, n_expert: int, zero_routers: bool) -> tuple[str, float] | None:
    """(how, factor) where every expert's factor is known: from the metadata, or from routers that prefer nothing.

    With a bias neuron there is none: what it stands for runs in the dense model.
    """
    amplification = metadata.get("moe2gguf.slicing.amplification")
    if metadata.get(BIAS_NEURON) is True:
        return None
    healed = any(key.startswith("moe2gguf.heal.") for key in metadata)
    if isinstance(amplification, float | int) and amplification > 0 and not healed:
        return "known", 1 / amplification
    return ("even", 1 / n_expert) if zero_routers else None


_NO_FACTOR = (
    "its routers weigh the experts by the input (healed, --amplify any or fitted, or another program's), so one MLP "
    "can only come close"
)
_BIASED = (
    "one neuron of every layer became a bias for the experts that do not run, so that all of them "
    "together are not the dense model"
)


def _no_factor(metadata: Metadata) -> str:
    """Why there is no `known_factor`."""
    return _BIASED if metadata.get(BIAS_NEURON) is True else _NO_FACTOR


def _densify_folder(
    checkpoint: Checkpoint,
    out: Path,
    text: Path | None,
    used: int | None,
    n_token: int,
    force: bool,
    progress: Progress,
) -> Densified:
    model = checkpoint.model
    if not model.n_expert:
        raise PlanError([f"{checkpoint.folder}: is dense already"])
    check_folder_target(out, [checkpoint.folder], force=force)
    routers = (checkpoint.tensors[checkpoint.mlp.tensors["router"][0].format(i=i)] for i in range(model.n_layer))
    known = known_factor(checkpoint.provenance, model.n_expert, text is None and all(r.is_zero() for r in routers))
    errors: tuple[float, ...] = ()
    if known and text is None:
        how, factors = known[0], [np.full(model.n_expert, known[1], np.float32)] * model.n_layer
    elif text is None:
        raise PlanError([f"{checkpoint.folder}: {_no_factor(checkpoint.provenance)}: give --text to fit it to"])
    else:
        how, (factors, errors) = "least squares", _fit(checkpoint, text, used, n_token, progress)
    keep = _kept(checkpoint.provenance, model)
    dense = replace(model, d_ff=keep, n_expert=0, n_expert_used=0)
    tensors = list(_folder_tensors(checkpoint, factors, keep))
    values = read_json(inside(checkpoint.folder, "config.json"))
    provenance = {**checkpoint.provenance, "moe2gguf.densify.factors": how}
    with replacing_folder(out) as partial:
        with progress("write", sum(tensor.n_bytes for tensor in tensors)) as advance:
            write_shards(partial, tensors, advance)
        write_json(partial / "config.json", llama_config(dense, values, provenance))
        copy_companions(checkpoint.folder, partial)
        open_checkpoint(partial)
    return Densified(out, how, errors)


def _kept(metadata: Metadata, model: Model) -> int:
    """Neurons of the dense MLP: all places but the padding, where the metadata tells it."""
    places = model.n_expert * model.d_ff
    d_ff = metadata.get("moe2gguf.slicing.dense_feed_forward_length")
    return d_ff if isinstance(d_ff, int) and 0 < d_ff <= places else places


def _fit(
    checkpoint: Checkpoint, text: Path, used: int | None, n_token: int, progress: Progress
) -> tuple[list[NDArray[np.float32]], tuple[float, ...]]:
    """Factors and errors of every layer, by least squares on the text."""
    try:
        from moe2gguf.experts.fold import fold
        from moe2gguf.experts.forward import Layers, choose_device
        from moe2gguf.experts.heal.moe_layer import Stored
    except ImportError as error:
        raise PlanError(
            [f"--text needs torch and transformers ({error}): pip install 'moe2gguf[calibrate]'"]
        ) from error
    model = checkpoint.model
    k = used or model.n_expert_used
    if not 1 <= k <= model.n_expert:
        raise PlanError([f"--used {k}: must lie between 1 and the number of experts, {model.n_expert}"])
    first = checkpoint.vocabulary.first_id
    ids = windows(checkpoint.folder, read_text(text), n_token, min(512, model.n_context), first)
    layers = Layers(model, functools.partial(_fused, checkpoint), choose_device(None))
    with progress("fit", ids.size * model.n_layer) as advance:
        found = fold(layers, lambda i: Stored(*expert_stacks(checkpoint, i)), ids, k, advance)
    return [layer.factors for layer in found], tuple(layer.error for layer in found)


def _fused(checkpoint: Checkpoint, name: str, rows: NDArray[np.int64] | None = None) -> Array:
    """A tensor by the name that transformers' modules have, experts stacked; of others these rows."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(gate\.weight|experts\.(?:gate_up|down)_proj)", name)
    if not match:
        return checkpoint.read(name, rows)
    router, gate, up, down = expert_stacks(checkpoint, int(match[1]))
    made = {"gate.weight": router, "experts.down_proj": down}
    return made[match[2]] if match[2] in made else np.concatenate([gate, up], 1)


def _folder_tensors(
    checkpoint: Checkpoint, factors: Sequence[NDArray[np.float32]], keep: int
) -> Iterator[OutputTensor]:
    """Every tensor of the dense folder; the projections of one layer are made together, when the first is asked for."""
    model = checkpoint.model
    role_name = "gate" if "gate" in checkpoint.mlp.tensors else "gate_up"
    kind = types.of_dtype(DTYPES[checkpoint.tensors[checkpoint.mlp.tensors[role_name][0].format(i=0, e=0)].dtype])

    @functools.lru_cache(maxsize=1)
    def layer(i: int) -> dict[str, Array]:
        _, gate, up, down = (stack.astype(types.FLOATS[kind]) for stack in expert_stacks(checkpoint, i))
        return joined(gate, up, down, factors[i], keep)

    def blocks(i: int, role: str) -> Iterator[Array]:
        yield layer(i)[role]

    for place in lay_out_tensors(model):
        if isinstance(place, MLPPlace):
            for role in ROLES:
                shape = (model.d_model, keep) if role == "down" else (keep, model.d_model)
                name = DENSE.tensors[role][0].format(i=place.i)
                yield OutputTensor(name, shape, kind, (), functools.partial(blocks, place.i, role))
            continue
        rule, number = place
        source = checkpoint.tensors[rule.source.format(i=number)]
        stored = types.of_dtype(DTYPES[source.dtype])
        yield OutputTensor(
            source.name, source.shape, stored, (source.name,), functools.partial(source.blocks, BLOCK_BYTES)
        )


def joined(gate: Array, up: Array, down: Array, factors: NDArray[np.float32], keep: int) -> dict[str, Array]:
    """One MLP of `keep` neurons: gate and up (n, d_expert, d_model), down (n, d_model, d_expert) times factors (n,).

    The product is rounded once to the weights' type. Zero neurons beyond `keep` are left out, from the last one on.
    """
    d_model = gate.shape[-1]
    gate, up = gate.reshape(-1, d_model), up.reshape(-1, d_model)
    scaled = down * factors.astype(down.dtype)[:, None, None]
    wide = scaled.transpose(1, 0, 2).reshape(d_model, -1)
    zero = ~(gate.any(1) | up.any(1) | wide.any(0))
    drop = np.flatnonzero(zero)[::-1][: len(gate) - keep]
    chosen = np.setdiff1d(np.arange(len(gate)), drop)
    if len(chosen) != keep:
        raise PlanError([f"{len(gate) - keep} neurons should be padding, but only {len(drop)} are zero"])
    return {"gate": gate[chosen], "up": up[chosen], "down": np.ascontiguousarray(wide[:, chosen])}


def _densify_file(file: GGUFFile, out: Path, force: bool, progress: Progress) -> Densified:
    """A GGUF file of arch `llama`; projections of block types become F32, all else keeps its bytes."""
    n = file.metadata.get("llama.expert_count")
    if not isinstance(n, int) or n < 1:
        raise PlanError([f"{file.path}: has no llama.expert_count; only a file with experts can become dense"])
    names = [name for name in file.tensors if name.endswith("ffn_gate_inp.weight")]
    known = known_factor(
        file.metadata, n, all(not SourceTensor(file, file.tensors[name]).read_numbers().any() for name in names)
    )
    if known is None:
        why = _no_factor(file.metadata)
        raise PlanError([f"{file.path}: {why}, and that needs the Hugging Face folder and a --text"])
    how, factor = known
    if scales := [name for name in file.tensors if name.endswith("_exps.scale")]:
        raise PlanError([f"{file.path}: has expert scales such as {scales[0]}; convert the model without them"])
    d_expert = file.metadata.get("llama.feed_forward_length")
    places = n * (d_expert if isinstance(d_expert, int) else 0)
    wanted = file.metadata.get("moe2gguf.slicing.dense_feed_forward_length")
    keep = wanted if isinstance(wanted, int) and 0 < wanted <= places else places
    tensors = list(_file_tensors(file, np.full(n, factor, np.float32), keep))
    kept = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    metadata = {**kept, "llama.feed_forward_length": keep, "moe2gguf.densify.factors": how}
    check_target(out, [*file.files], force=force)
    kinds: Mapping[str, Any] = {key: kind for key, kind in file.types.items() if key in kept}
    layout = lay_out(metadata, tensors, kinds)
    write_model(out, [(tensors, layout)], threads=1, progress=progress)
    return Densified(out, how)


def _file_tensors(file: GGUFFile, factors: NDArray[np.float32], keep: int) -> Iterator[OutputTensor]:
    @functools.lru_cache(maxsize=1)
    def layer(i: int) -> dict[str, Array]:
        gate, up, down = (
            SourceTensor(file, file.tensors[f"blk.{i}.ffn_{role}_exps.weight"]).read_numbers() for role in ROLES
        )
        return joined(gate, up, down, factors, keep)

    def blocks(i: int, role: str) -> Iterator[Array]:
        yield layer(i)[role]

    for info in file.tensors.values():
        match = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", info.name)
        if match:
            i, role = int(match[1]), match[2]
            d_model = info.shape[1] if role == "down" else info.shape[2]
            shape = (d_model, keep) if role == "down" else (keep, d_model)
            kind = info.type if info.type in types.FLOATS else GGMLType.F32
            name = info.name.replace("_exps", "")
            yield OutputTensor(name, shape, kind, (info.name,), functools.partial(blocks, i, role))
        elif not info.name.endswith("ffn_gate_inp.weight"):
            yield OutputTensor(info.name, info.shape, info.type, (info.name,), functools.partial(_bytes, file, info))


def _bytes(file: GGUFFile, info: TensorInfo) -> Iterator[Array]:
    """The tensor's bytes as they are."""
    yield from file.chunks(info, max(info.row_bytes, BLOCK_BYTES // max(info.row_bytes, 1) * info.row_bytes))
