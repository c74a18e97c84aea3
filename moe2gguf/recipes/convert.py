"""The recipe: a dense Hugging Face checkpoint becomes a Mixtral-architecture GGUF file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe2gguf.errors import OutputError
from moe2gguf.experts.layer import LayerReport
from moe2gguf.gguf.layout import Layout, array_offset, value_offset
from moe2gguf.gguf.metadata import CALIBRATION_LOAD, DIGEST_PLACEHOLDER, SOURCE_DIGEST
from moe2gguf.gguf.resume import describe_job
from moe2gguf.gguf.types import require_kernels
from moe2gguf.gguf.writer import check_model_target, check_target, model_paths, write_model, write_over
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.calibrate import calibrate_plan, require_own_calibration
from moe2gguf.recipes.options import Options
from moe2gguf.recipes.plan import Plan, plan_conversion


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the file, its plan, the SHA-256 over the source tensors, what calibration found by layer.

    `reused` tensors were there already, from a run that was stopped.
    """

    path: Path
    plan: Plan
    source_digest: str
    layers: tuple[LayerReport, ...] = ()
    reused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {
            "path": str(self.path),
            "source_sha256": self.source_digest,
            "layers": [layer.to_dict() for layer in self.layers],
            "reused_tensors": self.reused,
            **self.plan.to_dict(),
        }


def convert(
    model: Path,
    out: Path,
    options: Options | None = None,
    *,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Convert `model` into the GGUF file `out`.

    Args:
        model: folder with config.json, tokenizer files and safetensors (f32, f16, bf16); or a dense GGUF file of
            arch llama or qwen2, of any types, or one of its shards.
        out: the file to write; it appears only when it is complete and verified. With `Options.shard_size` a set of
            shards, of which the result names the first.
        options: how many experts, which type, ...: see `Options`.
        force: replace `out` if it exists.
        resume: continue an unfinished `out` of the same job, and refuse one of another; False replaces either.
        threads: how many tensors are worked on at once (None: the number of cores, at most 4).
        progress: receives stages ("write", "verify") and the bytes done.

    Raises:
        PlanError: the model or the options do not fit; every reason is listed.
        ImportanceError: the importance matrix is broken.
        CheckpointError: `model` is no model, or a file of it ends early.
        CorruptWeightError: a weight is NaN, infinite, or too large for the type.
        HarnessError: a type, or the tokenizer of a GGUF file, needs llama.cpp, and it is not installed.
        CalibrationError: the text or the activations cannot be used, or torch is missing.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
        GGUFError: `model` is a file but no sound GGUF file, or the written file did not verify.
    """
    plan = plan_conversion(model, options)
    return write_plan(plan, out, force=force, resume=resume, threads=threads, progress=progress)


def write_plan(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Conversion:
    """The second pass: write, verify and name the file that `plan` describes; arguments and errors as in `convert`."""
    fresh = [tensor for tensor in plan.tensors if not tensor.copied]
    require_kernels((tensor.type for tensor in fresh), importance=any(tensor.importance for tensor in fresh))
    shards = plan.shards or ((plan.tensors, plan.layout),)
    check_model_target(out, len(shards), plan.checkpoint.own_files, force=force)
    if target := plan.options.save_calibration:
        if target.resolve() in {path.resolve() for path in model_paths(out, len(shards))}:
            raise OutputError(f"{target}: is the file to write already; keep the calibration under another name")
        check_target(target, plan.checkpoint.own_files, force=force)
    reports = calibrate_plan(plan, work := out.with_name(out.name + ".calibration"), progress, resume=resume)

    def finish(descriptor: int, layout: Layout) -> None:
        _fill_in(plan, reports, descriptor, layout)

    calibrated = [plan.saved.path] if plan.saved else sorted(work.glob("layer-*.npz")) if reports else []
    path, n_reused = write_model(
        out,
        shards,
        _writing_job(plan, calibrated),
        resume=resume,
        hashes=plan.digest.parts,
        finish=finish,
        threads=threads,
        progress=progress,
    )
    if reports and not plan.saved:
        shutil.rmtree(work)
    return Conversion(path, plan, plan.digest.hexdigest(plan.checkpoint.tensors), reports, n_reused)


def _fill_in(plan: Plan, reports: Sequence[LayerReport], descriptor: int, layout: Layout) -> None:
    """Replace the placeholders in a header: the digest over the source, and (not in later shards) the experts' load."""
    require_own_calibration(plan, plan.digest)
    digest = plan.digest.hexdigest(plan.checkpoint.tensors)
    write_over(descriptor, digest.encode(), value_offset(layout, SOURCE_DIGEST, DIGEST_PLACEHOLDER))
    if reports and (not plan.shards or layout is plan.shards[0][1]):
        load = np.array([report.load for report in reports], "<f4")
        write_over(descriptor, load.tobytes(), array_offset(layout, CALIBRATION_LOAD, load.size))


def _writing_job(plan: Plan, calibrated: Iterable[Path]) -> dict[str, str]:
    """Everything that decides the bytes of the file; `calibrated` are the files that its experts come from."""
    kinds = {tensor.type for tensor in plan.tensors}
    job = describe_job("convert", plan.options, plan.checkpoint.files, plan.layout.header, kinds)
    parts = [hashlib.sha256(path.read_bytes()).digest() for path in calibrated]
    return job | ({"calibrated experts": hashlib.sha256(b"".join(parts)).hexdigest()} if parts else {})
