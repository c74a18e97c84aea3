"""A folder that can be published: variants of one model, measured, with a model card; and its way to the Hub."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError, OutputError, PlanError, list_names
from moe2gguf.gguf.outputs import require_place, require_room
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.resume import Job, checksum_path, describe, describe_record
from moe2gguf.hf import hub
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.measure.bench import Timing
from moe2gguf.measure.compare import CompareSettings, compare, require_comparison
from moe2gguf.measure.report.card import CardFile, write_card
from moe2gguf.measure.report.picture import require_picture, write_picture
from moe2gguf.measure.results import Comparison, ResultRow
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.convert import convert, plan_conversion
from moe2gguf.recipes.options import Options
from moe2gguf.recipes.plan import Plan
from moe2gguf.recipes.source import Source, complete_options, open_source

OnPlan = Callable[[Plan], None]

CARD = "README.md"
PICTURE = "quality.png"
DENSE = "dense.gguf"


@dataclass(frozen=True)
class PublishSettings:
    """What is published.

    types    of the files, as `convert --type` names them
    used     numbers of experts per token; empty: all experts. A file of each type is made for each of them, or where
             one file of the target graph serves every count, for the first of them and measured at all
    options  everything else about the conversions; a type that does not fit a tensor takes llama.cpp's substitute
    quality, timing  how the files are measured; without `timing` their speed is not
    """

    types: tuple[str, ...] = ("q8_0", "q4_k_m")
    used: tuple[int, ...] = ()
    options: Options = field(default_factory=Options)
    quality: CompareSettings = field(default_factory=CompareSettings)
    timing: Timing | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Those of `used` that files are made for."""
        return self.used[:1] if self.options.graph.has_shared else self.used


@dataclass(frozen=True)
class Publication:
    """What `publish` made: the folder, the files in it, what was measured, and the page on the Hub if it is there."""

    folder: Path
    files: tuple[CardFile, ...]
    found: Comparison
    url: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        files = [{"name": one.name, "bytes": one.n_byte, "sha256": one.sha256} for one in self.files]
        return {"path": str(self.folder), "files": files, "url": self.url, "measured": self.found.to_dict()}


@dataclass(frozen=True)
class Variant:
    """A file to make: its name, the options of its conversion, and where the calibration that it shares is kept."""

    name: str
    options: Options
    calibration: Path | None = None


def publish(
    model: str | Path,
    folder: str | Path,
    settings: PublishSettings | None = None,
    *,
    upload: str | None = None,
    private: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    on_plan: OnPlan = lambda _: None,
    on_row: Callable[[ResultRow], None] = lambda _: None,
) -> Publication:
    """Make `folder`: a GGUF file of `model` for every type and count, measured beside the dense model, and a card.

    What is finished is kept in `FOLDER.work` until all is done, and the same call goes on there.

    Args:
        model: as `convert` takes it.
        folder: is made, or has what an earlier call made.
        settings: the types, the counts, and how the files are made and measured.
        upload: "OWNER/NAME" on the Hugging Face Hub, to which the folder is sent; what is there is not sent again.
        private: make the repository private, if it is new.
        resume: False starts anew.
        progress: as in `convert`.
        on_plan: is given the plan of every file before it is written.
        on_row: receives each measured row.

    Raises:
        PlanError: a variant cannot be made; every reason is listed.
        OutputError: `folder` has other files, or it or the repository cannot be written.
        HarnessError: llama.cpp is missing, or a file could not be measured.
        CheckpointError: the model cannot be had.
        and what `convert` and `compare` raise.
    """
    settings, folder = settings or PublishSettings(), Path(folder)
    folder = folder if folder.name else folder.absolute()
    work = folder.with_name(folder.name + ".work")

    # Open the model, and plan every variant before the first is made.
    source = open_source(Path(model), name=settings.options.name)
    if source.model.n_expert:
        raise PlanError([f"{source.path}: has experts already; name the dense model they were cut from"])
    settings = replace(settings, options=complete_options(source, settings.options)[0])
    variants, dense_variants = list_variants(source, settings, work), list_dense(settings)
    reference = {work / DENSE: Variant(DENSE, Options(dense=True))}
    _require_new(folder, work)
    plans = plan_variants(source.path, variants)
    plans += plan_variants(source.path, [*dense_variants, *reference.values()])
    require_room(folder, sum(plan.file_size for plan in plans), begun=[folder, work])
    require_comparison(settings.quality, source)
    if upload:
        hub.require_login(upload)

    with Job(work, _describe_job(source, settings), resume=resume) as job, _make_folder(folder):
        # Make the variants, and the dense files to compare them with.
        ours = {folder / one.name: one for one in variants}
        dense = {work / one.name: one for one in dense_variants}
        to_make = (ours | reference | dense).items()
        for path, one in sorted(to_make, key=lambda item: item[1].calibration is None):  # where a text may be too short
            _make(source.path, path, one, job, progress, on_plan)

        # Measure all of them, draw them, describe them, and send them.
        found = _measure([*ours, *dense], work / DENSE, settings, on_row)
        files = tuple(_describe_file(folder / one.name, one.options) for one in variants)
        picture = PICTURE if _draw(found, folder / PICTURE) else None
        write_card(folder / CARD, read_gguf(folder / variants[0].name).metadata, files, found, picture)
        url = hub.upload_folder(folder, upload, private=private) if upload else ""
        job.remove()
    return Publication(folder, files, found, url)


def _require_new(folder: Path, work: Path) -> None:
    """Raise OutputError unless the folder can be made, or has what an earlier call made with this `work`."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise OutputError(f"{folder}: is no folder; name one that is not there yet")
    require_place(folder.parent)
    if folder.exists() and any(folder.iterdir()) and not work.exists():
        raise OutputError(f"{folder}: exists; choose another name, or remove it")


@contextlib.contextmanager
def _make_folder(folder: Path) -> Iterator[None]:
    """Make a folder; it goes again if nothing is put into it."""
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # as a folder with files in it stays
            folder.rmdir()


def list_variants(source: Source, settings: PublishSettings, work: Path) -> list[Variant]:
    """A variant for every count and type, named "Model-12of16-Q8_0.gguf"; those of one count share a calibration."""
    metadata = source.card if isinstance(source, Checkpoint) else source.file.metadata
    name = re.sub(r"[^\w.-]+", "-", str(metadata.get("general.name", "model")))
    found, n = [], settings.options.n_expert
    for k in dict.fromkeys(settings.counts or (n,)):
        chosen = replace(settings.options, used=k)
        calibrates = chosen.slices(source.model) and chosen.resolve_method().needs_calibration
        kept = work / f"{k}.calibration" if calibrates and not chosen.calibration.load_from else None
        for kind in dict.fromkeys(settings.types):
            types = replace(chosen.types, type=kind, allow_fallback=True)
            found.append(Variant(f"{name}-{k}of{n}-{kind.upper()}.gguf", replace(chosen, types=types), kept))
    return found


def list_dense(settings: PublishSettings) -> list[Variant]:
    """The dense model in the same types: what a reader would take otherwise."""
    types = [TypeOptions(kind, allow_fallback=True, imatrix=settings.options.types.imatrix) for kind in settings.types]
    return [Variant(f"dense-{one.type.upper()}.gguf", Options(dense=True, types=one)) for one in types]


def plan_variants(model: Path, variants: Sequence[Variant]) -> list[Plan]:
    """The plan of each variant. Raises PlanError with what is wrong with any of them; no weight is read for it."""
    refusals: dict[str, list[str]] = {}
    plans = []
    for one in variants:
        try:
            plans.append(plan_conversion(model, one.options))
        except PlanError as error:
            for line in error.refusals:
                refusals.setdefault(line, []).append(one.name)
    if refusals:
        raise PlanError(
            [f"`moe2gguf convert {list_names(names, 1)}` is refused: {line}" for line, names in refusals.items()]
        )
    return plans


def _describe_job(source: Source, settings: PublishSettings) -> dict[str, str]:
    """What decides the files of the folder."""
    chosen = {**describe_record(settings.options), "types": ",".join(settings.types), "used": str(settings.used)}
    return {"command": "publish", **chosen, **{file.name: describe(file) for file in source.files}}


def _make(model: Path, path: Path, one: Variant, job: Job, progress: Progress, on_plan: OnPlan) -> None:
    """Convert, unless an earlier call has."""
    if path.exists() and job.confirm(one.name, checksum_path(path)):
        return
    options, kept = one.options, one.calibration
    if kept:
        made, to_make = (kept, None) if kept.exists() else (None, kept)
        options = replace(options, calibration=replace(options.calibration, load_from=made, save_to=to_make))
    convert(model, path, options, force=True, progress=progress, on_plan=on_plan)
    job.record(one.name, checksum_path(path))


def _measure(
    paths: Sequence[Path], reference: Path, settings: PublishSettings, on_row: Callable[[ResultRow], None]
) -> Comparison:
    """Compare the files with the dense one. Raises HarnessError where one could not be measured."""
    used = settings.used if settings.options.graph.has_shared else ()
    quality, timing = settings.quality, settings.timing
    found = compare(paths, reference, used=used, settings=quality, timing=timing, on_row=on_row)
    if not found.ok:
        reasons = [f"{row.config.label}: {row.reason}" for row in found.rows if row.reason]
        raise HarnessError("\n".join(["not every file could be measured:", *(f"  - {one}" for one in reasons)]))
    return found


def _describe_file(path: Path, options: Options) -> CardFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return CardFile(path.name, path.stat().st_size, digest, " ".join(_list_words(options)))


def _list_words(options: Options) -> Iterator[str]:
    """The options of `convert` that make the file again."""
    if options.target is not None:
        yield f"--target {options.target}"
    if options.experts is not None:
        yield f"--experts {options.experts}"
    yield f"--used {options.used}"
    yield f"--type {options.types.type} --allow-fallback"
    if options.types.imatrix:
        yield f"--imatrix {options.types.imatrix.name}"
    if options.calibration.text:
        yield f"--calibration {options.calibration.text.name}"
    if options.calibration.n_token:
        yield f"--calibration-tokens {options.calibration.n_token}"


def _draw(found: Comparison, path: Path) -> bool:
    """Draw the picture where matplotlib is installed."""
    try:
        require_picture(path)
    except HarnessError:
        return False
    write_picture(found, path)
    return True
