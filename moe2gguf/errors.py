"""Every error a user can meet.

Each error names the object and the fix. The command line prints the message and exits with `exit_code`;
anything that is not a `Moe2GgufError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NESTED = "\n      "
"""What begins a line within one item of an error's list."""
_OPEN = Path("/dev/fd")


class Moe2GgufError(Exception):
    """Base of all errors below; raised only through its children."""

    exit_code = 1


class CheckpointError(Moe2GgufError):
    """The checkpoint cannot be read: a missing, broken, hostile or inconsistent file."""


class VocabularyError(Moe2GgufError):
    """The tokenizer files are missing, broken, or of a kind that llama.cpp has no twin for."""


class PlanError(Moe2GgufError):
    """The requested conversion is impossible; carries every refusal the plan found, not only the first.

    `way` is what to do about all of them together, if there is such a thing.
    """

    def __init__(self, refusals: Sequence[str], way: str = "") -> None:
        self.refusals = tuple(dict.fromkeys(refusals))  # two readers may find the same
        head = f"cannot go on, {count_problems(self.refusals)}:"
        super().__init__("\n".join([head, *(f"  - {line}" for line in self.refusals), *([way] if way else [])]))

    def name(self, model: str) -> PlanError:
        """The same with the model in every refusal, where several models are read."""
        return PlanError([one if model in one else f"{model}: {one}" for one in self.refusals])


def count_problems(problems: Sequence[str]) -> str:
    """How many there are: "1 problem", "2 problems"."""
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


class CorruptWeightError(Moe2GgufError):
    """A weight is NaN or infinite, or does not fit the requested type."""


class CalibrationError(Moe2GgufError):
    """Calibration is impossible: too little or unreadable text, or activations that are not finite."""


class HealError(Moe2GgufError):
    """Healing is impossible: teacher and student do not fit, torch is missing, or a number became NaN in training."""


class OutputError(Moe2GgufError):
    """The output file cannot be written or must not be replaced."""


class LeftBehindWarning(UserWarning):
    """A folder of unfinished work that is no longer needed could not be removed."""


class GGUFError(Moe2GgufError):
    """A GGUF file is malformed, truncated or internally inconsistent."""


class ImportanceError(Moe2GgufError):
    """An importance matrix is broken, or does not belong to the model it is used with."""


class HarnessError(Moe2GgufError):
    """llama.cpp could not load or run a file, is not installed, or lacks the requested device."""


class CrashError(HarnessError):
    """The process that ran llama.cpp ended without an answer; `signal` is the number that ended it, or 0."""

    def __init__(self, message: str, *, signal: int = 0) -> None:
        self.signal = signal
        super().__init__(message)


def advise_install(*packages: str) -> str:
    """What to type to get those of the packages that cannot be imported: "pip install torch"; "" if all can be."""
    missing = [name for name in packages if find_spec(name) is None]
    return " ".join(["pip install", *missing]) if missing else ""


def name_odd_file(path: Path, *, pipes: bool = False) -> str | None:
    """Say what stands at `path` in the place of a file, such as "is a pipe"; None for a file, and where nothing is.

    To be asked before a file is opened, as a pipe or a device would block. `pipes` allows those without a name, at
    whose other end somebody writes: what a shell puts in the place of `<(command)`, and /dev/stdin.
    """
    try:
        mode, place = path.stat().st_mode, path.resolve()
    except (OSError, ValueError):  # opening it will say why
        return None
    if stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode) and (place.parent == _OPEN or not place.exists())):
        return None
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return f"is a {next((name for is_kind, name in kinds.items() if is_kind(mode)), 'device')}; expected a file"


def list_names(names: Sequence[str], most: int = 3) -> str:
    """The first names for a message, and how many more there are: "a, b, c and 2 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def list_ways(ways: Sequence[str]) -> str:
    """What can be done about one item of an error's list, a line each."""
    return NESTED + f"{NESTED}or ".join(ways)
