"""Roles of tokens come from the first file that states them; what an encoder adds, llama.cpp adds."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors

from moe2gguf.hf.tokenizer.special_tokens import Surroundings, find_special_ids, find_surroundings, place_added

IDS = {"<s>": 1, "</s>": 2, "<unk>": 0, "<pad>": 3, "<eot>": 4, "<PRE>": 5}


@pytest.mark.parametrize(
    ("by_text", "by_id", "expected"),
    [
        ([{"bos_token": "<s>"}], [{"bos_token_id": 4}], {"bos": 1}),
        ([{"bos_token": {"content": "<s>"}}], [], {"bos": 1}),
        ([{"bos_token": None}, {"bos_token": "<s>"}], [{"bos_token_id": 4}], {"bos": 1}),
        ([{"pad_token": "[not added]"}], [{"pad_token_id": 3}], {"pad": 3}),
        ([], [{"bos_token_id": None}, {"bos_token_id": 1}], {"bos": 1}),
        ([], [{"eos_token_id": [4, 2]}], {"eos": 4}),
        ([], [{"pad_token_id": -1, "eos_token_id": 10, "bos_token_id": True, "unk_token_id": "0"}], {}),
        ([{"prefix_token": "<PRE>", "eot_token": "<eot>"}], [], {"fim_pre": 5, "eot": 4}),
        ([{"bos_token": ["<s>"], "eos_token": 7}], [{"eos_token_id": []}], {}),
    ],
)
def test_first_file_that_states_a_role(by_text: list[Any], by_id: list[Any], expected: dict[str, int]) -> None:
    """Files that name tokens go before files that number them; what is no token of the embedding states nothing."""
    files = [dict(zip(("first.json", "second.json"), some, strict=False)) for some in (by_text, by_id)]
    assert expected == find_special_ids(IDS, 10, *files)


def encoder(single: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({**IDS, "a": 6}, []))
    tokenizer.add_special_tokens(list(IDS))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(IDS.items()))
    return tokenizer


@pytest.mark.parametrize(
    ("single", "before", "behind"),
    [
        ("$A", [], []),
        ("<s> $A", [1], []),
        ("$A </s>", [], [2]),
        ("<s> $A </s>", [1], [2]),
        ("<s> <pad> $A", [1, 3], []),
    ],
)
def test_watches_the_encoder(single: str, before: list[int], behind: list[int]) -> None:
    """What stands around an encoded text is found, whatever the post-processor is called."""
    assert find_surroundings(encoder(single)) == Surroundings(before, behind)


def test_text_must_survive() -> None:
    """A post-processor that drops the text is an error."""
    with pytest.raises(ValueError, match="post_processor"):
        find_surroundings(encoder("<s> </s>"))


@pytest.mark.parametrize(
    ("special", "around", "config", "expected", "flags"),
    [
        ({"bos": 1, "eos": 2}, ([1], []), {}, {"bos": 1, "eos": 2}, (True, False)),
        ({"bos": 1, "eos": 2}, ([], [2]), {}, {"bos": 1, "eos": 2}, (False, True)),
        ({"bos": 1, "eos": 2}, ([1], []), {"add_bos_token": False}, {"bos": 1, "eos": 2}, (False, False)),
        ({"bos": 1, "eos": 2}, ([1], []), {"add_eos_token": True}, {"bos": 1, "eos": 2}, (True, True)),
        ({"eos": 2}, ([], []), {"add_bos_token": True}, {"eos": 2}, (False, False)),
        ({"bos": 1, "eos": 2}, ([3], [4]), {}, {"bos": 3, "eos": 4, "eot": 2}, (True, True)),
        ({"eos": 2}, ([3], []), {"add_bos_token": None}, {"bos": 3, "eos": 2}, (True, False)),
    ],
)
def test_roles_of_added_tokens(
    special: dict[str, int],
    around: tuple[list[int], list[int]],
    config: dict[str, Any],
    expected: dict[str, int],
    flags: tuple[bool, bool],
) -> None:
    """The token an encoder adds takes the role that llama.cpp adds; an explicit wish of the config overrides."""
    found, given, problems = place_added(special, Surroundings(*around), config)
    assert found == expected
    assert (given["add_bos_token"], given["add_eos_token"]) == flags
    assert problems == []


def test_what_llama_cannot_add() -> None:
    """Two tokens before a text, and no end-of-text token at all, are problems."""
    _, _, problems = place_added({"bos": 1}, Surroundings([1, 3], []), {})
    assert ["adds only one bos" in problems[0], "eos_token" in problems[1]] == [True, True]
