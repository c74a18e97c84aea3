"""The recipe's other ending: a sliced model as a Hugging Face folder of the class `MixtralForCausalLM`."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.metadata import CALIBRATION_LOAD, SOURCE_DIGEST
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.hf.companions import copy_companions
from moe2gguf.hf.families import MIXTRAL_PER_EXPERT, MLPPlace, lay_out_tensors
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.json_file import read_json
from moe2gguf.hf.paths import inside
from moe2gguf.hf.safetensors import DTYPES, SourceDigest, StoredTensor
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.calibrate import calibrate_plan, require_own_calibration
from moe2gguf.recipes.convert import Conversion
from moe2gguf.recipes.mixtral import mixtral_card, mixtral_config
from moe2gguf.recipes.plan import Plan
from moe2gguf.recipes.tensors_hf import BLOCK_BYTES, Maker, sliced_tensors
from moe2gguf.recipes.write_folder import check_folder_target, replacing_folder, write_json, write_shards
from moe2gguf.spec import Slicing


def write_folder(plan: Plan, out: Path, *, force: bool = False, progress: Progress = silent) -> Conversion:
    """Write the sliced model that `plan` describes as the folder `out`; it appears only when it is complete.

    Tensors keep the type in which they are stored, or get that of `plan.options.type`; routers are float32. The
    provenance stands in config.json under "moe2gguf". The finished folder is opened once more before it gets its name.

    Raises:
        PlanError: what the class cannot hold: attention biases, a model that is not sliced here, block types.
        OutputError, CorruptWeightError, CalibrationError: as in `moe2gguf.recipes.convert.convert`.
    """
    found, checkpoint = folder_refusals(plan), plan.checkpoint
    if found or plan.slicing is None or not isinstance(checkpoint, Checkpoint):
        raise PlanError(found)
    slicing, folder = plan.slicing, checkpoint.folder
    check_folder_target(out, [folder], force=force)
    reports = calibrate_plan(plan, work := out.with_name(out.name + ".calibration"), progress)
    digest, model = SourceDigest(), checkpoint.model
    tensors = mixtral_tensors(plan, checkpoint, slicing, digest)
    with replacing_folder(out) as partial:
        with progress("write", sum(tensor.n_bytes for tensor in tensors)) as advance:
            write_shards(partial, tensors, advance)
        require_own_calibration(plan, digest)
        provenance = {key: value for key, value in plan.metadata.items() if key.startswith("moe2gguf.")}
        if reports:
            provenance[CALIBRATION_LOAD] = [share for report in reports for share in report["load"]]
        provenance[SOURCE_DIGEST] = source = digest.hexdigest(checkpoint.tensors)
        values = read_json(inside(folder, "config.json"))
        write_json(partial / "config.json", mixtral_config(model, slicing, values, provenance))
        (partial / "README.md").write_text(mixtral_card(plan.metadata, slicing, provenance, reports), "utf-8")
        copy_companions(folder, partial)
        open_checkpoint(partial)
    if reports and not plan.saved:
        shutil.rmtree(work)
    return Conversion(out, plan, source, reports)


def folder_refusals(plan: Plan) -> list[str]:
    """Every reason why the class `MixtralForCausalLM` cannot hold what `plan` describes."""
    model, options = plan.checkpoint.model, plan.options
    found = []
    if plan.slicing is None:
        what = "keeps the checkpoint's own experts" if model.n_expert else "leaves the model dense"
        found.append(f"--format hf: this conversion {what}, so the folder would be the source again; use the source")
    if not isinstance(plan.checkpoint, Checkpoint):
        found.append("--format hf: a folder is made from a Hugging Face folder, not from a GGUF file; start from that")
    if options.shard_size is not None:
        found.append("--shard-size: is for GGUF files; leave it out")
    if plan.slicing and plan.slicing.scale_tensor:
        found.append("--expert-scale: transformers' MixtralForCausalLM has no scales; leave it out")
    if model.bias_qkv or model.bias_output:
        found.append(
            f"--format hf: {model.architecture} has attention biases, and transformers' MixtralForCausalLM has none; "
            "write a GGUF file instead, whose graph has them"
        )
    if options.type.lower() not in ("auto", "f32", "f16", "bf16"):
        found.append(f"--type {options.type}: a Hugging Face folder holds auto, f32, f16 or bf16; quantize a GGUF file")
    if options.tensor_types or options.type_rules:
        found.append("--tensor-type, --type-rules: types of single tensors are for GGUF files; leave them out")
    return found


def mixtral_tensors(
    plan: Plan, checkpoint: Checkpoint, slicing: Slicing, digest: SourceDigest
) -> tuple[OutputTensor, ...]:
    """Every tensor of the folder, under its Mixtral name, experts one by one; sources are hashed as they are read."""
    make = Maker(digest)
    kind = None if plan.options.type.lower() == "auto" else types.named(plan.options.type)
    tensors = []
    for place in lay_out_tensors(checkpoint.model):
        if not isinstance(place, MLPPlace):
            rule, layer = place
            tensors.append(_plain(checkpoint.tensors[rule.source.format(i=layer)], kind, digest))
            continue
        i = place.i
        router, *stacks = sliced_tensors(checkpoint, slicing, plan.experts, make, i)
        name = MIXTRAL_PER_EXPERT.tensors["router"][0].format(i=i)
        tensors.append(OutputTensor(name, router.shape, router.type, (), router.blocks))
        for role, stack in zip(("gate", "up", "down"), stacks, strict=True):
            tensors += _experts(stack, MIXTRAL_PER_EXPERT.tensors[role][0], i, kind)
    return tuple(tensors)


def _plain(source: StoredTensor, kind: TensorType | None, digest: SourceDigest) -> OutputTensor:
    """A tensor as it is stored, or a matrix as `kind`."""
    stored = types.of_dtype(DTYPES[source.dtype])
    chosen = kind if kind is not None and len(source.shape) > 1 else stored
    return OutputTensor(source.name, source.shape, chosen, (source.name,), lambda: digest.blocks(source, BLOCK_BYTES))


def _experts(stack: OutputTensor, name: str, i: int, kind: TensorType | None) -> Iterator[OutputTensor]:
    """The experts of a stack one by one; it is made once, when the first of them is asked for."""
    made: dict[int, NDArray[np.generic]] = {}

    def piece(e: int) -> Iterator[NDArray[np.generic]]:
        if e not in made:
            made.update(enumerate(stack.blocks()))
        yield made.pop(e)

    for e in range(stack.shape[0]):
        chosen = stack.type if kind is None else kind
        yield OutputTensor(name.format(i=i, e=e), stack.shape[1:], chosen, stack.sources, functools.partial(piece, e))
