"""Tasks with exact answers: made by seed, judged as greedy decoding would be, kept like any other measurement."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import tiny_gguf
from sweeps import settings

from moe2gguf.cli.tables_compare import comparison, write_csv
from moe2gguf.errors import HarnessError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.generate import generate
from moe2gguf.measure import tasks
from moe2gguf.measure.compare import compare
from moe2gguf.measure.journal import digest_parts
from moe2gguf.measure.report.compare import make_page
from moe2gguf.measure.results import Comparison
from moe2gguf.measure.tasks import (
    ANSWER,
    PER_KIND,
    REQUESTS,
    Prompt,
    Task,
    count_repeats,
    make_prompts,
    make_tasks,
    solve_tasks,
)

MERGED = tiny_gguf.FIRST_BYTE + 256
TEMPLATE = "[{{ messages[0].role }}]{{ messages[0].content }}[answer]"


def write_chain(path: Path, **options: object) -> Path:
    """A model that writes "cd." after b, "d." being one token, "lm." after k, "rst" after q, v and an end after u."""
    texts = tiny_gguf.vocabulary()[0]
    texts[MERGED] = "d."
    chain = {"b": "c", "c": "d.", "k": "l", "l": "m", "m": ".", "q": "r", "r": "s", "s": "t", "u": "v", "v": "</s>"}
    weights = tiny_gguf.chain_weights({texts.index(one): texts.index(after) for one, after in chain.items()})
    return tiny_gguf.write_gguf(path, weights, texts={MERGED: "d."}, **options)  # type: ignore[arg-type]


def test_every_task_has_its_exact_answer() -> None:
    """Fifty different ones of a kind, the same in every process and version of Python; each answer is the right one."""
    made = make_tasks()
    assert ["copying", "arithmetic", "JSON", "brackets", "recall", "cloze"] == list(made)
    assert dict.fromkeys(made, PER_KIND) == {kind: len(set(one)) for kind, one in made.items()}
    assert digest_parts(made=made) == digest_parts(made=make_tasks()) != digest_parts(made=make_tasks(1))
    assert "2d9e9cfa" == digest_parts(made=made)[:8]
    for one in made["copying"]:
        assert one.lead.split() == [*one.answer.split(), "->"]
    for one in made["arithmetic"]:
        a, sign, b, _ = one.lead.split()
        assert int(one.answer) == int(a) + int(b) * {"+": 1, "-": -1}[sign]
    for one in made["JSON"]:
        sentence = "The {job} {name} lives in {city}, has a {pet} and likes {color}."
        assert one.question.endswith(sentence.format(**json.loads(one.lead + one.answer)))
    for one in made["brackets"]:
        text = "".join((one.lead.removesuffix("->") + one.answer).split())
        for _ in range(len(text)):
            text = text.replace("()", "").replace("[]", "").replace("{}", "")
        assert "" == text
    for one in made["recall"]:
        assert 1 == one.question.splitlines().count(one.lead + one.answer)


def test_a_task_is_solved_where_greedy_decoding_writes_the_answer_and_stops(tmp_path: Path) -> None:
    """Also where its last token holds more than the answer, over several batches, and after texts that began alike."""
    path = write_chain(tmp_path / "chain.gguf")
    pairs = [("b", "cd"), ("b", "c"), ("k", "lm"), ("k", "ln"), ("k", "lm."), ("q", "rs"), ("u", "v"), ("u", "vv")]
    prompts = [Prompt(f"{'x' * n}{text}", answer) for n in (3, 9) for text, answer in pairs]
    written = ["".join(generate(path, one.text, n_token=6, threads=1)) for one in prompts]
    expected = [
        text.startswith(answer) and text[len(answer) :][:1] in ("", ".")
        for text, (_, answer) in zip(written, prompts, strict=True)
    ]
    assert expected == 2 * [True, False, True, False, False, False, True, False]
    scores = solve_tasks(path, Setup(n_batch=4, n_threads=1), {"a": prompts[:8], "b": prompts[8:]})
    assert {"a": tuple(expected[:8]), "b": tuple(expected[8:])} == scores.right
    assert [3 / 8] * 3 == [share.mean for share in scores.shares.values()]


def test_a_loop_is_seen_and_an_end_is_none(tmp_path: Path) -> None:
    """A loop of three tokens repeats all 4-grams but its first three; an answer that ends has no more."""
    texts = tiny_gguf.vocabulary()[0]
    chain = {"a": "b", "b": "c", "c": "a", "k": "l", "l": "m", "m": "</s>"}
    weights = tiny_gguf.chain_weights({texts.index(one): texts.index(after) for one, after in chain.items()})
    path = tiny_gguf.write_gguf(tmp_path / "chain.gguf", weights)
    scores = solve_tasks(path, Setup(n_threads=1), {"open": [Prompt("xa", ""), Prompt("k", ""), Prompt("c", "")]})
    assert {} == scores.right
    assert (ANSWER - 3 - 3) / (ANSWER - 3) == pytest.approx(scores.repeated)
    assert [(1, 6), (0, 0), (0, 1), (2, 3)] == [
        count_repeats(one) for one in ([1, 2, 3, 4, 9, 1, 2, 3, 4], [1, 2, 3], [1] * 4, [1] * 6)
    ]


def test_questions_are_put_through_the_chat_template(tmp_path: Path) -> None:
    """The question is the user's, the answer begins after the template's end; without a template all is one text."""
    plain = make_prompts(read_gguf(write_chain(tmp_path / "plain.gguf")))
    strings = {"tokenizer.chat_template": TEMPLATE}
    chat = make_prompts(read_gguf(write_chain(tmp_path / "chat.gguf", strings=strings)))
    for kind, made in make_tasks().items():
        assert [Prompt(f"{one.question}\n{one.lead}", one.answer) for one in made] == plain[kind]
        assert [Prompt(f"[user]{one.question}[answer]{one.lead}", one.answer) for one in made] == chat[kind]
    assert [Prompt(f"[user]{one}[answer]", "") for one in REQUESTS] == chat["open"]


def make_halves(_: random.Random, i: int) -> Task:
    return Task("x" * (i + 1), "b", "cd" if i % 2 else "cc")


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """The chain at two counts against itself: it solves every second of ten tasks."""
    monkeypatch.setattr(tasks, "_KINDS", {"chain": make_halves})
    monkeypatch.setattr(tasks, "PER_KIND", 10)
    path = write_chain(tmp_path / "chain.gguf", strings={"tokenizer.chat_template": TEMPLATE})
    other = tiny_gguf.write_gguf(tmp_path / "other.gguf", tiny_gguf.dense_weights(), texts={MERGED: "d."})
    asked = {"settings": settings(tmp_path, tasks=True)}
    compare([path], path, settings=settings(tmp_path))
    found = compare([path, other], path, **asked)  # type: ignore[arg-type]
    assert [True, False] == [row.resumed for row in found.rows]
    asked["settings"] = settings(tmp_path, tasks=True, timeout=1e-9)  # all of it comes from the journal
    again = compare([path, other], path, **asked)  # type: ignore[arg-type]
    assert found.tasks == again.tasks
    return found


def test_a_comparison_has_the_tasks_of_every_row_and_the_reference(
    swept: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Solved shares with intervals in JSON, CSV, table and page; a journal that knows the text's scores is used."""
    halves = (False, True) * 5
    assert swept.ok
    assert swept.reference_tasks is not None
    assert [halves, halves, (False,) * 10] == [one.right["chain"] for one in swept.tasks.values()]
    values = json.loads(json.dumps(swept.to_dict(), allow_nan=False))
    assert 0.5 == values["reference"]["tasks"]["shares"]["all"]["mean"]
    assert [*halves] == values["rows"][0]["tasks"]["right"]["chain"]
    write_csv(swept, tmp_path / "rows.csv")
    lines = [*csv.DictReader((tmp_path / "rows.csv").open())]
    assert [("ok", "0.5"), ("ok", "0.0"), ("reference", "0.5")] == [
        (one["status"], one["tasks_chain"]) for one in lines
    ]
    assert 0.2366 == pytest.approx(float(lines[0]["tasks_all_low"]), abs=1e-4)
    comparison(swept)
    printed = " ".join(capsys.readouterr().out.split())
    assert "reference chain.gguf 50% (24-76)" in printed
    assert "other.gguf 0% (0-28)" in printed
    assert "repeated 4-grams" in printed
    assert lines[2]["repeated"] == str(swept.reference_tasks.repeated)
    page = make_page(swept, ["moe2gguf"])
    assert "solves 50% (24-76) of the tasks" in " ".join(page.summary)
    assert "tasks chain, share" in page.table.columns


def test_tasks_that_cannot_be_asked_are_an_error_or_a_row(tmp_path: Path) -> None:
    """A template that fails ends the comparison, a run that fails is its row."""
    strings = {"tokenizer.chat_template": "{{ raise_exception('no') }}"}
    path = write_chain(tmp_path / "chain.gguf", strings=strings)
    with pytest.raises(HarnessError, match=r"chain\.gguf: its chat template fails: .*; leave out the tasks"):
        compare([path], path, settings=settings(tmp_path, tasks=True))
