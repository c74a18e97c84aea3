"""Finished rows of a sweep, one JSON object per line, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError

FORMAT = 1
"""Of a line; lines of other formats are left alone and not used."""


class Journal:
    """A file of finished rows. Lines are appended whole and flushed; a torn or foreign line is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text("utf-8", "replace") if path.exists() else ""
        except OSError as error:
            raise HarnessError(f"{path}: cannot read the journal ({error.strerror}); name another file") from error
        self._rows = dict(row for line in text.splitlines() if (row := _parsed(line)) is not None)
        self._ends_torn = bool(text) and not text.endswith("\n")

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the row kept under `key`, or None."""
        return self._rows.get(key)

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row. Raises HarnessError if the file cannot be written."""
        line = json.dumps({"format": FORMAT, "key": key, "row": row}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(("\n" + line if self._ends_torn else line).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise HarnessError(f"{self.path}: cannot keep the journal ({error}); name another file") from error
        self._ends_torn = False
        self._rows[key] = row


def key(**parts: Any) -> str:
    """Return a digest of JSON-ready values by name: the same values give the same key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _parsed(line: str) -> tuple[str, dict[str, Any]] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        return None
    name, row = entry.get("key"), entry.get("row")
    return (name, row) if isinstance(name, str) and isinstance(row, dict) else None
