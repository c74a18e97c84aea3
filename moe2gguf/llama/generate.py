"""Text from a GGUF file, piece by piece, out of a child process."""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe2gguf.errors import CrashError, HarnessError
from moe2gguf.llama.child import converse_with_child
from moe2gguf.llama.devices import Setup, place_on_device
from moe2gguf.llama.model import Llama, open_model
from moe2gguf.llama.repack import explain_retry, leave_weights_alone

N_BATCH = 512
_MIN_P = 0.05


@dataclass(frozen=True)
class Speed:
    """What a generation took. Speeds are tokens per second; 0.0 where nothing was computed.

    n_prompt counts the tokens that were computed: not those that are left from the prompt before. n_generated counts
    the tokens sampled, the one that ends the text included; the first of them comes from the prompt's own logits, so
    generation_speed is over the others.
    """

    n_prompt: int
    n_generated: int
    prompt_speed: float
    generation_speed: float
    stopped: Literal["end of text", "token limit", "interrupted"]


@dataclass(frozen=True)
class Turn:
    """A text to continue, and how. `temperature` 0 takes the most likely token each time.

    Raises HarnessError for numbers out of range.
    """

    prompt: str
    n_token: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_token < 1 or not self.temperature >= 0 or not 0 <= self.seed < 2**32:
            raise HarnessError(
                f"n_token {self.n_token}, temperature {self.temperature}, seed {self.seed}: "
                "needed are at least 1 token, a temperature of at least 0 and a seed of 32 bits"
            )


class Generation(Iterator[str]):
    """Pieces of text as they are generated; `speed` is set once they are exhausted.

    `notes` are sentences that a person who waits should read, known when the first piece is.
    """

    def __init__(self, pieces: Generator[str, None, Speed], session: Session) -> None:
        self._pieces = pieces
        self._session = session
        self.speed: Speed | None = None

    def __next__(self) -> str:
        """Return the next piece, never a part of a character."""
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.speed = self.speed or end.value
            raise StopIteration from None

    @property
    def notes(self) -> list[str]:
        """What happened to the process that generates."""
        return self._session.notes

    def stop(self) -> None:
        """Let the text end here, with its speed; also from a signal handler."""
        self._session.stop()

    def close(self) -> None:
        """Stop early and end the child process."""
        self._pieces.close()
        self._session.close()


class Session:
    """A file that is open in a child process and continues one text after the other.

    What a prompt has in common with the text before is not computed again. `n_context` is the room for prompt and
    answer together; 0: made for the first turn. Nothing runs before the first piece is asked for.
    """

    def __init__(self, path: Path, setup: Setup, n_context: int = 0) -> None:
        self._path = path
        self._setup = setup
        self._n_context = n_context
        self._talk: Generator[Any, Any, None] | None = None
        self._stop = self._said = False
        self.notes: list[str] = []

    def answer(self, turn: Turn, *, last: bool = False) -> Generation:
        """Continue a text; iterate over the result for it. The process ends with the `last` answer.

        Raises HarnessError from the iteration, see `generate`.
        """
        return Generation(self._answer(turn, last), self)

    def stop(self) -> None:
        """Let the present answer end with its next piece."""
        self._stop = True

    def close(self) -> None:
        """End the child process; the next answer starts another one."""
        if self._talk:
            self._talk.close()
        self._talk = None

    def _answer(self, turn: Turn, last: bool) -> Generator[str, None, Speed]:
        self._stop = self._said = False
        try:
            return (yield from self._converse(turn))
        except CrashError as crash:
            setup = leave_weights_alone(self._setup, crash)
            if setup is None or self._said:
                raise
            self._setup = setup
            self.notes.append(explain_retry(crash))
            return (yield from self._converse(turn))
        finally:
            if last:
                self.close()

    def _converse(self, turn: Turn) -> Generator[str, None, Speed]:
        """Yield the pieces of an answer, and tell the child whether to go on after each."""
        try:
            if self._talk is None:
                arguments = (self._path, self._setup, self._n_context)
                self._talk = converse_with_child(_answer_turns, *arguments, what=f"running {self._path}")
                next(self._talk)
            item = self._talk.send(turn)
            while isinstance(item, str):
                if item:
                    self._said = True
                    yield item
                item = self._talk.send(self._stop)
        except BaseException:
            self.close()
            raise
        speed: Speed = item
        return speed


def generate(
    path: str | Path,
    prompt: str,
    *,
    n_token: int = 64,
    n_expert_used: int | Literal["all"] | None = None,
    device: str = "cpu",
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> Generation:
    """Continue `prompt` by up to `n_token` tokens; iterate over the result for the text.

    The prompt is completed as it is: no chat template is applied, but special tokens written in it, such as
    `<|im_start|>`, are recognized. Temperature 0 takes the most likely token each time, another one draws among those
    that are at least a twentieth as likely. `device` is one of `moe2gguf.llama.devices.DEVICES`. Nothing runs before
    the first piece is asked for.

    Raises HarnessError (at once for numbers out of range, else from the iteration) if llama.cpp cannot run the
    file, has no GPU support, or prompt and text exceed the context the model was trained for.
    """
    path = Path(path)
    turn = Turn(prompt, n_token, temperature, seed)
    return Session(path, make_setup(n_expert_used, device, threads)).answer(turn, last=True)


def make_setup(n_expert_used: int | Literal["all"] | None, device: str, threads: int | None) -> Setup:
    """Return the settings that people run with: fast before exact."""
    setup = Setup(
        n_expert_used=n_expert_used,
        n_context=0,
        n_batch=N_BATCH,
        n_threads=threads,
        kv_type="f16",
        flash_attention=True,
        repack=True,
    )
    return place_on_device(setup, device)


# --- in the child ---


def _answer_turns(path: Path, setup: Setup, n_context: int) -> Generator[str | Speed | None, Any, None]:
    """Answer every turn that is sent: its pieces, each answered by whether to stop there, then its speed."""
    with open_model(path, setup) as model:
        turn = yield None
        cached: list[int] = []
        while True:
            tokens = model.tokenize_prompt(turn.prompt)
            n_token = _count_room(model, len(tokens), turn.n_token, n_context)
            if not model.n_context:
                model.start(n_context or len(tokens) + n_token)
            sampler = _make_sampler(model.lib, turn.temperature, turn.seed)
            try:
                turn = yield (yield from _decode_texts(model, sampler, cached, tokens, n_token))
            finally:
                model.lib.llama_sampler_free(sampler)


def _decode_texts(
    model: Llama, sampler: Any, cached: list[int], prompt: list[int], n_token: int
) -> Generator[str, bool | None, Speed]:
    """Yield the pieces; `cached` is what the model has computed already, and is brought up to date."""
    began = time.perf_counter()
    n_kept = model.keep(count_common(cached, prompt[:-1]))
    del cached[n_kept:]
    stop = yield from _feed_prompt(model, cached, prompt)
    n_prompt, prompted = len(cached) - n_kept, time.perf_counter()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    n, ended, token = 0, False, prompt[-1]
    while not stop and not ended and n < n_token:
        if n:
            model.feed([token], [True])
            cached.append(token)
        token = model.lib.llama_sampler_sample(sampler, model.context, -1)
        ended = model.ends(token)
        n += 1
        stop = not ended and bool((yield decoder.decode(model.piece(token))))
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
    seconds = time.perf_counter() - prompted
    return Speed(
        n_prompt=n_prompt,
        n_generated=n,
        prompt_speed=n_prompt / (prompted - began),
        generation_speed=(n - 1) / seconds if n > 1 else 0.0,
        stopped="end of text" if ended else "interrupted" if stop else "token limit",
    )


def _feed_prompt(model: Llama, cached: list[int], prompt: list[int]) -> Generator[str, bool | None, bool]:
    """Compute what is not cached, with an empty piece after each batch; return whether to stop."""
    while len(cached) < len(prompt):
        piece = prompt[len(cached) : len(cached) + N_BATCH]
        cached += piece
        model.feed(piece, [False] * (len(piece) - 1) + [len(cached) == len(prompt)])
        if (yield ""):
            return True
    return False


def count_common(first: list[int], second: list[int]) -> int:
    """Return how many tokens two texts have in common at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _count_room(model: Llama, n_prompt: int, n_token: int, n_context: int) -> int:
    """How many tokens to generate: `n_token`, or what a context of fixed size leaves. Raises HarnessError."""
    if n_prompt == 0:
        raise HarnessError(f"{model.facts.path}: the prompt has no token to start from: write at least one word")
    if n_context:
        if n_prompt >= n_context:
            raise HarnessError(f"a text of {n_prompt} tokens fills the context of {n_context}: begin a new one")
        return min(n_token, n_context - n_prompt)
    limit = model.facts.n_context_train
    if limit and n_prompt + n_token > limit:
        raise HarnessError(
            f"a prompt of {n_prompt} tokens and {n_token} more exceed the model's context of {limit}: "
            "shorten the prompt or ask for fewer tokens"
        )
    return n_token


def _make_sampler(lib: Any, temperature: float, seed: int) -> Any:
    """Return a llama.cpp sampler chain: the most likely token at temperature 0, else a draw among the likely ones."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if temperature == 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    else:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(_MIN_P, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    return chain
