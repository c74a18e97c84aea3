"""How long work tells what it has done."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with progress(stage, total_bytes) as advance:` gives the function that is told about bytes done."""


@contextlib.contextmanager
def silent(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress for nobody."""
    del stage, total
    yield lambda _: None
