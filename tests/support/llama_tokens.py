"""What llama.cpp makes of a vocabulary: a file that holds nothing else, loaded, and texts tokenized."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType

import gguf
import llama_cpp

from moe2gguf.spec import Metadata


@llama_cpp.llama_log_callback
def _quiet(_level: int, _text: bytes, _data: object) -> None:
    """Drop a line. llama.cpp keeps a bare pointer to this function for good: it must never be collected."""


def write_vocabulary_file(path: Path, metadata: Metadata) -> None:
    """Write a GGUF without tensors; lists that hold floats become float arrays, as in the files we make."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            raise TypeError(f"{key}: {value!r}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


class LlamaTokens:
    """A vocabulary loaded by llama.cpp; use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaTokens:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        llama_cpp.llama_model_free(self._model)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the ids of a text in which special tokens count as such, as transformers takes them."""
        data = text.encode()
        size = len(data) + 8
        ids = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, size, add_special, True)
        if count < 0:
            raise ValueError(f"{-count} tokens from {len(data)} bytes")
        return list(ids[:count])

    @property
    def size(self) -> int:
        """The number of tokens."""
        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def special(self, role: str) -> int:
        """Return the id of "bos", "eos" ..., -1 if there is none."""
        return int(getattr(llama_cpp, f"llama_vocab_{role}")(self._vocab))

    def is_end(self, id_: int) -> bool:
        """Say whether a token ends a generation."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, id_))
