"""A dense model becomes a GGUF file of architecture `llama` with experts: `convert`, from top to bottom."""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe2gguf.errors import OutputError
from moe2gguf.experts.layer import LayerReport
from moe2gguf.gguf.layout import Layout, find_array, find_value
from moe2gguf.gguf.metadata import CALIBRATION_LOAD, DIGEST_PLACEHOLDER, SOURCE_DIGEST
from moe2gguf.gguf.outputs import check_model_target, check_target, list_model_paths, require_room
from moe2gguf.gguf.resume import describe_job
from moe2gguf.gguf.system import write_at
from moe2gguf.gguf.types import require_kernels
from moe2gguf.gguf.writer import write_model
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.imatrix import ImportanceMatrix
from moe2gguf.quant.imatrix_match import note_other_model
from moe2gguf.recipes.calibrate import find_experts, require_own_calibration
from moe2gguf.recipes.fit_types import fit_types
from moe2gguf.recipes.inputs import read_inputs
from moe2gguf.recipes.options import Options
from moe2gguf.recipes.outputs import find_importance, output_tensors
from moe2gguf.recipes.plan import Plan, make_plan
from moe2gguf.recipes.source import open_source
from moe2gguf.recipes.tensors import ExpertSource

FindExperts = Callable[..., ExpertSource]
"""A step that finds the experts of a plan, with the arguments of `find_experts`."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the file, its plan, the SHA-256 over the source tensors, what calibration found by layer.

    `layers` are those with experts, in order. `reused` tensors were there already, from a run that was stopped.
    """

    path: Path
    plan: Plan
    source_digest: str
    layers: tuple[LayerReport, ...] = ()
    reused: int = 0

    @property
    def numbered_layers(self) -> dict[int, LayerReport]:
        """What calibration found, by the number of the layer."""
        return dict(enumerate(self.layers, self.plan.slicing.leading_dense if self.plan.slicing else 0))

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {
            "path": str(self.path),
            "source_sha256": self.source_digest,
            "layers": [{"layer": i, **layer.to_dict()} for i, layer in self.numbered_layers.items()],
            "reused_tensors": self.reused,
            **self.plan.to_dict(),
        }


def convert(
    model: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda _: None,
    find_experts: FindExperts = find_experts,
) -> Conversion:
    """Convert `model` into the GGUF file `out`.

    Args:
        model: folder with config.json, tokenizer files and safetensors (f32, f16, bf16); or OWNER/NAME or
            OWNER/NAME@REVISION of the Hugging Face Hub, where there is no such folder; or a dense GGUF file of arch
            llama or qwen2, of any types, or one of its shards.
        out: the file to write; it appears only when it is complete and verified. With `Options.shard_size` a set of
            shards, of which the result names the first.
        options: how many experts, which type, ...: see `Options`.
        force: replace `out` if it exists.
        resume: continue an unfinished `out` of the same job, and refuse one of another; False replaces either.
        threads: how many tensors are worked on at once (None: the number of cores, at most 4).
        progress: receives stages ("choose types", "calibrate", "write", "verify") and the units done.
        on_plan: is given the plan before anything is written.
        find_experts: makes the experts, in place of `moe2gguf.recipes.calibrate.find_experts`.

    Raises:
        PlanError: the model or the options do not fit, or torch is missing; every reason is listed.
        ImportanceError: the importance matrix is broken.
        CheckpointError: `model` is no model, or a file of it ends early.
        CorruptWeightError: a weight is NaN, infinite, or too large for the type.
        HarnessError: a type, or the tokenizer of a GGUF file, needs llama.cpp, and it is not installed.
        CalibrationError: the text or the activations cannot be used.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
        GGUFError: `model` is a file but no sound GGUF file, or the written file did not verify.
    """
    options, out = options or Options(), Path(out)

    # Open the model, read what the options name, and plan every tensor and byte.
    source = open_source(Path(model), name=options.name)
    inputs = read_inputs(source, options)
    plan = fit_types(make_plan(source, inputs), inputs, progress, functools.partial(require_room, out))
    plan = _compare_models(plan, inputs.types.matrix)
    _check_targets(plan, out, force=force)
    on_plan(plan)

    # Find the experts of every layer: contiguous slices, a saved calibration, or a new one in a folder of its own.
    work = out.with_name(out.name + ".calibration")
    experts = find_experts(plan, inputs, work, progress, resume=resume)

    # Cut the tensors, write, verify and name the files. The digest is known when all sources have been read.
    digest = SourceDigest()
    guidance = find_importance(plan, inputs.types.matrix, plan.tensors, experts)
    tensors = {one.name: one for one in output_tensors(plan.tensors, source, experts, digest, guidance)}
    path, n_reused = write_model(
        out,
        [([tensors[tensor.name] for tensor in planned], layout) for planned, layout in plan.files],
        _describe_job(plan, experts),
        resume=resume,
        hashes=digest.parts,
        finish=functools.partial(_fill_in, plan, experts, digest),
        threads=threads,
        progress=progress,
    )
    experts.finish()
    return Conversion(path, plan, digest.hexdigest(source.tensors), experts.reports, n_reused)


def plan_conversion(model: str | Path, options: Options | None = None, *, progress: Progress = silent) -> Plan:
    """The plan of what `convert` would write. No weight is read, but for a target size; errors as in `convert`.

    Of a model on the Hub only the small files are fetched, and the headers of the others.
    """
    options = options or Options()
    source = open_source(Path(model), name=options.name, weights=options.types.has_target)
    inputs = read_inputs(source, options)
    return fit_types(make_plan(source, inputs), inputs, progress)


def _compare_models(plan: Plan, matrix: ImportanceMatrix | None) -> Plan:
    """The plan, with a warning where the importance matrix is of another model."""
    norms = {one.name: plan.source.tensors[one.sources[0]] for one in plan.tensors if one.sources}
    return replace(plan, warnings=(*plan.warnings, *note_other_model(matrix, norms)))


def _check_targets(plan: Plan, out: Path, *, force: bool) -> None:
    """Refuse files that cannot be written or must not be replaced, and types that lack their kernels.

    Raises:
        HarnessError, OutputError: as in `convert`.
    """
    fresh = [tensor for tensor in plan.tensors if not tensor.copied]
    require_kernels((tensor.type for tensor in fresh), importance=any(tensor.guided for tensor in fresh))
    read = [*plan.source.own_files, *plan.options.files]
    check_model_target(out, len(plan.files), read, force=force, size=plan.file_size)
    check_kept(plan, list_model_paths(out, len(plan.files)), force=force)


def check_kept(plan: Plan, written: Sequence[Path], *, force: bool) -> None:
    """Refuse a place for the calibration that cannot be written, must not be replaced, or is one of those `written`.

    Raises:
        OutputError: as in `convert`.
    """
    if kept := plan.options.calibration.save_to:
        if os.path.realpath(kept) in map(os.path.realpath, written):
            raise OutputError(f"{kept}: is the file to write already; keep the calibration under another name")
        check_target(kept, [*plan.source.own_files, *plan.options.files], force=force)


def _describe_job(plan: Plan, experts: ExpertSource) -> dict[str, str]:
    """Everything that decides the bytes of the file."""
    kinds = {tensor.type for tensor in plan.tensors}
    options = replace(plan.options, calibration=replace(plan.options.calibration, save_to=None))
    job = describe_job("convert", options, plan.source.files, plan.header, kinds)
    parts = [hashlib.sha256(path.read_bytes()).digest() for path in experts.files]
    return job | ({"calibrated experts": hashlib.sha256(b"".join(parts)).hexdigest()} if parts else {})


def _fill_in(plan: Plan, experts: ExpertSource, digest: SourceDigest, descriptor: int, layout: Layout) -> None:
    """Replace the placeholders in a header: the digest over the source, and (not in later shards) the experts' load."""
    require_own_calibration(plan, digest)
    text = digest.hexdigest(plan.source.tensors)
    write_at(descriptor, memoryview(text.encode()), find_value(layout, SOURCE_DIGEST, DIGEST_PLACEHOLDER))
    if experts.reports and layout is plan.files[0][1]:
        load = np.array([report.load for report in experts.reports], "<f4")
        write_at(descriptor, memoryview(load.tobytes()), find_array(layout, CALIBRATION_LOAD, load.size))
