"""scripts/release: when the texts of a release agree; and scripts/smoke, which tries what was installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from script_modules import ROOT, load

PYPROJECT = '[project]\nname = "moe2gguf"\nversion = "1.2.3"\n'
CITATION = 'cff-version: 1.2.0\ntitle: "moe2gguf"\nversion: 1.2.3  # of the newest release\n'
CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2027-02-28

### Added

- A thing.

## [1.2.2] - 2027-01-01
"""


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return load("scripts/release")


@pytest.mark.parametrize("name", ["release", "smoke"])
def test_help(name: str) -> None:
    """Both are executable and explain themselves without installing anything."""
    path = ROOT / "scripts" / name

    answer = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=False)

    assert os.access(path, os.X_OK)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("usage:")


def test_texts_that_agree(release: ModuleType) -> None:
    """Three files with the same version and a dated section are ready; a date of the citation may be there too."""
    assert release.disagreements(PYPROJECT, CITATION, CHANGELOG) == []
    assert release.disagreements(PYPROJECT, CITATION + 'date-released: "2027-02-28"\n', CHANGELOG) == []
    assert release.released(CHANGELOG, "1.2.3") == ("2027-02-28", [])


def test_every_disagreement_is_named(release: ModuleType) -> None:
    """All problems come at once, each with the file it is in."""
    citation = CITATION.replace("1.2.3", "1.2.2") + "date-released: 2027-03-01\n"
    changelog = CHANGELOG.replace("## [1.2.3]", "- Left over.\n\n## [1.3.0] - 2027-03-01\n\n## [1.2.3]")

    assert release.disagreements(PYPROJECT, citation, changelog) == [
        "CITATION.cff: version is 1.2.2, pyproject.toml has 1.2.3",
        "CHANGELOG.md: 1 entries still stand under [Unreleased]",
        "CHANGELOG.md: the newest section is 1.3.0, pyproject.toml has 1.2.3",
        "CITATION.cff: date-released is 2027-03-01, CHANGELOG.md has 2027-02-28",
    ]


@pytest.mark.parametrize("date", ["", " - YYYY-MM-DD", " - 2027-02-29", " - 28.02.2027", " - 20270228"])
def test_a_section_needs_a_real_date(release: ModuleType, date: str) -> None:
    """A missing date, a place for one, and a day that no calendar has, are no date."""
    changelog = CHANGELOG.replace(" - 2027-02-28", date)

    found = release.released(changelog, "1.2.3")

    assert found[0] is None
    assert found[1] == [f"CHANGELOG.md: the date of 1.2.3 is {date[3:] or None}, expected YYYY-MM-DD"]


def test_a_changelog_without_the_version(release: ModuleType) -> None:
    """A version without a section, and a changelog without a place for what comes next, are problems."""
    assert release.released(CHANGELOG, "1.2.4")[1] == ["CHANGELOG.md: no section ## [1.2.4] - YYYY-MM-DD"]
    assert release.released("# Changelog\n", "1.2.3")[1] == [
        "CHANGELOG.md: the first section must be [Unreleased]",
        "CHANGELOG.md: no section ## [1.2.3] - YYYY-MM-DD",
    ]


def test_a_version_that_is_none_and_a_citation_without_one(release: ModuleType) -> None:
    """X.Y.Z alone is released; a citation must name it."""
    assert release.disagreements(PYPROJECT.replace("1.2.3", "1.2.3rc1"), "cff-version: 1.2.0\n", CHANGELOG) == [
        "pyproject.toml: version '1.2.3rc1' is not X.Y.Z",
        "CITATION.cff: version is None, pyproject.toml has 1.2.3rc1",
        "CHANGELOG.md: no section ## [1.2.3rc1] - YYYY-MM-DD",
    ]


def test_our_own_files_agree(release: ModuleType) -> None:
    """Between releases too, only the changelog may be unfinished."""
    texts = [(ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")]

    found = release.disagreements(*texts)

    assert [line for line in found if not line.startswith("CHANGELOG.md:")] == []
    assert "CHANGELOG.md: the first section must be [Unreleased]" not in found


def test_the_gate_is_skipped_in_dry_runs_only() -> None:
    """--skip-gate alone is refused before anything happens."""
    script = ROOT / "scripts" / "release"

    answer = subprocess.run([sys.executable, script, "--skip-gate"], capture_output=True, text=True, check=False)

    assert answer.returncode == 2
    assert "--skip-gate goes with --dry-run only" in answer.stderr


def test_a_tree_with_changes_is_not_clean(release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not committed and a tag that exists are named."""
    monkeypatch.setattr(release, "ROOT", tmp_path)
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "-m", "x"], ["tag", "v1"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)

    assert release.git_problems("v2") == []
    (tmp_path / "new.txt").touch()
    assert release.git_problems("v1") == [
        "git: the tree is not clean: 1 file(s), the first is new.txt",
        "git: the tag v1 exists already",
    ]
