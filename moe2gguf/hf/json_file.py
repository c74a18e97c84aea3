"""A JSON file of a checkpoint, read strictly: bounded, without duplicate keys, without surprises further down."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from moe2gguf.errors import CheckpointError, name_odd_file

MAX_JSON_BYTES = 256 * 1024 * 1024
"""The largest JSON file we read, in bytes; the largest tokenizer.json in use today has about 35 MB."""

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number, and one that a float can hold; `true` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in `path`.

    The text must be UTF-8 (a byte order mark is skipped) and strict RFC 8259: no NaN or Infinity, no object that
    names a key twice, no escape that is half of a surrogate pair (it could not be written as UTF-8 again).

    Raises:
        CheckpointError: the file is missing, no regular file, larger than `max_bytes`, malformed, too deeply
            nested, or holds something else than an object.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_require_unique_keys, parse_constant=_refuse_constant
        )
        if _ESCAPED_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply; no model's file is, fetch a sound copy of it") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: a \\u escape is half of a surrogate pair, which UTF-8 cannot hold") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch a sound copy of it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read the whole regular file at `path`, at most `max_bytes` of it.

    Raises:
        CheckpointError: the file is missing, unreadable, no regular file (a pipe would block), or larger.
    """
    try:
        if what := name_odd_file(path):
            raise CheckpointError(f"{path}: {what}")
        if (n_byte := path.stat().st_size) > max_bytes:
            raise CheckpointError(f"{path}: {n_byte:,} bytes; a sound one has at most {max_bytes:,}")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: grew above {max_bytes:,} bytes while it was read")
    return data


def _require_unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise ValueError(f"key named more than once: {', '.join(map(repr, twice[:5]))}")
    return result


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN, Infinity and -Infinity, which Python would accept."""
    raise ValueError(f"{name} is not a JSON number")
