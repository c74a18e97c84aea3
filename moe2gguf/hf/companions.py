"""The small files that make a checkpoint's weights usable: tokenizer, chat templates, generation settings, licence."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from moe2gguf.hf.paths import resolve_inside

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
TEMPLATES = "additional_chat_templates"


def list_companions(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name inside the folder, path) of every such file that `folder` has.

    Raises:
        CheckpointError: a folder on the way is elsewhere, or one of them is no file.
    """
    names = [*TOKENIZER_FILES, *OTHER_FILES]
    if (extra := resolve_inside(folder, TEMPLATES)).is_dir():
        names += sorted(f"{TEMPLATES}/{path.name}" for path in extra.iterdir() if path.suffix == ".jinja")
    for name in names:
        if (path := resolve_inside(folder, name)).is_file():
            yield name, path


def copy_companions(folder: Path, out: Path) -> None:
    """Copy those files of `folder`, contents only, into `out`. Raises as `list_companions` does."""
    for name, path in list_companions(folder):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, out / name)
