"""A text as windows of tokens, as llama.cpp's own tools cut it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.model import Llama


@dataclass(frozen=True)
class Windows:
    """A text cut into windows that are computed independently of each other.

    tokens  (n_window, n_context) int32; each starts with BOS where the file asks for it
    first   the first scored position: logits at first ... n_context - 2 are scored on the token that follows
    """

    tokens: NDArray[np.int32]
    first: int

    @property
    def n_scored(self) -> int:
        """Scored positions of one window."""
        return int(self.tokens.shape[1]) - 1 - self.first

    @property
    def n_token(self) -> int:
        """Scored positions of all windows."""
        return len(self.tokens) * self.n_scored


def cut_windows(
    tokens: NDArray[np.int32], *, n_token: int | None, n_context: int, first: int, bos: int | None
) -> Windows:
    """Cut tokens (n,) into as many windows as `n_token` scored positions need, rounded up; None: as many as there are.

    As in llama.cpp's perplexity tool the windows follow each other without overlap, and BOS takes the place of
    the first token of each: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/perplexity/perplexity.cpp#L569
    Raises HarnessError if the text is too short or the numbers do not fit each other.
    """
    if n_token is None:
        n_token = max(1, len(tokens) // n_context) * (n_context - 1 - first)
    if n_token < 1 or not 0 <= first < n_context - 1:
        raise HarnessError(
            f"cannot score {n_token} tokens from position {first} of windows of {n_context}: "
            "ask for at least 1 token and a context of at least 3"
        )
    n_window = -(-n_token // (n_context - 1 - first))
    if len(tokens) < n_window * n_context:
        raise HarnessError(
            f"scoring {n_token} tokens takes {n_window * n_context} tokens of text, this one has {len(tokens)}: "
            "give a longer text, or lower the number of tokens"
        )
    cut = tokens[: n_window * n_context].reshape(n_window, n_context).copy()
    if bos is not None:
        cut[:, 0] = bos
    return Windows(cut, first)


def tokenize_text(model: Llama, text: str) -> NDArray[np.int32]:
    """Return the tokens (n,) of a text; an EOS that the file appends is not part of it."""
    tokens = model.tokenize(text)
    ended = len(tokens) > 0 and model.lib.llama_vocab_get_add_eos(model.vocab)
    return tokens[:-1] if ended else tokens


def cut_text(model: Llama, text: str, n_context: int, n_token: int | None) -> NDArray[np.int32]:
    """At least `n_token` tokens of a text (None: all) in whole windows (n_window, n_context).

    Raises HarnessError as `cut_windows`.
    """
    n_scored = None if n_token is None else max(1, -(-n_token // n_context)) * (n_context - 1)
    tokens = tokenize_text(model, text)
    return cut_windows(tokens, n_token=n_scored, n_context=n_context, first=0, bos=model.bos()).tokens
