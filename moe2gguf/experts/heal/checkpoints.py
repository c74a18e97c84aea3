"""Checkpoints of the whole-model steps: weights and optimizer, saved by accelerate, under their step's number."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, best: float) -> None:
    """Save the state after `step` steps and the `best` score so far in `folder`, by rename; older checkpoints go."""
    target, unfinished = folder / f"step-{step:07}", folder / "step.partial"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.save_state(str(unfinished))
    if accelerator.is_main_process:
        (unfinished / "best.txt").write_text(repr(best))
        older = list(folder.glob("step-*"))
        unfinished.rename(target)
        for checkpoint in older:
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> tuple[int, float]:
    """Restore the last checkpoint in `folder`; the steps done and the best score, (0, infinity) if there is none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0, math.inf
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.split("-")[1]), float((found[-1] / "best.txt").read_text())
