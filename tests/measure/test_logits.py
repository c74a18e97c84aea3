"""Logits out of llama.cpp: the right ones, at the chosen number of experts, and none from a file that does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.library import import_llama
from moe2gguf.llama.model import Facts, open_model, read_facts
from moe2gguf.llama.windows import cut_windows
from moe2gguf.measure import logits, metrics
from moe2gguf.measure.logits import Reference, record_in_process, record_reference, score_file
from moe2gguf.measure.needed_experts import measure_entropy

TEXT = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. "
N_EXPERT = 4


def one_thread(**fields: Any) -> Setup:
    """The threads of tiny models on a busy machine mostly wait for each other."""
    return Setup(n_threads=1, **fields)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights()
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "zero": tiny_gguf.write_gguf(folder / "zero.gguf", tiny_gguf.sliced_weights(dense, N_EXPERT)),
        "routed": tiny_gguf.write_gguf(
            folder / "routed.gguf", tiny_gguf.sliced_weights(dense, N_EXPERT, router_seed=1), n_expert_used=2
        ),
        "sixteen": tiny_gguf.write_gguf(folder / "sixteen.gguf", tiny_gguf.sliced_weights(dense, 16)),
        "f16": tiny_gguf.write_gguf(folder / "f16.gguf", dense, f16=True),
        "other_words": tiny_gguf.write_gguf(folder / "other.gguf", dense, texts={259: "hte"}),
        "bad_count": tiny_gguf.write_gguf(
            folder / "bad_count.gguf", tiny_gguf.sliced_weights(dense, N_EXPERT), n_expert_used=N_EXPERT + 1
        ),
    }


def tokens_and_logits(path: Path, setup: Setup, text: str = TEXT) -> tuple[NDArray[np.int32], NDArray[np.float32], int]:
    """Runs in a child process."""
    with open_model(path, setup) as model:
        tokens = model.tokenize(text)
        return tokens, model.logits(tokens), model.n_expert_used


def some_logits(path: Path, setup: Setup, first: int, last: int) -> list[NDArray[np.float32]]:
    """Runs in a child process: the same positions three times, the last time after another text."""
    with open_model(path, setup) as model:
        tokens = model.tokenize(TEXT)
        part = model.logits(tokens, first, last)
        again = model.logits(tokens, first, last)
        model.logits(tokens[::-1].copy())
        return [part, again, model.logits(tokens, first, last)]


def overfull(path: Path) -> None:
    with open_model(path, one_thread(n_context=256)) as model:
        model.logits(np.ones(257, np.int32))


def without_llama_cpp() -> None:
    sys.modules["llama_cpp"] = None  # type: ignore[assignment]
    import_llama()


def numpy_logits(weights: tiny_gguf.Weights, tokens: NDArray[np.int32], k: int) -> NDArray[np.float64]:
    """The graph of architecture `llama` in float64: an oracle of its own, attention, rotary positions and experts."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    n_head, n_head_kv, d_head = 4, 2, 16

    def norm(x: NDArray[Any]) -> NDArray[Any]:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)

    def softmax(x: NDArray[Any]) -> NDArray[Any]:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def rotate(x: NDArray[Any]) -> NDArray[Any]:  # (n_token, heads, d_head), neighboring pairs
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, d_head, 2) / d_head)
        turn = np.exp(1j * angle)[:, None, :]
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    x = w["token_embd.weight"][tokens]
    n = len(tokens)
    mask = np.triu(np.full((n, n), -np.inf), 1)
    for i in range(2):
        b = f"blk.{i}."
        h = norm(x)
        q = rotate((h @ w[b + "attn_q.weight"].T).reshape(n, n_head, d_head))
        k_, v = ((h @ w[b + f"attn_{a}.weight"].T).reshape(n, n_head_kv, d_head) for a in "kv")
        k_, v = (np.repeat(a, n_head // n_head_kv, axis=1) for a in (rotate(k_), v))
        p = softmax(np.einsum("qhd,khd->hqk", q, k_) / np.sqrt(d_head) + mask)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(n, -1) @ w[b + "attn_output.weight"].T
        h = norm(x)
        route = h @ w[b + "ffn_gate_inp.weight"].T
        chosen = np.argsort(-route, axis=1, kind="stable")[:, :k]
        share = softmax(np.take_along_axis(route, chosen, axis=1))
        for t in range(n):
            for e, s in zip(chosen[t], share[t], strict=True):
                gate, up = (w[b + f"ffn_{a}_exps.weight"][e] @ h[t] for a in ("gate", "up"))
                x[t] += s * (w[b + "ffn_down_exps.weight"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return norm(x) @ w["output.weight"].T


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_logits_equal_a_numpy_model_at_every_k(files: dict[str, Path], k: int) -> None:
    """At every k the logits are those of the graph written down in numpy; so the override takes effect."""
    tokens, logits, used = run_in_child(tokens_and_logits, files["routed"], one_thread(n_expert_used=k, n_batch=16))
    expected = numpy_logits(tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), N_EXPERT, router_seed=1), tokens, k)
    assert used == k
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_zero_router_with_all_experts_is_the_dense_model(files: dict[str, Path]) -> None:
    """Down projection times n and a zero router: at k = n the dense logits, max |difference| <= 1e-3, KL <= 1e-6."""
    tokens, dense, _ = run_in_child(tokens_and_logits, files["dense"], one_thread())
    for name in ("zero", "sixteen"):
        _, sliced, _ = run_in_child(tokens_and_logits, files[name], one_thread(n_expert_used="all"))
        summary = metrics.summarize(metrics.score_block(dense[:-1], sliced[:-1], tokens[1:], -np.inf))
        assert summary.max_difference <= 1e-3
        assert summary.kl_mean <= 1e-6


@pytest.mark.parametrize(
    ("name", "requested", "words"),
    [
        ("routed", 0, "routed.gguf has 4 experts, 0 cannot be used: choose 1 to 4"),
        ("routed", N_EXPERT + 1, "routed.gguf has 4 experts, 5 cannot be used: choose 1 to 4"),
        ("routed", -1, "-1 cannot be used"),
        ("dense", 1, "dense.gguf is dense"),
        ("bad_count", 2, "5 of 4 experts are used: convert it again"),
    ],
)
def test_a_bad_number_of_experts_is_an_error_before_llama_cpp_sees_it(
    files: dict[str, Path], name: str, requested: int, words: str
) -> None:
    """Counts on which llama.cpp would abort the process are refused with the range that works."""
    with pytest.raises(HarnessError) as caught:
        run_in_child(tokens_and_logits, files[name], one_thread(n_expert_used=requested))
    assert words in str(caught.value)
    assert "ended by" not in str(caught.value)


def test_more_experts_than_llama_cpp_can_run(tmp_path: Path) -> None:
    """llama.cpp aborts when many experts outgrow its graph: an error with its assertion and what to lower."""
    deep = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(n_layer=16), 24)
    path = tiny_gguf.write_gguf(tmp_path / "deep.gguf", deep)
    with pytest.raises(HarnessError, match=r"(?s)the process was ended by SIGABRT.*GGML_ASSERT.*lower n_expert_used"):
        run_in_child(tokens_and_logits, path, one_thread())
    assert run_in_child(tokens_and_logits, path, one_thread(n_expert_used=16))[2] == 16


@pytest.mark.parametrize(
    ("name", "requested", "used"),
    [("routed", None, 2), ("routed", "all", 4), ("routed", np.int64(3), 3), ("dense", None, 0), ("dense", "all", 0)],
)
def test_number_of_experts_in_use(
    files: dict[str, Path], name: str, requested: int | Literal["all"] | None, used: int
) -> None:
    """Nothing asked for means the file's own count, "all" means n, and a numpy integer is as good as any."""
    assert run_in_child(tokens_and_logits, files[name], one_thread(n_expert_used=requested))[2] == used


def test_facts(files: dict[str, Path]) -> None:
    """The facts of a file are those it was written with."""
    expected = Facts(files["routed"], "llama", n_expert=4, n_expert_used=2, n_vocab=303, n_context_train=512)
    assert run_in_child(read_facts, files["routed"]) == expected


def test_only_the_chosen_positions_are_returned(files: dict[str, Path]) -> None:
    """Positions first ... last - 1, the same as in the whole, again after another text: memory is cleared."""
    _, whole, _ = run_in_child(tokens_and_logits, files["dense"], one_thread())
    for part in run_in_child(some_logits, files["dense"], one_thread(n_batch=8), 5, 21):
        assert part.shape == (16, whole.shape[1])
        np.testing.assert_allclose(part, whole[5:21], rtol=0, atol=1e-4)


def test_f16_weights_run(files: dict[str, Path]) -> None:
    """A file of 16-bit weights gives nearly the same logits."""
    _, f32, _ = run_in_child(tokens_and_logits, files["dense"], one_thread())
    _, f16, _ = run_in_child(tokens_and_logits, files["f16"], one_thread())
    assert 0 < np.abs(f32 - f16).max() < 0.1


def test_too_many_tokens_are_an_error(files: dict[str, Path]) -> None:
    """A text longer than the context is refused in words."""
    with pytest.raises(HarnessError, match="1 tokens do not fit, there is room for 0"):
        run_in_child(overfull, files["dense"])


def test_files_that_llama_cpp_refuses(tmp_path: Path, files: dict[str, Path]) -> None:
    """A missing, a foreign and a truncated file are errors that name the file and repeat llama.cpp's reason."""
    with pytest.raises(HarnessError, match=r"missing\.gguf is not a file"):
        run_in_child(read_facts, tmp_path / "missing.gguf")
    foreign, short = tmp_path / "foreign.gguf", tmp_path / "short.gguf"
    foreign.write_bytes(b"not a gguf file at all")
    short.write_bytes(files["dense"].read_bytes()[:-1000])
    with pytest.raises(HarnessError, match=r"(?s)foreign.gguf: llama.cpp cannot load it; it says:.*magic"):
        run_in_child(read_facts, foreign)
    with pytest.raises(HarnessError, match=r"(?s)short.gguf: llama.cpp cannot load it; it says:.*bounds"):
        run_in_child(tokens_and_logits, short, one_thread())


def test_missing_llama_cpp() -> None:
    """Without llama-cpp-python the error is the command that installs it."""
    with pytest.raises(HarnessError, match=r"^llama-cpp-python is not installed: pip install -U llama-cpp-python$"):
        run_in_child(without_llama_cpp)


def test_cut_follows_the_perplexity_tool() -> None:
    """Windows follow each other without overlap, BOS replaces each first token, the scored half is rounded up."""
    windows = cut_windows(np.arange(100, 120, dtype=np.int32), n_token=4, n_context=8, first=4, bos=1)
    assert windows.tokens.tolist() == [[1, *range(101, 108)], [1, *range(109, 116)]]
    assert (windows.n_scored, windows.n_token) == (3, 6)


@pytest.mark.parametrize(
    ("n_token", "n_context", "first", "words"),
    [(100, 8, 0, "takes 120 tokens of text, this one has 20"), (0, 8, 0, "at least 1 token"), (1, 2, 1, "at least 3")],
)
def test_cut_refuses(n_token: int, n_context: int, first: int, words: str) -> None:
    """A text that is too short and numbers that leave nothing to score are errors with the way out."""
    with pytest.raises(HarnessError, match=words):
        cut_windows(np.zeros(20, np.int32), n_token=n_token, n_context=n_context, first=first, bos=None)


def test_recorded_and_measured_logits_are_the_direct_ones(files: dict[str, Path], tmp_path: Path) -> None:
    """Scores through the reference file equal scores of logits held in memory, window by window."""
    setup = one_thread(n_context=16, n_batch=8)
    reference = record_reference(files["dense"], setup, TEXT, 20, 8, tmp_path / "logits")
    windows = reference.windows
    assert reference.logits.stat().st_size == windows.n_token * reference.facts.n_vocab * 4
    measured = list(score_file(files["routed"], setup, reference))
    assert [len(scores) for scores in measured] == [7, 7, 7]
    expected = run_in_child(direct_scores, files["dense"], files["routed"], setup, windows.tokens, windows.first)
    np.testing.assert_allclose(metrics.join_scores(measured).kl, expected.kl, rtol=1e-6)
    np.testing.assert_allclose(metrics.join_scores(measured).nll, expected.nll, rtol=1e-6)


def direct_scores(base: Path, other: Path, setup: Setup, windows: NDArray[np.int32], first: int) -> metrics.TokenScores:
    """Runs in a child process: all logits of both files at once."""
    rows = []
    for path in (base, other):
        with open_model(path, setup) as model:
            rows.append(np.concatenate([model.logits(window)[first:-1] for window in windows]))
    return metrics.score_block(rows[0], rows[1], windows[:, first + 1 :].ravel())


def test_another_vocabulary_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Files of the same size whose tokens have other texts cannot be compared."""
    reference: Reference = record_reference(files["dense"], one_thread(n_context=16), TEXT, 8, 0, tmp_path / "logits")
    with pytest.raises(HarnessError, match=r"other\.gguf and .*dense\.gguf have different vocabularies \(as many"):
        list(score_file(files["other_words"], one_thread(), reference))


def test_no_room_for_the_reference(files: dict[str, Path]) -> None:
    """A disk that cannot hold the reference's logits is an error that says how to go on."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, which always says that the disk is full")
    with pytest.raises(HarnessError, match=r"cannot keep the reference's logits.*TMPDIR"):
        record_reference(files["dense"], one_thread(n_context=128), TEXT * 3, 100, 0, full)


def test_logits_that_cannot_be_read_again_are_one_error(files: dict[str, Path], tmp_path: Path) -> None:
    """A disk that lost them, or a program that cleans temporary folders."""
    reference = record_reference(files["dense"], one_thread(n_context=16), TEXT, 8, 0, tmp_path / "logits")
    reference.logits.write_bytes(reference.logits.read_bytes()[:-4])
    for reason in ("it ends early", "No such file or directory"):
        with pytest.raises(HarnessError, match=rf"logits: cannot be read \({reason}\); set TMPDIR to another disk"):
            list(score_file(files["routed"], one_thread(), reference))
        with pytest.raises(HarnessError, match=rf"logits: cannot be read \({reason}\)"):
            measure_entropy(reference)
        reference.logits.unlink(missing_ok=True)


N_LARGE, N_BATCH = 131072, 128


def memory_of_a_comparison(path: Path, folder: Path, n_window: int) -> int:
    """Runs in a child process: by how many bytes its peak exceeds what it held with the model loaded."""
    setup = one_thread(n_context=2 * N_BATCH, n_batch=N_BATCH)
    n_token = n_window * (N_BATCH - 1)
    text = TEXT * (40 * n_window)
    status = Path("/proc/self/status")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    reference = record_in_process(path, setup, text, n_token, N_BATCH, folder / "logits", None)
    assert n_window == sum(1 for _ in logits._score_windows(path, setup, reference, metrics.TAIL))
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_a_few_blocks_whatever_the_text(tmp_path: Path) -> None:
    """131,072 tokens in the vocabulary: at most four blocks of logits besides the file, and no more for more text."""
    weights = tiny_gguf.dense_weights(n_layer=1, d_model=16, n_head=2, n_head_kv=1)
    for name in ("token_embd.weight", "output.weight"):
        weights[name] = np.resize(weights[name], (N_LARGE, 16))
    path = tiny_gguf.write_gguf(tmp_path / "wide.gguf", weights, n_head=2, n_head_kv=1)
    one, three = (run_in_child(memory_of_a_comparison, path, tmp_path, n) for n in (1, 3))
    block = N_BATCH * N_LARGE * 4
    room = path.stat().st_size + 32 * 2**20  # the file's pages, the vocabulary, what llama.cpp imports
    assert one < 4 * block + room
    assert three < one + block / 4
