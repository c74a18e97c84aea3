"""The folder in which a healing run keeps what it has finished, so that it can go on after a stop.

All of it is read and written here: the log, the healed layers with the hidden states behind them, the
best weights of the whole-model steps, and the names of the checkpoints of `moe2gguf.experts.heal.train`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HealError
from moe2gguf.experts.heal.log import LogLine, from_dict, to_dict
from moe2gguf.experts.heal.settings import HealSettings, Windows
from moe2gguf.gguf.resume import Job
from moe2gguf.progress import Progress

Arrays = dict[str, NDArray[np.float32]]


def _no_numbers() -> NDArray[np.float32]:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class ExpertWeights:
    """A layer's experts and router as a folder has them, experts stacked, float32; fields are the roles of tensors.

    router (n_expert, d_model), gate and up (n_expert, d_expert, d_model), down (n_expert, d_model, d_expert). In a
    graph that has them, the bias (n_expert,) of the choice and the shared expert: gate and up (d_shared, d_model),
    down (d_model, d_shared); elsewhere these are empty.
    """

    router: NDArray[np.float32]
    gate: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    bias: NDArray[np.float32] = field(default_factory=_no_numbers)
    shared_gate: NDArray[np.float32] = field(default_factory=_no_numbers)
    shared_up: NDArray[np.float32] = field(default_factory=_no_numbers)
    shared_down: NDArray[np.float32] = field(default_factory=_no_numbers)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> ExpertWeights:
        """Copies of torch's tensors by role."""
        return cls(**{role: tensor.detach().cpu().float().numpy().copy() for role, tensor in tensors.items()})

    def save(self, path: Path) -> None:
        """Write `path`, an .npz."""
        _save_arrays(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> ExpertWeights:
        """Read what `save` wrote."""
        return cls(**_load_arrays(path))


class WorkFolder:
    """The folder of one run. The main process holds it as a job; the other processes (`job` None) write nothing.

    job   of the main process, entered
    path  the folder
    """

    def __init__(self, path: Path, job: Job | None) -> None:
        self.path, self.job = path, job

    def remove(self) -> None:
        """Remove the folder, when the result is written."""
        if self.job:
            self.job.remove()

    def find_first_layer(self, layers: range) -> int:
        """The layer behind those of `layers` that the layer-wise passes have finished; without their states, 0."""
        if not self.job:
            return 0
        n = next((i for i in layers if not self.job.holds(f"layer-{i}.npz")), layers.stop)
        return n if self.job.holds(f"state-{n - 1}.npz") else 0

    def save_layer(self, i: int, weights: ExpertWeights, states: Arrays) -> None:
        """Save layer `i` and the hidden states behind it; the layer comes last: where it is finished, both are."""
        if self.job:
            with self.job.save(f"state-{i}.npz") as path:
                _save_arrays(path, states)
            with self.job.save(f"layer-{i}.npz") as path:
                weights.save(path)
            self.job.drop(f"state-{i - 1}.npz")

    def load_layer(self, i: int) -> ExpertWeights:
        """Layer `i` after the layer-wise passes."""
        return ExpertWeights.load(self.path / f"layer-{i}.npz")

    def load_states(self, i: int) -> Arrays:
        """The hidden states behind layer `i`."""
        return _load_arrays(self.path / f"state-{i}.npz")

    def save_best(self, step: int, layers: Iterable[tuple[int, ExpertWeights]], others: Arrays) -> None:
        """Save the best weights so far: `layers` with their numbers, and by name the `others` that train."""
        if self.job:
            name = f"best-{step:07}"
            with self.job.save(name) as path:
                path.mkdir()
                for i, weights in layers:
                    weights.save(path / f"layer-{i}.npz")
                _save_arrays(path / "attention.npz", others)
            self.job.drop_others(r"best-\d+", name)

    def load_best_layer(self, i: int) -> ExpertWeights:
        """Layer `i` of the best weights."""
        return ExpertWeights.load(self._best / f"layer-{i}.npz")

    def load_best_others(self) -> Arrays:
        """The best weights outside of the experts, by name; none for another process than the main one."""
        return _load_arrays(self._best / "attention.npz") if self.job else {}

    @cached_property
    def _best(self) -> Path:
        """The folder of the best weights, when there are no better ones to come."""
        name = self.job.last(r"best-\d+") if self.job else None
        if name is None:
            raise HealError(f"{self.path}: the best weights are gone or harmed; start anew with --no-resume")
        return self.path / name

    @contextlib.contextmanager
    def save_checkpoint(self, step: int, best: float) -> Iterator[Path]:
        """Make the folder of the state after `step` steps, with the `best` score so far; older ones go.

        Every process gets the same path; the main one gives the folder its name when the block ends.
        """
        name = f"step-{step:07}"
        if not self.job:
            yield self.path / f"unfinished-{name}"
            return
        with self.job.save(name, {"best": best}) as path:
            yield path
        self.job.drop_others(r"step-\d+", name)

    def find_checkpoint(self) -> tuple[str | None, float]:
        """The name of the last checkpoint's folder and the best score then; (None, infinity) if there is none."""
        name = self.job.last(r"step-\d+") if self.job else None
        piece = self.job.find(name) if self.job and name else None
        return name, float(piece.facts["best"]) if piece else math.inf


@dataclass(frozen=True)
class HealRun:
    """What the stages of a run share: token ids of windows to train on and to score, choices, and where results go."""

    ids: Windows
    held_out: Windows
    settings: HealSettings
    work: WorkFolder
    log: Callable[[LogLine], None]
    progress: Progress


class Log:
    """JSON lines on disk and in memory; a line that a continued run makes again is not written twice.

    `on_line` is told every line. `writes`: whether this process writes the file.
    """

    def __init__(self, path: Path, on_line: Callable[[LogLine], None], *, writes: bool) -> None:
        self._path, self._on_line = path, on_line
        text = path.read_text("utf-8") if path.exists() else ""
        # a kill may have torn the last line
        self.lines = [_parse(path, line) for line in text.splitlines() if line.endswith("}")]
        self._known = {_key(line) for line in self.lines}
        if writes:
            path.write_text(self.text, "utf-8")

    @property
    def text(self) -> str:
        """All lines as JSON."""
        return "".join(json.dumps(to_dict(line)) + "\n" for line in self.lines)

    def __call__(self, line: LogLine) -> None:
        """Add one line."""
        self._on_line(line)
        if _key(line) not in self._known:
            self._known.add(_key(line))
            self.lines.append(line)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(to_dict(line)) + "\n")


def _key(line: LogLine) -> tuple[str, int]:
    """What a line is about: two lines of one key are the same line."""
    return line.stage, getattr(line, "layer", getattr(line, "step", 0))


def _parse(path: Path, text: str) -> LogLine:
    """A line of the file. Raises HealError if it is none."""
    try:
        return from_dict(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise HealError(f"{path}: a line is broken ({error}); start anew with --no-resume") from error


def _save_arrays(path: Path, arrays: Arrays) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # a keyword could be allow_pickle; none is


def _load_arrays(path: Path) -> Arrays:
    """Read what `_save_arrays` wrote; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
