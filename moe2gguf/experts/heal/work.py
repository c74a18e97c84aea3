"""The folder in which a healing run keeps what it has finished, so that it can go on after a stop.

All of it is read and written here: the manifest, the log, the healed layers with the hidden states behind them, the
best weights of the whole-model steps, and the names of the checkpoints of `moe2gguf.experts.heal.checkpoints`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HealError
from moe2gguf.experts.heal.log import LogLine, from_dict, to_dict

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class ExpertWeights:
    """A layer's experts and router as a Mixtral folder has them, experts stacked, float32.

    router (n_expert, d_model), gate and up (n_expert, d_expert, d_model), down (n_expert, d_model, d_expert).
    """

    router: NDArray[np.float32]
    gate: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write `path`, an .npz, by rename."""
        _save_arrays(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> ExpertWeights:
        """Read what `save` wrote."""
        return cls(**_load_arrays(path))


class WorkFolder:
    """The folder of one run. Every file in it appears by rename, so one that exists is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the one that is there.

        Raises:
            HealError: the folder belongs to another run; what differs is named.
        """
        path, manifest = self.path / "job.json", json.loads(json.dumps(manifest))
        if not path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"job.{os.getpid()}.tmp")  # several processes may begin at once
            unfinished.write_text(json.dumps(manifest))
            unfinished.replace(path)
            return
        known = json.loads(path.read_text())
        if differing := [key for key in manifest if known.get(key) != manifest[key]]:
            raise HealError(
                f"{self.path}: holds another run (other {', '.join(differing)}); remove the folder to start anew"
            )

    def remove(self) -> None:
        """Remove the folder, when the result is written."""
        shutil.rmtree(self.path)

    def count_layers(self, n_layer: int) -> int:
        """How many of the first layers the layer-wise passes have finished."""
        return next((i for i in range(n_layer) if not self._layer(i).exists()), n_layer)

    def save_layer(self, i: int, weights: ExpertWeights, states: Arrays) -> None:
        """Save layer `i` and the hidden states behind it; the layer comes last: where it exists, both do."""
        _save_arrays(self._states(i), states)
        weights.save(self._layer(i))
        self._states(i - 1).unlink(missing_ok=True)

    def load_layer(self, i: int) -> ExpertWeights:
        """Layer `i` after the layer-wise passes."""
        return ExpertWeights.load(self._layer(i))

    def load_states(self, i: int) -> Arrays:
        """The hidden states behind layer `i`."""
        return _load_arrays(self._states(i))

    def _layer(self, i: int) -> Path:
        return self.path / f"layer-{i}.npz"

    def _states(self, i: int) -> Path:
        return self.path / f"state-{i}.npz"

    def save_best(self, layers: Iterable[ExpertWeights], others: Arrays) -> None:
        """Save the best weights so far: all layers, and by name the `others` outside of the experts that train."""
        (self.path / "best").mkdir(exist_ok=True)
        for i, weights in enumerate(layers):
            weights.save(self._best_layer(i))
        _save_arrays(self._best_others(), others)

    def load_best_layer(self, i: int) -> ExpertWeights:
        """Layer `i` of the best weights."""
        return ExpertWeights.load(self._best_layer(i))

    def load_best_others(self) -> Arrays:
        """The best weights outside of the experts, by name."""
        return _load_arrays(self._best_others())

    def _best_layer(self, i: int) -> Path:
        return self.path / "best" / f"layer-{i}.npz"

    def _best_others(self) -> Path:
        return self.path / "best" / "attention.npz"


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
        raise HealError(f"{path}: a line is broken ({error}); remove the folder to start anew") from error


def _save_arrays(path: Path, arrays: Arrays) -> None:
    """Write `path`, an .npz, by rename."""
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)  # type: ignore[arg-type]  # a keyword could be allow_pickle; none is
    unfinished.replace(path)


def _load_arrays(path: Path) -> Arrays:
    """Read what `_save_arrays` wrote; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
