"""Finished measurements, one JSON object per line, so that an interrupted comparison goes on where it stopped."""

import hashlib
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from moe2gguf.errors import OutputError
from moe2gguf.gguf.resume import Journal
from moe2gguf.llama.machine import read_package_version
from moe2gguf.measure.grid import Measurement
from moe2gguf.measure.metrics import as_json
from moe2gguf.measure.results import Quality
from moe2gguf.measure.tasks import REQUESTS, TaskScores, make_tasks


class MeasurementJournal:
    """The finished measurements of a comparison; `facts` is what they depend on besides their files.

    Raises OutputError for a file that is no journal, or cannot be written.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self._facts = facts
        self._journal = Journal(path)
        self._journal.require_own()
        require_writable(path)

    def get(self, one: Measurement) -> Quality | TaskScores | None:
        """Return the scores of an earlier run, or None."""
        values = self._journal.find_facts(self._key(one))
        kind = TaskScores if one.what == "tasks" else Quality
        try:
            return kind.from_dict(dict(values)) if values else None
        except (KeyError, TypeError, ValueError):  # another version's row: measure again
            return None

    def put(self, one: Measurement, scores: Quality | TaskScores) -> None:
        """Keep scores. Raises OutputError if the file cannot be written."""
        self._journal.record_facts(self._key(one), as_json(scores))

    def interruptible(self) -> AbstractContextManager[None]:
        """An interrupt of the block tells where the finished measurements are."""
        return self._journal.interruptible()

    def _key(self, one: Measurement) -> str:
        return digest_parts(
            what=one.what,
            files=[[config.identity, config.n_expert_used, config.device] for config in (one.base, one.one)],
            versions=[read_package_version("moe2gguf"), read_package_version("llama-cpp-python")],
            **({"tasks": make_tasks(), "requests": REQUESTS} if one.what == "tasks" else self._facts),
        )


def require_writable(path: Path) -> None:
    """Raise OutputError unless a file, for which the cache is the usual place, can be written or made."""
    place = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not os.access(place, os.W_OK):
        raise OutputError(f"{path}: {place} is not writable; choose another place, or set MOE2GGUF_CACHE to one")


def digest_parts(**parts: Any) -> str:
    """Return a digest of JSON-ready values by name: the same values give the same key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
