"""The sampling recipe: a GGUF file writes text of its own, to calibrate or to heal with where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.export.writer import check_target, replacing
from moe2gguf.harness.sampling import Draw, sample
from moe2gguf.progress import Progress, silent


@dataclass(frozen=True)
class Sample:
    """What `sample_text` wrote."""

    path: Path
    n_text: int
    n_token: int

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "texts": self.n_text, "tokens": self.n_token}


def sample_text(
    model: Path,
    out: Path,
    draw: Draw,
    *,
    gpu: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Sample:
    """Write texts drawn from the GGUF file `model` into `out`, UTF-8, an empty line between two of them.

    Raises:
        HarnessError: see `moe2gguf.harness.sampling.sample`.
        OutputError: `out` cannot be written, or must not be replaced.
    """
    check_target(out, [model], force=force)
    texts, n_token = [], 0
    with progress("sample", draw.n_token) as advance:
        for text, n in sample(model, draw, gpu=gpu, threads=threads):
            texts.append(text)
            n_token += n
            advance(n)
    data = "\n\n".join(texts).encode()
    with replacing(out, len(data)) as (descriptor, _), os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    return Sample(out, len(texts), n_token)
