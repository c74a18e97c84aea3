"""Generated text: known in advance, whole characters only, and honest about its end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import tiny_gguf
from tiny_gguf import EOS, FIRST_BYTE

from moe2gguf.errors import HarnessError
from moe2gguf.llama.generate import Speed, generate

STORY = "é中🙂"  # no byte occurs twice, so each byte token has one successor
A = tiny_gguf.vocabulary()[0].index("a")


def byte_token(byte: int) -> int:
    return FIRST_BYTE + byte


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that continues "a" with STORY and the end of the text; "b" leads into half a character, then the end."""
    b = tiny_gguf.vocabulary()[0].index("b")
    path = [A, *map(byte_token, STORY.encode()), EOS]
    successors = dict(pairwise(path))
    successors |= {b: byte_token(0xE9), byte_token(0xE9): EOS}
    return tiny_gguf.write_gguf(
        tmp_path_factory.mktemp("tiny") / "story.gguf", tiny_gguf.chain_weights(successors), n_context=256
    )


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4, router_seed=3)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "sliced.gguf", weights)


def test_text_is_the_models_and_characters_are_whole(story: Path) -> None:
    """Nine byte tokens arrive as three characters, one each, and the end-of-text token stops."""
    generation = generate(story, "a", n_token=50, threads=1)
    assert list(generation) == list(STORY)
    assert generation.speed is not None
    assert (generation.speed.n_prompt, generation.speed.n_generated) == (2, 10)
    assert generation.speed.stopped == "end of text"
    assert generation.speed.prompt_speed > 0
    assert generation.speed.generation_speed > 0


def test_one_start_of_text(story: Path) -> None:
    """A prompt that begins with it, as chat templates write, does not get another one."""
    generation = generate(story, "<s>a", n_token=50, threads=1)
    assert list(generation) == list(STORY)
    assert generation.speed is not None
    assert generation.speed.n_prompt == 2


def test_no_end_of_text_behind_a_prompt(story: Path, tmp_path: Path) -> None:
    """A file with add_eos_token (models of embeddings, some fine-tunes) goes on with the prompt, as others do."""
    with_eos = set_flag(story, tmp_path / "eos.gguf", "tokenizer.ggml.add_eos_token")

    generation = generate(with_eos, "a", n_token=50, threads=1)

    assert list(generation) == list(STORY)
    assert generation.speed is not None
    assert generation.speed.n_prompt == 2


def set_flag(path: Path, out: Path, key: str) -> Path:
    """A copy of a GGUF file with a flag set to true."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], kind)
    writer.add_bool(key, True)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_half_a_character_is_replaced_at_the_end(story: Path) -> None:
    """A character that the model never finishes becomes the replacement character, not an error."""
    assert list(generate(story, "b", threads=1)) == ["\N{REPLACEMENT CHARACTER}"]


def test_token_limit(story: Path) -> None:
    """n_token bounds the tokens; what they spell so far is returned."""
    generation = generate(story, "a", n_token=3, threads=1)
    assert "".join(generation) == "é\N{REPLACEMENT CHARACTER}"
    assert isinstance(generation.speed, Speed)
    assert (generation.speed.n_generated, generation.speed.stopped) == (3, "token limit")


def test_temperature_zero_is_deterministic_and_experts_matter(sliced: Path) -> None:
    """The most likely text is the same in every run, and another one with fewer experts."""
    texts = ["".join(generate(sliced, "the man", n_token=24, n_expert_used=k, threads=1)) for k in (4, 4, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_seeds_choose_the_text(sliced: Path) -> None:
    """At a temperature the seed decides, and the same seed gives the same text."""
    texts = ["".join(generate(sliced, "the", n_token=24, temperature=5.0, seed=s, threads=1)) for s in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_stopping_early(story: Path) -> None:
    """A reader may stop in the middle."""
    generation = generate(story, "a", threads=1)
    assert next(generation) == "é"
    generation.close()
    assert list(generation) == []
    assert generation.speed is None


@pytest.mark.parametrize(
    ("n_token", "temperature", "seed"), [(0, 0.0, 0), (1, -1.0, 0), (1, float("nan"), 0), (1, 1.0, -1)]
)
def test_numbers_out_of_range(story: Path, n_token: int, temperature: float, seed: int) -> None:
    """Numbers out of range are refused at once, with what is needed."""
    with pytest.raises(HarnessError, match="needed are at least 1 token"):
        generate(story, "a", n_token=n_token, temperature=temperature, seed=seed)


def test_text_beyond_the_context(story: Path) -> None:
    """Prompt and text must fit the context of the model."""
    with pytest.raises(HarnessError, match="a prompt of 2 tokens and 300 more exceed the model's context of 256"):
        list(generate(story, "a", n_token=300))


def test_bad_expert_count(sliced: Path) -> None:
    """An expert count out of range is an error in words, not a crash."""
    with pytest.raises(HarnessError, match="has 4 experts, 5 cannot be used"):
        list(generate(sliced, "a", n_expert_used=5))


def test_gpu_without_a_gpu_build(story: Path) -> None:
    """Asking for a GPU that the installed llama.cpp cannot use names the command that installs one."""
    from llama_cpp import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp can use a GPU")
    with pytest.raises(HarnessError, match=r"run vendor/install cuda\|vulkan\|metal \(see vendor/README.md\)"):
        list(generate(story, "a", device="gpu"))
