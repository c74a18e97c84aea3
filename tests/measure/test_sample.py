"""Text of a model's own making: the draw follows the softmax, texts side by side do not touch each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner
from tiny_gguf import EOS, FIRST_BYTE

from moe2gguf import convert
from moe2gguf.cli import cli
from moe2gguf.errors import CheckpointError, HarnessError, OutputError
from moe2gguf.experts.text import read_text
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.llama.sampling import Draw, draw_tokens, sample_texts
from moe2gguf.measure.sample import DENSE, sample_text

PIECES = [text.replace("▁", " ") for text in tiny_gguf.vocabulary()[0][FIRST_BYTE + 256 :]]
ENDING = "é"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every piece is followed by the two bytes of ENDING, and these by the end of the text."""
    first, second = (FIRST_BYTE + byte for byte in ENDING.encode())
    pieces = range(FIRST_BYTE + 256, len(tiny_gguf.vocabulary()[0]))
    weights = tiny_gguf.chain_weights({**dict.fromkeys(pieces, first), first: second, second: EOS}, d_model=1024)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "chain.gguf", weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "dense.gguf", tiny_gguf.dense_weights())


def test_texts_start_with_any_piece_and_end_where_the_model_ends_them(chain: Any) -> None:
    """Bytes make whole characters; tokens that are no text are neither drawn first nor counted."""
    found = list(sample_texts(chain, Draw(300, n_sequence=4, temperature=0.1), threads=1))
    whole, last = found[:-4], found[-4:]
    assert len(whole) >= 96
    assert {n for _, n in whole} == {3}
    assert all(text.endswith(ENDING) and text.removesuffix(ENDING) in PIECES for text, _ in whole)
    assert len({text for text, _ in whole}) > 20
    assert all(n <= 3 for _, n in last)
    assert 300 <= sum(n for _, n in found) < 300 + 4


@pytest.mark.parametrize(("n_token", "n_context"), [(60, 8), (120, 16), (700, 300)])
def test_a_text_that_does_not_end_is_as_long_as_the_context(model: Any, n_token: int, n_context: int) -> None:
    """BOS takes a place in it; the last texts are cut off. llama.cpp makes room for 256 tokens without being asked."""
    *whole, _, _ = sample_texts(model, Draw(n_token, n_context=n_context, n_sequence=2), threads=1)
    assert len(whole) >= 2
    assert max(n for _, n in whole) == n_context - 1


def test_the_seed_decides(model: Any) -> None:
    one, same, other = (list(sample_texts(model, Draw(60, n_sequence=3, seed=seed), threads=1)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def _side_by_side(path: Any, texts: Any) -> Any:
    """Logits of every position of three texts fed together; the second starts anew in between. In a child process."""
    with open_model(path, Setup(n_context=16, n_batch=3, n_sequence=3, n_threads=1)) as model:
        first = [model.step([text[i] for text in texts], [i] * 3).copy() for i in range(len(texts[0]))]
        model.forget(1)
        ends = [len(texts[0]), 0, len(texts[0])]
        return np.stack(first, 1), model.step([text[0] for text in texts], ends).copy()


def _alone(path: Any, tokens: Any) -> Any:
    with open_model(path, Setup(n_context=16, n_threads=1)) as model:
        return model.logits(np.array(tokens, np.int32))


def test_texts_side_by_side_have_the_logits_they_have_alone(model: Any) -> None:
    """Also where one is forgotten while the others go on."""
    texts = [[20 + 7 * i + 50 * j for i in range(5)] for j in range(3)]
    together, then = run_in_child(_side_by_side, model, texts)
    for j, text in enumerate(texts):
        tokens = [*text, text[0]]
        alone = run_in_child(_alone, model, tokens)
        assert together[j] == pytest.approx(alone[:5], abs=1e-4)
        assert then[j] == pytest.approx(alone[0 if j == 1 else 5], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_softmax(temperature: float) -> None:
    """60,000 draws: every share within five standard deviations."""
    logits = np.array([1.0, -2.0, 0.0, 2.5, -np.log(2)], np.float32)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    n = 60_000
    found = draw_tokens(np.broadcast_to(logits, (n, 5)), temperature, np.random.default_rng(0))
    shares = np.bincount(found, minlength=5) / n
    assert (abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_every_row_has_a_draw_of_its_own() -> None:
    logits = np.full((2, 50), -100, np.float32)
    logits[0, 7] = logits[1, 31] = 0
    assert draw_tokens(logits, 1.0, np.random.default_rng(0)).tolist() == [7, 31]


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(HarnessError, match="not finite"):
        draw_tokens(np.array([[0.0, np.nan]], np.float32), 1.0, np.random.default_rng(0))


def test_a_vocabulary_without_text_is_an_error(tmp_path: Path) -> None:
    path = tiny_gguf.write_gguf(tmp_path / "bytes.gguf", tiny_gguf.dense_weights())
    kinds = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.token_type"]
    for i in kinds.data:
        if kinds.parts[i][0] == gguf.TokenType.NORMAL:
            kinds.parts[i][0] = gguf.TokenType.UNUSED
    with pytest.raises(HarnessError, match="no token of plain text"):
        list(sample_texts(path, Draw(9), threads=1))


@pytest.mark.parametrize(
    "draw", [Draw(0), Draw(9, n_context=7), Draw(9, n_sequence=0), Draw(9, temperature=0.0), Draw(9, seed=-1)]
)
def test_numbers_out_of_range(model: Any, draw: Any) -> None:
    with pytest.raises(HarnessError, match="needed are at least"):
        list(sample_texts(model, draw))


def test_the_command_writes_a_text_that_calibration_reads(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "own.txt"
    command = ["sample", str(model), str(out), "--tokens", "80", "--parallel", "4", "--threads", "1"]
    done = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    drawn = list(sample_texts(model, Draw(80, n_sequence=4), threads=1))
    assert found == {"path": str(out), "texts": len(drawn), "tokens": sum(n for _, n in drawn)}
    assert read_text(out).text == "\n\n".join(text for text, _ in drawn)
    again = CliRunner().invoke(cli, command)
    assert isinstance(again.exception, OutputError)
    assert "--force" in str(again.exception)
    assert f"{len(drawn):,} texts" in CliRunner().invoke(cli, [*command, "--force"]).stdout


def test_a_folder_writes_what_its_dense_file_writes(tmp_path: Path) -> None:
    """And nothing but the text is left."""
    folder = checkpoints.make(tmp_path / "model")
    convert(folder, tmp_path / "dense.gguf", DENSE)
    before = sorted(tmp_path.iterdir())
    sample_text(folder, tmp_path / "own.txt", Draw(60), threads=1)
    drawn = sample_texts(tmp_path / "dense.gguf", Draw(60), threads=1)
    assert read_text(tmp_path / "own.txt").text == "\n\n".join(text for text, _ in drawn)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "own.txt"])


def test_a_folder_that_is_no_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        sample_text(tmp_path / "empty", tmp_path / "own.txt", Draw(60))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_broken_model_leaves_nothing_behind(tmp_path: Path) -> None:
    weights = tiny_gguf.dense_weights()
    weights["output.weight"][5] = np.nan
    broken = tiny_gguf.write_gguf(tmp_path / "broken.gguf", weights)
    with pytest.raises(HarnessError, match="not finite"):
        sample_text(broken, tmp_path / "own.txt", Draw(30), threads=1)
    assert list(tmp_path.iterdir()) == [broken]
