"""The commands and the Python code of README and tutorial, run as they are printed.

A block marked `console` is run line by line, and all `python` blocks of a page run in one namespace. A tiny checkpoint
stands in for the model of the pages, except in the tests marked `real`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from script_modules import ROOT
from smollm2 import smollm2_folder

from moe2gguf.cli import cli

MODEL = "SmolLM2-135M-Instruct"
PAGES = ["README.md", "docs/tutorial/folder.md", "docs/tutorial/gguf.md", "docs/tutorial/python.md"]
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

GetModel = Callable[[Path], object]


def run_page(page: str, get_model: GetModel, done: list[list[str]] | None = None) -> None:
    """Run all blocks of a page in this folder, in order, but commands that are `done`; raises what fails."""
    done = [] if done is None else done
    if not done:
        Path("SECURITY.md").symlink_to(ROOT / "SECURITY.md")  # the pages stand in a clone, and take a text from it
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, body in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(body, page, "exec"), names)
        else:
            for command in commands(body):
                if command not in done:
                    run_command(command, get_model)
                    done.append(command)


def commands(body: str) -> Iterator[list[str]]:
    """The arguments of every command of a `console` block; each line starts with `$ ` and has nothing of a shell."""
    for line in body.replace("\\\n", " ").splitlines():
        assert line.startswith("$ "), f"not a command: {line}"
        assert not set("|;&<>*$`") & set(line[2:]), f"needs a shell: {line}"
        yield shlex.split(line[2:])


def run_command(command: list[str], get_model: GetModel) -> None:
    """Run one command in this process, and see that the files it names exist afterwards."""
    match command:
        case ["moe2gguf", *arguments]:
            cli.main(args=arguments, prog_name="moe2gguf", standalone_mode=False)
        case ["python", "scripts/smollm2", folder]:
            get_model(Path(folder))
        case _:
            pytest.fail(f"the pages run only moe2gguf and scripts/smollm2, not {shlex.join(command)}")
    missing = [
        name for name in command if name.endswith((".gguf", ".html", ".svg", ".csv")) and not Path(name).is_file()
    ]
    assert [] == missing


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with half of SmolLM2's neurons per MLP, so that the same experts and types fit."""
    return checkpoints.make(
        tmp_path_factory.mktemp("tiny") / MODEL,
        "llama-tied",
        hidden_size=32,
        intermediate_size=768,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    )


@pytest.mark.parametrize("page", PAGES)
def test_runs_on_a_tiny_model(
    page: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command and every line of Python of the page works, in order, and makes the files it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))

    run_page(page, lambda folder: shutil.copytree(tiny_model, folder))

    assert (tmp_path / MODEL / "config.json").is_file()
    assert capsys.readouterr().out


@pytest.mark.real
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pages", [PAGES[:2], PAGES[2:3], PAGES[3:]], ids=",".join)
def test_runs_on_the_real_model(pages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with SmolLM2-135M-Instruct, as scripts/smollm2 makes it; what two pages have in common, once."""
    smollm2_folder()  # skips the test where the model cannot be had
    script, environment = [sys.executable, str(ROOT / "scripts" / "smollm2")], dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))  # not the journal of another run

    done: list[list[str]] = []
    for page in pages:
        run_page(page, lambda folder: subprocess.run([*script, str(folder)], env=environment, check=True), done)

    assert (tmp_path / MODEL / "config.json").is_file()


def test_refuses_what_it_cannot_run() -> None:
    """A line that is no command, and one that needs a shell, are errors of the page."""
    assert [["moe2gguf", "run", "a b"]] == list(commands('$ moe2gguf \\\n  run "a b"\n'))
    with pytest.raises(AssertionError, match="not a command: output"):
        list(commands("$ true\noutput\n"))
    with pytest.raises(AssertionError, match="needs a shell"):
        list(commands("$ true | false\n"))
