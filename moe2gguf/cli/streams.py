"""Standard output and error that may be full, closed, or unable to show a character."""

import io
import os
import sys
from typing import BinaryIO, TextIO

from moe2gguf.errors import Moe2GgufError


class StreamError(Moe2GgufError):
    """Standard output cannot be written."""


class ReaderGoneError(StreamError):
    """Whoever read standard output wanted no more of it, as `head` does."""


class StandardOutput(io.TextIOWrapper):
    """Standard output: a failed write is a `StreamError`, and what its encoding cannot show is replaced."""

    def write(self, text: str) -> int:
        """Write a text. Raises StreamError."""
        try:
            return super().write(text)
        except OSError as error:
            raise self._fail(error) from error

    def flush(self) -> None:
        """Write what is left. Raises StreamError."""
        try:
            super().flush()
        except OSError as error:
            raise self._fail(error) from error

    def _fail(self, error: OSError) -> StreamError:
        """The error to raise. The rest of the output goes nowhere, so that closing the stream fails no second time."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        kind = ReaderGoneError if isinstance(error, BrokenPipeError) else StreamError
        return kind(f"standard output cannot be written: {error.strerror}")


class StandardError(io.TextIOWrapper):
    """Standard error: there is no place left to tell of a failed write."""

    def write(self, text: str) -> int:
        """Write a text if that is possible."""
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Write what is left if that is possible."""
        try:
            super().flush()
        except OSError:
            return


def prepare_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr`, what `sys.stdin` cannot decode, and one that was closed by an empty one.

    Where a program is started without the descriptors 0 to 2, the next files it opens would get their numbers, and
    what llama.cpp prints would land in them: they are opened, standard output so that a write fails.
    """
    descriptor = os.open(os.devnull, os.O_RDONLY)
    while descriptor < 3:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 -- nothing to read, as long as we run
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sys.stdout = StandardOutput(*_open_stream(sys.stdout, 1), "replace", line_buffering=os.isatty(1))
    sys.stderr = StandardError(*_open_stream(sys.stderr, 2), "backslashreplace", line_buffering=True)


def _open_stream(stream: TextIO | None, descriptor: int) -> tuple[BinaryIO, str]:
    """The bytes and the encoding of a standard stream; None is one that was closed."""
    if stream is None:
        return open(descriptor, "wb", closefd=False), "utf-8"
    encoding = stream.encoding
    return stream.detach(), encoding  # type: ignore[attr-defined]
