"""Settings of a small sweep."""

from __future__ import annotations

from pathlib import Path

from moe2gguf.experts.text import Text
from moe2gguf.measure.compare import CompareSettings

CONTEXT, N_WINDOW = 32, 3


TEXT = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. " * 4


def settings(folder: Path, **fields: object) -> CompareSettings:
    n_token = N_WINDOW * (CONTEXT // 2 - 1)
    given = {
        "text": Text(TEXT, "tan"),
        "n_token": n_token,
        "n_context": CONTEXT,
        "threads": 1,
        "journal": folder / "journal.jsonl",
    }
    return CompareSettings(**{**given, **fields})  # type: ignore[arg-type]
