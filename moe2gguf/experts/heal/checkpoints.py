"""Checkpoints of the whole-model steps: weights and optimizer, saved by accelerate, under their step's number."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from moe2gguf.experts.heal.work import WorkFolder


def save_checkpoint(accelerator: Accelerator, work: WorkFolder, step: int, best: float) -> None:
    """Save the state after `step` steps and the `best` score so far; older checkpoints go."""
    with work.save_checkpoint(step, best) as path:
        accelerator.wait_for_everyone()  # the main process has removed what a stopped run left there
        accelerator.save_state(str(path))
        accelerator.wait_for_everyone()  # every process has written its part


def load_checkpoint(accelerator: Accelerator, work: WorkFolder) -> tuple[int, float]:
    """Restore the last checkpoint; the steps done and the best score, (0, infinity) if there is none."""
    name, best = broadcast_object_list([*work.find_checkpoint()])
    if name is None:
        return 0, best
    accelerator.load_state(str(work.path / name))
    return int(name.split("-")[1]), best
