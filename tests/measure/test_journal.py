"""The journal of finished measurements: kept through crashes, and never trusted further than it can be checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe2gguf.errors import OutputError
from moe2gguf.gguf.resume import Journal
from moe2gguf.measure.journal import MeasurementJournal, digest_parts


def test_facts_come_back(tmp_path: Path) -> None:
    """In the same process and in the next; the folder is made."""
    path = tmp_path / "new" / "journal.jsonl"
    first = Journal(path)
    first.record_facts("a", {"kl": 0.1, "name": "é"})
    first.record_facts("b", {"kl": None})
    assert {"kl": 0.1, "name": "é"} == first.find_facts("a") == Journal(path).find_facts("a")
    assert (None, {"kl": None}) == (Journal(path).find_facts("c"), Journal(path).find_facts("b"))


def test_the_last_facts_of_a_name_count(tmp_path: Path) -> None:
    """A row measured again replaces the old one."""
    journal = Journal(tmp_path / "j")
    journal.record_facts("a", {"n": 1})
    journal.record_facts("a", {"n": 2})
    assert {"n": 2} == Journal(tmp_path / "j").find_facts("a")


def test_torn_foreign_and_changed_lines_are_passed_over(tmp_path: Path) -> None:
    """A line cut by a kill, other forms, nonsense and an edited row lose only themselves, also for what comes next."""
    path = tmp_path / "j"
    journal = Journal(path)
    journal.record_facts("a", {"n": 1})
    journal.record_facts("e", {"n": 5})
    lines = ['{"format": 2, "key": "b", "row": {}}', "[1]", "no json", '{"piece": 3, "xxh3": "", "facts": {}}', "\x00"]
    text = path.read_text().replace('{"n": 5}', '{"n": 6}')
    path.write_text(text + "\n".join(["", *lines]) + '\n{"piece": "c", "fac')
    again = Journal(path)
    again.record_facts("d", {"n": 4})
    last = Journal(path)
    assert [{"n": 1}, None, None, {"n": 4}, None] == [last.find_facts(name) for name in "abcde"]


def test_a_journal_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    """It names the file."""
    with pytest.raises(OutputError, match=r"cannot be read .*; choose another place"):
        Journal(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"j: cannot be .*; choose another place"):
        Journal(tmp_path / "file" / "j").record_facts("a", {})


@pytest.mark.parametrize("text", ["notes\n", '{"architectures": []}', "\n[1]\n"])
def test_a_file_that_is_no_journal_is_not_continued(tmp_path: Path, text: str) -> None:
    """It keeps its bytes; an empty file, and one that a kill has torn in its first line, are journals."""
    path = tmp_path / "j"
    for own in ("", "\n", '\n{"pie'):
        path.write_text(own)
        Journal(path).require_own()

    path.write_text(text)
    with pytest.raises(OutputError, match="is no journal of moe2gguf; choose another name"):
        MeasurementJournal(path, {})

    assert text == path.read_text()


def test_keys_differ_where_anything_differs() -> None:
    """Values and names count, order does not."""
    assert digest_parts(a=1, b="x") == digest_parts(b="x", a=1)
    assert (
        len({digest_parts(a=1), digest_parts(a=2), digest_parts(b=1), digest_parts(a="1"), digest_parts(a=None)}) == 5
    )
