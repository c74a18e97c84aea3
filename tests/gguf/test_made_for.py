"""moe2gguf.gguf.made_for: which counts of experts a file serves, from its metadata."""

from __future__ import annotations

import pytest

from moe2gguf.gguf.made_for import read_made_for
from moe2gguf.spec import MetadataValue

USED: dict[str, MetadataValue] = {"llama.expert_used_count": 8}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("moe2gguf.slicing.amplify", "used", "amplified for 8 of them"),
        ("moe2gguf.slicing.refit", True, "refitted for 8 of them"),
    ],
)
def test_another_count_is_named_once_with_the_reason(key: str, value: MetadataValue, words: str) -> None:
    """More experts are worse too, which nobody expects; its own count says nothing."""
    made_for = read_made_for(USED | {key: value})
    assert made_for is not None
    assert words in made_for.reason
    assert made_for.note("a.gguf", [16, 8, 4, 16]).startswith("in a.gguf ")
    assert made_for.note("a.gguf", [16, 8, 4, 16]).endswith("; with 16 or 4 it answers worse, even where that is more")
    assert "" == made_for.note("a.gguf", [8])


def test_a_router_of_zeros_serves_all_experts_only() -> None:
    """It cannot choose: fewer are an arbitrary choice, whatever the file says; a healed router chooses."""
    zero: dict[str, MetadataValue] = {"moe2gguf.slicing.router": "zero", "llama.expert_count": 8}
    made_for = read_made_for({"llama.expert_used_count": 4} | zero)
    assert made_for is not None
    assert made_for.note("a.gguf", [8, 4, 9, 0]).endswith("among the 8 experts; with 4 it answers worse")
    assert read_made_for(USED | zero | {"moe2gguf.slicing.router": "least-squares"}) is None
    assert read_made_for(USED | zero | {"moe2gguf.heal.used_min": 4, "moe2gguf.heal.used_max": 8}) is None


def test_healed_files_serve_the_range_they_were_healed_for() -> None:
    """Counts of that range are no others."""
    keys: dict[str, MetadataValue] = {"moe2gguf.slicing.refit": True, "moe2gguf.heal.used_min": 4}
    made_for = read_made_for(USED | keys | {"moe2gguf.heal.used_max": 12})
    assert made_for is not None
    assert ("", True) == (made_for.note("a", [4, 12]), "with 3 it" in made_for.note("a", [4, 3]))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"llama.block_count": 2},
        USED,
        USED | {"moe2gguf.slicing.amplify": "any", "moe2gguf.slicing.refit": False},
        {"glm4moe.expert_used_count": 8, "moe2gguf.slicing.expert_used_count": 8, "moe2gguf.slicing.refit": True},
    ],
)
def test_files_that_serve_every_count_say_nothing(metadata: dict[str, MetadataValue]) -> None:
    """Dense files, foreign ones, those made to be exact or for any count, and graphs without normalised weights."""
    assert read_made_for(metadata) is None
