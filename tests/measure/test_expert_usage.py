"""Experts at work: what llama.cpp routes, against a numpy version of the whole graph, and what is said about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner
from flat_options import flat_options
from html_page import Page
from reference import reference_routing

from moe2gguf import convert
from moe2gguf.cli import cli
from moe2gguf.cli.tables_expert_usage import print_experts as show
from moe2gguf.errors import HarnessError, OutputError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.metadata import CALIBRATION_LOAD
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.measure.expert_usage import (
    ExpertUse,
    classify_experts,
    count_effective_experts,
    find_closest_pair,
    find_typical_tokens,
    measure_expert_usage,
    read_calibration_load,
)
from moe2gguf.measure.report.expert_usage import draw_figures, make_page
from moe2gguf.measure.report.page import render_page, write_page
from moe2gguf.measure.watch_routing import RoutingWatcher

CONTEXT, N_WINDOW, K, N = 32, 4, 3, 8
TEXT = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. " * 5


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with eight experts, three of them used, and a router that tells tokens apart."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), N, router_seed=1)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "moe.gguf", weights, n_expert_used=K)


@pytest.fixture(scope="module")
def found(moe: Path) -> ExpertUse:
    return measure_expert_usage(moe, text=Text(TEXT, "tan"), n_token=CONTEXT * N_WINDOW, n_context=CONTEXT, threads=1)


@pytest.fixture(scope="module")
def expected(moe: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens, and per layer and token the router's probabilities and who runs, from numpy: see `reference`."""
    tokens = run_in_child(_tokens, moe)[: CONTEXT * N_WINDOW].reshape(N_WINDOW, CONTEXT)
    tokens[:, 0] = tiny_gguf.BOS
    routed = [reference_routing(moe, [int(t) for t in window]) for window in tokens]
    p, chosen = (np.concatenate(parts, axis=1) for parts in zip(*routed, strict=True))
    return tokens.ravel(), p, (chosen[..., None] == np.arange(N)).any(axis=2)


def _tokens(path: Path) -> np.ndarray:
    with open_model(path, Setup(n_threads=1)) as model:
        return model.tokenize(TEXT)


def _both_logits(path: Path, tokens: list[int]) -> list[np.ndarray]:
    """Logits (n_token, n_vocab) without and with the callback."""
    out = []
    for is_watched in (False, True):
        with open_model(path, Setup(n_context=0, n_threads=1)) as model:
            observer = RoutingWatcher(model.lib, model.facts.n_expert, model.n_expert_used, 1)
            model.start(len(tokens), observer.callback if is_watched else None)
            observer.words = np.zeros(len(tokens), np.int64)
            out.append(model.logits(np.array(tokens, np.int32)))
            assert bool(observer.layers) == is_watched
    return out


def test_watching_changes_nothing(moe: Path) -> None:
    """The logits with the callback are those without it, to the last bit."""
    plain, watched = run_in_child(_both_logits, moe, [tiny_gguf.BOS, *range(3, 60)])
    np.testing.assert_array_equal(plain, watched)


def test_load_and_company_are_those_of_numpy(found: ExpertUse, expected: tuple[np.ndarray, ...]) -> None:
    """Load, pairs, mean probability and entropy equal those of a numpy version of the whole graph."""
    tokens, p, ran = expected
    assert len(tokens) == found.n_token == CONTEXT * N_WINDOW
    assert [0, 1] == [one.layer for one in found.layers]
    for one, q, mask in zip(found.layers, p, ran, strict=True):
        np.testing.assert_allclose(one.load, mask.mean(axis=0), atol=1e-12)
        together = (mask[:, :, None] & mask[:, None, :]).mean(axis=0)
        np.testing.assert_allclose(one.together, together, atol=1e-12)
        np.testing.assert_allclose(one.probability, q.mean(axis=0), rtol=1e-4)
        assert one.router_entropy == pytest.approx(float(-(q * np.log(q)).sum(axis=1).mean()), rel=1e-4)
        assert math.isclose(K, sum(one.load))


def test_typical_tokens_are_counted_right(moe: Path, found: ExpertUse, expected: tuple[np.ndarray, ...]) -> None:
    """Every token that is named has the count and the share that numpy finds, and runs the expert more than others."""
    tokens, _, ran = expected
    pieces = run_in_child(_pieces, moe, sorted({int(t) for t in tokens}))
    named = 0
    for one, mask in zip(found.layers, ran, strict=True):
        for e, words in enumerate(one.words):
            for word in words:
                here = np.isin(tokens, [t for t, text in pieces.items() if text == word.text])
                assert (int(here.sum()), float(mask[here, e].mean())) == pytest.approx((word.count, word.share))
                assert word.share > one.load[e]
                named += 1
    assert named > 20


def _pieces(path: Path, tokens: list[int]) -> dict[int, str]:
    with open_model(path, Setup(n_threads=1)) as model:
        return {t: model.piece(t).decode("utf-8", "replace") or f"<{t}>" for t in tokens}


def test_roles_follow_their_limits() -> None:
    """Always on from 99 %; dead below 1 % and overloaded above twice of what is left for each of the others."""
    load = np.array([1.0, 0.995, 0.7, 0.3, 0.003, 0.002, 0.0, 0.0])
    assert ((0, 1), (6, 7), (2,)) == classify_experts(load, 3)  # a fair share is 1 / 6
    assert ((), (), ()) == classify_experts(np.ones(4), 4)
    assert ((0, 1), (2, 3), ()) == classify_experts(np.array([1.0, 1.0, 0.0, 0.0]), 2)


def test_evenness_and_pairs_of_known_loads() -> None:
    """Equal loads count in full, one expert alone as one; of pairs the one beyond chance, not the busiest."""
    assert count_effective_experts(np.full(8, 0.25)) == pytest.approx(8)
    assert count_effective_experts(np.array([1.0, 0.0])) == pytest.approx(1)
    ran = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 1, 0, 1], [1, 0, 1, 0, 0]], float)
    pair = find_closest_pair(ran.T @ ran / 4, [0])
    assert pair is not None
    assert (1, 4) == pair[:2]
    assert pair[2] == pytest.approx(np.corrcoef(ran[:, 1], ran[:, 4])[0, 1])
    assert find_closest_pair(np.eye(2), []) is None


def test_rare_tokens_and_experts_that_always_run_have_no_words() -> None:
    """A token seen twice says nothing, and neither does an expert that every token runs."""
    counts = np.array([2, 4, 4])
    (word,) = find_typical_tokens(np.array([2, 4, 1]), counts, 0.7, ["rare", "yes", "no"])
    assert ("yes", 4, 1.0) == (word.text, word.count, word.share)
    assert () == find_typical_tokens(counts, counts, 1.0, ["a", "b", "c"])


def test_a_converted_file_carries_its_calibrations_load(tmp_path: Path) -> None:
    """The load is in the metadata; on the calibration's own text llama.cpp runs nearly the same experts."""
    folder, text = checkpoints.make(tmp_path / "model"), tmp_path / "text"
    text.write_text(TEXT * 40)
    convert(folder, tmp_path / "m.gguf", flat_options(experts=8, used=4, text=text, n_token=1024))
    file = read_gguf(tmp_path / "m.gguf")
    load = np.array(file.metadata[CALIBRATION_LOAD], np.float64).reshape(3, 8)
    np.testing.assert_allclose(load.sum(axis=1), 4, rtol=1e-6)
    found = measure_expert_usage(
        tmp_path / "m.gguf", text=Text(TEXT * 40, "tan"), n_token=1024, n_context=128, threads=1
    )
    assert "compared with the load in calibration (text" in found.calibration
    assert [True] == ["calibrated on the same text" in note and "m.gguf" in note for note in found.notes]
    assert max(one.moved or 0 for one in found.layers) < 0.05
    expected = [np.abs(np.array(one.load) - row).sum() / 8 for one, row in zip(found.layers, load, strict=True)]
    assert expected == pytest.approx([one.moved for one in found.layers])
    other = measure_expert_usage(
        tmp_path / "m.gguf", used=2, text=Text(TEXT * 10, "tan"), n_token=128, n_context=128, threads=1
    )
    assert "is that of 4 experts per token, not of 2" in other.calibration
    assert [None] * 3 == [one.moved for one in other.layers]


@pytest.mark.parametrize("value", [None, [1.0] * 15, ["a"] * 16, "text", [0] * 16])
def test_a_load_that_is_not_one_is_left_alone(moe: Path, value: object) -> None:
    """Missing, too short, or not numbers: nothing is compared."""
    file = read_gguf(moe)
    file.metadata[CALIBRATION_LOAD] = value  # type: ignore[assignment]
    assert (None, "the file carries no load from a calibration") == read_calibration_load(file, read_counts(file), K)


def test_files_that_cannot_be_watched_say_why(moe: Path, tmp_path: Path) -> None:
    """A dense file, a count that cannot run, a text that is too short."""
    dense = tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights())
    with pytest.raises(HarnessError, match="is dense, it has no experts"):
        measure_expert_usage(dense, text=Text(TEXT, "tan"))
    with pytest.raises(HarnessError, match="there are only 8"):
        measure_expert_usage(moe, used=9, text=Text(TEXT, "tan"))
    with pytest.raises(HarnessError, match="give a longer text"):
        measure_expert_usage(moe, text=Text("the man", "man"), n_context=CONTEXT, threads=1)


def test_the_whole_text_is_whole_windows(moe: Path) -> None:
    """n_token None runs every window the text fills."""
    found = measure_expert_usage(moe, text=Text(TEXT, "tan"), n_token=None, n_context=CONTEXT, threads=1)
    assert len(run_in_child(_tokens, moe)) // CONTEXT * CONTEXT == found.n_token


def test_table_json_and_page_say_the_same(
    found: ExpertUse, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strict JSON with every layer; a line per layer; a sound page with maps and a row per expert."""
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["layers"][1]["load"] == list(found.layers[1].load)
    assert values["overloaded"] == found.named("overloaded")
    show(found)
    text = capsys.readouterr().out
    assert f"{found.layers[1].effective:.1f}" in text
    assert f"{CONTEXT * N_WINDOW} tokens; 3 of 8 experts per token in 2 layers" in text
    page = Page(render_page(make_page(found, ["prog", "experts"]), "/* plotly */"))
    assert [] == page.open == page.addresses
    figures = draw_figures(found)
    assert 3 == len(figures) == page.tags["h2"] - 2
    assert [list(one.load) for one in found.layers] == figures[0].data[0]["z"]
    assert ["layer 0", "layer 1"] == [b["label"] for b in figures[2].layout["updatemenus"][0]["buttons"]]
    rows = [cells for cells in page.cells if len(cells) == 6]
    assert [str(e) for _ in range(2) for e in range(N)] == [cells[1] for cells in rows]
    monkeypatch.setattr("moe2gguf.measure.report.page.plotly_script", lambda: "/* plotly */")
    write_page(make_page(found, ["prog"]), tmp_path / "out.html")
    assert ["out.html"] == [path.name for path in tmp_path.iterdir()]


def test_with_all_experts_on_there_is_nothing_to_choose(moe: Path) -> None:
    """Every load is 1, nobody is dead or overloaded, and the map of pairs is left out."""
    found = measure_expert_usage(moe, used=N, text=Text(TEXT, "tan"), n_token=CONTEXT, n_context=CONTEXT, threads=1)
    assert {1.0} == {value for one in found.layers for value in one.load}
    assert [[], [], []] == [found.named(kind) for kind in ("always_on", "dead", "overloaded")]
    assert 2 == len(draw_figures(found))


def test_the_command(moe: Path, tmp_path: Path) -> None:
    """JSON on stdout; a report in a folder that is not there is refused before anything runs."""
    (tmp_path / "text").write_text(TEXT)
    arguments = ["expert-usage", str(moe), "--text", str(tmp_path / "text"), "--tokens", "64", "--context", "32"]
    done = CliRunner().invoke(cli, [*arguments, "--threads", "1", "--used", "2", "--json"])
    assert 0 == done.exit_code, done.output
    assert (2, 64) == (json.loads(done.stdout)["n_expert_used"], json.loads(done.stdout)["tokens"])
    missing = CliRunner().invoke(cli, [*arguments, "--report", str(tmp_path / "no" / "report.html")])
    assert isinstance(missing.exception, OutputError)
