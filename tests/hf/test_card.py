"""moe2gguf.hf.card: how a model gets its name, whatever is known of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe2gguf.hf.card import read_card
from moe2gguf.spec import Metadata

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def card(folder: Path, name: str | None = None, **values: object) -> tuple[Metadata, list[str]]:
    """The keys and the warnings for a folder that need not hold a model."""
    folder.mkdir(parents=True, exist_ok=True)
    warnings: list[str] = []
    return read_card(folder, values, {}, name, warnings), warnings


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("SmolLM2-135M-Instruct", "SmolLM2 135M Instruct"),
        (f"models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/{COMMIT}", "SmolLM2 135M Instruct"),
        ("x/../Tiny-Chat", "Tiny Chat"),
        ("my model \udcff", "My Model"),
    ],
)
def test_a_folder_or_its_repository_gives_the_name(tmp_path: Path, folder: str, name: str) -> None:
    """Where neither the card nor config.json has one; a path in config.json is none."""
    (tmp_path / "x").mkdir()

    found, warnings = card(tmp_path / folder, _name_or_path="/home/me/secret")

    assert (name, []) == (found["general.name"], warnings)
    assert "secret" not in str(found)


def test_the_name_of_the_config_and_of_the_card_come_first(tmp_path: Path) -> None:
    """In this order: the user's, the card's, config.json's, the folder's."""
    folder = tmp_path / "Folder"
    assert "From Config" == card(folder, _name_or_path="org/From-Config")[0]["general.name"]

    (folder / "README.md").write_text("---\nmodel_name: From Card\n---\n")

    assert "From Card" == card(folder, _name_or_path="org/From-Config")[0]["general.name"]
    assert "Mine" == card(folder, "Mine", _name_or_path="org/From-Config")[0]["general.name"]


@pytest.mark.parametrize(
    "front", ["license: [a", "- a\n- b", "words", "x: &a [*a]", "version: 2020-13-45", "license: !!python/name:os x"]
)
def test_a_broken_front_matter_stops_nothing(tmp_path: Path, front: str) -> None:
    """A warning names the file, and the rest is found as without it."""
    expected, _ = card(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")

    found, (warning,) = card(tmp_path)

    assert expected == found
    assert f"{tmp_path / 'README.md'} is skipped: its front matter is " in warning


@pytest.mark.parametrize("folder", ["Phi-3-mini", "phi3-mini", "org--phi3-mini"])
def test_a_found_name_never_changes_how_llama_cpp_reads_tokens(tmp_path: Path, folder: str) -> None:
    """ "phi3" and "phi-3" do, in any name; one that the user gives so is used with a warning."""
    found, warnings = card(tmp_path / folder)

    assert "Phi 3 Mini" in str(found["general.name"])
    assert [] == warnings
    found, warnings = card(tmp_path / folder, "my-phi3")
    assert "my-phi3" == found["general.name"]
    assert ["the name 'my-phi3' makes llama.cpp drop"] == [text.split(" the spaces")[0] for text in warnings]
