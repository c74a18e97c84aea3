"""What is measured: one file at one number of experts on one device, each checked before anything runs."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe2gguf.experts.text import Text
from moe2gguf.gguf import types
from moe2gguf.gguf.counts import read_context_length, read_counts
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.layout import active_bytes, mean_bits_per_weight
from moe2gguf.gguf.made_for import read_made_for
from moe2gguf.gguf.shards import read_model
from moe2gguf.limits import check_expert_counts
from moe2gguf.measure.metrics import as_json

ANOTHER_TEXT = "; give a text that they have not seen (--text)"
_CALIBRATED_ON = "moe2gguf.calibration.sha256"


@dataclass(frozen=True)
class RunConfig:
    """One file, k and device.

    n_expert, n_expert_used   0 for a dense file
    type          the file type that it gives, such as "Q4_K_M", else the type that most bytes of the weights have
    file_size     bytes
    active_bytes  bytes of weights read per generated token
    identity      digest of the file's header, size and time of change: cheap, and new whenever the file is rewritten
    refusal       why this cannot run; empty if it can
    name          a name that differs from those of the other files; empty: the last part of its path
    bits_per_weight   of all tensors together
    """

    path: Path
    n_expert: int
    n_expert_used: int
    device: str
    type: str
    file_size: int
    active_bytes: int
    identity: str
    refusal: str = ""
    name: str = ""
    bits_per_weight: float = 0.0

    @property
    def label(self) -> str:
        """The words for it: file, k of n, and the device unless it is the CPU."""
        k = f" k={self.n_expert_used}/{self.n_expert}" if self.n_expert else ""
        device = "" if self.device == "cpu" else f" {self.device}"
        return f"{self.name or self.path.name}{k}{device}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {**as_json(self), "label": self.label}


@dataclass(frozen=True)
class Measurement:
    """One measurement that any machine can make that sees the files.

    what  "quality": `one` against the reference `base` on the whole text; "noise": `base` against itself, computed in
          another order; "devices": `one` against the same file on another device, `base`. The last two take the
          first window only. "tasks": which tasks `one` solves, in the chat template of `base`.
    """

    what: Literal["quality", "noise", "devices", "tasks"]
    base: RunConfig
    one: RunConfig


def plan_grid(files: Iterable[Path], used: Sequence[int] = (), devices: Sequence[str] = ("cpu",)) -> list[RunConfig]:
    """Return a run for every file, expert count and device, in that order; a dense file has one per device.

    A file given twice counts once; of files with equal names the labels have the whole path. Without `used` each file
    runs at its own count. What llama.cpp cannot run carries the refusal.

    Raises GGUFError for a file whose header is not sound.
    """
    out = []
    paths = list(dict.fromkeys(files))
    names = Counter(path.name for path in paths)
    for path in paths:
        file = read_model(path)
        name = "" if names[path.name] == 1 else str(path)
        own = read_counts(file)
        for k in (list(dict.fromkeys(used)) or [own.n_used]) if own.n_expert else [0]:
            out += [plan_run(file, k, device, name) for device in devices]
    return out


def plan_run(file: GGUFFile, n_expert_used: int | None, device: str = "cpu", name: str = "") -> RunConfig:
    """Return one combination; `n_expert_used` None is the file's own count, and of a dense file it is ignored."""
    counts = read_counts(file)
    n_expert, n_shared = counts.n_expert, counts.n_shared
    k = (counts.n_used if n_expert_used is None else n_expert_used) if n_expert else 0
    refusals = check_expert_counts(n_expert, k, counts.size, n_shared) if n_expert else []
    return RunConfig(
        path=file.path,
        n_expert=n_expert,
        n_expert_used=k,
        device=device,
        type=_find_main_type(file),
        file_size=file.file_size,
        active_bytes=active_bytes(file.tensors.values(), counts.n_routed, max(0, k - n_shared)),
        identity=digest_identity(file),
        refusal=" ".join(refusals),
        name=name,
        bits_per_weight=mean_bits_per_weight(file.tensors.values()),
    )


def _find_main_type(file: GGUFFile) -> str:
    if said := types.name_file_type(file.metadata.get("general.file_type")):
        return said
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type.name] += tensor.n_bytes
    return sizes.most_common(1)[0][0] if sizes else "none"


def digest_identity(file: GGUFFile) -> str:
    """A digest of header, size and time of change: cheap, and new whenever the file, or a shard of it, is rewritten."""
    digest = hashlib.sha256()
    for path in file.files:
        with path.open("rb") as stream:
            digest.update(stream.read(file.data_offset))
            status = os.fstat(stream.fileno())
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def list_notes(files: Iterable[Path], text: Text, n_context: int) -> list[str]:
    """Return a sentence on files that were calibrated on this very text, and one on windows beyond their training."""
    paths = list(dict.fromkeys(files))
    seen = [path.name for path in paths if read_model(path).metadata.get(_CALIBRATED_ON) == text.digest]
    if not seen:
        return note_long_windows(paths, n_context)
    note = f"calibrated on the same text that is measured here, which flatters the figures: {', '.join(seen)}"
    return [note + ANOTHER_TEXT, *note_long_windows(paths, n_context)]


def note_other_counts(grid: Iterable[RunConfig]) -> list[str]:
    """Return a sentence on every file that runs at counts it was not made for."""
    counts: dict[Path, list[int]] = {}
    for one in grid:
        if one.n_expert and not one.refusal:
            counts.setdefault(one.path, []).append(one.n_expert_used)
    found = ((path, used, read_made_for(read_model(path).metadata)) for path, used in counts.items())
    return [note for path, used, made_for in found if made_for and (note := made_for.note(path.name, used))]


def note_long_windows(files: Iterable[Path], n_context: int) -> list[str]:
    """Return a sentence on files whose model was trained on shorter windows; none where there are none."""
    trained = {path.name: read_context_length(read_model(path)) for path in files}
    shorter = [f"{name} ({n})" for name, n in trained.items() if 0 < n < n_context]
    if not shorter:
        return []
    return [f"a context of {n_context} tokens is longer than the model was trained on: {', '.join(shorter)}"]
