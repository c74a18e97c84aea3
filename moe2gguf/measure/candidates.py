"""What is measured: one file at one number of experts on one device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One file, k and device.

    n_expert, n_expert_used   0 for a dense file
    type          the type that most bytes of the weights have
    file_size     bytes
    active_bytes  bytes of weights read per generated token
    identity      digest of the file's header, size and time of change: cheap, and new whenever the file is rewritten
    refusal       why this cannot run; empty if it can
    name          what tells the file from the others of a sweep; empty: the last part of its path does
    bits_per_weight   of all tensors together
    """

    path: Path
    n_expert: int
    n_expert_used: int
    device: str
    type: str
    file_size: int
    active_bytes: int
    identity: str
    refusal: str = ""
    name: str = ""
    bits_per_weight: float = 0.0

    @property
    def label(self) -> str:
        """The words for it: file, k of n, and the device unless it is the CPU."""
        k = f" k={self.n_expert_used}/{self.n_expert}" if self.n_expert else ""
        device = "" if self.device == "cpu" else f" {self.device}"
        return f"{self.name or self.path.name}{k}{device}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {**asdict(self), "path": str(self.path), "label": self.label}
