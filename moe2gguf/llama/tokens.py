"""Token ids from the vocabulary of a GGUF file, as llama.cpp's own tokenizer makes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.model import open_vocabulary


def read_tokens(path: Path, text: str) -> tuple[NDArray[np.int64], int | None]:
    """(ids of `text` without special tokens around it (n_token,), the token that starts every prompt or None).

    `path` is a GGUF file, or the first of its shards. Special tokens that are spelled out in the text count as such, as
    tokenizer.json has it.

    Raises:
        HarnessError: llama.cpp is not installed, or cannot read the vocabulary.
    """
    [ids], bos = read_token_lists(path, [text])
    return ids, bos


def read_token_lists(path: Path, texts: Sequence[str]) -> tuple[list[NDArray[np.int64]], int | None]:
    """`read_tokens` of several texts at once."""
    try:
        return run_in_child(_read_tokens, path, texts, what=f"{path.name}: reading text with its vocabulary")
    except HarnessError as error:
        raise HarnessError(f"{path}: token ids come from llama.cpp where the model is a GGUF file: {error}") from error


def _read_tokens(path: Path, texts: Sequence[str]) -> tuple[list[NDArray[np.int64]], int | None]:
    with open_vocabulary(path) as vocabulary:
        lists = [vocabulary.tokenize(text, special=False, parse_special=True).astype(np.int64) for text in texts]
        return lists, vocabulary.bos()
