"""What the stages of a healing run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe2gguf.experts.heal.log import LogLine
from moe2gguf.experts.heal.settings import HealSettings, Windows
from moe2gguf.experts.heal.work import WorkFolder
from moe2gguf.progress import Progress


@dataclass(frozen=True)
class HealRun:
    """The text (token ids of windows to train on, and `held_out` ones to score), the choices, and where results go."""

    ids: Windows
    held_out: Windows
    settings: HealSettings
    work: WorkFolder
    log: Callable[[LogLine], None]
    progress: Progress
