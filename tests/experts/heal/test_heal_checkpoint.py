"""moe2gguf.experts.heal.train: checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from full_disk import limit_files

from moe2gguf.errors import OutputError
from moe2gguf.experts.heal.train import save_checkpoint
from moe2gguf.experts.heal.work import WorkFolder
from moe2gguf.gguf.resume import Job


def test_a_full_disk_is_one_error_whoever_writes(tmp_path: Path) -> None:
    """torch, which keeps the optimizer's state, tells of it in a way of its own."""
    weight = torch.nn.Parameter(torch.ones(4096))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW([weight]))
    weight.sum().backward()
    optimizer.step()

    with Job(tmp_path / "work", {}) as job:
        job.record("layer", "0")
        with limit_files(4096), pytest.raises(OutputError, match=r"step-0000001: cannot be written \(no room, or"):
            save_checkpoint(accelerator, WorkFolder(tmp_path / "work", job), 1, 0.5)

    assert ["job.jsonl"] == [path.name for path in (tmp_path / "work").iterdir()]
