"""Calibration text, and the windows of tokens made of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError

MAX_TEXT_BYTES = 1 << 30
EMBEDDED = "moe2gguf texts 1"
"""The default text: `texts/`, written for this program. A change of it gets another number."""


@dataclass(frozen=True)
class Text:
    """A text, what to call it in metadata (never a path), and its SHA-256."""

    text: str
    label: str

    @property
    def digest(self) -> str:
        """SHA-256 of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path | None) -> Text:
    """The text of `path`: plain UTF-8, or JSONL whose objects have a "text" string; None is the embedded default.

    Raises:
        CalibrationError: unreadable, too large, empty, or a JSONL line without text (its number is named).
    """
    if path is None:
        return Text(_embedded(), EMBEDDED)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CalibrationError(f"{path}: larger than {MAX_TEXT_BYTES:,} bytes; give a part of it")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not readable as UTF-8 text ({error})") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_json_text(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line)
    if not text.strip():
        raise CalibrationError(f"{path}: empty; calibration needs text of the kind the model is meant for")
    return Text(text, path.name)


def _embedded() -> str:
    """The documents of all files in `texts/`, each at its share of the way through its file: every part has all kinds.

    A line of % stands between the documents of a file.
    """
    files = sorted((resources.files("moe2gguf.experts") / "texts").iterdir(), key=lambda file: file.name)
    documents = [file.read_text(encoding="utf-8").strip().split("\n%\n") for file in files]
    places = [((i + 0.5) / len(own), own[i]) for own in documents for i in range(len(own))]
    return "\n\n".join(document for _, document in sorted(places, key=lambda place: place[0]))


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: line {number} is not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise CalibrationError(f'{path}: line {number} is not an object with a "text" string')
    return str(value["text"])


def windows(folder: Path, text: Text, n_token: int, n_context: int, bos: int | None) -> NDArray[np.int64]:
    """About `n_token` token ids of `text`, (n_window, n_context): windows spread evenly over the whole text.

    The ids are those of the model folder's own tokenizer. Each window starts with the token `bos`, unless it is None,
    as a prompt would.

    Raises:
        CalibrationError: the text has fewer tokens than two windows.
    """
    return spread(text, np.array(_token_ids(folder, text.text), np.int64), n_token, n_context, bos)


def spread(text: Text, ids: NDArray[np.int64], n_token: int, n_context: int, bos: int | None) -> NDArray[np.int64]:
    """The same of all the token `ids` (n_token,) of `text`, whichever tokenizer they come from.

    Raises:
        CalibrationError: the text has fewer tokens than two windows, or a window has no room.
    """
    prefix = np.array([] if bos is None else [bos], np.int64)
    if (step := n_context - len(prefix)) < 1:
        raise CalibrationError(f"a context of {n_context} tokens, which the model asks for, leaves no room for text")
    available, wanted = len(ids) // step, max(n_token // n_context, 2)
    if available < 2:
        raise CalibrationError(
            f"{text.label}: {len(ids)} tokens are too few to calibrate with; at least {2 * step} are needed, "
            "and some ten thousand for a good result"
        )
    chosen = np.linspace(0, available - 1, min(wanted, available)).astype(np.int64)
    return np.stack([np.concatenate([prefix, ids[start : start + step]]) for start in chosen * step])


def _token_ids(folder: Path, text: str) -> list[int]:
    """Ids without special tokens; the plan has read the same files before, so they are sound."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids)
    from sentencepiece import SentencePieceProcessor

    return list(SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text))
