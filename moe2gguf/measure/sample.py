"""The sampling recipe: a model writes text of its own, to calibrate or to heal with where there is none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.gguf.writer import check_target, replace_files
from moe2gguf.llama.sampling import Draw, sample_texts
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.convert import convert
from moe2gguf.recipes.options import Options

DENSE = Options(dense=True, types=TypeOptions("q8_0", allow_fallback=True))
"""What a folder becomes to write: twice as fast as 16 bits, and hardly another model."""


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
    device: str = "cpu",
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Sample:
    """Write texts drawn from `model` into `out`, UTF-8, an empty line between two of them.

    `model` is a GGUF file, or a Hugging Face folder, of which a dense Q8_0 file stands beside `out` meanwhile.

    Raises:
        HarnessError: see `moe2gguf.llama.sampling.sample`.
        OutputError: `out` cannot be written, or must not be replaced.
        PlanError, CheckpointError, CorruptWeightError: the folder cannot be converted.
    """
    check_target(out, [model], force=force)
    texts, n_token = [], 0
    with _gguf(model, out, threads, progress) as file, progress("sample", draw.n_token) as advance:
        for text, n in sample_texts(file, draw, device=device, threads=threads):
            texts.append(text)
            n_token += n
            advance(n)
    data = "\n\n".join(texts).encode()
    with replace_files(out, [out], len(data)) as (_, (part,)):
        part.write_bytes(data)
    return Sample(out, len(texts), n_token)


@contextmanager
def _gguf(model: Path, out: Path, threads: int | None, progress: Progress) -> Iterator[Path]:
    """The file itself, or the folder as a file that goes again."""
    if not model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        file = Path(folder) / "dense.gguf"
        convert(model, file, DENSE, threads=threads, progress=progress)
        yield file
