"""What the parts of `verify` collect."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Problems make a file unsound; notes are worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
