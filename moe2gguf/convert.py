"""The recipe: a dense Hugging Face checkpoint becomes a Mixtral-architecture GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe2gguf.errors import CalibrationError
from moe2gguf.export.assignment import may_quantize
from moe2gguf.export.layout import array_offset, value_offset
from moe2gguf.export.metadata import CALIBRATION_LOAD, DIGEST_PLACEHOLDER, SOURCE_DIGEST
from moe2gguf.export.partial import Journal, describe_job
from moe2gguf.export.types import require_kernels
from moe2gguf.export.verify import require_sound
from moe2gguf.export.writer import check_target, replacing, write_over, write_tensors
from moe2gguf.harness.check import Check, check
from moe2gguf.options import Options
from moe2gguf.planning import Plan, plan_conversion

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with progress(stage, total_bytes) as advance:` gives the function that is told about bytes done."""


@contextlib.contextmanager
def silent(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress for nobody."""
    del stage, total
    yield lambda _: None


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
    """Convert the Hugging Face folder `model` into the GGUF file `out`.

    Args:
        model: folder with config.json, tokenizer files and safetensors (f32, f16, bf16).
        out: the file to write; it appears only when it is complete and verified.
        options: how many experts, which type, ...: see `Options`.
        force: replace `out` if it exists.
        resume: continue an unfinished `out` of the same job, and refuse one of another; False replaces either.
        threads: how many tensors are worked on at once (None: the number of cores, at most 4).
        progress: receives stages ("write", "verify") and the bytes done.

    Raises:
        PlanError: the model or the options do not fit; every reason is listed.
        CheckpointError: `model` is not a model folder, or a file of it ends early.
        CorruptWeightError: a weight is NaN, infinite, or too large for the type.
        HarnessError: a type needs llama.cpp's kernels, and they are not installed.
        CalibrationError: the text or the activations cannot be used, or torch is missing.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
        GGUFError: the written file did not verify (a defect of ours or of the disk).
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
    sources = (path for path in plan.checkpoint.folder.iterdir() if path.is_file())
    require_kernels(tensor.type for tensor in plan.tensors)
    check_target(out, (*plan.checkpoint.files, *sources), force=force)
    reports = calibrate_plan(plan, work := out.with_name(out.name + ".calibration"), progress)
    journal = Journal(out, _job(plan), plan.digest.parts, resume=resume)
    with replacing(out, plan.file_size, journal) as (descriptor, partial):
        with progress("write", plan.file_size) as advance:
            write_tensors(
                descriptor,
                plan.layout,
                plan.tensors,
                threads=threads,
                quantizers=quantizers,
                advance=advance,
                journal=journal,
            )
        digest = plan.digest.hexdigest(plan.checkpoint.tensors)
        write_over(descriptor, digest.encode(), value_offset(plan.layout, SOURCE_DIGEST, DIGEST_PLACEHOLDER))
        if reports:
            load = np.array([report["load"] for report in reports], "<f4")
            write_over(descriptor, load.tobytes(), array_offset(plan.layout, CALIBRATION_LOAD, load.size))
        flush_and_verify(descriptor, partial, plan.file_size, threads=threads, progress=progress)
    if reports:
        shutil.rmtree(work)
    return Conversion(out, plan, digest, reports, journal.reused)


def _job(plan: Plan) -> dict[str, str]:
    """Everything that decides the bytes of the file."""
    kinds = {tensor.type for tensor in plan.tensors}
    job = describe_job("convert", plan.options, plan.checkpoint.files, plan.layout.header, kinds)
    if plan.experts.folder is not None:
        parts = (path.read_bytes() for path in sorted(plan.experts.folder.glob("layer-*.npz")))
        job["calibrated experts"] = hashlib.sha256(
            b"".join(hashlib.sha256(part).digest() for part in parts)
        ).hexdigest()
    return job


def flush_and_verify(
    descriptor: int, partial: Path, file_size: int, *, threads: int | None, progress: Progress
) -> None:
    """Verify the file just written while the disk still works on it. Raises GGUFError for what is not sound."""
    with ThreadPoolExecutor(1) as background, progress("verify", file_size) as advance:
        flushed = background.submit(os.fsync, descriptor)
        require_sound(partial, threads=threads, progress=advance)
        flushed.result()


def calibrate_plan(plan: Plan, work: Path, progress: Progress) -> tuple[dict[str, Any], ...]:
    """Make the experts that need text, in `work`; the reports of the layers. A stopped calibration is continued."""
    if plan.text is None or plan.slicing is None:
        return ()
    try:
        from moe2gguf.experts.calibration import Settings, calibrate
    except ImportError as error:
        raise CalibrationError(
            f"calibration needs torch and transformers ({error}): pip install 'moe2gguf[calibrate]', "
            "or take --recipe seed"
        ) from error
    checkpoint, options = plan.checkpoint, plan.options
    vocabulary = checkpoint.vocabulary
    bos = vocabulary.special_ids.get("bos") if vocabulary.flags.get("add_bos_token") else None
    settings = Settings(options.calibration_tokens, min(512, checkpoint.model.n_context), bos, options.device)
    total = options.calibration_tokens * checkpoint.model.n_layer
    with progress("calibrate", total) as advance:
        reports = calibrate(
            checkpoint.folder,
            lambda name: checkpoint.tensors[name].read(),
            plan.text,
            plan.slicing,
            settings,
            work,
            advance,
        )
    plan.experts.folder = work
    return tuple(reports)


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
        tensor_types=_pinned(done.plan),
        allow_fallback=True,
    )
    with tempfile.TemporaryDirectory(prefix=".moe2gguf-", dir=done.path.parent) as folder:
        twin = Path(folder) / "dense.gguf"
        convert(done.plan.checkpoint.folder, twin, options, threads=threads, progress=progress)
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
