"""scripts/bench_front.py: the options it gives to `convert`, and the table it prints."""

import sys
from pathlib import Path

import pytest

from moe2gguf.cli import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_every_slicing_s_options_are_those_of_the_command(tmp_path: Path) -> None:
    """`moe2gguf convert` takes each of them, and no two make files of one name."""
    import bench_front as bench

    for one in bench.SLICINGS:
        words = [word.format(n=16, half=8, k=12, fixed=11) for word in one.options]
        context = cli.commands["convert"].make_context("convert", [str(tmp_path), str(tmp_path / "out"), *words])
        assert context.params["target"] == ("mixtral" if one.per_count else "glm4moe")
    assert len({one.name for one in bench.SLICINGS}) == len(bench.SLICINGS) == 10


def test_two_texts_are_mixed_in_equal_pieces() -> None:
    """As much of each, in turn, from the beginning to near the end of both."""
    import bench_front as bench

    short, long = "".join(f"{i:09d} " for i in range(1200)), "x" * 50_000

    pieces = list(bench.interleave(short, long))

    assert pieces[1::2] == ["x" * 4000 + "\n"] * 3
    assert [piece[:9] for piece in pieces[::2]] == ["000000000", "000000400", "000000800"]


def test_the_mixed_text_is_made_once(tmp_path: Path) -> None:
    """A stopped conversion goes on only with the same file."""
    import bench_front as bench

    text = tmp_path / "text.txt"
    text.write_text("A line of text.\n" * 1000)
    words = [str(tmp_path), "--text", str(text), "--other", str(text), "--work", str(tmp_path / "work")]
    front = bench.Front(bench.parse(words), Path(sys.executable))

    front.cut_texts()
    made = (front.work / "both-first.txt").stat()
    front.cut_texts()

    assert made.st_size > 2 * bench.PIECE
    assert (front.work / "both-first.txt").stat().st_mtime_ns == made.st_mtime_ns


def test_the_table_is_in_the_order_of_the_divergence() -> None:
    """Quality on both texts over the reference's, speed where it was timed, and below what was measured."""
    import bench_front as bench

    def row(file: str, used: int, kl: float, base: object = None) -> dict[str, object]:
        summary = {"perplexity": 30.0, "perplexity_base": 20.0, "kl_mean": kl, "kl_error": 0.0, "top1": 0.9}
        spreads = {"prompt": {"median": 130.0}, "generation": {"median": 12.0}}
        config = {
            "path": f"{file}.gguf",
            "n_expert": 16 if used else 0,
            "n_expert_used": used,
            "file_size": 10**7,
        }
        measured = {**config, "quality": {"summary": summary}, "speed": spreads if base else None}
        return bench.flat(measured, base)  # type: ignore[arg-type]  # only what is read is there

    base = {"prompt": {"median": 100.0}, "generation": {"median": 10.0}}
    prose, code = ([row("sliced", 8, kl, own), row("dense-q8_0", 0, kl / 2)] for kl, own in ((0.4, base), (0.6, None)))
    settings = {"tokens": 2048}
    about = {"model": "m", "machine": {"processor": "cpu", "cores": 2}, "settings": settings, "windows": 2}

    lines = bench.report({**about, "rows": {"prose": prose, "code": code}}).splitlines()

    assert lines[3] == "| dense-q8_0 | 10 | 1.500 | 0.2000 | 90.0% | 1.500 | 0.3000 | 90.0% |  |  |"
    assert lines[4] == "| sliced 8/16 | 10 | 1.500 | 0.4000 | 90.0% | 1.500 | 0.6000 | 90.0% | 1.30 | 1.20 |"
    assert "Calibrated on 2,048 tokens, scored on 510 tokens of each text; cpu, 2 cores." in lines[-1]
