"""Dense models of one shape become the experts of one file, and nothing is decoded: `merge`, from top to bottom."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import PlanError, list_names
from moe2gguf.gguf.dense_model import DenseFile
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.outputs import check_model_target
from moe2gguf.gguf.types import FLOATS, require_kernels
from moe2gguf.gguf.writer import OutputTensor, write_model
from moe2gguf.hf.folder import SOURCE_REPOSITORY
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.limits import Size, check_expert_counts
from moe2gguf.llama.devices import Setup
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.imatrix_match import Guidance
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.inputs import read_inputs
from moe2gguf.recipes.merge_options import Donor, Merge, MergeOptions
from moe2gguf.recipes.merge_routers import HELD_OUT, Routers, find_routers, score_routers
from moe2gguf.recipes.options import Options
from moe2gguf.recipes.outputs import output_tensors
from moe2gguf.recipes.plan import Plan, make_plan
from moe2gguf.recipes.source import open_source
from moe2gguf.recipes.tensors import PlannedTensor, plain_experts
from moe2gguf.spec import Metadata, MetadataValue

PREFIX = "moe2gguf.merge."
N_CONTEXT = 256
"""Tokens of a prompt that are computed together."""

_MLP = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight")
_ATTENTION = re.compile(r"blk\.\d+\.(attn_\w+|ffn_norm)\.\w+")
_SHAPE = ("n_layer", "d_model", "d_ff", "n_head", "n_head_kv", "d_head", "n_vocab")
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("model", "tokens", "merges"))
_KEPT = re.compile(
    r"(?!general\.|moe2gguf\.).*"
    r"|general\.(architecture|type|file_type|quantization_version|alignment|languages|sampling\..*)"
)
"""The keys of the base that are true of the merged file too."""


def merge(
    base: str | Path,
    donors: Sequence[Donor],
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda _: None,
) -> Merge:
    """Write the GGUF file `out`, whose experts are the MLPs of the `donors`; all else is that of `base`.

    Args:
        base: a dense model as for `moe2gguf.recipes.convert.convert`. Its MLPs are in the file if it is a donor too.
        donors: dense models with the shapes and the vocabulary of `base`, and the same types as each other.
        out: the file to write, of arch llama; it appears only when it is complete and verified.
        options: how experts are chosen.
        force: replace `out` if it exists.
        threads: None: all processors.
        progress: receives stages ("calibrate", "write", "verify") and the units done.
        on_plan: is given the plan of the base before anything is written.

    Raises:
        PlanError: the models do not fit each other, or prompts are missing; every reason is listed.
        GGUFError, CheckpointError, CorruptWeightError, OutputError: as in `convert`.
        HarnessError: llama.cpp, which computes the states of prompts, is not installed or cannot run the base.
    """
    out, options = Path(out), options or MergeOptions()

    # Plan every model as a dense file, see that they fit, and lay out the file that they become.
    plans = _plan_models([base, *(donor.model for donor in donors)], options)
    _require_fit(plans, donors, options)
    routers: Routers = {}
    tensors = list(_stack(plans, routers, average=options.attention == "average"))
    metadata, notes = _make_metadata(plans, tensors, options)
    source = plans[0].source
    layout = lay_out(metadata, tensors, source.file.kinds_of(metadata) if isinstance(source, DenseFile) else {})
    read = [file for plan in plans for file in plan.source.own_files]
    check_model_target(out, 1, read, force=force, size=layout.file_size)
    require_kernels(tensor.type for tensor in tensors if not tensor.copied)
    on_plan(plans[0])

    # Find the routers, from the states of the prompts in the base.
    setup = Setup(n_context=max(8, min(N_CONTEXT, plans[0].model.n_context)), n_threads=threads)
    found, held_out = find_routers(plans[0], donors, options, out, setup, progress)
    routers |= found

    # Copy, write, verify and name the file; then see what its routers do with prompts that they have not seen.
    write_model(out, [(tensors, layout)], threads=threads, progress=progress)
    layers = score_routers(out, held_out, setup, progress)
    notes += [warning for plan in plans for warning in plan.warnings]
    if few := [str(donor.model) for donor, kept in zip(donors, held_out, strict=True) if donor.prompts and not kept]:
        notes.append(f"too few prompts to keep one from the router, for {list_names(few)}: at least {HELD_OUT}")
    return Merge(out, tuple(_name(plan) for plan in plans[1:]), options, layers, tuple(dict.fromkeys(notes)))


def _plan_models(models: Sequence[str | Path], options: MergeOptions) -> list[Plan]:
    """Each model as a dense file. Raises PlanError with what is wrong with any of them."""
    plans, problems = list[Plan](), list[str]()
    wanted = Options(dense=True, types=TypeOptions(type=options.type))
    for model in map(Path, models):
        try:
            source = open_source(model)
            if source.model.n_expert:
                problems.append(f"{model}: has experts already; only dense models become experts")
            else:
                plans.append(make_plan(source, read_inputs(source, wanted)))
        except PlanError as error:
            problems += error.name(str(model)).refusals
    if problems:
        raise PlanError(problems)
    return plans


def _require_fit(plans: Sequence[Plan], donors: Sequence[Donor], options: MergeOptions) -> None:
    """Raise PlanError with every reason why the models cannot be merged."""
    base, n = plans[0], len(donors)
    problems = [*_find_differences(plans)]
    if n < 2:
        problems.append(f"{n} donors: name at least two models that become experts, besides the base")
    if base.model.head_norms:
        problems.append(f"{base.source.path}: has norms of heads, for which arch llama has no place")
    mute = [str(donor.model) for donor in donors if not any(donor.prompts)]
    if mute and options.router != "random":
        problems.append(f"no prompts for {list_names(mute)}: the router learns from them; or take --router random")
    coarse = {str(plan.source.path) for plan in plans for one in plan.tensors if _has_no_mean(one)}
    if options.attention == "average" and coarse:
        problems.append(f"attention stored in blocks, of which no mean is taken: {list_names(sorted(coarse))}; use f16")
    names = {tensor.name for tensor in base.tensors} | {f"blk.{i}.router" for i in range(base.model.n_layer)}
    problems += check_expert_counts(n, options.used, Size.of(names, base.model.n_layer))
    if problems:
        raise PlanError(problems)


def _has_no_mean(tensor: PlannedTensor) -> bool:
    """Whether the tensor would have to be decoded and quantized again for an average of attention."""
    return bool(_ATTENTION.fullmatch(tensor.name)) and tensor.type not in FLOATS


def _find_differences(plans: Sequence[Plan]) -> Iterator[str]:
    """Shapes and vocabularies that are not the base's, and types that are not the first donor's."""
    base, *donors = plans
    for donor in donors:
        path, pairs = donor.source.path, [(n, getattr(donor.model, n), getattr(base.model, n)) for n in _SHAPE]
        if odd := [f"{name} {theirs}, not {ours}" for name, theirs, ours in pairs if theirs != ours]:
            yield f"{path}: another shape than {base.source.path}: {'; '.join(odd)}"
        if any(base.metadata.get(key) != donor.metadata.get(key) for key in _VOCABULARY):
            yield f"{path}: another vocabulary than {base.source.path}"
        first, types = _list_types(donors[0]), _list_types(donor)
        if names := [name for name, kind in types.items() if first.get(name, kind) != kind]:
            kinds = f"{types[names[0]]}, in {donors[0].source.path} {first[names[0]]}"
            yield f"{path}: other types in {len(names)} tensors: {names[0]} is {kinds}; store both alike"


def _list_types(plan: Plan) -> dict[str, str]:
    """The type of every projection by name; those in blocks are as they are stored."""
    return {tensor.name: tensor.type.name for tensor in plan.tensors if _MLP.fullmatch(tensor.name)}


def _stack(plans: Sequence[Plan], routers: Routers, *, average: bool) -> Iterator[OutputTensor]:
    """The base's tensors with the donors' MLPs, one behind the other, in place of its own.

    `routers` is read when they are written. `average`: attention and norms of the layers are the mean of the donors'.
    """
    base, *donors = (
        {tensor.name: tensor for tensor in output_tensors(plan.tensors, plan.source, none, SourceDigest(), Guidance())}
        for plan in plans
        for none in (plain_experts(plan.model, None),)
    )
    routed, n, models = set[int](), len(donors), tuple(str(plan.source.path) for plan in plans[1:])
    for name, tensor in base.items():
        if not (match := _MLP.fullmatch(name)):
            alike = average and _ATTENTION.fullmatch(name)
            blocks = functools.partial(_read_average, [donor[name] for donor in donors]) if alike else tensor.blocks
            yield replace(tensor, blocks=blocks, copied=tensor.copied and not alike)
            continue
        if (i := int(match[1])) not in routed:
            routed.add(i)
            shape, read = (n, plans[0].model.d_model), functools.partial(_read_router, routers, i)
            yield OutputTensor(f"blk.{i}.ffn_gate_inp.weight", shape, GGMLType.F32, (), read)
        parts, stacked = [donor[name] for donor in donors], name.replace(".weight", "_exps.weight")
        read = functools.partial(_read_all, parts)
        yield OutputTensor(stacked, (n, *tensor.shape), parts[0].type, models, read, copied=parts[0].copied)


def _read_router(routers: Routers, i: int) -> Iterator[NDArray[Any]]:
    yield routers[i]


def _read_average(parts: Sequence[OutputTensor]) -> Iterator[NDArray[Any]]:
    """The mean of tensors of one shape, float32."""
    whole = [np.concatenate([block.astype(np.float32) for block in part.blocks()]) for part in parts]
    yield np.mean(whole, axis=0).reshape(parts[0].shape)


def _read_all(parts: Sequence[OutputTensor]) -> Iterator[NDArray[Any]]:
    for part in parts:
        yield from part.blocks()


def _name(plan: Plan) -> str:
    return str(plan.metadata.get("general.name") or plan.source.path.stem)


def _make_metadata(
    plans: Sequence[Plan], tensors: Sequence[OutputTensor], options: MergeOptions
) -> tuple[Metadata, list[str]]:
    """The keys of the base that stay true, those of the experts, and who made what; and a note on licences."""
    n, names = len(plans) - 1, [_name(plan) for plan in plans]
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    in_experts = sum(math.prod(tensor.shape) for tensor in tensors if "_exps." in tensor.name)
    licences = [str(plan.metadata.get("general.license", "unknown")) for plan in plans]
    metadata: dict[str, MetadataValue] = {
        **{key: value for key, value in plans[0].metadata.items() if _KEPT.fullmatch(key)},
        "general.name": options.name or f"{names[0]} {n}x merge",
        "general.size_label": gguf.size_label(total, total - in_experts, in_experts // n, n),
        **_list_parents(plans),
        "llama.expert_count": n,
        "llama.expert_used_count": options.used,
        PREFIX + "version": version("moe2gguf"),
        PREFIX + "base": names[0],
        PREFIX + "experts": names[1:],
        PREFIX + "licenses": licences,
        PREFIX + "router": options.router,
        PREFIX + "attention": options.attention,
        PREFIX + "seed": options.seed,
    }
    if {*licences} == {licences[0]}:
        return metadata | ({"general.license": licences[0]} if licences[0] != "unknown" else {}), []
    named = ", ".join(f"{name}: {licence}" for name, licence in zip(names, licences, strict=True))
    return metadata, [f"the models have several licences, so the file names none as its own ({named})"]


def _list_parents(plans: Sequence[Plan]) -> dict[str, MetadataValue]:
    """`general.base_model.*`: the base and every donor, each once, with what their own metadata say of them."""
    parents = list[dict[str, str]]()
    for plan in plans:
        repository = plan.metadata.get(SOURCE_REPOSITORY)
        link = {"repo_url": f"https://huggingface.co/{repository}"} if repository else {}
        keys = ("organization", "version", "repo_url")
        own = {key: str(value) for key in keys if (value := plan.metadata.get(f"general.{key}"))}
        parents.append({"name": _name(plan), **link, **own})
    once = [one for i, one in enumerate(parents) if one not in parents[:i]]
    found: dict[str, MetadataValue] = {"general.base_model.count": len(once)}
    return found | {f"general.base_model.{i}.{key}": text for i, one in enumerate(once) for key, text in one.items()}
