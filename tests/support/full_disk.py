"""A disk that is full, for this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

resource = pytest.importorskip("resource")


@contextmanager
def limit_files(n_byte: int) -> Iterator[None]:
    """No file of this process grows over `n_byte` bytes, which it meets as it would meet a full disk.

    Python writes no compiled modules meanwhile, for it would not notice that they are cut.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "dont_write_bytecode", True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_byte, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
