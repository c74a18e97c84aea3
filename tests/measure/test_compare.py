"""The sweep as a whole, on tiny files in llama.cpp: right numbers, reasons for what fails, nothing measured twice."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner
from llama_logits import llama_logits
from sweeps import CONTEXT, N_WINDOW, TEXT, settings
from textbook import textbook_summary, textbook_token

from moe2gguf.cli import cli
from moe2gguf.cli.tables_compare import comparison, write_csv
from moe2gguf.errors import CalibrationError, HarnessError, OutputError
from moe2gguf.experts.text import EMBEDDED, Text
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.resume import Interrupted
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import DEVICES
from moe2gguf.measure import compare as recipe
from moe2gguf.measure.bench import Timing
from moe2gguf.measure.compare import compare, make_settings
from moe2gguf.measure.drafts import DraftGain, DraftGains
from moe2gguf.measure.grid import list_notes
from moe2gguf.measure.metrics import TAIL, as_json
from moe2gguf.measure.report.compare import summarize
from moe2gguf.measure.results import Comparison, ResultRow, describe_drafts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights()
    sliced = tiny_gguf.sliced_weights(dense, 4)
    poisoned = {name: array.copy() for name, array in sliced.items()}
    poisoned["output.weight"][200] = np.nan
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "moe": tiny_gguf.write_gguf(folder / "moe.gguf", sliced),
        "poisoned": tiny_gguf.write_gguf(folder / "poisoned.gguf", poisoned),
        "other_words": tiny_gguf.write_gguf(folder / "other.gguf", sliced, texts={259: "hte"}),
    }


@pytest.fixture(scope="module")
def swept(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The sweep most tests look at: k = 4, 2, and 9, which cannot run, then three files with one fault each."""
    folder = tmp_path_factory.mktemp("sweep")
    wanted = [files["moe"], files["poisoned"], files["other_words"]]
    return compare(wanted, files["dense"], used=[4, 2, 9], settings=settings(folder))


def test_every_combination_has_a_row_and_failures_their_reason(swept: Comparison) -> None:
    """What cannot run is refused, what breaks fails, and the sweep goes on after both."""
    assert ["ok", "ok", "refused", "failed", "failed", "refused", "failed", "failed", "refused"] == [
        row.status for row in swept.rows
    ]
    assert not swept.ok
    assert "there are only 4" in swept.rows[2].reason
    assert f"{N_WINDOW * (CONTEXT // 2 - 1)} logits are NaN or infinite" == swept.rows[3].reason
    assert swept.rows[3].above_noise is None
    assert "different vocabularies" in swept.rows[6].reason


def test_numbers_are_those_of_the_textbook(swept: Comparison, files: dict[str, Path]) -> None:
    """From logits of llama.cpp, window by window, BOS first, the second half scored: every sum to 1e-6."""
    words = llama_tokens(files["dense"])
    tokens = []
    for i in range(N_WINDOW):
        window = [tiny_gguf.BOS, *words[i * CONTEXT + 1 : (i + 1) * CONTEXT]]
        base, other = llama_logits(files["dense"], window), llama_logits(files["moe"], window, 2)
        scored = range(CONTEXT // 2, CONTEXT - 1)
        tokens += [textbook_token(base[t], other[t], window[t + 1], TAIL) for t in scored]
    quality = swept.rows[1].quality
    assert quality is not None
    found = as_json(quality.summary)
    found |= {f"kl_percentiles.{name}": value for name, value in found.pop("kl_percentiles").items()}
    assert textbook_summary(tokens) == pytest.approx(found, rel=1e-6, abs=1e-7)
    per_window = np.mean(np.reshape([token["kl"] for token in tokens], (N_WINDOW, -1)), axis=1)
    assert per_window == pytest.approx(quality.window_kl, rel=1e-6)


def test_the_exact_count_is_noise_and_the_half_is_not(swept: Comparison) -> None:
    """k = n is the dense model as far as the noise floor can tell; k = n / 2 is another one, and they are different."""
    assert [False, True] == [row.above_noise for row in swept.rows[:2]]
    assert swept.noise is not None
    assert swept.noise.summary.kl_mean < swept.kl_limit
    (pair,) = swept.pairs
    assert ("moe.gguf k=4/4", "moe.gguf k=2/4", True) == (pair.first, pair.second, pair.different)
    assert pair.kl.low < pair.kl.mean < pair.kl.high < 0


def test_an_interrupted_sweep_goes_on_where_it_stopped(files: dict[str, Path], tmp_path: Path) -> None:
    """Rows that were finished come from the journal, the same to the last bit; only the others are measured."""

    def stop(_: ResultRow) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"journal.jsonl keeps what is finished \(2 pieces\)"):
        compare([files["moe"]], files["dense"], used=[4, 2], settings=settings(tmp_path), on_row=stop)
    with pytest.raises(Interrupted, match=r"journal.jsonl keeps what is finished \(2 pieces\)"):  # found, not measured
        compare([files["moe"]], files["dense"], used=[4], settings=settings(tmp_path), on_row=stop)
    again = compare([files["moe"]], files["dense"], used=[4, 2], settings=settings(tmp_path))
    third = compare([files["moe"]], files["dense"], used=[4, 2], settings=settings(tmp_path))
    assert [[True, False], [True, True]] == [[row.resumed for row in found.rows] for found in (again, third)]
    assert [row.quality for row in again.rows] == [row.quality for row in third.rows]
    assert again.pairs == third.pairs


def test_the_journal_is_not_used_for_anything_else(files: dict[str, Path], tmp_path: Path) -> None:
    """Another text, length or context, and --no-resume, are measured."""
    compare([files["moe"]], files["dense"], settings=settings(tmp_path))
    for change in ({"text": Text(TEXT + "the", "tan")}, {"n_token": 20}, {"n_context": 30}, {"resume": False}):
        found = compare([files["moe"]], files["dense"], settings=settings(tmp_path, **change))
        assert [False] == [row.resumed for row in found.rows], change


def test_a_run_that_takes_too_long_or_too_much_is_a_row(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time and memory limits end a run, and the reason says which."""
    compare([files["moe"]], files["dense"], settings=settings(tmp_path))  # the noise floor is in the journal now
    for limit, words in (({"timeout": 1e-3}, "no answer within 0.001 s"), ({"memory_limit": 2**20}, "1 MiB")):
        found = compare([files["moe"]], files["dense"], used=[3], settings=settings(tmp_path, **limit))
        assert "failed" == found.rows[0].status
        assert words in found.rows[0].reason


def test_little_room_keeps_the_bounds(files: dict[str, Path], tmp_path: Path, swept: Comparison) -> None:
    """With a compact reference the divergence of the full one is within the stated bounds."""
    room = N_WINDOW * (CONTEXT // 2 - 1) * (40 + 8 * 100)
    found = compare([files["moe"]], files["dense"], used=[2], settings=settings(tmp_path, room=room)).rows[0].quality
    full = swept.rows[1].quality
    assert found is not None
    assert full is not None
    slack = found.summary.kl_slack
    assert 0 < slack
    assert found.summary.kl_mean - 1e-9 <= full.summary.kl_mean <= found.summary.kl_mean + slack + 1e-9


def test_the_whole_text_is_whole_windows(files: dict[str, Path], tmp_path: Path) -> None:
    """n_token None scores every window the text fills."""
    found = compare([files["moe"]], files["dense"], settings=settings(tmp_path, n_token=None)).rows[0].quality
    assert found is not None
    assert len(llama_tokens(files["dense"])) // CONTEXT == len(found.window_kl)


def test_nothing_runs_for_a_device_that_is_not_there(files: dict[str, Path], tmp_path: Path) -> None:
    """The refusal comes before the first measurement."""
    with pytest.raises(HarnessError, match="no such device: tpu"):
        compare([files["moe"]], files["dense"], devices=["cpu", "tpu"], settings=settings(tmp_path))
    assert [] == list(tmp_path.iterdir())


def test_the_same_file_on_two_devices_is_compared_with_itself(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean KL and top-1 of the second against the first, over one window, by the textbook; once, then journaled."""
    monkeypatch.setitem(DEVICES, "cpu:f16-cache", {"kv_type": "f16"})
    asked = {"used": [4, 2], "devices": ["cpu", "cpu:f16-cache"], "settings": settings(tmp_path)}
    found = compare([files["moe"]], files["dense"], **asked)  # type: ignore[arg-type]
    assert [
        ("moe.gguf k=4/4", "moe.gguf k=4/4 cpu:f16-cache"),
        ("moe.gguf k=2/4", "moe.gguf k=2/4 cpu:f16-cache"),
    ] == [(pair.first, pair.second) for pair in found.agreements]

    window = [tiny_gguf.BOS, *llama_tokens(files["dense"])[1:CONTEXT]]
    base, other = llama_logits(files["moe"], window, 2), run_in_child(_f16_cache_logits, files["moe"], window)
    scored = range(CONTEXT // 2, CONTEXT - 1)
    tokens = [textbook_token(base[t], other[t], window[t + 1], TAIL) for t in scored]
    summary = found.agreements[1].quality.summary  # type: ignore[union-attr]
    assert summary.kl_mean > 0
    assert np.mean([token["kl"] for token in tokens]) == pytest.approx(summary.kl_mean, rel=1e-6)
    assert np.mean([token["same_top"] for token in tokens]) == pytest.approx(summary.top1)

    again = compare([files["moe"]], files["dense"], **asked)  # type: ignore[arg-type]
    assert found.agreements == again.agreements
    comparison(again)
    assert "moe.gguf k=2/4 cpu:f16-cache against moe.gguf k=2/4, first window: mean KL" in capsys.readouterr().out
    assert 2 == len(json.loads(json.dumps(again.to_dict(), allow_nan=False))["devices"])


def _f16_cache_logits(path: Path, tokens: list[int]) -> np.ndarray:
    from moe2gguf.llama.devices import Setup
    from moe2gguf.llama.model import open_model

    with open_model(path, Setup(n_expert_used=2, n_context=len(tokens), n_threads=1, kv_type="f16")) as model:
        return np.array(model.logits(np.array(tokens, np.int32)), np.float64)


def test_only_refused_rows_run_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    """No reference is computed; the refusals are the result, and it is not a success."""
    found = compare([files["moe"]], files["dense"], used=[7], settings=settings(tmp_path))
    assert (["refused"], None, False) == ([row.status for row in found.rows], found.noise, found.ok)


def test_a_refused_row_is_no_success(swept: Comparison) -> None:
    """Beside rows that ran: a script that asked for it has no figures. The table has those that there are."""
    for rows, ok in ((swept.rows[:3], False), (swept.rows[:2], True)):
        assert ok == replace(swept, rows=rows).ok


def test_json_csv_and_table_say_the_same(swept: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strict JSON; a CSV line and a table line for every row, failures with their reason."""
    values = json.loads(json.dumps(swept.to_dict(), allow_nan=False))
    assert values["rows"][1]["quality"]["summary"]["kl_mean"] == swept.rows[1].quality.summary.kl_mean  # type: ignore[union-attr]
    write_csv(swept, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [row.config.label for row in swept.rows] == [line["label"] for line in lines]
    assert math.isclose(float(lines[1]["kl_99%"]), swept.rows[1].quality.summary.kl_percentiles["99"])  # type: ignore[union-attr]
    comparison(swept)
    text = capsys.readouterr().out
    assert f"{float(lines[1]['ratio']):.3f} +- {float(lines[1]['ratio_error']):.1g}" in text
    assert "noise floor" in text
    assert "= the reference itself" in text
    assert "other.gguf k=4/4 failed: " in text
    with pytest.raises(OutputError, match="cannot be written"):
        write_csv(swept, tmp_path / "no" / "folder.csv")


def test_rows_that_no_text_tells_apart_share_a_line(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight copies of a file: a line per row with all later ones, not one per pair; the first of both are printed."""
    paths = [tmp_path / f"{name}.gguf" for name in "abcdefgh"]
    for path in paths:
        path.write_bytes(files["moe"].read_bytes())
    found = compare(paths, files["dense"], used=[2], settings=settings(tmp_path))
    labels = [f"{path.name} k=2/4" for path in paths]
    assert {label: labels[i + 1 :] for i, label in enumerate(labels[:-1])} == found.not_told_apart
    comparison(found)
    text = capsys.readouterr().out
    assert f"\nnot told apart from {labels[0]}: {', '.join(labels[1:4])} and 4 more\n" in text
    assert f"\nnot told apart from {labels[4]}: {', '.join(labels[5:])}\n  and 2 more (--verbose shows all)\n" in text


def test_settings_of_the_command_line(tmp_path: Path) -> None:
    """A text that is not UTF-8 is refused; of a long one the start is read, amply."""
    (tmp_path / "text").write_text("word " * 200_000)
    found = make_settings(tmp_path / "text", 5, n_context=64, memory_limit=2, resume=False)
    assert (5, 64, 2, None, False) == (
        found.n_token,
        found.n_context,
        found.memory_limit,
        found.room,
        found.resume,
    )
    assert 20 * 64 < len(found.text.text) < 200_000
    whole = make_settings(tmp_path / "text", None, n_context=64)
    assert ("word " * 200_000, "text") == (whole.text.text, whole.text.label)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match="not readable as UTF-8"):
        make_settings(tmp_path / "latin", 5, n_context=64)
    assert EMBEDDED == make_settings(None, 5, n_context=64).text.label


def test_notes_name_files_calibrated_on_this_text_and_windows_that_are_too_long(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """The text's digest stands in such a file; a context is held against the model's own."""
    text = settings(tmp_path).text
    sliced = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4)
    facts = {"moe2gguf.calibration.sha256": text.digest}
    own = tiny_gguf.write_gguf(tmp_path / "own.gguf", sliced, strings=facts)
    assert [] == list_notes([files["moe"]], text, 32)
    (note,) = list_notes([files["moe"], own, own], text, 32)
    assert "calibrated on the same text that is measured here" in note
    assert ": own.gguf;" in note
    assert [] == list_notes([own], Text(TEXT + "the", "tan"), 32)
    trained = read_gguf(own).metadata["llama.context_length"]
    (note,) = list_notes([files["moe"], files["dense"]], text, int(trained) + 1)  # type: ignore[arg-type]
    assert f"moe.gguf ({trained}), dense.gguf ({trained})" in note
    found = compare([own], files["dense"], settings=settings(tmp_path))
    assert list_notes([own], text, 32) == list(found.notes) == found.to_dict()["notes"]


def test_the_journal_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$MOE2GGUF_CACHE, else the user's cache folder."""
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path))
    assert tmp_path == recipe.cache_folder()
    monkeypatch.delenv("MOE2GGUF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path / "moe2gguf" == recipe.cache_folder()


def llama_tokens(path: Path) -> list[int]:
    return run_in_child(_tokens, path)


def _tokens(path: Path) -> list[int]:
    from moe2gguf.llama.devices import Setup
    from moe2gguf.llama.model import open_model

    with open_model(path, Setup(n_threads=1)) as model:
        return [int(token) for token in model.tokenize(TEXT)]


def test_speed_joins_the_rows_and_names_a_choice(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that ran are timed beside the reference; the exact count is the only one close enough to take."""
    timing = Timing(n_prompt=8, n_generate=4, repeat=1, threads=1)
    found = compare([files["moe"]], files["dense"], used=[4, 2, 9], settings=settings(tmp_path), timing=timing)
    assert [True, True, False] == [row.speed is not None for row in found.rows]
    assert found.reference_speed is not None
    assert found.recommendation is not None
    assert "moe.gguf k=4/4" == found.recommendation.label
    assert found.rows[0].flat()["generation_speed"] > 0
    assert [True, True, False] == [row.draft is not None for row in found.rows]
    assert found.rows[0].flat()["draft_greedy_speed_up"] == found.rows[0].draft.greedy.speed_up  # type: ignore[union-attr]
    comparison(found, wide=True)
    text = " ".join(capsys.readouterr().out.split())
    assert "accepted" in text
    drafts = describe_drafts(found.rows)
    assert set(drafts) <= {"moe.gguf k=4/4", "moe.gguf k=2/4"}
    for label, words in drafts.items():
        assert f"{label} as a draft of the reference: {words}" in text
        assert f"{label}</code> as a draft of the reference: {words}" in "".join(summarize(found))
    json.dumps(found.to_dict(), allow_nan=False)


def test_drafts_that_are_no_faster_are_not_listed(files: dict[str, Path], tmp_path: Path) -> None:
    """Of several the best is named, with the verdict."""
    timing = Timing(n_prompt=8, n_generate=4, repeat=1, threads=1)
    found = compare([files["moe"]], files["dense"], used=[4, 2], settings=settings(tmp_path), timing=timing)
    slow, slower, quick = DraftGain(1, 0.5), DraftGain(1, 0.4), DraftGain(3, 1.5)
    first = replace(found.rows[0], draft=DraftGains(slow, slower))
    second, third = (replace(found.rows[1], draft=DraftGains(slower, gain)) for gain in (quick, slower))

    assert ["moe.gguf k=2/4"] == [*describe_drafts([first, second])]
    assert describe_drafts([first, second])["moe.gguf k=2/4"].endswith(", 1.50 x its speed with 3 drafted")
    ((label, words),) = describe_drafts([first, third]).items()
    assert "moe.gguf k=4/4" == label
    assert words.endswith("; so no file here makes it faster as a draft")
    assert {} == describe_drafts([])


def test_the_command(files: dict[str, Path], tmp_path: Path) -> None:
    """JSON on stdout, the CSV and the report beside it, exit code 1 where a row failed."""
    (tmp_path / "text").write_text(TEXT)
    arguments = [str(files["moe"]), str(files["poisoned"]), "--reference", str(files["dense"]), "--used", "4"]
    arguments += ["--text", str(tmp_path / "text"), "--tokens", "0", "--context", "32", "--threads", "1", "--json"]
    arguments += ["--journal", str(tmp_path / "journal"), "--csv", str(tmp_path / "rows.csv")]
    done = CliRunner().invoke(cli, ["compare", *arguments])
    assert 1 == done.exit_code, done.output
    assert ["ok", "failed"] == [row["status"] for row in json.loads(done.stdout)["rows"]]
    assert 3 == len((tmp_path / "rows.csv").read_text().splitlines())
    report = str(tmp_path / "no" / "report.html")
    missing = CliRunner().invoke(cli, ["compare", *arguments, "--force", "--report", report])
    assert isinstance(missing.exception, OutputError)
