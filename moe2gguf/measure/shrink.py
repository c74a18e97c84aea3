"""One wish about a model, and the file that meets it: it fits a room, reaches a speed, or keeps a quality.

Smaller types of the dense model come first. It is cut into experts where no type reaches the speed, and tried in
experts where they might make the smallest type that keeps the quality faster still: wherever both were measured, a type
lost less than slices that are as fast (docs/results/quants.md).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moe2gguf.errors import CalibrationError, PlanError
from moe2gguf.experts.text import Text, hold_out, read_sample
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.outputs import check_model_target
from moe2gguf.gguf.resume import Job, checksum_path, describe
from moe2gguf.gguf.set_used import set_used
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.system import temporary_folder
from moe2gguf.gguf.types import FLOATS
from moe2gguf.measure.check import require_llama
from moe2gguf.measure.compare import CompareSettings, require_text
from moe2gguf.measure.grid import RunConfig, plan_run
from moe2gguf.measure.metrics import as_json
from moe2gguf.measure.trials import FINAL, WINDOW, Trial, Trials
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.rules import TypeOptions, refuse_type
from moe2gguf.recipes.convert import convert, plan_conversion
from moe2gguf.recipes.options import DEFAULT_TOKENS, CalibrationOptions, Options
from moe2gguf.recipes.plan import Plan, find_target
from moe2gguf.recipes.quantize import plan_quantization, quantize
from moe2gguf.recipes.source import Source, open_source

TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
_MORE_ROOM = "give more, or a smaller --context"
_NO_EXPERTS = "no experts are tried, which `moe2gguf convert` refuses"
T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """What the file is to be: one of them. The source is a folder's dense file in its own types, or the GGUF file.

    room     bytes, of the file and of the key/value cache (F16) of `n_context` tokens
    faster   the speed of generation on this machine over the source's, at least
    quality  the perplexity over the source's, at most; the file that reads the least per token is looked for
    """

    room: int | None = None
    faster: float | None = None
    quality: float | None = None
    n_context: int = 4096


@dataclass(frozen=True)
class ShrinkSettings:
    """How a wish is met.

    text     its first four fifths fit the experts, the last one is scored; None: the built-in text
    n_token  scored positions; None: all of that fifth
    types    that are tried
    threads  None: all processors
    """

    text: Path | None = None
    n_token: int | None = 2048
    types: tuple[str, ...] = TYPES
    threads: int | None = None


@dataclass(frozen=True)
class Shrunk:
    """The file, what was measured of it in the end, everything that was tried on the way, and what is to be said.

    cache  bytes of the key/value cache that the wish for a room counts
    prompt_ratio  speed of prompts over the source's
    """

    path: Path
    wish: Wish
    chosen: Trial
    prompt_ratio: float
    source: RunConfig
    trials: tuple[Trial, ...]
    cache: int
    text: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {**as_json(self), "path": str(self.path)}


def shrink(
    model: str | Path,
    out: str | Path,
    wish: Wish,
    settings: ShrinkSettings | None = None,
    *,
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Shrunk:
    """Write `out`, the file of `model` that meets the wish, and measure it against the source.

    What is made on the way is kept in `OUT.work` until all is done, and the same call goes on there.

    Args:
        model: as `convert` takes it.
        out: the GGUF file to write.
        wish: the one wish.
        settings: the text, the types.
        force: replace `out` if it exists.
        resume: False starts anew.
        progress: as in `convert`.
        on_plan: is given the plan of a conversion before it is written.
        on_step: is told, in a line each, what is made or measured next, and what was found.

    Raises:
        PlanError: the model cannot be read, or the wish cannot be met; it says what could be.
        OutputError: `out` cannot be written.
        HarnessError: llama.cpp is missing, or a file could not be measured.
        CalibrationError: the text cannot be read.
        and what `convert` and `quantize` raise.
    """
    settings, out = settings or ShrinkSettings(), Path(out)
    if unknown := [line for kind in settings.types for line in refuse_type(kind)]:
        raise PlanError(unknown)
    source = open_source(Path(model))
    check_model_target(out, 1, [*source.own_files, *([settings.text] if settings.text else [])], force=force)
    fit, held_out = hold_out(read_sample(settings.text, 5 * DEFAULT_TOKENS))
    cache = _count_cache(source, wish)
    require_llama()
    n_context = min(WINDOW, source.model.n_context or WINDOW)
    require_text(CompareSettings(held_out, settings.n_token, n_context), source)
    manifest = {"command": "shrink", "text": fit.digest, **{file.name: describe(file) for file in source.files}}

    with (
        Job(out.with_name(out.name + ".work"), manifest, resume=resume) as job,
        temporary_folder() as logits,
    ):
        try:
            # Make the files that the wish asks for, measure them, and choose one.
            files = _Files(source, job, fit, progress, on_plan, on_step)
            if wish.room is None:
                files.can_slice(source.path)
            trials = Trials(files.dense, held_out, settings.n_token, settings.threads, logits, on_step)
            chosen = _find(wish, files, trials, settings.types, cache)
        except PlanError:
            job.remove()
            raise
        # Measure it anew: the figure for which it was chosen flatters it.
        on_step(f"chosen: {Trial(chosen).name}")
        tried = tuple(trials.found.values())
        trials.score(chosen)
        prompt_ratio = trials.time(chosen, FINAL)[1]
        final = replace(trials.found[chosen], config=replace(chosen, path=out))
        if chosen.n_expert:
            set_used(chosen.path, chosen.n_expert_used)
        os.replace(chosen.path, out)
        job.remove()
    notes = (*files.notes, *trials.notes, *_judge(wish, final))
    return Shrunk(out, wish, final, prompt_ratio, trials.source, tried, cache, held_out.label, notes)


def _judge(wish: Wish, final: Trial) -> list[str]:
    """A sentence where the last measurement does not bear out the choice."""
    ratio = final.speed.ratio if final.speed else None
    if wish.faster and ratio and ratio < wish.faster:
        return [f"measured again, it is {ratio:.2f} times as fast, not {wish.faster:g}: the two are close"]
    return []


def _count_cache(source: Source, wish: Wish) -> int:
    """Bytes of keys and values in F16; 0 where the wish is not for a room."""
    model = source.model
    n_token = min(wish.n_context, model.n_context)
    return 4 * n_token * model.n_layer * model.n_head_kv * model.d_head if wish.room else 0


# --- making ---


class _Files:
    """The files that can be made of a source, each made once.

    dense  the source as a GGUF file with its own types
    notes  why no experts can be cut, where that is so
    """

    def __init__(
        self,
        source: Source,
        job: Job,
        text: Text,
        progress: Progress,
        on_plan: Callable[[Plan], None],
        on_step: Callable[[str], None],
    ) -> None:
        self._job, self._progress, self._on_plan, self._on_step = job, progress, on_plan, on_step
        self.notes: list[str] = []
        fit = job.folder / f"{text.label.removesuffix('.txt')}.txt"
        if not fit.exists():  # a conversion that was stopped knows it by the time of its change
            fit.write_text(text.text, encoding="utf-8")
        self._experts = Options(target=find_target(source.model), calibration=CalibrationOptions(text=fit))
        self.is_own = not source.path.is_file()
        plain = Options(dense=not source.model.n_expert)
        self.dense = self._convert(source.path, "dense.gguf", plain) if self.is_own else source.path
        self.size = read_model(self.dense).file_size
        self.is_quantized = any(one.type not in FLOATS for one in read_model(self.dense).tensors.values())

    def list_types(self, types: Sequence[str]) -> list[str]:
        """Those of `types` that make the file smaller, the smallest first; none of weights that are quantized."""
        if self.is_quantized:
            return []
        sizes = {self._plan_size(kind): kind for kind in types[::-1]}
        return [kind for size, kind in sorted(sizes.items()) if size < self.size]

    def quantize(self, kind: str) -> RunConfig:
        """The dense file in a type."""
        return self._quantize(f"{kind.lower()}.gguf", TypeOptions(kind, allow_fallback=True))

    def fit_room(self, n_byte: int) -> RunConfig:
        """The dense file in the types that lose least in `n_byte` bytes."""
        if self.size <= n_byte:
            return plan_run(read_model(self.dense), None)
        if self._plan_size("f16") <= n_byte:
            return self.quantize("f16")
        return self._quantize(f"room-{n_byte}.gguf", TypeOptions(target_size=n_byte))

    def slice(self, dense: RunConfig) -> list[RunConfig]:
        """The dense file cut into experts, at every count below all that llama.cpp can run, the fewest first."""
        if self.notes or not self.can_slice(dense.path):
            return []
        try:
            file = read_model(self._convert(dense.path, f"{dense.path.stem}-sliced.gguf", self._experts))
        except CalibrationError as error:
            self.notes = [f"{_NO_EXPERTS}: {error}"]
            return []
        counts = read_counts(file)
        found = [plan_run(file, k) for k in range(counts.n_shared + 1, counts.n_expert)]
        return [one for one in found if not one.refusal]

    def can_slice(self, path: Path) -> bool:
        """Whether experts can be cut of a model; the notes say why not."""
        try:
            plan_conversion(path, self._experts)
        except PlanError as error:
            self.notes = [f"{_NO_EXPERTS}: {line}" for line in error.refusals]
            self._on_step(self.notes[0])
        return not self.notes

    def _plan_size(self, kind: str) -> int:
        try:
            return plan_quantization(self.dense, TypeOptions(kind, allow_fallback=True)).file_size
        except PlanError as error:
            raise PlanError(
                [f"--types {kind}: `moe2gguf quantize` refuses: {one}" for one in error.refusals]
            ) from error

    def _quantize(self, name: str, options: TypeOptions) -> RunConfig:
        write = partial(quantize, self.dense, options=options, force=True, progress=self._progress)
        return plan_run(read_model(self._make(name, write)), None)

    def _convert(self, source: Path, name: str, options: Options) -> Path:
        more: dict[str, Any] = {"progress": self._progress, "on_plan": self._on_plan}
        return self._make(name, partial(convert, source, options=options, force=True, **more))

    def _make(self, name: str, write: Callable[..., object]) -> Path:
        """Make a file, unless an earlier call has."""
        path = self._job.folder / name
        if not (path.exists() and self._job.confirm(name, checksum_path(path))):
            self._on_step(f"making {name}")
            write(out=path)
            self._job.record(name, checksum_path(path))
        return path


# --- choosing ---


def _find(wish: Wish, files: _Files, trials: Trials, types: Sequence[str], cache: int) -> RunConfig:
    """The file and count that meets the wish. Raises PlanError where none does, or the source does already."""
    if wish.room is not None:
        return _find_for_room(wish.room, files, cache)
    if wish.faster is not None:
        return _find_faster(wish.faster, files, trials, types)
    return _find_smallest(wish.quality or 1.0, files, trials, types)


def _find_for_room(room: int, files: _Files, cache: int) -> RunConfig:
    """The types that lose least; the cache goes first."""
    if room <= cache:
        raise PlanError([f"--room {room:,}: the cache alone takes {cache:,} bytes; {_MORE_ROOM}"])
    where = f"--room {room:,}: less {cache:,} bytes for the cache, {room - cache:,} are left for the file"
    if files.size <= room - cache and not files.is_own:
        raise PlanError([f"{where}, and {files.dense} of {files.size:,} fits already"])
    if files.size > room - cache and files.is_quantized:
        raise PlanError(
            [f"{where}; {files.dense} is quantized, and would lose twice: give the folder or F16 file it was made from"]
        )
    try:
        return files.fit_room(room - cache)
    except PlanError as error:
        reasons = "; ".join(error.refusals).removeprefix(f"--target-size {room - cache:,}: ")
        raise PlanError([f"{where}, but {reasons}; {_MORE_ROOM}"]) from error


def _find_faster(factor: float, files: _Files, trials: Trials, types: Sequence[str]) -> RunConfig:
    """The largest type that is so fast; where none is, the most experts of the smallest."""

    def is_fast(one: RunConfig) -> bool:
        return trials.time(one)[0] >= factor

    kinds = files.list_types(types)
    if kind := find_last(kinds, lambda kind: is_fast(files.quantize(kind))):
        return files.quantize(kind)
    counts = files.slice(files.quantize(kinds[0]) if kinds else trials.source)
    if found := find_last(counts, is_fast):
        return found
    timed = [(one.speed.ratio or 0, one.name) for one in trials.found.values() if one.speed]
    most = "; {1} is {0:.2f} times".format(*max(timed)) if timed else ""
    raise PlanError([f"--faster {factor:g}: nothing here is so fast{most}", *files.notes])


def _find_smallest(limit: float, files: _Files, trials: Trials, types: Sequence[str]) -> RunConfig:
    """The smallest type within the limit, or the fewest experts of it that are and make it faster."""

    def is_good(one: RunConfig) -> bool:
        return trials.score(one) <= limit

    kinds = files.list_types(types)[::-1]
    kind = find_last(kinds, lambda kind: is_good(files.quantize(kind)))
    dense = files.quantize(kind) if kind else trials.source
    if kind or not kinds:
        counts = [one for one in files.slice(dense)[::-1] if one.active_bytes < dense.active_bytes]
        sliced = find_last(counts, is_good)
        if sliced and trials.time(sliced)[0] > (trials.time(dense)[0] if kind else 1):
            return sliced
    if kind:
        return dense
    found = [(one.perplexity.mean, one.name) for one in trials.found.values() if one.perplexity]
    least = f"; {min(found)[1]} has {min(found)[0]:.4f} times" if found else ""
    raise PlanError([f"--quality {limit:g}: nothing here is that good and faster{least}", *files.notes])


def find_last(items: Sequence[T], passes: Callable[[T], bool]) -> T | None:
    """The last of the items that passes, if all before it do and none behind it; few are asked."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if passes(items[middle]):
            low = middle + 1
        else:
            high = middle
    return items[low - 1] if low else None
