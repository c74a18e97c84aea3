"""moe2gguf.experts.methods: one table for the command line, the docs and the report."""

from pathlib import Path

import pytest

from moe2gguf.experts import methods

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"


@pytest.mark.parametrize("table", ["GROUPS", "ROUTERS", "AMPLIFICATIONS", "CORRECTIONS"])
def test_the_docs_have_every_method_with_its_source(table):
    """Word for word."""
    text = PAGE.read_text(encoding="utf-8")

    for name, words in getattr(methods, table).items():
        assert f"| {name} | {words} |" in text
