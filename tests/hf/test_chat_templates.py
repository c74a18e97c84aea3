"""Chat templates are found where transformers finds them, and copied byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe2gguf.errors import CheckpointError, VocabularyError
from moe2gguf.hf.tokenizer.chat_templates import MAX_TEMPLATES, read_chat_templates

ODD = "{% if 1 %}\r\n  {{ 'é🚀' }}\t{% endif %}\n\n"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, {}),
        ("", {}),
        (ODD, {"default": ODD}),
        (
            [{"name": "default", "template": "D"}, {"name": "tool-use", "template": ODD}],
            {"default": "D", "tool_use": ODD},
        ),
        ([{"name": "rag", "template": "R"}], {"rag": "R"}),
        ({"default": "D", "rag": "R"}, {"default": "D", "rag": "R"}),
    ],
)
def test_entry_in_the_config(tmp_path: Path, entry: Any, expected: dict[str, str]) -> None:
    """A string, a list of named templates and a mapping are all read."""
    assert expected == read_chat_templates(tmp_path, {"chat_template": entry})


def test_files_go_first(tmp_path: Path) -> None:
    """chat_template.jinja wins over the config, with the additional ones beside it; chat_template.json comes last."""
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert read_chat_templates(tmp_path, {}) == {"default": "J"}
    assert read_chat_templates(tmp_path, {"chat_template": "C"}) == {"default": "C"}
    (tmp_path / "chat_template.jinja").write_bytes(ODD.encode())
    assert read_chat_templates(tmp_path, {"chat_template": "C"}) == {"default": ODD}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"T")
    (tmp_path / "additional_chat_templates" / "notes.txt").write_bytes(b"no template")
    assert read_chat_templates(tmp_path, {"chat_template": "C"}) == {"default": ODD, "tool_use": "T"}


def test_never_rendered(tmp_path: Path) -> None:
    """A template that would do harm when rendered is text like any other."""
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}{% endfor %}{{ unclosed"
    (tmp_path / "chat_template.jinja").write_text(evil)
    assert read_chat_templates(tmp_path, {}) == {"default": evil}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (3, "no string"),
        ([{"name": "a"}], "lacks"),
        (["text"], "lacks"),
        ([{"name": "a", "template": None}], "lacks"),
        ([{"name": "a-b", "template": "1"}, {"name": "a.b", "template": "2"}], "two chat templates are called 'a_b'"),
        ([{"name": "", "template": "1"}], "called ''"),
        ([{"name": str(i), "template": "1"} for i in range(MAX_TEMPLATES + 1)], "no short list"),
    ],
)
def test_malformed_entries(tmp_path: Path, entry: Any, says: str) -> None:
    """An entry of another shape is an error that says what is wrong."""
    with pytest.raises(VocabularyError, match=says):
        read_chat_templates(tmp_path, {"chat_template": entry})


def test_links_and_encodings(tmp_path: Path) -> None:
    """A link to a file is read; a link to a folder elsewhere, or what is no UTF-8, is refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "elsewhere").write_text("S")
    (folder / "chat_template.jinja").symlink_to("../elsewhere")
    assert {"default": "S"} == read_chat_templates(folder, {})
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_chat_templates(folder, {})
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="link to another folder"):
        read_chat_templates(folder, {})
