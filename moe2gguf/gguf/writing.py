"""One GGUF file, from its plan to its name: written beside it, verified, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe2gguf.gguf.layout import Layout
from moe2gguf.gguf.resume import Journal
from moe2gguf.gguf.verify import require_sound
from moe2gguf.gguf.writer import OutputTensor, replacing, write_tensors
from moe2gguf.progress import Progress

Finish = Callable[[int, Layout], None]
"""Fills in what was not known before all tensors were made, through a descriptor of a file with this layout."""


def write_file(
    out: Path,
    layout: Layout,
    tensors: Sequence[OutputTensor],
    *,
    progress: Progress,
    threads: int,
    quantizers: int | None = None,
    verifiers: int | None = None,
    journal: Journal | None = None,
    finish: Finish | None = None,
) -> None:
    """Write `tensors` as the file `out`, which appears when it is complete and verified.

    `threads` and `quantizers` are those of `write_tensors`, `verifiers` the threads of `verify`; with a `journal` a
    file that was stopped is continued. `progress` receives the stages "write" and "verify".

    Raises:
        OutputError, CorruptWeightError, GGUFError: as `moe2gguf.recipes.convert.convert`.
    """
    with replacing(out, layout.file_size, journal) as (descriptor, partial):
        with progress("write", layout.file_size) as advance:
            write_tensors(
                descriptor, layout, tensors, threads=threads, quantizers=quantizers, advance=advance, journal=journal
            )
        if finish:
            finish(descriptor, layout)
        # the disk still works on the file while it is read again
        with ThreadPoolExecutor(1) as background, progress("verify", layout.file_size) as advance:
            flushed = background.submit(os.fsync, descriptor)
            require_sound(partial, threads=verifiers, progress=advance)
            flushed.result()
