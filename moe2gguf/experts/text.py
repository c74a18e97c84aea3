"""Calibration text, and the windows of tokens made of it."""

import codecs
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError, name_odd_file
from moe2gguf.hf.tokenizer.tokenizer_json import load_tokenizer

MAX_TEXT_BYTES = 1 << 30
_PIECE = 1 << 16
_BYTES_PER_TOKEN = 32
_SPARE_TOKENS = 4096
_SAMPLE_BYTES, _N_PIECE = 1 << 21, 64
_INSIDE_CHARACTERS = bytes(range(0x80, 0xC0))
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


def bytes_to_read(n_token: int | None) -> int | None:
    """Return how many bytes of a text hold its first `n_token` tokens, amply; None where all are wanted."""
    return None if n_token is None else _BYTES_PER_TOKEN * (n_token + _SPARE_TOKENS)


def read_text(path: Path | None = None, n_byte: int | None = None, *, spread: bool = False) -> Text:
    """Return the text of `path`: plain UTF-8, or JSONL whose objects have a "text" string; None: the built-in text.

    A shell's `<(command)` and /dev/stdin are read too, once.

    With `n_byte` only the start of a larger text is read: so many bytes, less a character or a JSONL line that is cut
    off. With `spread` it is pieces from all over a file, not its start.

    Raises:
        CalibrationError: unreadable, too large, empty, in another encoding, or a JSONL line without text (its number
            or its start is named).
    """
    if path is None:
        return Text(_embedded(), EMBEDDED)
    has_lines = path.suffix == ".jsonl"
    pieces, is_part = _read_pieces(path, n_byte, spread, has_lines)
    if has_lines and is_part:
        pieces = _drop_torn_lines(path, pieces)
    text = "\n\n".join(_decode(path, data, is_part) for data in pieces)
    if has_lines:
        numbered = ((f"line {i}" if len(pieces) == 1 else None, line) for i, line in enumerate(text.split("\n"), 1))
        text = "\n\n".join(_json_text(path, where, line) for where, line in numbered if line)
    if not text.strip():
        raise CalibrationError(f"{path}: empty; a text of the kind that the model is meant for is needed")
    return Text(text, path.name if path.is_file() else "pipe")


def read_sample(path: Path | None, n_token: int) -> Text:
    """`read_text` for windows from all over a text: of a file that is far larger than its `n_token` tokens, pieces."""
    return read_text(path, max(_SAMPLE_BYTES, _BYTES_PER_TOKEN * n_token), spread=True)


def hold_out(text: Text) -> tuple[Text, Text]:
    """Cut a text before its last fifth, between paragraphs if it has some: to fit to, and to measure on."""
    end = len(text.text) * 4 // 5
    at = text.text.rfind("\n\n", 0, end) + 1 or end
    start, rest = f"the first four fifths of {text.label}", f"the last fifth of {text.label}"
    return Text(text.text[:at], start), Text(text.text[at:], rest)


def _read_pieces(path: Path, n_byte: int | None, spread: bool, has_lines: bool) -> tuple[list[bytes], bool]:
    """Return the bytes of a file, in one piece or in pieces from all over it, and whether more follow each."""
    try:
        if what := name_odd_file(path, pipes=True):
            raise CalibrationError(f"{path}: {what}")
        with path.open("rb") as file:
            size = path.stat().st_size if path.is_file() else 0
            if spread and n_byte and size > n_byte:
                return [*_read_spread(file, size, n_byte // _N_PIECE, has_lines)], True
            pieces = iter(functools.partial(file.read, _PIECE), b"")  # as much memory as the text needs
            data = b"".join(itertools.islice(pieces, (MAX_TEXT_BYTES if n_byte is None else n_byte) // _PIECE + 1))
    except OSError as error:
        raise CalibrationError(f"{path}: not readable as text ({error.strerror})") from error
    if n_byte is None and len(data) > MAX_TEXT_BYTES:
        raise CalibrationError(f"{path}: larger than {MAX_TEXT_BYTES:,} bytes; give a part of it")
    return [data[:n_byte]], n_byte is not None and len(data) > n_byte


def _read_spread(file: BinaryIO, size: int, n_byte: int, has_lines: bool) -> Iterator[bytes]:
    """Yield _N_PIECE pieces of about `n_byte`, in order: whole lines where the file has them, else whole characters."""
    for start in np.linspace(0, size - n_byte, _N_PIECE).astype(int).tolist():
        file.seek(max(start, file.tell()) if has_lines else start)
        if not has_lines:
            yield file.read(n_byte).lstrip(_INSIDE_CHARACTERS)
            continue
        if start:
            file.readline(MAX_TEXT_BYTES)
        data, most = b"", n_byte * _N_PIECE
        while len(data) < n_byte and (line := file.readline(most)):
            data += line
        if len(data) >= most:
            raise CalibrationError(f"{file.name}: a line is longer than {most:,} bytes; cut it into shorter ones")
        yield data


def _drop_torn_lines(path: Path, pieces: list[bytes]) -> list[bytes]:
    """Leave out the last line of a piece, which may be cut. Raises CalibrationError where it is all that was read."""
    if len(pieces) == 1 and b"\n" not in pieces[0]:
        raise CalibrationError(f"{path}: line 1 is longer than {len(pieces[0]):,} bytes; cut it into shorter ones")
    return [data[: data.rfind(b"\n") + 1] or data for data in pieces]


def _decode(path: Path, data: bytes, is_part: bool) -> str:
    """Return UTF-8 as text without a byte order mark. Raises CalibrationError for any other encoding."""
    advice = "convert it to UTF-8, such as with iconv"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CalibrationError(f"{path}: not readable as UTF-8 text (it is UTF-16 or UTF-32); {advice}")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=not is_part)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not readable as UTF-8 text ({error}); {advice}") from error
    if "\0" in text:
        raise CalibrationError(f"{path}: not readable as UTF-8 text (it has zero bytes); {advice}")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python's own text mode reads it


def _embedded() -> str:
    """Return the documents of all files in `texts/`, interleaved so that every part of the text has all genres.

    Documents of a file are separated by a line of %. Each is placed at its share of the way through its file.
    """
    files = sorted((resources.files("moe2gguf.experts") / "texts").iterdir(), key=lambda file: file.name)
    documents = [file.read_text(encoding="utf-8").strip().split("\n%\n") for file in files]
    places = [((i + 0.5) / len(own), own[i]) for own in documents for i in range(len(own))]
    return "\n\n".join(document for _, document in sorted(places, key=lambda place: place[0]))


def _json_text(path: Path, where: str | None, line: str) -> str:
    where = where or f"the line {line[:40]!r}..."
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: {where} is not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise CalibrationError(f'{path}: {where} is not an object with a "text" string')
    return str(value["text"]).encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair


def tokenize_windows(folder: Path, text: Text, n_token: int, n_context: int, bos: int | None) -> NDArray[np.int64]:
    """Return about `n_token` token ids of `text`, (n_window, n_context): windows spread evenly over the whole text.

    The ids are those of the model folder's own tokenizer. Each window starts with the token `bos`, unless it is None,
    as a prompt would.

    Raises:
        CalibrationError: the text has fewer tokens than two windows.
    """
    return spread_windows(text, np.array(open_tokenizer(folder).encode(text.text), np.int64), n_token, n_context, bos)


def spread_windows(
    text: Text, ids: NDArray[np.int64], n_token: int, n_context: int, bos: int | None
) -> NDArray[np.int64]:
    """Cut windows as `tokenize_windows` does from all the token `ids` (n_token,) of `text`, of any tokenizer.

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


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer of a model folder.

    encode   text to ids, without special tokens around them
    decode   ids to text
    n_token  the number of ordinary tokens, whose ids come first
    added    the texts of added tokens
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    n_token: int
    added: tuple[str, ...] = ()


def open_tokenizer(folder: Path) -> FolderTokenizer:
    """Open tokenizer.json, or tokenizer.model; the plan has read the same files before, so they are valid."""
    if (folder / "tokenizer.json").is_file():
        own = load_tokenizer(folder / "tokenizer.json")
        added = tuple(token.content for token in own.get_added_tokens_decoder().values())
        n_token = own.get_vocab_size(with_added_tokens=False)
        return FolderTokenizer(lambda text: own.encode(text, add_special_tokens=False).ids, own.decode, n_token, added)
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return FolderTokenizer(pieces.encode, pieces.decode, len(pieces))
