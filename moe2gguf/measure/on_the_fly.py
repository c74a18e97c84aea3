"""A comparison whose files are also quantized on the fly, and removed when it is done."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe2gguf.errors import OutputError, PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.outputs import make_folder
from moe2gguf.gguf.shards import read_model
from moe2gguf.measure.compare import CompareSettings, cache_folder, compare
from moe2gguf.measure.expert_usage import ExpertUse, measure_expert_usage
from moe2gguf.measure.grid import plan_run
from moe2gguf.measure.journal import require_writable
from moe2gguf.measure.results import Comparison
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import QuantizationPlan, plan_quantization, quantize


@dataclass(frozen=True)
class QuantizedCopy:
    """A quantized copy of a file: `plan` describes it in full, `path` is where it lies while it is needed."""

    plan: QuantizationPlan
    path: Path

    @property
    def origin(self) -> str:
        """How to make it again, and which types are not the one that was asked for."""
        options, counts = self.plan.options, self.plan.assigned.fallbacks
        words = f"moe2gguf quantize {self.plan.source.path.name} OUT {options.type} --allow-fallback"
        if options.imatrix:
            words += f" --imatrix {options.imatrix.name}"
        return f"{words} ({len(counts)} tensors took a substitute)" if counts else words


def compare_types(
    files: Sequence[str | Path],
    reference: str | Path,
    *,
    kinds: Sequence[str] = (),
    imatrix: str | Path | None = None,
    experts: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Comparison:
    """Compare `files`, and each of them that is f32, f16 or bf16 in every type of `kinds` too.

    All types take the importance matrix `imatrix`; `options` are those of `compare`. A type that does not fit a tensor
    takes llama.cpp's substitute; the result's settings tell how many did, and how to make each file again. With
    `experts` every sound row that leaves experts out has its experts counted, on the same text: see
    `measure_expert_usage`.

    Raises:
        PlanError: a type cannot be had, or no file is in a float type; every reason is listed.
        and what `quantize` and `compare` raise.
    """
    reference = Path(reference)
    imatrix = None if imatrix is None else Path(imatrix)
    paths = [Path(one) for one in files]
    wanted = plan_copies(paths, kinds, cache_folder() / "types", imatrix)
    with write_copies(wanted, progress) as copies:
        found = compare([*paths, *copies], reference, **options)
        if experts:
            found = replace(found, experts=_count_experts(found, options.get("settings") or CompareSettings()))
    if not wanted:
        return found
    warnings = dict.fromkeys(warning for one in wanted for warning in one.plan.warnings)
    settings = found.settings | {"made": {one.path.name: one.origin for one in wanted}}
    return replace(found, settings=settings, notes=(*found.notes, *warnings))


def _count_experts(found: Comparison, settings: CompareSettings) -> tuple[ExpertUse, ...]:
    """Count the experts of every sound row that does not run all."""
    return tuple(
        measure_expert_usage(
            one.path,
            used=one.n_expert_used,
            text=settings.text,
            n_token=settings.n_token,
            n_context=settings.n_context,
            device=one.device,
            threads=settings.threads,
        )
        for one in (row.config for row in found.rows if row.status == "ok")
        if one.n_expert_used < one.n_expert
    )


def plan_copies(
    files: Sequence[Path], kinds: Sequence[str], folder: Path, imatrix: Path | None = None
) -> list[QuantizedCopy]:
    """Plan every type for every file whose weights are in a float type; nothing is written.

    A copy's place in `folder` depends on the source, the type and the importance matrix only. Files that are
    quantized already are left out. Raises PlanError with every reason.
    """
    refusals, out = [], []
    if imatrix and not kinds:
        refusals.append(f"{imatrix}: an importance matrix is for files quantized on the fly: name --types, too")
    sources = [path for path in dict.fromkeys(files) if _is_float(path)]
    if kinds and not sources:
        refusals.append("no file is f32, f16 or bf16: name the one that the others were quantized from")
    for path in sources:
        for kind in dict.fromkeys(kinds):
            try:
                plan = plan_quantization(path, TypeOptions(kind.lower(), allow_fallback=True, imatrix=imatrix))
            except PlanError as error:
                words = f"moe2gguf quantize {path.name} OUT {kind}"
                refusals += [f"`{words}` is refused: {line}" for line in error.refusals]
                continue
            place = folder / _choose_place(plan)
            out.append(QuantizedCopy(plan, place / f"{path.stem}-{kind.upper()}.gguf"))
    if refusals:
        raise PlanError(refusals)
    return out


@contextlib.contextmanager
def write_copies(wanted: Sequence[QuantizedCopy], progress: Progress = silent) -> Iterator[list[Path]]:
    """Make the files, hand out their paths, and remove them.

    An interrupt (or a kill) leaves the finished ones for the next time. A file's time is that of the newest thing it is
    made from, so that the same file made again is the same to a journal, and another is not.
    """
    try:
        for one in wanted:
            if not _is_written(one):
                require_writable(one.path)
                make_folder(one.path.parent)
                quantize(one.plan.source.path, one.path, one.plan.options, force=True, progress=progress)
            newest = max(path.stat().st_mtime_ns for path in (*one.plan.source.files, one.plan.options.imatrix) if path)
            with _explained(one.path, "changed"):
                os.utime(one.path, ns=(newest, newest))
        yield [one.path for one in wanted]
    except Exception:
        with contextlib.suppress(OutputError):  # the first error counts
            _remove(wanted)
        raise
    _remove(wanted)


def _choose_place(plan: QuantizationPlan) -> str:
    """What tells the files of one source and importance matrix from those of others."""
    source, imatrix = plan_run(plan.source, 1).identity, plan.options.imatrix
    return source if imatrix is None else hashlib.sha256(source.encode() + imatrix.read_bytes()).hexdigest()[:32]


def _is_float(path: Path) -> bool:
    return all(tensor.type in types.FLOATS for tensor in read_model(path).tensors.values())


def _is_written(one: QuantizedCopy) -> bool:
    """Whether an interrupted run left the file: it is whole if it is there, but a version of ours may be older."""
    header = one.plan.header
    with contextlib.suppress(OSError), one.path.open("rb") as file:
        return file.read(len(header)) == header
    return False


def _remove(wanted: Sequence[QuantizedCopy]) -> None:
    for one in wanted:
        with _explained(one.path, "removed"):
            one.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another comparison's files are in it
            one.path.parent.rmdir()


@contextlib.contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Raise OutputError for a disk error."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be {what} ({error.strerror}); remove it by hand") from error
