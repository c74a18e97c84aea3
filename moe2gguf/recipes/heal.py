"""The recipe of `moe2gguf heal`: a sliced model is trained for a while against the dense model it was cut from."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.errors import HealError, PlanError, advise_install, count_problems
from moe2gguf.experts.heal.log import LogLine, ScoreLine, to_dict
from moe2gguf.experts.heal.settings import HealSettings, Windows
from moe2gguf.experts.heal.work import ExpertWeights, HealRun, Log, WorkFolder
from moe2gguf.experts.text import Text, read_sample, tokenize_windows
from moe2gguf.gguf.metadata import SOURCE_DIGEST
from moe2gguf.gguf.outputs import require_room
from moe2gguf.gguf.resume import Job, describe, describe_record
from moe2gguf.graphs import find_graph_of
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.safetensors import digest_source
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.hf_output import Trained, write_healed
from moe2gguf.recipes.tensors_hf import expert_stacks
from moe2gguf.recipes.write_folder import check_folder_target
from moe2gguf.spec import Metadata, Model

HELD_OUT_SHARE = 0.1
_SIZES = ["n_layer", "d_model", "n_head", "n_head_kv", "d_head", "n_vocab", "tied_embeddings"]
_SIZES += ["bias_qkv", "head_norms"]
"""Of a model, what teacher and student have in common."""


@dataclass(frozen=True)
class HealText:
    """What to train on: files of plain text, or JSONL with a text field.

    held_out    what to evaluate on; None: the last tenth of the text
    n_token, n_held_out  how many tokens of them, in windows of `n_context`
    """

    files: tuple[Path, ...]
    held_out: Path | None = None
    n_token: int = 65536
    n_held_out: int = 4096
    n_context: int = 512


@dataclass(frozen=True)
class HealWindows:
    """Token windows (n_window, n_context) to train on and to evaluate on, and the name and SHA-256 of the text."""

    ids: Windows
    held_out: Windows
    label: str
    digest: str


@dataclass(frozen=True)
class Healing:
    """What `heal` did: the folder, and every line of its log."""

    path: Path
    log: tuple[LogLine, ...]

    @property
    def scores(self) -> list[ScoreLine]:
        """The scores of the held-out text, first to last."""
        return [line for line in self.log if isinstance(line, ScoreLine)]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "log": [to_dict(line) for line in self.log]}


def heal(
    student: str | Path,
    teacher: str | Path,
    text: HealText,
    out: str | Path,
    settings: HealSettings,
    *,
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    on_line: Callable[[LogLine], None] = lambda _: None,
) -> Healing:
    """Train the sliced folder `student` against the dense folder `teacher`; the result is the folder `out`.

    A run that was stopped is continued in `OUT.heal`, to the same result, unless `resume` is False. `on_line` is given
    every line of the log.

    Raises:
        HealError: the two do not fit (every reason is listed), a number became NaN, or torch is missing.
        PlanError, CheckpointError: a folder is not a sound checkpoint.
        CalibrationError: the text cannot be used.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
    """
    student, teacher, out = Path(student), Path(teacher), Path(out)
    if install := advise_install("torch", "transformers", "accelerate"):
        raise HealError(f"healing trains with torch, transformers and accelerate: {install}")
    held_out = [text.held_out] if text.held_out else []
    check_folder_target(out, [student, teacher, *text.files, *held_out], force=force)
    sliced, dense = _open(student), _open(teacher)
    require_fit(sliced, dense, settings)
    require_room(out, sum(tensor.n_bytes for tensor in sliced.tensors.values()))
    data = read_windows(sliced, text)
    folder, manifest = out.with_name(out.name + ".heal"), make_manifest(sliced, dense, data, settings)
    with Job(folder, manifest, resume=resume) if is_main() else nullcontext() as job:
        work = WorkFolder(folder, job)
        log = Log(folder / "log.jsonl", on_line, writes=is_main())
        run = HealRun(data.ids, data.held_out, settings, work, log, progress)
        trained = train(sliced, dense, run)
        if is_main():
            write_healed(sliced, trained, out, make_provenance(data, run, log.lines), log.lines, progress=progress)
            work.remove()
    return Healing(out, tuple(log.lines))


def _open(folder: Path) -> Checkpoint:
    """Open one of the two folders. Raises PlanError, which says which of them is wrong."""
    try:
        return open_checkpoint(folder)
    except PlanError as error:
        raise error.name(str(folder)) from error


def is_main() -> bool:
    """Whether this process writes: the only one, or the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def require_fit(sliced: Checkpoint, dense: Checkpoint, settings: HealSettings) -> None:
    """Raise HealError with every reason why `dense` cannot teach `sliced`, or why the settings do not fit."""
    found = [*_find_differences(sliced, dense, settings), *refuse_settings(sliced.model, settings)]
    digest = None if found or dense.model.n_expert else sliced.provenance.get(SOURCE_DIGEST)
    if digest is not None and digest != digest_source(dense.tensors):
        found = [f"the student was cut from a model with digest {digest}, and the teacher has another"]
    if found:
        raise HealError("\n".join([f"cannot heal, {count_problems(found)}:", *(f"  - {reason}" for reason in found)]))


def _find_differences(sliced: Checkpoint, dense: Checkpoint, settings: HealSettings) -> Iterator[str]:
    """What teacher and student must have in common and have not."""
    ours, theirs = sliced.model, dense.model
    if not ours.n_expert:
        yield f"{sliced.folder}: has no experts; make it with `moe2gguf convert --format hf`"
    if theirs.n_expert and (ours.n_expert != 1 or settings.training.layerwise):
        yield (
            f"{dense.folder}: has experts; it teaches a dense student, as `moe2gguf convert --experts 1` makes one, "
            "with --layerwise 0"
        )
    for (name, a), b in zip(_list_sizes(ours).items(), _list_sizes(theirs).values(), strict=True):
        if a != b:
            yield f"{name} is {a} in the student, {b} in the teacher"
    if sliced.vocabulary.tokens != dense.vocabulary.tokens:
        yield "the vocabularies differ; teacher and student must read the same token ids"


def _list_sizes(model: Model) -> dict[str, Any]:
    """What both must have alike, by name."""
    rotary = {f"rope {name}": value for name, value in vars(model.rope).items()}
    return {**{size: getattr(model, size) for size in _SIZES}, **rotary}


def refuse_settings(ours: Model, settings: HealSettings) -> Iterator[str]:
    """Everything that the settings have wrong for the student `ours`."""
    training = settings.training
    if ours.n_expert:
        yield from _refuse_counts(ours, settings)
    if training.layerwise and "lora" in training.parts:
        yield "--train lora is for whole-model steps; add --layerwise 0"
    if "attention" in training.parts and not training.steps:
        yield "--train attention is for whole-model steps; add --steps, or leave it out"
    if training.layerwise and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "--layerwise runs in one process; run it alone with --steps 0, then heal its folder further"
    if not training.layerwise and not training.steps:
        yield "--layerwise 0 --steps 0: nothing is left to do"
    if training.batch % training.accumulate:
        yield f"--accumulate {training.accumulate}: must divide --batch {training.batch}"


def _refuse_counts(ours: Model, settings: HealSettings) -> Iterator[str]:
    """Numbers of used experts that the student `ours` cannot run with."""
    low, high = settings.training.used_range
    least, most = ours.n_shared + 1, ours.n_shared + ours.n_expert
    outside = [k for k in settings.evaluation.used if not least <= k <= most and k not in (low, high)]
    between = f"must lie between {least} and {most}, the number of experts"
    if ours.n_shared:
        between += f"; the {ours.n_shared} shared ones, which always run, count among them"
    if not least <= low <= high <= most:
        yield f"--used-range {low}..{high}: {between}"
    if outside:
        yield f"--evaluate-at {outside}: {between}"


def read_windows(checkpoint: Checkpoint, text: HealText) -> HealWindows:
    """The windows of the text; raises CalibrationError for unusable or too little text."""
    parts = [read_sample(path, text.n_token) for path in text.files]
    train = Text("\n\n".join(part.text for part in parts), ", ".join(part.label for part in parts))
    if text.held_out:
        held_out = read_sample(text.held_out, text.n_held_out)
    else:
        cut = int(len(train.text) * (1 - HELD_OUT_SHARE))
        held_out = Text(train.text[cut:], f"end of {train.label}")
        train = Text(train.text[:cut], train.label)
    first, n_context = checkpoint.vocabulary.first_id, min(text.n_context, checkpoint.model.n_context)
    return HealWindows(
        tokenize_windows(checkpoint.folder, train, text.n_token, n_context, first),
        tokenize_windows(checkpoint.folder, held_out, text.n_held_out, n_context, first),
        train.label,
        train.digest,
    )


def make_manifest(sliced: Checkpoint, dense: Checkpoint, data: HealWindows, settings: HealSettings) -> dict[str, str]:
    """What decides the result of a run: only a run with the same manifest is continued."""
    return {
        "command": "heal",
        "student": digest_source(sliced.tensors),
        **{f"teacher's {file.name}": describe(file) for file in dense.files},
        "text": hashlib.sha256(data.ids.tobytes()).hexdigest(),
        "held-out text": hashlib.sha256(data.held_out.tobytes()).hexdigest(),
        **describe_record(settings),
    }


def train(sliced: Checkpoint, dense: Checkpoint, run: HealRun) -> Trained:
    """Both stages, and how their result is read.

    Raises:
        HealError: a number became NaN.
    """
    from moe2gguf.experts.forward import Layers, choose_device
    from moe2gguf.experts.heal.layerwise import heal_layers
    from moe2gguf.experts.heal.train import heal_model

    training, work = run.settings.training, run.work
    if training.layerwise:
        layers = Layers(dense.model, dense.read, choose_device(run.settings.compute.device))
        read_layer = lambda i: ExpertWeights(**expert_stacks(sliced, i))  # noqa: E731
        heal_layers(layers, read_layer, run, find_graph_of(sliced.model), sliced.model.leading_dense)
    if not training.steps:
        return Trained(work.load_layer, training.parts)
    heal_model(sliced.folder, dense.folder, run, work.load_layer if training.layerwise else None)
    return Trained(work.load_best_layer, training.parts, work.load_best_others())


def make_provenance(data: HealWindows, run: HealRun, lines: list[LogLine]) -> Metadata:
    """The `moe2gguf.heal.*` metadata."""
    training, scores = run.settings.training, [line for line in lines if isinstance(line, ScoreLine) and line.best]
    low, high = training.used_range
    return {
        "moe2gguf.heal.text": data.label[:256],
        "moe2gguf.heal.sha256": data.digest,
        "moe2gguf.heal.tokens": int(data.ids.size),
        "moe2gguf.heal.train": ",".join(training.parts),
        "moe2gguf.heal.used_min": low,
        "moe2gguf.heal.used_max": high,
        "moe2gguf.heal.layerwise": training.layerwise,
        "moe2gguf.heal.steps": training.steps,
        "moe2gguf.heal.next_token": run.settings.loss.next_token,
        "moe2gguf.heal.seed": training.seed,
        **({"moe2gguf.heal.kl": scores[-1].kl_mean} if scores else {}),
    }
