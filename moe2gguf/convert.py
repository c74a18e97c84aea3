"""The recipe: a dense Hugging Face checkpoint becomes a Mixtral-architecture GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe2gguf.checkpoint.folder import Checkpoint
from moe2gguf.checkpoint.tensors import source_digest
from moe2gguf.errors import CalibrationError, OutputError
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.saved import Job
from moe2gguf.experts.saved import save as save_calibration
from moe2gguf.experts.text import Text
from moe2gguf.export.assignment import may_quantize
from moe2gguf.export.layout import Layout, array_offset, value_offset
from moe2gguf.export.metadata import CALIBRATION_LOAD, DIGEST_PLACEHOLDER, SOURCE_DIGEST
from moe2gguf.export.partial import Journal, describe_job
from moe2gguf.export.types import require_kernels
from moe2gguf.export.writer import check_target, write_over
from moe2gguf.harness.check import Check, check
from moe2gguf.options import Options
from moe2gguf.planning import Plan, plan_conversion, window
from moe2gguf.progress import Progress, silent
from moe2gguf.sharded import check_set, write_set
from moe2gguf.spec import Slicing
from moe2gguf.writing import write_file


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the file, its plan, the SHA-256 over the source tensors, what calibration found by layer.

    `reused` tensors were there already, from a run that was stopped.
    """

    path: Path
    plan: Plan
    source_digest: str
    layers: tuple[dict[str, Any], ...] = ()
    reused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {
            "path": str(self.path),
            "source_sha256": self.source_digest,
            "layers": list(self.layers),
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
        HarnessError: a type needs llama.cpp's kernels, and they are not installed.
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
    quantizers = threads or os.cpu_count() or 1
    threads = threads or min(os.cpu_count() or 1, 4)
    fresh = [tensor for tensor in plan.tensors if not tensor.copied]
    require_kernels((tensor.type for tensor in fresh), importance=any(tensor.importance for tensor in fresh))
    if plan.shards:
        check_set(plan, out, force=force)
    else:
        check_target(out, plan.checkpoint.own_files, force=force)
    if target := plan.options.save_calibration:
        if target.resolve() == out.resolve():
            raise OutputError(f"{target}: is the file to write already; keep the calibration under another name")
        check_target(target, plan.checkpoint.own_files, force=force)
    reports = calibrate_plan(plan, work := out.with_name(out.name + ".calibration"), progress)

    def finish(descriptor: int, layout: Layout) -> None:
        _fill_in(plan, reports, descriptor, layout)

    if plan.shards:
        out, reused = write_set(plan, out, threads=threads, quantizers=quantizers, progress=progress, finish=finish), 0
    else:
        calibrated = [plan.saved.path] if plan.saved else sorted(work.glob("layer-*.npz")) if reports else []
        journal = Journal(out, _writing_job(plan, calibrated), plan.digest.parts, resume=resume)
        write_file(
            out,
            plan.layout,
            plan.tensors,
            progress=progress,
            threads=threads,
            quantizers=quantizers,
            verifiers=threads,
            journal=journal,
            finish=finish,
        )
        reused = journal.reused
    if reports and not plan.saved:
        shutil.rmtree(work)
    return Conversion(out, plan, plan.digest.hexdigest(plan.checkpoint.tensors), reports, reused)


def _fill_in(plan: Plan, reports: Sequence[dict[str, Any]], descriptor: int, layout: Layout) -> None:
    """Replace the placeholders in a header: the digest over the source, and (not in later shards) the experts' load."""
    digest = plan.digest.hexdigest(plan.checkpoint.tensors)
    write_over(descriptor, digest.encode(), value_offset(layout, SOURCE_DIGEST, DIGEST_PLACEHOLDER))
    if reports and (not plan.shards or layout is plan.shards[0][1]):
        load = np.array([report["load"] for report in reports], "<f4")
        write_over(descriptor, load.tobytes(), array_offset(layout, CALIBRATION_LOAD, load.size))


def _writing_job(plan: Plan, calibrated: Iterable[Path]) -> dict[str, str]:
    """Everything that decides the bytes of the file; `calibrated` are the files that its experts come from."""
    kinds = {tensor.type for tensor in plan.tensors}
    job = describe_job("convert", plan.options, plan.checkpoint.files, plan.layout.header, kinds)
    parts = [hashlib.sha256(path.read_bytes()).digest() for path in calibrated]
    return job | ({"calibrated experts": hashlib.sha256(b"".join(parts)).hexdigest()} if parts else {})


def calibrate_plan(plan: Plan, work: Path, progress: Progress) -> tuple[dict[str, Any], ...]:
    """Find the experts of every layer, if they need text; the reports of the layers.

    They come from a saved calibration, or are made in `work`, where a stopped calibration is continued.
    """
    text, saved, slicing, checkpoint = plan.text, plan.saved, plan.slicing, plan.checkpoint
    if slicing is None:
        return ()
    if not isinstance(checkpoint, Checkpoint):  # whose weights are rounded: the plan warns that they are not compared
        if saved is None:
            return ()
        plan.experts.load = lambda i: saved.layer(i, slicing)
        return saved.reports
    identity = _identity(checkpoint) if text or saved else ""
    if saved:
        if saved.job.checkpoint != identity:
            raise CalibrationError(
                f"{saved.path}: made from another checkpoint than {checkpoint.folder} (other weights); "
                "calibrate again without --load-calibration"
            )
        plan.experts.load = lambda i: saved.layer(i, slicing)
        return saved.reports
    if text is None:
        return ()
    reports = _calibrate_on_text(plan, checkpoint, text, slicing, work, identity, progress)
    plan.experts.load = functools.partial(LayerExperts.load, work)
    if target := plan.options.save_calibration:
        save_calibration(target, _calibration_job(plan, text, slicing, identity), plan.experts.load)
    return tuple(reports)


def _calibrate_on_text(
    plan: Plan,
    checkpoint: Checkpoint,
    text: Text,
    slicing: Slicing,
    work: Path,
    identity: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Make the experts of every layer in `work`."""
    try:
        from moe2gguf.experts.calibration import Settings, calibrate
    except ImportError as error:
        raise CalibrationError(
            f"calibration needs torch and transformers ({error}): pip install 'moe2gguf[calibrate]', "
            "or take --recipe seed"
        ) from error
    options = plan.options
    n_context = window(checkpoint.model)
    settings = Settings(
        options.calibration_tokens,
        n_context,
        checkpoint.vocabulary.first_id,
        options.device,
        options.calibration_memory,
        identity,
    )
    total = options.calibration_tokens // n_context * n_context * checkpoint.model.n_layer
    with progress("calibrate", total) as advance:
        return calibrate(
            checkpoint.folder,
            lambda name: checkpoint.tensors[name].read(),
            text,
            slicing,
            settings,
            work,
            advance,
        )


def _identity(checkpoint: Checkpoint) -> str:
    """A digest of everything that a calibration depends on: the embedding and all layers."""
    used = {name: t for name, t in checkpoint.tensors.items() if name.startswith(("model.layers.", "model.embed"))}
    return source_digest(used)


def _calibration_job(plan: Plan, text: Text, slicing: Slicing, identity: str) -> Job:
    model = plan.checkpoint.model
    return Job(
        checkpoint=identity,
        text=text.digest,
        label=text.label,
        n_token=plan.options.calibration_tokens,
        n_layer=model.n_layer,
        d_model=model.d_model,
        d_ff=model.d_ff,
        n_expert=slicing.n_expert,
        n_expert_used=slicing.n_expert_used,
        **vars(slicing.recipe),
    )


def check_conversion(done: Conversion, dense: str, *, threads: int | None = None, progress: Progress = silent) -> Check:
    """Compare the file `done` in llama.cpp with its dense twin, at all experts.

    `dense` is a path, or "auto": the dense file is made beside it from the same checkpoint, with the same type for
    every tensor, and removed afterwards.

    Raises:
        HarnessError: llama.cpp is not installed or cannot run a file.
    """
    if dense != "auto":
        return check(done.path, Path(dense), threads=threads)
    options = dataclasses.replace(
        done.plan.options,
        dense=True,
        experts=None,
        used=None,
        recipe_file=None,
        shard_size=None,
        save_calibration=None,
        load_calibration=None,
        target_size=None,
        target_bpw=None,
        tensor_types=_pinned(done.plan),
        allow_fallback=True,
    )
    with tempfile.TemporaryDirectory(prefix=".moe2gguf-", dir=done.path.parent) as folder:
        twin = Path(folder) / "dense.gguf"
        convert(done.plan.checkpoint.path, twin, options, threads=threads, progress=progress)
        return check(done.path, twin, threads=threads)


def _pinned(plan: Plan) -> tuple[str, ...]:
    """`--tensor-type` for every matrix of the plan, by its name in the dense file; none where all are as stored."""
    if not plan.assigned.counts:
        return ()
    return tuple(
        f"{re.escape(tensor.name.replace('_exps', ''))}={tensor.type.name}"
        for tensor in plan.tensors
        if may_quantize(tensor.name, tensor.shape)
    )
