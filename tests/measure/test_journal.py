"""The journal of finished rows: kept through crashes, and never trusted further than it can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe2gguf.errors import HarnessError
from moe2gguf.measure.journal import Journal, key


def test_rows_come_back(tmp_path: Path) -> None:
    """In the same process and in the next; the folder is made."""
    path = tmp_path / "new" / "journal.jsonl"
    first = Journal(path)
    first.put("a", {"kl": 0.1, "name": "é"})
    first.put("b", {"kl": None})
    assert {"kl": 0.1, "name": "é"} == first.get("a") == Journal(path).get("a")
    assert (None, {"kl": None}) == (Journal(path).get("c"), Journal(path).get("b"))


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    """A row measured again replaces the old one."""
    journal = Journal(tmp_path / "j")
    journal.put("a", {"n": 1})
    journal.put("a", {"n": 2})
    assert {"n": 2} == Journal(tmp_path / "j").get("a")


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    """A line cut by a kill, other formats and plain nonsense lose only themselves, also for what is written next."""
    path = tmp_path / "j"
    journal = Journal(path)
    journal.put("a", {"n": 1})
    lines = ['{"format": 2, "key": "b", "row": {}}', "[1]", "no json", '{"format": 1, "key": 3, "row": {}}', "\x00"]
    path.write_text(path.read_text() + "\n".join(lines) + '\n{"format": 1, "key": "c", "ro')
    again = Journal(path)
    again.put("d", {"n": 4})
    last = Journal(path)
    assert [{"n": 1}, None, None, {"n": 4}] == [last.get(name) for name in "abcd"]


def test_a_journal_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    """It names the file."""
    with pytest.raises(HarnessError, match="name another file"):
        Journal(tmp_path).get("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="name another file"):
        Journal(tmp_path / "file" / "j").put("a", {})


def test_keys_differ_where_anything_differs() -> None:
    """Values and names count, order does not."""
    assert key(a=1, b="x") == key(b="x", a=1)
    assert len({key(a=1), key(a=2), key(b=1), key(a="1"), key(a=None)}) == 5
