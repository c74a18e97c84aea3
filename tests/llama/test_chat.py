"""A conversation: what is said, remembered, computed again, stopped and refused."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import checkpoints
import pytest
import tiny_gguf
from flat_options import flat_options
from tiny_gguf import EOS, FIRST_BYTE

from moe2gguf import convert
from moe2gguf.errors import HarnessError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.llama.chat import Chat
from moe2gguf.llama.generate import generate
from moe2gguf.llama.serving import make_presets
from moe2gguf.llama.templates import read_template

STORY = "é中🙂"
LETTERS = tiny_gguf.vocabulary()[0].index("a")
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
"""A template that only joins."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on from "a" with STORY and the end, and from "z" with z without end."""
    path = [LETTERS, *(FIRST_BYTE + byte for byte in STORY.encode()), EOS]
    weights = tiny_gguf.chain_weights(dict(pairwise(path)) | {LETTERS + 25: LETTERS + 25})
    strings = {"tokenizer.chat_template": PLAIN}
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "story.gguf", weights, n_context=64, strings=strings)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, made for two of them."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4, router_seed=3)
    strings = {"tokenizer.chat_template": PLAIN, "moe2gguf.slicing.amplify": "used"}
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "moe.gguf", weights, n_expert_used=2, strings=strings)


def test_turns_are_remembered_and_not_computed_again(story: Path) -> None:
    """The second prompt holds the first turn; only what is new is computed."""
    with Chat(story, threads=1) as talk:
        first = talk.say("a")
        assert "".join(first) == STORY
        second = talk.say("a")
        assert "".join(second) == STORY
        talk.clear()
        third = talk.say("a")
        assert list(third) == list(STORY)
    speeds = [one.speed for one in (first, second, third)]
    assert [2, 1, 1] == [speed and speed.n_prompt for speed in speeds]  # BOS and a, then a alone
    assert {"end of text"} == {speed.stopped for speed in speeds if speed}


def test_an_answer_can_be_stopped(story: Path) -> None:
    """It keeps what has arrived, and the conversation goes on."""
    with Chat(story, threads=1) as talk:
        answer = talk.say("z")
        assert [next(answer), next(answer)] == ["z", "z"]
        answer.stop()
        assert list(answer) == []
        assert answer.speed is not None
        assert (answer.speed.stopped, answer.speed.n_generated) == ("interrupted", 2)
        assert "".join(talk.say("a")) == STORY


def test_the_context_ends_an_answer_and_then_the_conversation(story: Path) -> None:
    """An answer takes the room that is left; without any, the message says what to do, and a new start works."""
    with Chat(story, threads=1, n_context=12) as talk:
        answer = talk.say("z")
        assert "".join(answer) == "z" * 10
        assert answer.speed is not None
        assert answer.speed.stopped == "token limit"
        with pytest.raises(HarnessError, match=r"a text of 13 tokens fills the context of 12: begin a new one"):
            list(talk.say("a"))
        talk.clear()
        assert "".join(talk.say("a")) == STORY


def test_raw_goes_on_with_the_text(story: Path) -> None:
    """No template, as in a file of a base model."""
    with Chat(story, threads=1, raw=True) as talk:
        assert "".join(talk.say("a")) == STORY


def test_the_number_of_experts_changes_in_mid_talk(sliced: Path) -> None:
    """The answer is what this number gives elsewhere; a note tells of counts that the file was not made for."""
    two, four = ("".join(generate(sliced, "the man", n_token=12, n_expert_used=k, threads=1)) for k in (2, 4))
    assert two != four
    with Chat(sliced, threads=1, n_token=12) as talk:
        assert "".join(talk.say("the man")) == two
        assert (talk.n_expert_used, talk.note) == (2, "")
        talk.clear()
        talk.use(4)
        assert "".join(talk.say("the man")) == four
        assert "with 4 it answers worse" in talk.note
    with Chat(sliced, threads=1, n_token=12, n_expert_used=4) as talk:
        assert "".join(talk.say("the man")) == four


def test_a_graph_with_a_shared_expert_counts_it_too(tmp_path: Path) -> None:
    """As every option does: of six experts, two of them shared, three to six can be used; presets say one to four."""
    options = flat_options(6, target="glm4moe", n_shared=2, preset="exact")
    path = convert(checkpoints.make(tmp_path / "hf"), tmp_path / "moe.gguf", options).path
    prompt = "Hello world"
    with Chat(path, threads=1, n_token=8) as talk:
        assert (talk.n_expert, talk.n_expert_used, talk.note) == (6, 6, "")
        talk.use(3)
        said = "".join(talk.say(prompt))
        with pytest.raises(HarnessError, match=r"moe\.gguf has 6 experts: choose 3 to 6"):
            talk.use(2)
    template = read_template(read_gguf(path))
    assert template is not None
    whole = template.render([{"role": "user", "content": prompt}])
    template.close()
    assert said == "".join(generate(path, whole, n_token=8, n_expert_used=3, threads=1))
    counts = re.findall(r"glm4moe\.expert_used_count=int:(\d)", make_presets(read_gguf(path)))
    assert ["4", "2", "1"] == counts


def test_what_cannot_be_is_refused(story: Path, sliced: Path, tmp_path: Path) -> None:
    """A dense file has no count, a count has a limit, a base model no template; the talk goes on."""
    with Chat(story, threads=1) as talk:
        with pytest.raises(HarnessError, match="is dense: it has no experts to choose from"):
            talk.use(2)
        assert "".join(talk.say("a")) == STORY
    with Chat(sliced) as talk, pytest.raises(HarnessError, match=r"moe\.gguf has 4 experts: choose 1 to 4"):
        talk.use(5)
    plain = tiny_gguf.write_gguf(tmp_path / "base.gguf", tiny_gguf.dense_weights())
    with pytest.raises(HarnessError, match=r"base\.gguf: has no chat template.*`moe2gguf run`, or --raw"):
        Chat(plain)
    with pytest.raises(HarnessError, match="needed are at least 1 token"):
        Chat(story, temperature=-1.0)
