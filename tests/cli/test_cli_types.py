"""Values of the command line: sizes as people write them."""

from __future__ import annotations

from typing import Any

import click
import pytest

from moe2gguf.cli.options import Size


@pytest.mark.parametrize(
    ("text", "n"), [("2GB", 2 * 10**9), ("500M", 5 * 10**8), ("1.5GiB", 3 << 29), ("90 mb", 90 * 10**6), ("123", 123)]
)
def test_sizes_are_parsed(text: str, n: Any) -> None:
    """Decimal and binary units, upper and lower case."""
    assert Size().convert(text, None, None) == n


@pytest.mark.parametrize("text", ["", "GB", "-1G", "1e9", "2XB", "1.2.3M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """With an example of what is."""
    with pytest.raises(click.BadParameter, match="such as 500MB or 2GB"):
        Size().convert(text, None, None)
