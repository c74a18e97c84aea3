"""What the experts of a merge are for: prompts from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe2gguf.errors import PlanError
from moe2gguf.experts.text import bytes_to_read, read_text
from moe2gguf.recipes.merge_options import Donor


def read_donors(models: Sequence[Path], prompts: Sequence[Path], n_token: int) -> list[Donor]:
    """The donors with the first `n_token` tokens, and ample more, of the file of prompts of each, if there are any.

    Raises:
        PlanError: there are not as many files as models.
        CalibrationError: a file cannot be read as text.
    """
    if prompts and len(prompts) != len(models):
        raise PlanError(
            [f"{len(prompts)} files of prompts for {len(models)} experts: give one for each, in their order"]
        )
    texts = [read_text(path, bytes_to_read(n_token)).text for path in prompts]
    return [Donor(model, tuple(texts[i : i + 1])) for i, model in enumerate(models)]
