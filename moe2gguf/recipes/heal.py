"""The healing recipe: a sliced model and the dense one it was cut from -> the sliced model, trained for a while."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moe2gguf.errors import HealError
from moe2gguf.experts.heal.settings import HealSettings, Windows
from moe2gguf.experts.text import Text, read_text, tokenize_windows
from moe2gguf.gguf.metadata import SOURCE_DIGEST
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.safetensors import source_digest
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.hf_output import Trained, write_healed
from moe2gguf.recipes.tensors_hf import expert_stacks
from moe2gguf.recipes.write_folder import check_folder_target
from moe2gguf.spec import MetadataValue

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Texts:
    """Token windows (n_window, n_context) to train on and to evaluate on, and what to call the text."""

    ids: Windows
    held_out: Windows
    label: str
    digest: str


@dataclass(frozen=True)
class Healing:
    """What `heal` did: the folder, and every line of its log."""

    path: Path
    log: tuple[dict[str, Any], ...]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The held-out scores, first to last."""
        return [line for line in self.log if line["stage"] == "evaluation"]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "log": list(self.log)}


def heal(
    student: Path,
    teacher: Path,
    texts: Sequence[Path],
    out: Path,
    settings: HealSettings,
    *,
    held_out: Path | None = None,
    n_token: int = 65536,
    n_held_out: int = 4096,
    n_context: int = 512,
    force: bool = False,
    progress: Progress = silent,
    on_line: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Healing:
    """Train the sliced folder `student` against the dense folder `teacher`; the result is the folder `out`.

    A run that was stopped goes on from `OUT.heal`, to the same result. Without `held_out`, the last tenth of the text
    is kept for evaluation.

    Args:
        texts: what to train on, plain text or JSONL with a text field.
        n_token, n_held_out: how many tokens of them, in windows of `n_context`.
        on_line: is told every line of the log.

    Raises:
        HealError: the two do not fit (every reason is listed), a number became NaN, or torch is missing.
        PlanError, CheckpointError: a folder is not a sound checkpoint.
        CalibrationError: the text cannot be used.
        OutputError: `out` cannot be written, or must not be replaced.
    """
    check_folder_target(out, [student, teacher], force=force)
    sliced, dense = open_checkpoint(student), open_checkpoint(teacher)
    if found := misfits(sliced, dense, settings):
        raise HealError("\n".join([f"cannot heal, {len(found)} problem(s):", *(f"  - {line}" for line in found)]))
    data = read_texts(sliced, texts, held_out, n_token, n_held_out, n_context)
    work = out.with_name(out.name + ".heal")
    resume(work, _job(data, sliced, settings))
    log = Log(work / "log.jsonl", on_line)
    trained = _train(sliced, dense, data, settings, work, log, progress)
    if is_main():
        provenance = _provenance(data, settings, log.lines)
        write_healed(sliced, trained, out, provenance, log.lines, progress=progress)
        shutil.rmtree(work)
    return Healing(out, tuple(log.lines))


def is_main() -> bool:
    """Whether this process writes: the only one, or the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def misfits(sliced: Checkpoint, dense: Checkpoint, settings: HealSettings) -> list[str]:
    """Every reason why `dense` cannot teach `sliced`, or why the settings do not fit them."""
    ours, theirs = sliced.model, dense.model
    found = []
    if not ours.n_expert:
        found.append(f"{sliced.folder}: has no experts; make it with `moe2gguf convert --format hf`")
    if theirs.n_expert:
        found.append(f"{dense.folder}: has experts; the teacher is the dense model the student was cut from")
    for field in ("n_layer", "d_model", "n_head", "n_head_kv", "d_head", "n_vocab", "rope", "tied_embeddings"):
        if getattr(ours, field) != getattr(theirs, field):
            found.append(f"{field} is {getattr(ours, field)} in the student, {getattr(theirs, field)} in the teacher")
    if sliced.vocabulary.tokens != dense.vocabulary.tokens:
        found.append("the vocabularies differ; teacher and student must read the same token ids")
    found += _refuse_counts(ours.n_expert, settings)
    if not found and (digest := sliced.provenance.get(SOURCE_DIGEST)) not in (None, source_digest(dense.tensors)):
        found.append(f"the student was cut from a model with digest {digest}, and the teacher has another")
    return found


def _refuse_counts(n_expert: int, settings: HealSettings) -> list[str]:
    found = []
    low, high = settings.used_range
    if n_expert and not 1 <= low <= high <= n_expert:
        found.append(f"--used-range {low}..{high}: must lie between 1 and {n_expert}, the number of experts")
    if n_expert and (outside := [k for k in settings.evaluate_at if not 1 <= k <= n_expert]):
        found.append(f"--evaluate-at {outside}: must lie between 1 and {n_expert}, the number of experts")
    if settings.layerwise and "lora" in settings.train:
        found.append("--train lora is for whole steps; add --layerwise 0")
    if "attention" in settings.train and not settings.steps:
        found.append("--train attention is for whole steps; add --steps, or leave it out")
    if settings.layerwise and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found.append("--layerwise runs in one process; run it alone with --steps 0, then heal its folder further")
    if not settings.layerwise and not settings.steps:
        found.append("--layerwise 0 --steps 0: nothing is left to do")
    if settings.batch % settings.accumulate:
        found.append(f"--accumulate {settings.accumulate}: must divide --batch {settings.batch}")
    return found


def read_texts(
    checkpoint: Checkpoint, paths: Sequence[Path], held_out: Path | None, n_token: int, n_held_out: int, n_context: int
) -> Texts:
    """The windows; raises CalibrationError for unusable or too little text."""
    read = [read_text(path) for path in paths]
    text = Text("\n\n".join(t.text for t in read), ", ".join(t.label for t in read))
    if held_out:
        train, other = text, read_text(held_out)
    else:
        cut = int(len(text.text) * (1 - HELD_OUT_SHARE))
        train, other = Text(text.text[:cut], text.label), Text(text.text[cut:], f"end of {text.label}")
    bos = checkpoint.vocabulary.first_id
    context = min(n_context, checkpoint.model.n_context)
    ids = tokenize_windows(checkpoint.folder, train, n_token, context, bos)
    return Texts(ids, tokenize_windows(checkpoint.folder, other, n_held_out, context, bos), train.label, train.digest)


def _job(data: Texts, sliced: Checkpoint, settings: HealSettings) -> dict[str, Any]:
    sha = {
        name: hashlib.sha256(ids.tobytes()).hexdigest() for name, ids in (("ids", data.ids), ("held", data.held_out))
    }
    return {"student": source_digest(sliced.tensors), "text": sha, "settings": asdict(settings)}


def resume(work: Path, job: dict[str, Any]) -> None:
    """Make the work folder with its manifest, or compare it with this job.

    Raises:
        HealError: the folder belongs to another job; what differs is named.
    """
    manifest, job = work / "job.json", json.loads(json.dumps(job))
    if not manifest.exists():
        work.mkdir(parents=True, exist_ok=True)
        unfinished = manifest.with_name(f"job.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(job))
        unfinished.replace(manifest)
        return
    known = json.loads(manifest.read_text())
    if differing := [key for key in job if known.get(key) != job[key]]:
        raise HealError(f"{work}: holds another run (other {', '.join(differing)}); remove the folder to start anew")


class Log:
    """JSON lines on disk and in memory; a line that a continued run makes again is not written twice."""

    def __init__(self, path: Path, on_line: Callable[[Mapping[str, Any]], None]) -> None:
        self._path, self._on_line = path, on_line
        text = path.read_text("utf-8") if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        self._known = {self._key(line) for line in self.lines}
        if is_main():
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")

    def __call__(self, line: dict[str, Any]) -> None:
        """Add one line."""
        self._on_line(line)
        if self._key(line) not in self._known:
            self._known.add(self._key(line))
            self.lines.append(line)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @staticmethod
    def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return line["stage"], line.get("step"), line.get("layer")


def _train(
    sliced: Checkpoint,
    dense: Checkpoint,
    data: Texts,
    settings: HealSettings,
    work: Path,
    log: Log,
    progress: Progress,
) -> Trained:
    """Both stages; where the trained layers stand."""
    try:
        from moe2gguf.experts.forward import Layers, choose_device
        from moe2gguf.experts.heal.layerwise import Job, heal_layers
        from moe2gguf.experts.heal.moe_layer import Stored, load_arrays
        from moe2gguf.experts.heal.train import heal_model
    except ImportError as error:
        raise HealError(
            f"healing needs torch, transformers and accelerate ({error}): pip install 'moe2gguf[heal]'"
        ) from error
    overlay: Callable[[int], Stored | None] = lambda _: None  # noqa: E731
    folder = work
    if settings.layerwise:
        layers = Layers(dense.model, dense.read, choose_device(settings.device))
        job = Job.of(data.ids, data.held_out, settings)
        tied = None if settings.steps else dense.model.tied_embeddings
        with progress("layers", data.ids.size * sliced.model.n_layer) as advance:
            heal_layers(layers, lambda i: Stored(*expert_stacks(sliced, i)), job, settings, work, log, advance, tied)
        overlay = partial(_stored, work)
    if settings.steps:
        with progress("steps", settings.steps * settings.batch * data.ids.shape[1]) as advance:
            heal_model(sliced.folder, dense.folder, overlay, data.ids, data.held_out, settings, work, log, advance)
        folder = work / "best"
    others = load_arrays(folder / "attention.npz") if settings.steps else {}
    return Trained(lambda i: Stored.load(folder / f"layer-{i}.npz"), settings.train, others)


def _stored(folder: Path, i: int) -> Any:
    from moe2gguf.experts.heal.moe_layer import Stored

    return Stored.load(folder / f"layer-{i}.npz")


def _provenance(data: Texts, settings: HealSettings, lines: Sequence[Mapping[str, Any]]) -> dict[str, MetadataValue]:
    """`moe2gguf.recipes.heal.*`."""
    result: dict[str, MetadataValue] = {
        "moe2gguf.heal.text": data.label[:256],
        "moe2gguf.heal.sha256": data.digest,
        "moe2gguf.heal.tokens": int(data.ids.size),
        "moe2gguf.heal.train": ",".join(settings.train),
        "moe2gguf.heal.used_min": settings.used_range[0],
        "moe2gguf.heal.used_max": settings.used_range[1],
        "moe2gguf.heal.layerwise": settings.layerwise,
        "moe2gguf.heal.steps": settings.steps,
        "moe2gguf.heal.next_token": settings.next_token,
        "moe2gguf.heal.seed": settings.seed,
    }
    scores = [line["kl_mean"] for line in lines if line["stage"] == "evaluation" and line["best"]]
    return result | ({"moe2gguf.heal.kl": scores[-1]} if scores else {})
