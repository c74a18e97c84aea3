"""The chat template of a file: a program from outside, run in a child process with bounds on its time and memory.

The engine is llama-cpp-python's, a Jinja sandbox set up as transformers sets up its own.
"""

import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.llama.child import converse_with_child
from moe2gguf.llama.library import require_llama

TIMEOUT = 30.0
"""Seconds for one text, the start of the process included."""

MEMORY = 2 * 2**30 if sys.platform == "linux" else None
"""Bytes that the process may take; other systems have no such limit."""

LONGEST = 2**24
"""Characters of a text."""

Message = Mapping[str, str]
"""`role` ("system", "user" or "assistant") and `content`."""


class ChatTemplate:
    """The template of a file, ready to make prompts; `close` ends its process, `way_out` is what errors advise."""

    def __init__(self, path: Path, text: str, bos: str, eos: str, way_out: str = "--raw does without it") -> None:
        self._path = path
        self._arguments = (text, bos, eos)
        self._way_out = way_out
        self._talk: Generator[str, Any, None] | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that ends where the next answer begins.

        Raises HarnessError where the template fails, takes too long or needs too much memory, or llama.cpp is missing.
        """
        require_llama()
        try:
            if self._talk is None:
                self._talk = converse_with_child(
                    _render_all, *self._arguments, what="evaluation", timeout=TIMEOUT, memory_limit=MEMORY
                )
                next(self._talk)
            return self._talk.send([dict(message) for message in messages])
        except HarnessError as error:
            self.close()
            reason = str(error).splitlines()[0]
            raise HarnessError(f"{self._path}: its chat template fails: {reason}; {self._way_out}") from error

    def close(self) -> None:
        """End the process; the next text starts another one."""
        if self._talk:
            self._talk.close()
        self._talk = None


def read_template(file: GGUFFile, *way_out: str) -> ChatTemplate | None:
    """Return the chat template of a file, None where it has none, as files of base models have not.

    `way_out` is what an error advises in place of the option --raw.
    """
    text = file.metadata.get("tokenizer.chat_template")
    if not isinstance(text, str) or not text:
        return None
    return ChatTemplate(file.path, text, special_token(file, "bos"), special_token(file, "eos"), *way_out)


def special_token(file: GGUFFile, role: str) -> str:
    """Return the text of a special token ("bos", "eos", "eot"), empty where the file has none."""
    tokens, index = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", f"{role}_token_id"))
    if not isinstance(tokens, list) or not isinstance(index, int) or not 0 <= index < len(tokens):
        return ""
    return str(tokens[index])


def _render_all(text: str, bos: str, eos: str) -> Generator[str, list[dict[str, str]], None]:
    """In the child: a prompt for every list of messages that is sent."""
    prompt = ""
    while True:
        messages = yield prompt
        prompt = _render(text, bos, eos, messages)


def _render(text: str, bos: str, eos: str, messages: list[Any]) -> str:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        prompt = Jinja2ChatFormatter(text, eos_token=eos, bos_token=bos)(messages=messages).prompt
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        raise HarnessError(f"{type(error).__name__}: {str(error)[:200]}") from None
    if len(prompt) > LONGEST:
        raise HarnessError(f"it makes a text of {len(prompt):,} characters")
    return str(prompt)
