"""One tensor of a GGUF file, read whole or in pieces of rows, as it is stored or as numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe2gguf.gguf import types
from moe2gguf.gguf.file import GGUFFile, TensorInfo

Array = NDArray[np.generic]
Seen = Callable[[memoryview], object]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the file: rows as they are stored, numbers or (block types) bytes."""

    file: GGUFFile
    info: TensorInfo

    @property
    def name(self) -> str:
        """As in the file."""
        return self.info.name

    @property
    def dtype(self) -> str:
        """The name of its type."""
        return self.info.type.name

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy order; of the numbers, also where they are stored as blocks."""
        return self.info.shape

    @property
    def block(self) -> int:
        """Elements that are stored together."""
        return types.block_size(self.info.type)

    def read(self, seen: Seen = lambda _: None) -> Array:
        """Read the whole tensor: an array of its shape, or for block types the blocks as uint8 (n_row, row_bytes).

        `seen` is given its bytes.

        Raises:
            GGUFError: the file became shorter.
        """
        array = self.file.read_tensor(self.info)
        seen(array.reshape(-1).view(np.uint8).data)
        return array

    def blocks(self, max_bytes: int, seen: Seen = lambda _: None) -> Iterator[Array]:
        """Read it in pieces of whole rows, at most about `max_bytes` each; use each before asking for the next."""
        width = self.shape[-1] if self.shape else 1
        row_bytes = max(self.info.row_bytes, 1)
        for piece in self.file.chunks(self.info, max(max_bytes // row_bytes, 1) * row_bytes):
            seen(piece.data)
            if self.info.type in types.FLOATS:
                yield piece.view(types.FLOATS[self.info.type]).reshape(-1, width)
            else:
                yield piece.reshape(-1, row_bytes)

    def decode(self, rows: Array) -> Array:
        """Rows as `read` and `blocks` give them, as numbers (n_row, width): float32 where they were blocks.

        Raises:
            HarnessError: the type needs llama.cpp, which is not installed or does not know it.
        """
        return rows if self.info.type in types.FLOATS else types.decode(rows.view(np.uint8), self.info.type)

    def read_numbers(self) -> Array:
        """Read the whole tensor as numbers, in its shape; errors as `read` and `decode`."""
        return self.decode(self.read()).reshape(self.shape)
