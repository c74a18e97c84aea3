"""Are the token ids of a converted file those of its folder's tokenizer? Both read texts made of its own tokens."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe2gguf.errors import HarnessError, OutputError, list_names
from moe2gguf.experts.text import FolderTokenizer, open_tokenizer
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.metadata import vocabulary_metadata
from moe2gguf.gguf.system import temporary_folder
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.tokenizer.pretokenizers import PROBES
from moe2gguf.llama.tokens import read_token_lists
from moe2gguf.recipes.source import Source

T = TypeVar("T")

MOST_NAMED = 5
_MOST_TOKENS = 400

_AROUND = ("{}", " {}", "{} ", " {} ", "a{}b", "{0}{0}", "the {0}  {0} end")
"""Where an added token may stand in a text."""

_PLAIN = (*PROBES, "u\u0308ber e\u0301\u0301", "1234567890", "İıſ", "<0x41></x>", "")
"""Texts that have nothing to do with a vocabulary; one is not in normalization form C."""


@dataclass(frozen=True)
class TokenDifference:
    """A text, and its token ids from llama.cpp and from the folder's tokenizer, both without special tokens around."""

    text: str
    llama_cpp: tuple[int, ...]
    tokenizer: tuple[int, ...]


@dataclass(frozen=True)
class TokenCheck:
    """How many texts were compared, how many of them differ, and at most MOST_NAMED of these, each of another token."""

    n_text: int
    n_differing: int
    named: tuple[TokenDifference, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return asdict(self)

    @property
    def warnings(self) -> list[str]:
        """A sentence where ids differ."""
        if not self.named:
            return []
        texts = list_names([repr(one.text) for one in self.named], MOST_NAMED)
        return [
            f"{self.n_differing} of {self.n_text} texts made of its own tokens have other ids in llama.cpp than the "
            f"folder's tokenizer gives, such as {texts}; `moe2gguf convert --check auto` shows them"
        ]


def warn_of_token_ids(source: Source) -> list[str]:
    """Compare the token ids of a file of `source` as `compare_token_ids` does, before it is made: what to be told.

    Nothing for a GGUF file, whose vocabulary stays as it is, and where llama.cpp is not installed.
    """
    if not isinstance(source, Checkpoint) or find_spec("llama_cpp") is None:
        return []
    try:
        with vocabulary_file(source) as path:
            return compare_token_ids(path, source.folder).warnings
    except (HarnessError, OutputError) as error:
        return [f"token ids were not compared with the folder's tokenizer: {error}"]


@contextlib.contextmanager
def vocabulary_file(source: Source) -> Iterator[Path]:
    """A GGUF file with the vocabulary of a source: itself if it is one, or one without tensors that goes again.

    Raises OutputError where it cannot be written.
    """
    if not isinstance(source, Checkpoint):
        yield source.path
        return
    metadata = {"general.architecture": "llama", **vocabulary_metadata(source.vocabulary)}
    with temporary_folder() as folder:
        path = folder / "vocabulary.gguf"
        try:
            path.write_bytes(lay_out(metadata, [], {}).header)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror}); set TMPDIR to a folder with room"
            ) from error
        yield path


def compare_token_ids(path: Path, folder: Path) -> TokenCheck:
    """Compare llama.cpp's ids from the vocabulary of the GGUF file `path` with those of the tokenizer in `folder`.

    The texts are every added token bare, between spaces, in a word and doubled; ordinary tokens from all over the
    vocabulary; digits, spaces, line ends and Unicode. Of thousands of tokens, 400 are taken.

    Raises:
        HarnessError: llama.cpp is not installed, or cannot read the vocabulary.
    """
    own = open_tokenizer(folder)
    groups = [[form.format(token) for form in _AROUND] for token in _spread(own.added)]
    groups += [[word, f" {word}", f"{word}{word}"] for word in _list_words(own)]
    groups += [[text] for text in _PLAIN]
    given = iter(read_token_lists(path, [text for group in groups for text in group])[0])
    n_differing, named = 0, list[TokenDifference]()
    for group in groups:
        found = [TokenDifference(text, tuple(next(given).tolist()), tuple(own.encode(text))) for text in group]
        differing = [one for one in found if one.llama_cpp != one.tokenizer]
        n_differing += len(differing)
        named += differing[:1]
    return TokenCheck(sum(map(len, groups)), n_differing, tuple(named[:MOST_NAMED]))


def _list_words(own: FolderTokenizer) -> Iterator[str]:
    """Yield the texts of ordinary tokens, evenly over the vocabulary; those of parts of a character have none."""
    for id_ in _spread(range(own.n_token)):
        word = own.decode([int(id_)])
        if word and "\ufffd" not in word:
            yield word


def _spread(values: Sequence[T]) -> list[T]:
    """Return _MOST_TOKENS of the values, from first to last, or all if there are fewer."""
    chosen = np.linspace(0, len(values) - 1, min(len(values), _MOST_TOKENS)).astype(int)
    return [values[i] for i in chosen]
