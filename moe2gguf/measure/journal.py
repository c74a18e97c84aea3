"""Finished measurements, one JSON object per line, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.llama.machine import package_version
from moe2gguf.measure.grid import Measurement
from moe2gguf.measure.results import Quality

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


class MeasurementJournal:
    """The finished measurements of a comparison; `facts` is what they depend on besides their files."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self._facts = facts
        self._journal = Journal(path)

    def get(self, one: Measurement) -> Quality | None:
        """Return the scores of an earlier run, or None."""
        values = self._journal.get(self._key(one))
        try:
            return Quality.from_dict(values) if values else None
        except (KeyError, TypeError, ValueError):  # another version's row, or an edited one: measure again
            return None

    def put(self, one: Measurement, scores: Quality) -> None:
        """Keep scores. Raises HarnessError if the file cannot be written."""
        self._journal.put(self._key(one), scores.to_dict())

    def _key(self, one: Measurement) -> str:
        return key(
            what=one.what,
            files=[[config.identity, config.n_expert_used, config.device] for config in (one.base, one.one)],
            versions=[package_version("moe2gguf"), package_version("llama-cpp-python")],
            **self._facts,
        )


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
