"""The documentation against the program: options that exist, links that lead somewhere, a reference that is whole."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from script_modules import ROOT, load

from moe2gguf.cli import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
ELSEWHERE = {
    "llama.cpp": {"--cpu-moe", "--n-gpu-layers", "--override-kv", "--port", "--kl-divergence", "--models-preset"}
    | {"--n-cpu-ffn", "--spec-type", "--models-dir", "--context-shift", "--cache-reuse"},
    "llama-cpp-python": {"--kv"},  # --kv_overrides
    "dask": {"--nthreads"},
    "docker": {"--rm"},
    "mypy": {"--strict"},
    "scripts/bench": {"--long", "--no-peer", "--only", "--repeats", "--size-gb", "--vocabulary", "--windows"},
    "scripts/check": {"--coverage", "--fast"},
    "scripts/experiments": {"--d-ff", "--d-model", "--epochs", "--layers", "--model", "--repeat"},
    "scripts/release": {"--dry-run"},
}
"""Options of other programs that the pages name."""


def options() -> set[str]:
    """Every option of every command of moe2gguf."""
    commands = [cli, *cli.commands.values()]
    context = click.Context(cli)
    parameters = [one for command in commands for one in command.get_params(context) if isinstance(one, click.Option)]
    return {name for one in parameters for name in (*one.opts, *one.secondary_opts)} | {"--version"}


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """scripts/docs_hook.py as a module."""
    pytest.importorskip("griffe", reason="mkdocstrings is not installed")
    before = list(sys.path)
    try:
        return load("scripts/docs_hook.py")
    finally:
        sys.path[:] = before


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "log" not in p.parts], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_option_exists(page: Path) -> None:
    """A page names only options that a command has, or that another program has; the log may name what was removed."""
    known = options().union(*ELSEWHERE.values())

    assert set() == set(OPTION.findall(page.read_text(encoding="utf-8"))) - known


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "log" not in p.parts], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_command_line_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are those of its own command, with values that they take, and no argument is missing."""
    monkeypatch.setattr(click.Path, "convert", lambda _type, value, *_: value)  # the files are the reader's
    blocks = re.findall(
        r"^```(?:sh|bash|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        before, command, rest = line.partition("moe2gguf ")
        words = shlex.split(rest.partition("|")[0].partition(" > ")[0], comments=True)
        if command and words and (before in ("", "$ ") or before.endswith("| ")):
            cli.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_to_files(page: str) -> None:
    """Pages outside of docs/, which mkdocs does not check, link only to files that exist."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8").replace("\n", " "))

    assert [] == [target for target in targets if not (ROOT / target.strip()).exists()]


def test_readme_fits_in_150_lines() -> None:
    """README.md stays short enough to be read."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_reference_has_every_command_and_option(hook: ModuleType) -> None:
    """The generated reference has a section for each command and a row for each option, hidden ones included."""
    text = hook.on_page_markdown(f"before\n\n{hook.PLACE}\n")

    assert text.startswith("before\n\n## ")
    assert set(cli.commands) == set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    rows = "\n".join(re.findall(r"^\| <code>(.*?)</code>", text, re.MULTILINE))
    assert options() - {"--version"} == set(OPTION.findall(rows)) | set(re.findall(r"(?<![\w-])-[a-z](?![\w-])", rows))


def test_field_lists(hook: ModuleType) -> None:
    """Aligned fields of a docstring become list items, with their continuation lines, and nothing else changes."""
    lines = ["Options.", "", "used    how many", "        of them", "a, b  two", "Plain text  with a gap.", "", "End."]

    expected = ["Options.", "", "- `used`: how many", "        of them", "- `a, b`: two"]
    assert expected == list(hook.list_fields(lines))[:5]
    assert ["text", "", "- `used`: how many"] == list(hook.list_fields(["text", "used  how many"]))
