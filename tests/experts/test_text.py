"""moe2gguf.experts.text: what may calibrate, and the windows made of it."""

import re
import subprocess
import tracemalloc
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tiny_tokenizers import byte_level_bpe, sentencepiece_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.text import EMBEDDED, read_sample, read_text, tokenize_windows


def test_the_embedded_text_needs_no_file() -> None:
    """It is part of the package, long enough for 65k tokens of most tokenizers, and every part of it has all kinds."""
    text = read_text(None)

    assert EMBEDDED == text.label
    assert len(text.text) > 300_000
    assert text.digest == read_text(None).digest
    assert "\n%\n" not in text.text
    files = list((resources.files("moe2gguf.experts") / "texts").iterdir())
    assert len(files) == 8
    for file in files:
        documents = file.read_text(encoding="utf-8").strip().split("\n%\n")
        places = [text.text.index(document) / len(text.text) for document in documents]
        assert places == sorted(places)
        assert places[0] < 0.06
        assert places[-1] > 0.9
        assert max(np.diff(places)) < 0.12


def test_plain_text_and_jsonl_are_the_same_text(tmp_path: Path) -> None:
    """The label is the file's name, never its path."""
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "x": 1}\n\n{"text": "two"}\n')

    plain, lines = read_text(tmp_path / "a.txt"), read_text(tmp_path / "b.jsonl")

    assert plain.text == lines.text
    assert ("a.txt", "b.jsonl") == (plain.label, lines.label)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"caf\xe9", "not readable as UTF-8"),
        ("a.txt", "word".encode("utf-16"), "it is UTF-16 or"),
        ("a.txt", "word".encode("utf-32"), "or UTF-32"),
        ("a.txt", "word".encode("utf-16-be"), "it has zero bytes"),
        ("a.jsonl", b'{"text": "x"}\n{oops', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": 5}', 'line 1 is not an object with a "text"'),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_unusable_text_is_a_clear_error(tmp_path: Path, name: str, content: Any, words: str) -> None:
    """Named, with the line where there is one."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(CalibrationError, match=words):
        read_text(tmp_path / name)


def test_of_a_part_of_a_text_nothing_is_half(tmp_path: Path) -> None:
    """No byte order mark, no half character, no half JSON line; a file that is shorter is whole."""
    (tmp_path / "a.txt").write_text("\ufeffweiß\r\nä", encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "one\\ud800\u2028"}\n{"text": "two"}\n')

    assert ["weiß\nä", "wei", "weiß"] == [read_text(tmp_path / "a.txt", n).text for n in (None, 7, 8)]
    assert ["one?\u2028", "one?\u2028\n\ntwo"] == [read_text(tmp_path / "b.jsonl", n).text for n in (30, 300)]
    with pytest.raises(CalibrationError, match="is a folder; expected a file"):
        read_text(tmp_path)


def test_a_line_that_is_longer_than_what_is_read_is_refused(tmp_path: Path) -> None:
    """It is no broken JSON; nothing behind what is read is."""
    (tmp_path / "x.jsonl").write_text('{"text": "' + "words " * 100 + '"}\n')

    with pytest.raises(CalibrationError, match=r"x.jsonl: line 1 is longer than 500 bytes; cut it into shorter ones"):
        read_text(tmp_path / "x.jsonl", 500)

    (tmp_path / "x.jsonl").write_text('{"text": "short"}\n{"text": "' + "words " * 1_000_000 + '"}\n')
    with pytest.raises(CalibrationError, match=r"x.jsonl: a line is longer than 2,097,152 bytes; cut it into"):
        read_sample(tmp_path / "x.jsonl", 1000)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_of_a_huge_file_pieces_from_all_over_are_read(tmp_path: Path, name: str) -> None:
    """In their order, from the first line to the last tenth, without half characters or lines, in little memory."""
    path = tmp_path / name
    lines = (f"ö {i} {40 * 'ü'}" for i in range(320_000))
    path.write_text("".join(f'{{"text": "{line}"}}\n' if name == "x.jsonl" else f"{line}\n" for line in lines))
    assert path.stat().st_size > 20e6
    tracemalloc.start()

    text = read_sample(path, 1000)

    assert tracemalloc.get_traced_memory()[1] < 15e6
    tracemalloc.stop()
    found = [int(line.split()[1]) for line in text.text.split("\n") if re.fullmatch(r"ö \d+ ü{40}", line)]
    assert found == sorted(set(found))
    assert (0, 64) == (found[0], len({i // 5_000 for i in found}))
    assert 1e6 < len(text.text.encode()) < 2.1e6
    assert set(text.text) <= set("0123456789 öü\n")


def test_a_file_that_is_not_much_larger_than_needed_is_whole(tmp_path: Path) -> None:
    """The more tokens, the more is read of it; of a pipe the start."""
    path = tmp_path / "x.txt"
    path.write_text("word " * 600_000)

    assert len(read_sample(path, 100_000).text) == 3_000_000
    assert len(read_sample(path, 50_000).text) < 2_200_000
    assert read_sample(None, 5) == read_text(None)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert len(read_sample(Path(f"/dev/fd/{process.stdout.fileno()}"), 1000).text) == 1 << 21


def test_of_a_part_the_line_is_named_by_its_start(tmp_path: Path) -> None:
    """Its number would be that of another one."""
    (tmp_path / "x.jsonl").write_text('{"text": "some words"}\n' * 100_000 + '{"txt": 5}\n' * 100)

    with pytest.raises(CalibrationError, match=r"x.jsonl: the line '{\"txt\": 5}'... is not an object with a"):
        read_sample(tmp_path / "x.jsonl", 5)


@pytest.mark.parametrize("bos", [None, 1])
def test_windows_are_the_tokenizers_ids(tmp_path: Path, bos: int | None) -> None:
    """Spread over the text, each as a prompt of its own: transformers' ids, after BOS where the model wants one."""
    byte_level_bpe(tmp_path)
    text = read_text(None)

    ids = tokenize_windows(tmp_path, text, 640, 64, bos)

    assert ((10, 64), np.int64) == (ids.shape, ids.dtype)
    expected = AutoTokenizer.from_pretrained(tmp_path)(text.text[:4000], add_special_tokens=False).input_ids
    begin = 0 if bos is None else 1
    assert expected[: 64 - begin] == ids[0, begin:].tolist()
    assert bos is None or [bos] * 10 == ids[:, 0].tolist()
    assert 10 == len({tuple(row) for row in ids.tolist()})


def test_a_folder_with_tokenizer_model_alone(tmp_path: Path) -> None:
    """sentencepiece's ids, as LLaMA 1 and 2 ship them."""
    sentencepiece_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    text = read_text(None)

    ids = tokenize_windows(tmp_path, text, 640, 64, 1)

    expected = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text.text[:4000])
    assert [1, *expected[:63]] == ids[0].tolist()


def test_a_window_of_the_first_token_alone(tmp_path: Path) -> None:
    """A context of 1 in a hostile file."""
    byte_level_bpe(tmp_path)

    with pytest.raises(CalibrationError, match=r"a context of 1 tokens.*leaves no room"):
        tokenize_windows(tmp_path, read_text(None), 1024, 1, 0)


def test_a_tokenizer_json_that_cuts_texts_gives_all_windows(tmp_path: Path) -> None:
    """As transformers does, unless it is asked to."""
    byte_level_bpe(tmp_path)
    text = read_text(None)
    expected = tokenize_windows(tmp_path, text, 640, 64, None)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=100)
    tokenizer.enable_padding(length=1000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    assert expected.tolist() == tokenize_windows(tmp_path, text, 640, 64, None).tolist()


def test_too_little_text(tmp_path: Path) -> None:
    """Two windows at least; the message says how much there is and how much is needed."""
    byte_level_bpe(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")

    with pytest.raises(CalibrationError, match="too few to calibrate"):
        tokenize_windows(tmp_path, read_text(tmp_path / "short.txt"), 1024, 512, None)
