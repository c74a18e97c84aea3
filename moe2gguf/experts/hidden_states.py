"""One row of numbers per token, (n_token, width) float32: in memory, in a file, or computed when it is asked for.

Rows are read piece by piece (`chunks`), so that results do not depend on where they are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe2gguf.errors import CalibrationError

CHUNK = 2048


def chunks(n_token: int, size: int = CHUNK) -> Iterator[slice]:
    """Return slices that cover range(n_token)."""
    return (slice(start, min(start + size, n_token)) for start in range(0, n_token, size))


class Rows(Protocol):
    """Rows that can be read; a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


class HiddenStates(Rows, Protocol):
    """Rows that can be read and written; a tensor is one."""

    def __setitem__(self, part: slice, rows: Tensor, /) -> None: ...


@dataclass(frozen=True)
class LazyRows:
    """Rows that `compute` gives, again at every reading."""

    n_token: int
    compute: Callable[[slice], Tensor]

    def __len__(self) -> int:
        return self.n_token

    def __getitem__(self, part: slice) -> Tensor:
        return self.compute(part)


def sample_rows(rows: Rows, n_token: int) -> LazyRows:
    """Return at least `n_token` of the rows, at equal distances, or all where there are fewer than twice as many."""
    step = max(len(rows) // n_token, 1)
    return LazyRows(len(rows) // step, lambda part: rows[slice(part.start * step, part.stop * step)][::step])


class RowsOnDisk:
    """Rows in a file of their own, in the machine's byte order; only the piece that is asked for is in memory."""

    def __init__(self, path: Path, n_token: int, width: int) -> None:
        self._path, self._n_token, self._width = path, n_token, width
        with path.open("wb") as file:
            file.truncate(n_token * width * 4)

    def __len__(self) -> int:
        return self._n_token

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self._n_token)
        values = np.fromfile(self._path, np.float32, (stop - start) * self._width, offset=start * self._width * 4)
        return torch.from_numpy(values.reshape(stop - start, self._width))

    def __setitem__(self, part: slice, rows: Tensor) -> None:
        with self._path.open("r+b", buffering=0) as file:
            file.seek(part.indices(self._n_token)[0] * self._width * 4)
            file.write(rows.cpu().contiguous().numpy().data)


def allocate(names: Sequence[str], n_token: int, width: int, limit: int, folder: Path) -> list[HiddenStates]:
    """Make hidden states (n_token, width) of zeros for each name.

    They are in memory if all fit into `limit` bytes, else in files of `folder`.

    Raises:
        CalibrationError: the disk of `folder` has no room for the files.
    """
    size = len(names) * n_token * width * 4
    if size <= limit:
        return [torch.zeros(n_token, width, device="cpu") for _ in names]
    if (free := shutil.disk_usage(folder).free) < size:
        raise CalibrationError(
            f"{folder}: {free:,} bytes are free, but the hidden states of {n_token:,} tokens need {size:,}; "
            "allow more --calibration-memory, take fewer --calibration-tokens, or write to another disk"
        )
    return [RowsOnDisk(folder / f"{name}.f32", n_token, width) for name in names]
