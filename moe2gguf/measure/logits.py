"""The logits of one text under two files: the reference's go to disk once, every other file is compared with them.

Only scored positions are computed to logits, a batch at a time, so memory is at most four blocks of n_batch * n_vocab
* 4 bytes (two of llama.cpp's, the reference's, and work) for any text and any vocabulary; disk space is
n_token * n_vocab * 4 bytes, or what `record_reference` is given: see `compact`.
"""

import contextlib
import errno
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import run_in_child, stream_from_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import Facts, Llama, Logits, open_model, open_vocabulary
from moe2gguf.llama.windows import Windows, cut_windows, tokenize_text
from moe2gguf.measure import metrics
from moe2gguf.measure import top_logits as compact
from moe2gguf.measure.metrics import TokenScores


@dataclass(frozen=True)
class Reference:
    """What `record_reference` leaves: logits (n_token, n_vocab) float32, row after row, in the file `logits`.

    With `n_kept` the file holds records of `compact.row_type(n_kept)` instead.
    """

    logits: Path
    windows: Windows
    text: str
    facts: Facts
    vocabulary: str  # digest
    n_kept: int | None = None


def record_reference(
    path: Path, setup: Setup, text: str, n_token: int | None, first: int, target: Path, room: int | None = None
) -> Reference:
    """Compute the reference's logits in a child process and keep them in the file `target`.

    At least `n_token` positions are scored (None: the whole text), windows being whole; see `cut_windows`. `room` is
    how many bytes the file may have before it takes the compact form.

    Raises HarnessError if llama.cpp cannot run the file, the text is too short, or the disk has no room.
    """
    return run_in_child(record_in_process, path, setup, text, n_token, first, target, room, what=f"running {path}")


def score_file(
    path: Path,
    setup: Setup,
    reference: Reference,
    tail: float = metrics.TAIL,
    *,
    timeout: float | None = None,
    memory_limit: int | None = None,
) -> Generator[TokenScores, None, None]:
    """Compare a file with the reference in a child process; yields the scores of one window after the other.

    `timeout` is in seconds per window, the first with the load; `memory_limit` in bytes: see `run_in_child`. A compact
    reference has a tail of its own, `metrics.TAIL`.

    Raises HarnessError if llama.cpp cannot run the file or its vocabulary is not the reference's.
    """
    limits: dict[str, Any] = {"timeout": timeout, "memory_limit": memory_limit}
    yield from stream_from_child(_score_windows, path, setup, reference, tail, what=f"running {path}", **limits)


def record_in_process(
    path: Path, setup: Setup, text: str, n_token: int | None, first: int, target: Path, room: int | None
) -> Reference:
    """Do what `record_reference` does in the process that calls it: a child process, or a benchmark's own."""
    with open_model(path, setup) as model:
        windows = _cut_text(model, text, n_token, setup.n_context, first)
        n_vocab = model.facts.n_vocab
        n_kept = None if room is None else compact.count_entries_to_keep(windows.n_token, n_vocab, room)
        row_bytes = n_vocab * 4 if n_kept is None else compact.row_type(n_kept).itemsize
        _require_room(target.parent, windows.n_token * row_bytes)
        try:
            with target.open("wb") as file:
                for window in windows.tokens:
                    for block, targets in _compute_scored(model, window, first):
                        rows = block if n_kept is None else compact.keep_top(block, targets, n_kept)
                        file.write(rows.data)
        except OSError as error:
            raise HarnessError(f"cannot keep the reference's logits: {error}; set TMPDIR to a larger disk") from error
        return Reference(target, windows, text, model.facts, model.vocabulary_digest(), n_kept)


def require_tokens(path: Path, text: str, n_token: int | None, n_context: int, first: int) -> None:
    """Raise HarnessError, as `record_reference` does, for a text that is too short; only the vocabulary is loaded."""
    run_in_child(_count_tokens, path, text, n_token, n_context, first, what=f"{path.name}: reading its vocabulary")


def _count_tokens(path: Path, *settings: Any) -> None:
    with open_vocabulary(path) as vocabulary:
        _cut_text(vocabulary, *settings)


def _cut_text(model: Llama, text: str, n_token: int | None, n_context: int, first: int) -> Windows:
    return cut_windows(tokenize_text(model, text), n_token=n_token, n_context=n_context, first=first, bos=model.bos())


@contextlib.contextmanager
def open_logits(reference: Reference) -> Iterator[IO[bytes]]:
    """The file of the reference's logits. Raises HarnessError where it cannot be opened or read."""
    try:
        with reference.logits.open("rb") as file:
            yield file
    except OSError as error:
        raise HarnessError(
            f"{reference.logits}: cannot be read ({error.strerror}); set TMPDIR to another disk"
        ) from error


def read_rows(file: IO[bytes], kind: np.dtype[Any], n: int) -> NDArray[Any]:
    """The next `n` values of an open file. Raises OSError where there are fewer."""
    rows = np.fromfile(file, kind, n)
    if len(rows) < n:
        raise OSError(errno.EIO, "it ends early")
    return rows


def _score_windows(path: Path, setup: Setup, reference: Reference, tail: float) -> Iterator[TokenScores]:
    windows = reference.windows
    setup = replace(setup, n_context=windows.tokens.shape[1])
    with open_model(path, setup) as model, open_logits(reference) as file:
        _require_same_vocabulary(model, reference)
        for window in windows.tokens:
            yield metrics.join_scores(score_window(model, window, reference, file, tail))


def score_window(
    model: Llama, window: NDArray[np.int32], reference: Reference, file: IO[bytes], tail: float
) -> Iterator[TokenScores]:
    """Yield the scores of a window (n_context,), a batch at a time; `file` is at the window's first logit."""
    for block, targets in _compute_scored(model, window, reference.windows.first):
        if reference.n_kept is None:
            base = read_rows(file, np.dtype(np.float32), block.size).reshape(block.shape)
            yield metrics.score_block(base, block, targets, tail)
        else:
            rows = read_rows(file, compact.row_type(reference.n_kept), len(block))
            yield compact.score_block(rows, block, targets)


def _compute_scored(model: Llama, window: NDArray[np.int32], first: int) -> Iterator[tuple[Logits, NDArray[np.int32]]]:
    """Yield blocks of logits of the scored positions, and the tokens that follow these."""
    row = first
    for block in model.blocks(window, first, len(window) - 1):
        yield block, window[row + 1 : row + 1 + len(block)]
        row += len(block)


def _require_room(folder: Path, n_byte: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_byte:
        raise HarnessError(
            f"the reference's logits take {n_byte / 2**20:.0f} MiB, {folder} has {free / 2**20:.0f} MiB free: "
            "set TMPDIR to a larger disk, or score fewer tokens"
        )


def _require_same_vocabulary(model: Llama, reference: Reference) -> None:
    """Raise HarnessError unless both files give every token and the text the same ids."""
    ours, base = model.facts, reference.facts
    if ours.n_vocab != base.n_vocab:
        difference = f"{ours.n_vocab} tokens against {base.n_vocab}"
    elif model.vocabulary_digest() != reference.vocabulary:
        difference = "as many tokens, but other texts or kinds of token"
    elif not _is_same_cut(tokenize_text(model, reference.text), reference.windows, model.bos()):
        difference = "the same tokens, but the text is split differently (tokenizer.ggml.pre or flags)"
    else:
        return
    raise HarnessError(
        f"{ours.path} and {base.path} have different vocabularies ({difference}): "
        "compare files made from the same checkpoint"
    )


def _is_same_cut(tokens: NDArray[np.int32], windows: Windows, bos: int | None) -> bool:
    if len(tokens) < windows.tokens.size:
        return False
    n_window, n_context = windows.tokens.shape
    n_token = n_window * windows.n_scored
    again = cut_windows(tokens, n_token=n_token, n_context=n_context, first=windows.first, bos=bos)
    return np.array_equal(again.tokens, windows.tokens)
