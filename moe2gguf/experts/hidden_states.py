"""One row of numbers per token, (n_token, width) float32: in memory, in a file, or computed when it is asked for.

Rows are read piece by piece (`chunks`), so that results do not depend on where they are kept. What is read belongs to
its owner: nobody changes it in place.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
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


class KeptRows:
    """Rows that are computed when they are read first, in pieces of `chunks`, and kept for the next readings.

    Pieces are kept up to `limit` bytes; the others are computed again at every reading, with the same result.
    """

    def __init__(self, rows: Rows, limit: int) -> None:
        self._rows, self._limit = rows, limit
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> Tensor:
        if part.start in self._kept and len(kept := self._kept[part.start]) == part.stop - part.start:
            return kept
        rows = self._rows[part]
        if part.start % CHUNK == 0 and part.start not in self._kept and self._limit >= rows.nbytes:
            self._kept[part.start] = rows
            self._limit -= rows.nbytes
        return rows


def sample_rows(rows: Rows, n_token: int) -> Rows:
    """Return at least `n_token` of the rows, at equal distances, or all where there are fewer than twice as many."""
    if (step := len(rows) // n_token) < 2:
        return rows
    sampled: Rows = torch.cat([rows[part][-part.start % step :: step] for part in chunks(len(rows))])
    return sampled


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


def allocate(n_token: Mapping[str, int], width: int, limit: int, folder: Path) -> list[HiddenStates]:
    """Make hidden states (n_token, width) of zeros for each name.

    They are in memory if all fit into `limit` bytes, else in files of `folder`.

    Raises:
        CalibrationError: the disk of `folder` has no room for the files.
    """
    size = sum(n_token.values()) * width * 4
    if size <= limit:
        return [torch.zeros(n, width, device="cpu") for n in n_token.values()]
    if (free := shutil.disk_usage(folder).free) < size:
        raise CalibrationError(
            f"{folder}: {free:,} bytes are free, but hidden states of {max(n_token.values()):,} tokens need {size:,}; "
            "take fewer --calibration-tokens, write to another disk, or allow more memory, as "
            "`moe2gguf convert --calibration-memory SIZE` does"
        )
    return [RowsOnDisk(folder / f"{name}.f32", n, width) for name, n in n_token.items()]
