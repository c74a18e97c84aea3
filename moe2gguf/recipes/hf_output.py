"""What a Hugging Face folder of a target's class holds: a sliced model, or one whose experts were healed.

`MixtralForCausalLM` and `Glm4MoeForCausalLM` route as llama.cpp's graphs `mixtral` and `glm4moe` do
(https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py,
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/glm4_moe/modeling_glm4_moe.py).
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import PlanError
from moe2gguf.experts.heal.log import LogLine, ScoreLine, to_dict
from moe2gguf.experts.heal.work import ExpertWeights
from moe2gguf.experts.layer import LayerReport
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.metadata import CALIBRATION_LOAD, SOURCE_DIGEST
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.graphs import GRAPHS, MIXTRAL
from moe2gguf.hf.families import DENSE, FOLDER_FORMS, MLPPlace, lay_out_tensors
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.json_file import read_bytes, read_json
from moe2gguf.hf.paths import resolve_inside
from moe2gguf.hf.safetensors import DTYPES, SourceDigest, StoredTensor
from moe2gguf.hf.write_config import GROUPED_ROW_BYTES, describe_config
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.imatrix_match import Guidance
from moe2gguf.recipes.calibrate import find_experts, require_own_calibration
from moe2gguf.recipes.convert import Conversion, check_kept
from moe2gguf.recipes.inputs import read_inputs
from moe2gguf.recipes.options import Options
from moe2gguf.recipes.outputs import output_tensors
from moe2gguf.recipes.plan import Plan, find_target, make_plan
from moe2gguf.recipes.source import open_source
from moe2gguf.recipes.tensors import ExpertSource, plain_experts
from moe2gguf.recipes.tensors_hf import BLOCK_BYTES, ROLES, plan_sliced_mlp
from moe2gguf.recipes.write_folder import MARK, check_folder_target, to_json, write_hf_folder
from moe2gguf.spec import Metadata, MetadataValue, Model, Slicing

Array = NDArray[Any]
FOLDER_TYPES = ("auto", "f32", "f16", "bf16")
"""The types that a folder can hold."""

MAX_CARD_BYTES = 4 << 20

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "initializer_range")
"""Keys of the source's config.json that are copied: the records of `moe2gguf.spec` do not have them."""

FRONT_MATTER = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}
"""Key of a model card's front matter -> the `general.*` key of the metadata that it repeats."""

LAYER_FIGURES = ("n_shared", "shared_rate", "energy_kept", "energy_oracle", "hit_rate", "refit_error")
"""Columns of a card's table of layers; see `moe2gguf.experts.layer.LayerReport`."""

WEIGHTS_NOTE = {
    "mixtral": "The weights are those of the dense model but for the down projections, which carry the experts' "
    "amplification, and the routers. `moe2gguf convert` makes a GGUF file of this folder.",
    "glm4moe": "The shared expert counts among them. With all experts the model is the dense one, up to a refit; "
    "`num_experts_per_tok` in config.json, without the shared ones, may be any number. `moe2gguf convert` makes a GGUF "
    "file of this folder.",
}

CHANGED_BY: dict[str, tuple[str, ...]] = {
    "router": ("router",),
    "bias": (),
    **dict.fromkeys(("gate", "up", "gate_up", "shared_gate", "shared_up"), ("experts", "lora")),
    **dict.fromkeys(("down", "shared_down"), ("down", "experts", "lora")),
}
"""Role of an MLP's tensor -> the parts of `moe2gguf.experts.methods.TRAINED` that change it."""


# --- a sliced model ---------------------------------------------------------------------------------------------------


def write_folder(
    model: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda _: None,
) -> Conversion:
    """Slice the dense folder `model` into the folder `out`, which appears only when it is complete.

    Tensors keep the type in which they are stored, or get that of the options; routers are float32. The provenance
    stands in config.json under "moe2gguf". Arguments as in `moe2gguf.recipes.convert.convert`.

    Raises:
        PlanError: what the class cannot hold: attention biases, a model that is not sliced here, block types.
        OutputError, CorruptWeightError, CalibrationError: as in `moe2gguf.recipes.convert.convert`.
    """
    options, out = options or Options(), Path(out)
    source = open_source(Path(model), name=options.name)
    inputs = read_inputs(source, options)
    plan = make_plan(source, inputs)
    found = [*folder_refusals(plan)]
    if found or plan.slicing is None or not isinstance(source, Checkpoint):
        raise PlanError(found)
    on_plan(plan)
    planned = folder_tensors(plan, source, plan.slicing, plain_experts(plan.model, plan.slicing), SourceDigest())
    size = sum(tensor.n_bytes for tensor in planned)
    check_folder_target(out, [source.folder, *options.files], force=force, size=size)
    check_kept(plan, [out], force=force)
    work = out.with_name(out.name + ".calibration")
    experts = find_experts(plan, inputs, work, progress, resume=resume)
    digest = SourceDigest()
    tensors = folder_tensors(plan, source, plan.slicing, experts, digest)
    make_texts = functools.partial(_describe_sliced, plan, source, plan.slicing, digest, experts.reports)
    write_hf_folder(out, tensors, source.folder, make_texts, progress=progress)
    experts.finish()
    return Conversion(out, plan, digest.hexdigest(source.tensors), experts.reports)


def folder_refusals(plan: Plan) -> Iterator[str]:
    """Every reason why `plan` cannot be written as a folder of the target's class in transformers."""
    is_folder, is_float = isinstance(plan.source, Checkpoint), plan.options.types.type.lower() in FOLDER_TYPES
    if plan.slicing is None:
        what = "keeps the checkpoint's own experts" if plan.model.n_expert else "leaves the model dense"
        yield f"--format hf: this conversion {what}, so the folder would be the source again; use the source"
    if not is_folder:
        yield "--format hf: a folder is made from a Hugging Face folder, not from a GGUF file; start from that"
    yield from _refuse_class(plan)
    yield from _refuse_folder_options(plan.options)
    if plan.slicing and is_folder and is_float:
        yield from _find_short_rows(plan, plan.slicing)


def _refuse_class(plan: Plan) -> Iterator[str]:
    """What the target's class lacks."""
    model, options = plan.model, plan.options
    if plan.slicing and plan.slicing.scale_tensor:
        yield "--expert-scale: transformers' MixtralForCausalLM has no scales; leave it out"
    if options.graph.hf_class is None:
        better = find_target(model)
        way = better if GRAPHS[better].hf_class else "mixtral"
        yield f"--format hf: transformers has no class for --target {options.target}; choose --target {way}"
    if options.graph is MIXTRAL and (model.bias_qkv or model.bias_output):
        yield (
            f"--format hf: {model.architecture} has attention biases, and transformers' MixtralForCausalLM has none; "
            "choose --target glm4moe, or write a GGUF file instead, whose graphs have them"
        )


def _refuse_folder_options(options: Options) -> Iterator[str]:
    """Options that are for GGUF files."""
    chosen = options.types
    if options.shard_size is not None:
        yield "--shard-size: is for GGUF files; leave it out"
    if chosen.type.lower() not in FOLDER_TYPES:
        yield f"--type {chosen.type}: a Hugging Face folder holds auto, f32, f16 or bf16; quantize a GGUF file"
    if chosen.tensor_types or chosen.type_rules:
        yield "--tensor-type, --type-rules: types of single tensors are for GGUF files; leave them out"


def _find_short_rows(plan: Plan, slicing: Slicing) -> Iterator[str]:
    """Why transformers' default way to compute experts would refuse their rows, if it would."""
    size, d_model = types.FLOATS[_find_type(plan)].itemsize, plan.model.d_model
    step = GROUPED_ROW_BYTES // size
    needs = f"transformers' {plan.options.graph.hf_class} computes rows of a multiple of {GROUPED_ROW_BYTES} bytes only"
    if d_model % step:
        yield f"--format hf: rows of {d_model} numbers have {d_model * size} bytes, and {needs}; write a GGUF file"
    elif slicing.d_expert % step:
        rows = f"experts of {slicing.d_expert} neurons have rows of {slicing.d_expert * size} bytes"
        yield f"--format hf: {rows}, and {needs}; add --align {math.lcm(slicing.align, step)}"


def _find_type(plan: Plan) -> TensorType:
    """The type of the projections of the folder to come."""
    chosen, gate = plan.options.types.type, plan.source.tensors[DENSE.tensors["gate"][0].format(i=0)]
    return types.find_float(DTYPES[gate.dtype]) if chosen.lower() == "auto" else types.find_type(chosen)


def folder_tensors(
    plan: Plan, checkpoint: Checkpoint, slicing: Slicing, experts: ExpertSource, digest: SourceDigest
) -> tuple[OutputTensor, ...]:
    """Every tensor of the folder under its name there, experts one by one; sources are hashed as they are read."""
    chosen = plan.options.types.type
    kind, names = None if chosen.lower() == "auto" else types.find_type(chosen), FOLDER_FORMS[slicing.target].tensors
    tensors = []
    for place in lay_out_tensors(checkpoint.model):
        if not isinstance(place, MLPPlace):
            rule, layer = place
            tensors.append(_convert_tensor(checkpoint.tensors[rule.source.format(i=layer)], kind, digest))
            continue
        if (i := place.i) < slicing.leading_dense:
            stored = (checkpoint.tensors[name.format(i=i)] for name, _ in DENSE.tensors.values())
            tensors += [_convert_tensor(tensor, kind, digest) for tensor in stored]
            continue
        planned = plan_sliced_mlp(checkpoint, slicing, i)
        for one in output_tensors(planned, checkpoint, experts, digest, Guidance()):
            name = names[ROLES[one.name.split(".")[2]]][0]
            if "{e}" in name:
                tensors += _split_stack(one, name, i, kind)
            else:
                chosen_type = kind if kind is not None and one.sources else one.type
                tensors.append(OutputTensor(name.format(i=i), one.shape, chosen_type, one.sources, one.blocks))
    return tuple(tensors)


def _convert_tensor(source: StoredTensor, kind: TensorType | None, digest: SourceDigest) -> OutputTensor:
    """A tensor as it is stored, or a matrix as `kind`."""
    chosen = kind if kind is not None and len(source.shape) > 1 else types.find_float(DTYPES[source.dtype])
    blocks = functools.partial(digest.blocks, source, BLOCK_BYTES)
    return OutputTensor(source.name, source.shape, chosen, (source.name,), blocks)


def _split_stack(stack: OutputTensor, name: str, i: int, kind: TensorType | None) -> Iterator[OutputTensor]:
    """The experts of a stack one by one."""
    experts = _Experts(stack)
    for e in range(stack.shape[0]):
        chosen = stack.type if kind is None else kind
        blocks = functools.partial(experts.take, e)
        yield OutputTensor(name.format(i=i, e=e), stack.shape[1:], chosen, stack.sources, blocks)


class _Experts:
    """The experts of a stack: all are made when the first is asked for, and each is let go when it is taken."""

    def __init__(self, stack: OutputTensor) -> None:
        self._stack = stack
        self._made: dict[int, Array] = {}

    def take(self, e: int) -> Iterator[Array]:
        if e not in self._made:
            self._made.update(enumerate(self._stack.blocks()))
        yield self._made.pop(e)


def _describe_sliced(
    plan: Plan, checkpoint: Checkpoint, slicing: Slicing, digest: SourceDigest, reports: Sequence[LayerReport]
) -> dict[str, str]:
    """config.json and the model card, when all tensors have been read.

    Raises:
        CalibrationError: a loaded calibration is of another model, as its digest tells now.
    """
    require_own_calibration(plan, digest)
    provenance = {key: value for key, value in plan.metadata.items() if key.startswith("moe2gguf.")}
    if reports:
        provenance[CALIBRATION_LOAD] = [share for report in reports for share in report.load]
    provenance[SOURCE_DIGEST] = digest.hexdigest(checkpoint.tensors)
    return {
        "config.json": make_config(
            checkpoint, _describe_class(checkpoint.model, slicing), _find_type(plan), provenance
        ),
        "README.md": sliced_card(plan.metadata, slicing, provenance, reports),
    }


def _describe_class(model: Model, slicing: Slicing) -> dict[str, Any]:
    """config.json of `model`, sliced, in the words of the target's class."""
    counts = {"n_expert": slicing.n_routed, "n_expert_used": slicing.n_routed_used, "n_shared": slicing.in_shared}
    counts["leading_dense"] = slicing.leading_dense
    counts["d_expert" if slicing.in_shared else "d_ff"] = slicing.d_expert
    return describe_config(replace(model, **counts))  # type: ignore[arg-type]  # all of them are whole numbers


def make_config(checkpoint: Checkpoint, described: Mapping[str, Any], kind: TensorType, provenance: Metadata) -> str:
    """config.json of a model of `kind` that was made of `checkpoint`; `provenance` is the `moe2gguf.*` metadata."""
    source = read_json(resolve_inside(checkpoint.folder, "config.json"))
    kept = {key: source[key] for key in KEPT if source.get(key) is not None}
    named = [key for key in ("torch_dtype", "dtype") if key in source] or ["torch_dtype"]
    return to_json({**described, **kept, **dict.fromkeys(named, types.FLOATS[kind].name), MARK: dict(provenance)})


def sliced_card(metadata: Metadata, slicing: Slicing, provenance: Metadata, reports: Sequence[LayerReport]) -> str:
    """README.md: what the model is, how it was made, what calibration found. `metadata` has the `general.*` keys."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {key: value for key, source in FRONT_MATTER.items() if (value := metadata.get(f"general.{source}"))}
    front["tags"] = ["moe2gguf", slicing.target, "moe"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    part = f" from layer {slicing.leading_dense} on" if slicing.leading_dense else ""
    lines += [
        f"# {metadata.get('general.name', 'A sliced model')}",
        "",
        f"Every MLP of the dense model{part} is cut into {slicing.n_expert} experts, of which {slicing.n_expert_used} "
        f"run per token. {WEIGHTS_NOTE[slicing.target]}",
        "",
        *_provenance_table("how it was made", "moe2gguf.", provenance),
    ]
    if reports:
        lines += ["", *_layer_table(reports, slicing.leading_dense)]
    return "\n".join(lines) + "\n"


def _provenance_table(title: str, prefix: str, provenance: Metadata) -> list[str]:
    """A Markdown table of keys, without their prefix, and values."""
    return [f"| {title} | |", "|---|---|", *(f"| {k.removeprefix(prefix)} | {v} |" for k, v in provenance.items())]


def _layer_table(reports: Sequence[LayerReport], first: int) -> list[str]:
    """A Markdown table of what calibration found, one row per layer from the `first` with experts on."""
    layers = [report.to_dict() for report in reports]
    present = [figure for figure in LAYER_FIGURES if any(figure in layer for layer in layers)]
    rows = [
        f"| {i} | " + " | ".join(f"{layer[f]:.3f}" if f in layer else "" for f in present) + " |"
        for i, layer in enumerate(layers, first)
    ]
    head = "| layer | " + " | ".join(figure.replace("_", " ") for figure in present) + " |"
    return [head, "|--:|" + "--:|" * len(present), *rows]


# --- a healed model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What changed: the parts `train`, of which `layer(i)` gives a layer's experts and router.

    `others` has tensors outside of the MLPs that changed, float32, by their names.
    """

    layer: Callable[[int], ExpertWeights]
    train: Sequence[str]
    others: Mapping[str, Array] = field(default_factory=dict)

    def changes(self, role: str) -> bool:
        """Whether tensors of that role differ from the source's."""
        return any(part in self.train for part in CHANGED_BY[role])


def write_healed(
    source: Checkpoint,
    trained: Trained,
    out: Path,
    provenance: Mapping[str, MetadataValue],
    log: Sequence[LogLine],
    *,
    progress: Progress = silent,
) -> None:
    """Write the folder `out`: `source` with the trained layers, each tensor in the type it had; log and card beside.

    Raises:
        OutputError, CorruptWeightError: as in `moe2gguf.recipes.convert.convert`.
    """
    config = read_json(resolve_inside(source.folder, "config.json"))
    config.pop("quantization_config", None)  # left over: the weights are plain
    texts = {
        "config.json": to_json({**config, MARK: {**source.provenance, **provenance}}),
        "README.md": healed_card(source.folder, provenance, log),
        "heal.jsonl": "".join(json.dumps(to_dict(line)) + "\n" for line in log),
    }
    write_hf_folder(out, healed_tensors(source, trained), source.folder, lambda: texts, progress=progress)


def healed_tensors(source: Checkpoint, trained: Trained) -> list[OutputTensor]:
    """Every tensor under its old name: copied bit for bit, or taken from the trained layer when asked for."""
    read_layer = functools.lru_cache(maxsize=1)(trained.layer)
    changed: dict[str, Callable[[], Iterator[Array]]] = {
        name: functools.partial(iter, (array,)) for name, array in trained.others.items()
    }
    for role, (name, _) in source.mlp.tensors.items():
        if trained.changes(role):
            for i in range(source.model.leading_dense, source.model.n_layer):
                for e in range(source.model.n_expert) if "{e}" in name else (None,):
                    changed[name.format(i=i, e=e)] = functools.partial(_read_trained, read_layer, role, i, e)
    copied = [copy_tensor(tensor) for tensor in source.tensors.values()]
    return [replace(tensor, blocks=changed.get(tensor.name, tensor.blocks)) for tensor in copied]


def _read_trained(read_layer: Callable[[int], ExpertWeights], role: str, i: int, e: int | None) -> Iterator[Array]:
    """Layer `i`'s tensor of a role, or expert `e` of it."""
    layer = read_layer(i)
    array = np.concatenate([layer.gate, layer.up], 1) if role == "gate_up" else getattr(layer, role)
    yield array if e is None else array[e]


def copy_tensor(source: StoredTensor) -> OutputTensor:
    """A tensor as it is stored."""
    kind = types.find_float(DTYPES[source.dtype])
    blocks = functools.partial(source.blocks, BLOCK_BYTES)
    return OutputTensor(source.name, source.shape, kind, (source.name,), blocks)


def healed_card(folder: Path, provenance: Metadata, log: Sequence[LogLine]) -> str:
    """The source's model card, and below it how the model was healed and what the held-out text says."""
    path = resolve_inside(folder, "README.md")
    before = read_bytes(path, max_bytes=MAX_CARD_BYTES).decode("utf-8", "replace") if path.is_file() else ""
    lines = ["", "## Healed", "", *_provenance_table("how", "moe2gguf.heal.", provenance)]
    if scores := [line for line in log if isinstance(line, ScoreLine)]:
        counts = list(scores[0].kl)
        lines += ["", "Held-out KL divergence from the dense model, nats per token:", ""]
        lines += ["| step | " + " | ".join(f"k = {k}" for k in counts) + " |", "|--:|" + "--:|" * len(counts)]
        lines += [f"| {s.step} | " + " | ".join(f"{s.kl[k]:.4f}" for k in counts) + " |" for s in scores]
    return before + "\n".join(lines) + "\n"
