"""The functions of the package itself: one for every command, and paths that may be strings."""

from __future__ import annotations

import inspect as introspection
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from script_modules import ROOT

import moe2gguf
from moe2gguf.cli import cli

FUNCTIONS = {
    "chat": "Chat",
    "expert-usage": "measure_expert_usage",
    "imatrix": "collect_imatrix",
    "run": "generate",
    "serve-help": "list_ways",
    "set-used": "set_used",
    "views": "write_views",
}
"""Commands whose function has another name."""

NO_FUNCTION = {"completion"}


@pytest.mark.parametrize("command", sorted(set(cli.commands) - NO_FUNCTION))
def test_every_command_is_a_function(command: str) -> None:
    """It is exported under the command's name, or that of the table above."""
    name = FUNCTIONS.get(command, command.replace("-", "_"))

    assert name in moe2gguf.__all__
    assert callable(getattr(moe2gguf, name))


@pytest.mark.parametrize("name", [name for name in moe2gguf.__all__ if name[0].islower() or name == "Chat"])
def test_paths_may_be_strings(name: str) -> None:
    """Every parameter that takes a path takes a string too."""
    function: Callable[..., Any] = getattr(moe2gguf, name)
    parameters = introspection.signature(function).parameters
    texts = {key: str(one.annotation).replace("pathlib.", "") for key, one in parameters.items()}

    assert {} == {key: text for key, text in texts.items() if "Path" in text.replace("str | Path", "")}


def test_the_reference_has_every_name() -> None:
    """What is exported is documented."""
    page = (ROOT / "docs" / "reference" / "python.md").read_text()

    assert set(moe2gguf.__all__) == set(re.findall(r"^::: moe2gguf\.(\w+)$", page, re.MULTILINE))


def test_strings_are_paths(tmp_path: Path) -> None:
    """On files: whatever reads, writes and changes one."""
    dense, sliced = str(tmp_path / "dense.gguf"), str(tmp_path / "sliced.gguf")
    weights = tiny_gguf.dense_weights()
    tiny_gguf.write_gguf(Path(dense), weights)
    tiny_gguf.write_gguf(Path(sliced), tiny_gguf.sliced_weights(weights, 4))

    assert not moe2gguf.verify(sliced).problems
    assert 4 == typing.cast(Any, moe2gguf.inspect(sliced).experts).count
    moe2gguf.set_used(sliced, 2)
    assert 2 == moe2gguf.read_gguf(sliced).metadata["llama.expert_used_count"]
    moe2gguf.set_used(sliced, 4)
    settings = moe2gguf.CompareSettings(n_token=64, n_context=32, resume=False, journal=tmp_path / "rows")
    found = moe2gguf.compare([sliced], dense, settings=settings)
    assert ["ok"] == [row.status for row in found.rows]
    assert 4 == moe2gguf.measure_expert_usage(sliced, n_token=32, n_context=32).config.n_expert
    timing = moe2gguf.Timing(n_prompt=8, n_generate=4, repeat=1)
    assert 2 == len(moe2gguf.bench([sliced], reference=dense, timing=timing).rows)
    text = tmp_path / "text.txt"
    text.write_text("A text of some words. " * 200)
    moe2gguf.collect_imatrix(dense, f"{dense}.imatrix", str(text), n_token=64, n_context=32)
    options = moe2gguf.TypeOptions("q8_0", imatrix=f"{dense}.imatrix")  # type: ignore[arg-type]
    assert options.files == [Path(f"{dense}.imatrix")]
