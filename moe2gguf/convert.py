"""The recipe: a dense Hugging Face checkpoint becomes a Mixtral-architecture GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.export.layout import value_offset
from moe2gguf.export.metadata import DIGEST_PLACEHOLDER, SOURCE_DIGEST
from moe2gguf.export.verify import require_sound
from moe2gguf.export.writer import check_target, replacing, write_tensors, write_text
from moe2gguf.harness.check import Check, check
from moe2gguf.planning import Options, Plan, plan_conversion

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with progress(stage, total_bytes) as advance:` gives the function that is told about bytes done."""


@contextlib.contextmanager
def silent(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress for nobody."""
    del stage, total
    yield lambda _: None


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the file, its plan, and the SHA-256 over the source tensors."""

    path: Path
    plan: Plan
    source_digest: str

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "source_sha256": self.source_digest, **self.plan.to_dict()}


def convert(
    model: Path,
    out: Path,
    options: Options | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Convert the Hugging Face folder `model` into the GGUF file `out`.

    Args:
        model: folder with config.json, tokenizer files and safetensors (f32, f16, bf16).
        out: the file to write; it appears only when it is complete and verified.
        options: how many experts, which type, ...: see `Options`.
        force: replace `out` if it exists.
        threads: how many tensors are worked on at once (None: the number of cores, at most 4).
        progress: receives stages ("write", "verify") and the bytes done.

    Raises:
        PlanError: the model or the options do not fit; every reason is listed.
        CheckpointError: `model` is not a model folder, or a file of it ends early.
        CorruptWeightError: a weight is NaN, infinite, or too large for the type.
        OutputError: `out` cannot be written, or must not be replaced.
        GGUFError: the written file did not verify (a defect of ours or of the disk).
    """
    return write_plan(plan_conversion(model, options), out, force=force, threads=threads, progress=progress)


def write_plan(
    plan: Plan, out: Path, *, force: bool = False, threads: int | None = None, progress: Progress = silent
) -> Conversion:
    """The second pass: write, verify and name the file that `plan` describes; arguments and errors as in `convert`."""
    threads = threads or min(os.cpu_count() or 1, 4)
    sources = (path for path in plan.checkpoint.folder.iterdir() if path.is_file())
    check_target(out, (*plan.checkpoint.files, *sources), force=force)
    with replacing(out, plan.file_size) as (descriptor, partial):
        with progress("write", plan.file_size) as advance:
            write_tensors(descriptor, plan.layout, plan.tensors, threads=threads, advance=advance)
        digest = plan.digest.hexdigest(plan.checkpoint.tensors)
        write_text(descriptor, digest, value_offset(plan.layout, SOURCE_DIGEST, DIGEST_PLACEHOLDER))
        with progress("verify", plan.file_size) as advance:
            require_sound(partial, threads=threads, progress=advance)
    return Conversion(out, plan, digest)


def check_conversion(done: Conversion, dense: str, *, threads: int | None = None, progress: Progress = silent) -> Check:
    """Compare the file `done` in llama.cpp with its dense twin, at all experts.

    `dense` is a path, or "auto": the dense file is made beside it from the same checkpoint, at the same type, and
    removed afterwards.

    Raises:
        HarnessError: llama.cpp is not installed or cannot run a file.
    """
    if dense != "auto":
        return check(done.path, Path(dense), threads=threads)
    options = dataclasses.replace(done.plan.options, dense=True, experts=None, used=None)
    with tempfile.TemporaryDirectory(prefix=".moe2gguf-", dir=done.path.parent) as folder:
        twin = Path(folder) / "dense.gguf"
        convert(done.plan.checkpoint.folder, twin, options, threads=threads, progress=progress)
        return check(done.path, twin, threads=threads)
