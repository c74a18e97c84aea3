"""An interrupt or error after a file has its name: the message says that it is there, and what was not done."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import tiny_gguf
from command import moe2gguf

from moe2gguf.cli import Terminated
from moe2gguf.errors import HarnessError, PlanError

HF, MOE, DENSE, OUT, PAGE, ROWS, KEPT = "HF", "MOE", "DENSE", "OUT", "PAGE", "ROWS", "KEPT"
CALIBRATED = f"convert {HF} {OUT} --experts 4 --used 2 --calibration-tokens 1024 --check auto --report {PAGE}"
COMPARED = f"compare {MOE} --reference {DENSE} --tokens 20 --context 16 --csv {ROWS} --report {PAGE}"
CASES = {
    "check": (
        CALIBRATED,
        "measure.check.compare_with_dense",
        f"{OUT}, --report {PAGE} were written; not done: --check",
    ),
    "page": (CALIBRATED, "measure.report.page.write_whole", f"{OUT} was written; not done: --report {PAGE}, --check"),
    "folder": (f"convert {HF} {OUT} --experts 4 --format hf", "cli.tables_convert.print_folder", f"{OUT} was written"),
    "shards": (
        f"quantize {DENSE} {OUT} q8_0 --shard-size 40KB",
        "cli.tables_convert.print_quantization",
        f"{OUT} was written",
    ),
    "routers": (
        f"merge {DENSE} {DENSE} {DENSE} {OUT} --router random",
        "recipes.merge.score_routers",
        f"{OUT} was written; not done: the table of its routers",
    ),
    "rows": (
        f"{COMPARED} --journal {KEPT}",
        "measure.report.page.write_page",
        f"{KEPT} keeps what is finished (2 pieces); the same command goes on there; --csv {ROWS} was written; "
        f"not done: --report {PAGE}",
    ),
    "table": (
        f"compare {MOE} --reference {DENSE} --tokens 20 --context 16 --journal {KEPT}",
        "cli.tables_compare.comparison",
        f"{KEPT} keeps what is finished (2 pieces); the same command goes on there",
    ),
}
"""A command line, what is interrupted, and what is said."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What stands for the words in capitals."""
    folder = tmp_path_factory.mktemp("interrupts")
    dense = tiny_gguf.dense_weights(n_layer=1)
    return {
        HF: checkpoints.make(folder / "hf", num_hidden_layers=1),
        MOE: tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(dense, 4)),
        DENSE: tiny_gguf.write_gguf(folder / "dense.gguf", dense),
    }


@pytest.fixture
def words(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """With the outputs."""
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    return {
        **files,
        OUT: tmp_path / "out",
        PAGE: tmp_path / "page.html",
        ROWS: tmp_path / "rows.csv",
        KEPT: tmp_path / "kept",
    }


def run(line: str, words: dict[str, Path]) -> tuple[int, str]:
    """Exit code and the last line of standard error."""
    done = moe2gguf(*(words.get(word, word) for word in line.split()))
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


def fill_in(text: str, words: dict[str, Path]) -> str:
    """The text with paths in place of the words in capitals."""
    for word, path in words.items():
        text = text.replace(word, str(path))
    return text


def stop(monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Raise the error where this function of the package is called."""

    def fail(*_: object, **__: object) -> None:
        raise error("stopped")

    monkeypatch.setattr(f"moe2gguf.{place}", fail)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_named_with_what_is_not_done(
    case: str, words: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a set of shards, a folder, a table, a page."""
    line, place, said = CASES[case]
    stop(monkeypatch, place)

    assert (130, f"moe2gguf: interrupted; {fill_in(said, words)}") == run(line, words)


@pytest.mark.parametrize(
    ("error", "code", "said"), [(Terminated, 143, "interrupted"), (HarnessError, 1, "stopped")], ids=["kill", "error"]
)
def test_a_kill_and_an_error_name_it_too(
    error: type[BaseException], code: int, said: str, words: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As does Ctrl-C."""
    line, place, written = CASES["check"]
    stop(monkeypatch, place, error)

    assert (code, f"moe2gguf: {said}; {fill_in(written, words)}") == run(line, words)


def test_a_list_of_problems_ends_with_a_line_of_what_is_written(
    words: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in its last item."""
    line, place, written = CASES["check"]
    monkeypatch.setattr(f"moe2gguf.{place}", lambda *_, **__: list_problems())

    assert (1, fill_in(written, words)) == run(line, words)


def list_problems() -> None:
    """Raise an error with several lines."""
    raise PlanError(["one", "two"])


@pytest.mark.parametrize("kind", ["file", "shards", "folder"])
def test_an_earlier_file_is_not_taken_for_a_new_one(
    kind: str, words: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said of what --force would have replaced."""
    line = f"convert {HF} {OUT} --experts 4" if kind == "file" else CASES[kind][0]
    place = "hf_output.write_hf_folder" if kind == "folder" else f"{line.split()[0]}.write_model"
    assert 0 == run(line, words)[0]
    stop(monkeypatch, f"recipes.{place}")

    assert (130, "moe2gguf: interrupted; no unfinished file was kept") == run(f"{line} --force", words)


def test_where_no_file_is_written_none_is_spoken_of(words: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is interrupted is just that."""
    stop(monkeypatch, "llama.generate.generate")

    assert (130, "moe2gguf: interrupted") == run(f"run {DENSE} hello", words)


def test_a_new_file_in_place_of_an_earlier_one_is_named(
    words: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same name and the same bytes."""
    line, place, said = CASES["shards"]
    assert 0 == run(line, words)[0]
    stop(monkeypatch, place)

    assert (130, f"moe2gguf: interrupted; {fill_in(said, words)}") == run(f"{line} --force", words)


def test_a_defect_is_not_taken_for_an_interrupt(words: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As is an end of input, which a broken installation gives: it keeps its traceback."""
    stop(monkeypatch, "recipes.convert.write_model", EOFError)

    with pytest.raises(EOFError):
        run(f"convert {HF} {OUT} --experts 4", words)


def test_a_folder_that_is_not_complete_is_not_said_to_be_written(
    words: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a publication may be there, and the folder is continued."""
    stop(monkeypatch, "measure.publish.compare")

    code, said = run(f"publish {HF} {OUT} --experts 4 --types q8_0 --tokens 20 --context 16", words)

    assert 130 == code
    assert said.endswith("out.work keeps what is finished (3 pieces); the same command goes on there")
