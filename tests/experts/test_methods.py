"""moe2gguf.experts.methods: one table for the command line, the docs and the report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe2gguf.experts import methods

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "fewer-experts.md"


@pytest.mark.parametrize("table", ["GROUPS", "ROUTERS", "AMPLIFICATIONS"])
def test_the_docs_have_every_method_with_its_source(table: str) -> None:
    """A row for each name; every link of the table is somewhere on the page."""
    text = PAGE.read_text(encoding="utf-8")

    for name, words in getattr(methods, table).items():
        assert f"| `{name}` |" in text
        assert [] == [link for link in re.findall(r"https://[^\s,)]+", words) if link not in text]
