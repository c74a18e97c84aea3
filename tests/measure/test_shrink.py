"""moe2gguf.measure.shrink: one wish, and the file that meets it, from a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from command import moe2gguf
from gguf import GGUFReader

from moe2gguf import CompareSettings, Options, ShrinkSettings, TypeOptions, Wish, compare, convert, shrink
from moe2gguf.errors import HarnessError, PlanError
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.measure.bench import Bench, BenchRow, Timing
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.shrink import find_last
from moe2gguf.measure.speed import Run, summarize_runs

SETTINGS = ShrinkSettings(n_token=64, types=("q8_0", "q4_0"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in F16 whose experts fit blocks of 32."""
    return checkpoints.make(
        tmp_path_factory.mktemp("shrink") / "model",
        dtype="float16",
        hidden_size=32,
        intermediate_size=512,
        num_hidden_layers=1,
    )


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the bytes that are read decide the speed, and nothing else."""

    def time_grid(grid: Sequence[RunConfig], base: RunConfig, timing: Timing) -> Bench:
        rows = []
        for one in (base, *grid):
            speed = summarize_runs([Run(1.0, 1e9 / one.active_bytes, 1.0, 1.0, 1)])
            rows.append(BenchRow(one, replace(speed, ratio=base.active_bytes / one.active_bytes)))
        assert timing.repeat
        return Bench(tuple(rows), 1e9, {}, {})

    monkeypatch.setattr("moe2gguf.measure.trials.time_grid", time_grid)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
def test_the_last_that_passes_is_found(n: int) -> None:
    """Wherever it is, and None where none does; few are asked."""
    asked: list[int] = []

    def passes(i: int) -> bool:
        asked.append(i)
        return i < n

    assert (n - 1 if n else None) == find_last(range(8), passes)
    assert len(asked) <= 4


def test_a_room_holds_the_file_and_its_cache(model: Path, tmp_path: Path) -> None:
    """As many bytes as are there, in the types that lose least; nothing else is left. The speed is really measured."""
    out = tmp_path / "small.gguf"
    cache = 64 * 2 * 2 * 16  # tokens, keys and values, bytes, heads of keys times their width

    done = moe2gguf("shrink", model, out, "--room", "80KB", "--context", 64, "--tokens", 64, "-t", 1, "--json")

    assert (0, ["small.gguf"]) == (done.returncode, [path.name for path in tmp_path.iterdir()])
    found = json.loads(done.stdout)
    assert cache == found["cache"]
    assert 0.9 * (80_000 - cache) < out.stat().st_size <= 80_000 - cache
    assert len({tensor.tensor_type for tensor in GGUFReader(out).tensors}) > 1
    assert found["chosen"]["speed"]["generation"]["median"] > 0
    name = f"{found['chosen']['config']['type']}, dense"
    steps = ["making dense.gguf", "making room-[0-9]+.gguf", f"chosen: {name}", f"{name}: scoring"]
    steps += [f"{name}: {found['chosen']['perplexity']['mean']:.3f} times the perplexity", f"{name}: timing, 5 runs .*"]
    steps += [f"{name}: {found['chosen']['speed']['ratio']:.2f} times the speed"]
    assert re.fullmatch("\n".join([*steps, "(warning: the machine is busy.*\n)?"]), done.stderr)
    assert 0.5 < found["chosen"]["perplexity"]["mean"] < 2


def test_a_large_room_needs_no_other_type(model: Path, tmp_path: Path, speeds: None) -> None:
    """A folder becomes its dense file; a GGUF file that fits is left as it is, and one that is quantized is refused."""
    convert(model, tmp_path / "dense.gguf", Options(dense=True))
    quantized = Options(dense=True, types=TypeOptions("q8_0", allow_fallback=True))
    convert(model, tmp_path / "q8.gguf", quantized)

    shrink(model, tmp_path / "out.gguf", Wish(room=10**9), SETTINGS)

    assert (tmp_path / "dense.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    for source, room, reason in (
        ("dense.gguf", 10**9, "fits already"),
        ("dense.gguf", 20_000, r"--room 20,000: less [\d,]+ bytes .* the file, but reachable are .*; give more, or"),
        ("dense.gguf", 1000, r"--room 1,000: the cache alone takes [\d,]+ bytes; give more, or a smaller --context"),
        ("q8.gguf", 30_000, "is quantized, and would lose twice: give the folder"),
    ):
        with pytest.raises(PlanError, match=reason):
            shrink(tmp_path / source, tmp_path / "no.gguf", Wish(room=room, n_context=64), SETTINGS)
    assert ["dense.gguf", "out.gguf", "q8.gguf"] == sorted(path.name for path in tmp_path.iterdir())


def test_the_largest_type_that_is_fast_enough_is_taken(model: Path, tmp_path: Path, speeds: None) -> None:
    """Without cutting experts."""
    done = shrink(model, tmp_path / "out.gguf", Wish(faster=1.5), SETTINGS)

    assert (0, "Q8_0") == (done.chosen.config.n_expert, done.chosen.config.type)
    assert ["Q8_0"] == [one.config.type for one in done.trials]


def test_experts_are_cut_where_no_type_is_fast_enough(model: Path, tmp_path: Path, speeds: None) -> None:
    """The most of them that are; the count is in the file."""
    done = shrink(model, tmp_path / "out.gguf", Wish(faster=4.0), SETTINGS)

    file = read_gguf(tmp_path / "out.gguf")
    ratios = {one.config.n_expert_used: one.speed.ratio for one in done.trials if one.speed}
    chosen = done.chosen.config.n_expert_used
    assert ("glm4moe", chosen) == (file.metadata["general.architecture"], read_counts(file).n_used)
    assert ratios[chosen] >= 4  # type: ignore[operator]
    assert ratios[chosen + 1] < 4  # type: ignore[operator]
    with pytest.raises(PlanError, match=r"--faster 99: nothing here is so fast; Q4_0, 5 of 16 is \d"):
        shrink(model, tmp_path / "no.gguf", Wish(faster=99), SETTINGS)
    assert ["out.gguf"] == [path.name for path in tmp_path.iterdir()]


def test_a_quality_is_kept_with_the_fewest_bytes(model: Path, tmp_path: Path, speeds: None) -> None:
    """Those of the smallest type within it, and of the fewest experts; an independent comparison says the same."""
    dense = convert(model, tmp_path / "dense.gguf", Options(dense=True)).path

    done = shrink(dense, tmp_path / "out.gguf", Wish(quality=1.3), SETTINGS)

    assert done.chosen.perplexity
    assert done.chosen.perplexity.mean <= 1.3
    within = [one.config.active_bytes for one in done.trials if one.perplexity and one.perplexity.mean <= 1.3]
    assert min(within) == done.chosen.config.active_bytes
    assert done.chosen.config.n_expert > 0
    assert "the last fifth of moe2gguf texts 1" == done.text
    calibrated = read_gguf(done.path).metadata["moe2gguf.calibration.text"]
    assert "the first four fifths of moe2gguf texts 1.txt" == calibrated

    settings = CompareSettings(n_token=64, n_context=128, journal=tmp_path / "rows.jsonl")
    (row,) = compare([done.path], dense, settings=settings).rows
    assert done.chosen.config.n_expert_used == row.config.n_expert_used


@pytest.mark.parametrize(("tokens", "interval"), [(16, "(one window, so there is no interval)"), (0, " to ")])
def test_an_interval_needs_windows(tokens: int, interval: str, model: Path, tmp_path: Path, speeds: None) -> None:
    """Of one there is none; 0 tokens are the whole fifth."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(200)))

    done = moe2gguf("shrink", model, tmp_path / "out.gguf", "--room", "1GB", "--text", text, "--tokens", tokens)

    assert 0 == done.returncode, done.stderr
    assert interval in next(line for line in done.stdout.splitlines() if line.startswith("perplexity: "))
    assert done.stdout.count("the last fifth of text.txt") == 1


def test_what_cannot_be_cut_has_types(tmp_path: Path, speeds: None) -> None:
    """A model that the graph cannot carry; the reason is told."""
    model, steps = checkpoints.make(tmp_path / "model", "llama-bias"), list[str]()

    done = shrink(model, tmp_path / "out.gguf", Wish(quality=5.0), SETTINGS, on_step=steps.append)

    assert (0, "Q4_0") == (done.chosen.config.n_expert, done.chosen.config.type)
    said = "no experts are tried, which `moe2gguf convert` refuses: --target glm4moe: its graph has no bias of the"
    assert said in done.notes[0]
    assert ["making dense.gguf", done.notes[0]] == steps[:2]


def test_rotary_factors_are_carried(tmp_path: Path, speeds: None) -> None:
    """LLaMA 3.1's are, in the graph that has them."""
    model = checkpoints.make(tmp_path / "model", "llama3-rope", dtype="float16", hidden_size=32, intermediate_size=512)

    done = shrink(model, tmp_path / "out.gguf", Wish(quality=50.0), SETTINGS)

    assert done.chosen.config.n_expert
    assert GGUFReader(done.path).fields["general.architecture"].contents() == "step35"


@pytest.mark.parametrize("wish", [Wish(room=100_000), Wish(quality=2.0)])
def test_a_text_that_is_too_short_to_score_leaves_nothing(wish: Wish, model: Path, tmp_path: Path) -> None:
    """It is known before a file is made."""
    (tmp_path / "text.txt").write_text("Hardly a word.")

    with pytest.raises(HarnessError, match="tokens of text, this one has"):
        shrink(model, tmp_path / "out.gguf", wish, ShrinkSettings(text=tmp_path / "text.txt"))

    assert ["text.txt"] == [path.name for path in tmp_path.iterdir()]


def test_a_short_text_leaves_types(model: Path, tmp_path: Path, speeds: None) -> None:
    """Too few tokens to fit experts to are enough to choose a type."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(200)))

    done = shrink(model, tmp_path / "out.gguf", Wish(quality=5.0), replace(SETTINGS, text=tmp_path / "text.txt"))

    assert (0, "Q4_0") == (done.chosen.config.n_expert, done.chosen.config.type)
    said = "no experts are tried, which `moe2gguf convert` refuses: the first four fifths of text.txt: too few tokens"
    assert said in done.notes[0]
    nothing = replace(SETTINGS, text=tmp_path / "text.txt", types=("f16",))
    with pytest.raises(PlanError, match=r"--faster 9: nothing here is so fast\n.*too few tokens"):
        shrink(model, tmp_path / "no.gguf", Wish(faster=9.0), nothing)


def test_an_interrupted_call_goes_on(model: Path, tmp_path: Path, speeds: None, monkeypatch: Any) -> None:
    """What was made is not made again."""
    out, made = tmp_path / "out.gguf", list[str]()

    def count(source: Path, out: Path, *arguments: Any, **more: Any) -> Any:
        made.append(out.name)
        return convert(source, out, *arguments, **more)

    def stop(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe2gguf.measure.shrink.convert", count)
    with monkeypatch.context() as patched:
        patched.setattr("moe2gguf.measure.trials.Trials.score", stop)
        with pytest.raises(KeyboardInterrupt, match=r"out\.gguf\.work keeps"):
            shrink(model, out, Wish(quality=1.01), SETTINGS)

    shrink(model, out, Wish(quality=1.01), SETTINGS)

    assert 1 == made.count("dense.gguf")
    assert ["out.gguf"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give one wish: --faster, --room or --quality"),
        (["--faster", 2, "--quality", 1.1], 2, "give one wish"),
        (["--faster", 1], 2, "not in the range"),
        (["--quality", "nan"], 2, "not a finite number"),
        (["--quality", 1.1, "--types", "q9_0"], 1, "type q9_0: unknown"),
        (["--room", "1KB"], 1, "--room 1,000: the cache alone takes"),
        (["--quality", 1.1, "--context", 9], 1, "--context: no effect without --room"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(
    arguments: list[object], code: int, said: str, model: Path, tmp_path: Path
) -> None:
    """With what to do, and nothing left behind."""
    (tmp_path / "there.gguf").touch()
    out = "there.gguf" if "--context" in arguments else "out.gguf"

    done = moe2gguf("shrink", model, tmp_path / out, *arguments)

    assert (code, ["there.gguf"]) == (done.returncode, [path.name for path in tmp_path.iterdir()])
    assert said in done.stderr
