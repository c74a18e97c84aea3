"""Chat templates: copied, never rendered."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe2gguf.errors import CheckpointError, VocabularyError
from moe2gguf.hf.json_file import read_bytes, read_json
from moe2gguf.hf.paths import resolve_inside

MAX_TEMPLATE_BYTES = 4 * 1024 * 1024
MAX_TEMPLATES = 64

_FOLDER = "additional_chat_templates"


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> template; "default" is the unnamed one.

    Files go before the entry in tokenizer_config.json (`config`), as in transformers: chat_template.jinja and
    additional_chat_templates/NAME.jinja; else `chat_template` of tokenizer_config.json; else of chat_template.json.
    That entry is a string, a list of `{"name": ..., "template": ...}` or a mapping. In names, what is no letter, digit
    or underscore becomes an underscore, since a name is part of a GGUF key. Empty templates are left out.

    Raises:
        CheckpointError: a file cannot be read, or its folder is a link to elsewhere.
        VocabularyError: a template is no text, or two have the same name.
    """
    templates = _read_files(folder) or _read_entry(config.get("chat_template"), folder / "tokenizer_config.json")
    path = resolve_inside(folder, "chat_template.json")
    if not templates and path.exists():
        templates = _read_entry(read_json(path, max_bytes=MAX_TEMPLATE_BYTES).get("chat_template"), path)
    named: dict[str, str] = {}
    for name, template in templates:
        key = re.sub(r"[^A-Za-z0-9_]", "_", name)
        if not key or key in named:
            raise VocabularyError(f"{folder}: two chat templates are called {key!r}")
        named[key] = template
    return {name: template for name, template in named.items() if template}


def _read_files(folder: Path) -> list[tuple[str, str]]:
    names = {"default": "chat_template.jinja"}
    extra = resolve_inside(folder, _FOLDER)
    if extra.is_dir():
        files = sorted(path.name for path in extra.iterdir() if path.suffix == ".jinja")
        if len(files) > MAX_TEMPLATES:
            raise VocabularyError(f"{extra}: {len(files)} chat templates; at most {MAX_TEMPLATES} are read")
        names |= {file.removesuffix(".jinja"): f"{_FOLDER}/{file}" for file in files}
    paths = {name: resolve_inside(folder, file) for name, file in names.items()}
    return [(name, _read_text(path)) for name, path in paths.items() if path.exists()]


def _read_text(path: Path) -> str:
    """Read a template; line ends stay as they are."""
    try:
        return read_bytes(path, max_bytes=MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error})") from error


def _read_entry(entry: Any, path: Path) -> list[tuple[str, str]]:
    if entry is None:
        return []
    if isinstance(entry, str):
        return [("default", entry)]
    if isinstance(entry, dict):
        entry = [{"name": name, "template": template} for name, template in entry.items()]
    if not isinstance(entry, list) or len(entry) > MAX_TEMPLATES:
        raise VocabularyError(f"{path}: chat_template is no string and no short list of named templates")
    pairs = []
    for item in entry:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise VocabularyError(f"{path}: an item of chat_template lacks its name or its template")
        pairs.append((name, template))
    return pairs
