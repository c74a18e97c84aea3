"""Checkpoint JSON is read strictly or not at all."""

import os
from pathlib import Path

import pytest

from moe2gguf.errors import CheckpointError
from moe2gguf.hf.json_file import read_json


def test_reads_an_object(tmp_path: Path) -> None:
    """A JSON object comes back as a dict, with or without a byte order mark."""
    path = tmp_path / "a.json"
    for head in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(head + '{"a": [1, 2.5, null, true, "é\\ud83d\\ude80"], "b": {}}'.encode())
        assert {"a": [1, 2.5, None, True, "é🚀"], "b": {}} == read_json(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a'"),
        (b'{"x": {"a": 1, "a": 1}}', "more than once"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"[1]", "list"),
        (b'"text"', "str"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_refuses(tmp_path: Path, content: bytes, says: str) -> None:
    """What is not a strict JSON object is refused by name and reason."""
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_bounds_the_size(tmp_path: Path) -> None:
    """A file above the limit is refused before it is read."""
    path = tmp_path / "large.json"
    path.write_bytes(b'{"a": 1}')
    assert {"a": 1} == read_json(path, max_bytes=8)
    with pytest.raises(CheckpointError, match="8 bytes; a sound one has at most 7"):
        read_json(path, max_bytes=7)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    """A missing file, a folder and a pipe (which would block) are refused."""
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(CheckpointError, match="is a folder; expected a file"):
        read_json(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="is a pipe; expected a file"):
            read_json(tmp_path / "pipe")
