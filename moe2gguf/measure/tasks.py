"""Short tasks with one exact answer each, made by seed, and which of them a file solves.

A task is a question and the beginning of its answer. It is solved where the model, taking the most likely token each
time, would write the rest of the answer and stop there: with the end of the text, of the line or a punctuation mark.
Nothing is generated to find out. The answer stands behind the question, all of it is computed in one batch, and each
token must be the most likely one after those before it. That is what greedy decoding writes, except where it spells
the answer with other tokens than the tokenizer does, which counts as wrong; a last token that holds more than the end
of the answer does not. It takes one batch per task, and what questions of a kind have in common, their examples, is
computed once. Nothing that a model writes is used for anything.

A damaged model also falls into loops, sooner than perplexity shows, which is measured on texts of others. So each file
answers some open requests too, and it is counted what it repeats. Every model repeats some words: such a share means
something beside that of another file only.

A kind has five levels, from what a model of 135 million parameters solves to what it does not; only the facts of the
last kind come in any order.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe2gguf.gguf.file import GGUFFile
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.generate import count_common
from moe2gguf.llama.model import Llama, open_model
from moe2gguf.llama.templates import read_template
from moe2gguf.measure.intervals import Interval, share_interval
from moe2gguf.measure.metrics import as_json

PER_KIND = 50
"""Tasks of each kind, ten of each level."""

OPEN, ANSWER = "open", 96
"""The kind of the open requests, and the most tokens of an answer."""

REQUESTS = (
    *("Write a short story about a lighthouse.", "Explain how bread is made.", "Describe a walk through an old town."),
    *("What should a traveler know about the desert?", "Write to a friend about the winter.", "What is a program?"),
)
_LEVELS = 5
_STOPS = b"\r\n.,;:!?"

_SYLLABLES = "ba de fi go ku la me ni po ru sa te vi zo"
_RECORD = {
    "city": "Rome Oslo Paris Berlin Madrid London Vienna Dublin Athens Prague",
    "color": "red blue green black white yellow brown pink gray orange",
    "name": "Ann Bob Carl Dora Emil Fay Gus Hana Ivan Jill",
    "pet": "cat dog horse parrot rabbit hamster goat snake",
    "job": "cook baker nurse pilot farmer teacher singer driver painter lawyer",
}
_VERBS = "load save move copy draw send open close merge split sort find read write print scale"
_ARGUMENTS = "path name size color width height index count offset limit mode value key speed label text"
_FACTS = {
    "The capital of {} is": "France Paris Italy Rome Spain Madrid Germany Berlin Japan Tokyo Russia Moscow Egypt Cairo "
    "Austria Vienna Greece Athens Norway Oslo",
    "The day after {} is": "Monday Tuesday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "The month before {} is": "March February June May August July December November",
    "The opposite of {} is": "hot cold big small up down left right open closed day night old young wet dry fast slow "
    "true false rich poor empty full",
    "The plural of {} is": "mouse mice child children foot feet tooth teeth man men goose geese wolf wolves",
    "The past tense of {} is": "go went see saw take took write wrote eat ate run ran buy bought",
    "A young {} is called a": "dog puppy cat kitten cow calf sheep lamb horse foal",
    "The number after {} is": "nine ten twelve thirteen",
}


class Task(NamedTuple):
    """A question, the beginning of its answer, and the rest of it, which the model is to find."""

    question: str
    lead: str
    answer: str


class Prompt(NamedTuple):
    """A task as a model meets it: the text so far, and what must come next."""

    text: str
    answer: str


@dataclass(frozen=True)
class TaskScores:
    """Which tasks a file solves: by kind, for each in order. `seconds` is the wall time, load included.

    `repeated` is the share of the 4-grams of its open answers that stood in the same answer before.
    """

    right: dict[str, tuple[bool, ...]]
    seconds: float
    repeated: float

    @property
    def shares(self) -> dict[str, Interval]:
        """The share that is solved with its confidence interval, of all tasks together ("all") and by kind."""
        groups = {"all": [one for answers in self.right.values() for one in answers], **self.right}
        return {name: share_interval(sum(answers), len(answers)) for name, answers in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {**as_json(self), "shares": as_json(self.shares)}

    def flat(self) -> dict[str, float]:
        """Return the shares and their intervals as one level of names, for tables."""
        values = {"repeated": self.repeated}
        for kind, share in self.shares.items():
            values |= {f"tasks_{kind}": share.mean, f"tasks_{kind}_low": share.low, f"tasks_{kind}_high": share.high}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskScores:
        """Return what `as_json` was made of. Raises KeyError or TypeError for anything else."""
        right = {str(kind): tuple(bool(one) for one in answers) for kind, answers in values["right"].items()}
        return cls(right, float(values["seconds"]), float(values["repeated"]))


def describe_share(share: Interval) -> str:
    """Return a share and its interval in percent, such as "50% (24-76)"."""
    return f"{share.mean:.0%} ({100 * share.low:.0f}-{100 * share.high:.0f})"


def make_tasks(seed: int = 0) -> dict[str, list[Task]]:
    """Return PER_KIND different tasks of every kind, their levels in turn; the same seed makes the same tasks."""
    rng = random.Random(seed)  # noqa: S311 - nothing secret is made of it
    tasks: dict[str, list[Task]] = {kind: [] for kind in _KINDS}
    for kind, made in tasks.items():
        while len(made) < PER_KIND:
            one = _KINDS[kind](rng, len(made))
            if one not in made:
                made.append(one)
    return tasks


def make_prompts(file: GGUFFile) -> dict[str, list[Prompt]]:
    """Return the tasks by kind, and the open requests, as a user's questions in the chat template of `file`, if any.

    Raises HarnessError where the template fails.
    """
    template = read_template(file, "leave out the tasks")

    def ask(question: str) -> str:
        return template.render([{"role": "user", "content": question}]) if template else f"{question}\n"

    with closing(template) if template else nullcontext():
        tasks = {kind: [Prompt(ask(q) + lead, end) for q, lead, end in made] for kind, made in make_tasks().items()}
        return tasks | {OPEN: [Prompt(ask(one), "") for one in REQUESTS]}


def solve_tasks(path: Path, setup: Setup, prompts: Mapping[str, Sequence[Prompt]], **limits: Any) -> TaskScores:
    """Find out which prompts a file answers rightly, in a child process; `limits` as in `score_file`.

    The context of `setup` does not count: it is as long as the longest prompt. Raises HarnessError if llama.cpp cannot
    run the file.
    """
    began = time.perf_counter()
    tasks = {kind: made for kind, made in prompts.items() if kind != OPEN}
    everything, requests = [one for made in tasks.values() for one in made], [one.text for one in prompts.get(OPEN, ())]
    with closing(
        stream_from_child(_solve_prompts, path, setup, everything, requests, what=f"running {path}", **limits)
    ) as stream:
        right = {kind: tuple(islice(stream, len(made))) for kind, made in tasks.items()}
        counts = [count_repeats(answer) for answer in stream]
    repeated = sum(repeats for repeats, _ in counts) / max(1, sum(total for _, total in counts))
    return TaskScores(right, time.perf_counter() - began, repeated)


def count_repeats(tokens: Sequence[int]) -> tuple[int, int]:
    """Return how many runs of four tokens occurred before, and how many there are."""
    runs = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(runs) - len(set(runs)), len(runs)


def _solve_prompts(path: Path, setup: Setup, prompts: Sequence[Prompt], requests: Sequence[str]) -> Iterator[Any]:
    """Yield whether each task is solved, then the tokens of the answer to each request."""
    with open_model(path, replace(setup, n_context=0)) as model:
        texts = [(model.tokenize_prompt(one.text), model.tokenize_prompt(one.text + one.answer)) for one in prompts]
        opened = [model.tokenize_prompt(one) for one in requests]
        model.start(max(len(tokens) for tokens in (*(whole for _, whole in texts), *opened)) + ANSWER)
        before: list[int] = []
        for prompt, whole in texts:
            first = count_common(prompt, whole) - 1  # a token may hold the end of the prompt and more
            n_kept = count_common(before, whole[:first])
            blocks = model.blocks(np.array(whole, np.int32), first, n_kept=n_kept)
            best = [int(token) for block in blocks for token in block.argmax(axis=1)]
            yield _is_answer(best, whole[first + 1 :], model.piece)
            before = whole
        yield from (_write_answer(model, tokens) for tokens in opened)


def _write_answer(model: Llama, prompt: list[int]) -> list[int]:
    """The most likely tokens one after the other, up to `ANSWER` of them."""
    answer, logits = list[int](), model.logits(np.array(prompt, np.int32), len(prompt) - 1)
    while len(answer) < ANSWER and not model.ends(token := int(logits[-1].argmax())):
        answer.append(token)
        logits = model.feed([token], [True])
    return answer


def _is_answer(best: list[int], answer: list[int], piece: Callable[[int], bytes]) -> bool:
    """Whether the tokens `best`, one more than those of the answer, spell it and stop.

    `best[i]` is the most likely token after the prompt and `answer[:i]`.
    """
    n = count_common(best, answer)
    said, rest = piece(best[n]), b"".join(piece(token) for token in answer[n:])
    after = said[len(rest) :]
    return said.startswith(rest) and (not after or after[0] in _STOPS)


# --- the kinds: the i-th task of each ---


def _choose(rng: random.Random, words: str) -> str:
    return rng.choice(words.split())


def _copy_words(rng: random.Random, i: int) -> Task:
    n_word = (1, 2, 4, 7, 12)[i % _LEVELS]
    words = " ".join("".join(_choose(rng, _SYLLABLES) for _ in range(rng.randint(2, 3))) for _ in range(n_word))
    examples = "apple rain -> apple rain\nmetuza -> metuza\ndogi rasel tipo -> dogi rasel tipo"
    return Task(f"Copy the words.\n{examples}", f"{words} ->", f" {words}")


def _calculate(rng: random.Random, i: int) -> Task:
    low, high = ((1, 9), (1, 19), (10, 49), (10, 99), (100, 999))[i % _LEVELS]
    b, a = sorted(rng.randint(low, high) for _ in range(2))
    sign, result = rng.choice((("+", a + b), ("-", a - b)))
    return Task("Calculate.\n7 + 2 = 9\n35 - 12 = 23", f"{a} {sign} {b} =", f" {result}")


def _complete_json(rng: random.Random, i: int) -> Task:
    one = {key: _choose(rng, words) for key, words in _RECORD.items()}
    whole = json.dumps(one)
    cut = whole.index(":", whole.index([*one][_LEVELS - 1 - i % _LEVELS])) + 1
    example = {"city": "Lima", "color": "violet", "name": "Zoe", "pet": "mouse", "job": "clerk"}
    texts = ("The {job} {name} lives in {city}, has a {pet} and likes {color}.".format(**of) for of in (example, one))
    question = f"\n{json.dumps(example)}\n".join(texts)
    return Task(f"Write each sentence as JSON.\n{question}", whole[:cut], whole[cut:])


def _close_brackets(rng: random.Random, i: int) -> Task:
    pairs = [_choose(rng, "() [] {}") for _ in range((1, 2, 3, 5, 8)[i % _LEVELS])]
    opened, closed = [pair[0] for pair in pairs], " ".join(pair[1] for pair in reversed(pairs))
    opened.insert(rng.randint(0, len(pairs)), " ".join(_choose(rng, "() [] {}")))  # one that is closed already
    examples = "( [ { } -> ] )\n[ ] ( { [ -> ] } )\n{ ( ) -> }"
    return Task(f"Close the open brackets, the last one first.\n{examples}", f"{' '.join(opened)} ->", f" {closed}")


def _recall_arguments(rng: random.Random, i: int) -> Task:
    n_argument = 1 + i % _LEVELS
    verbs = rng.sample(_VERBS.split(), (1, 3, 5, 8, 12)[i % _LEVELS])
    arguments = {verb: ", ".join(rng.sample(_ARGUMENTS.split(), rng.randint(1, n_argument))) for verb in verbs}
    verb = rng.choice(verbs)
    lines = [f"Repeat the definition of {verb}.", *(f"def {name}({given}):" for name, given in arguments.items())]
    return Task("\n".join(lines), f"def {verb}(", f"{arguments[verb]}):")


def _complete_fact(_: random.Random, i: int) -> Task:
    facts = [(text, pairs.split()) for text, pairs in _FACTS.items()]
    known = [(text.format(words[j]), words[j + 1]) for text, words in facts for j in range(0, len(words), 2)]
    lead, answer = known[i % len(known)]
    examples = "The color of snow is white.\nThe capital of Hungary is Budapest.\nThe plural of ox is oxen."
    return Task(f"Complete the sentence.\n{examples}", lead, f" {answer}")


_KINDS = {
    "copying": _copy_words,
    "arithmetic": _calculate,
    "JSON": _complete_json,
    "brackets": _close_brackets,
    "recall": _recall_arguments,
    "cloze": _complete_fact,
}
