"""Text from a GGUF file, piece by piece, out of a child process."""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.devices import Setup, place_on_device
from moe2gguf.llama.model import Llama, open_model

_N_BATCH = 512


@dataclass(frozen=True)
class Speed:
    """What a generation took. Speeds are tokens per second; 0.0 where nothing was computed.

    n_generated counts the tokens sampled, the one that ends the text included; the first of them comes from the
    prompt's own logits, so generation_speed is over the others.
    """

    n_prompt: int
    n_generated: int
    prompt_speed: float
    generation_speed: float
    stopped: Literal["end of text", "token limit"]


class Generation(Iterator[str]):
    """Pieces of text as they are generated; `speed` is set once they are exhausted."""

    def __init__(self, pieces: Generator[str, None, Speed]) -> None:
        self._pieces = pieces
        self.speed: Speed | None = None

    def __next__(self) -> str:
        """Return the next piece, never a part of a character."""
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.speed = self.speed or end.value
            raise StopIteration from None

    def close(self) -> None:
        """Stop early and end the child process."""
        self._pieces.close()


def generate(
    path: Path,
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
    `<|im_start|>`, are recognized. Temperature 0 takes the most likely token each time. `device` is one of
    `moe2gguf.llama.devices.DEVICES`. Nothing runs before the first piece is asked for.

    Raises HarnessError (at once for numbers out of range, else from the iteration) if llama.cpp cannot run the
    file, has no GPU support, or prompt and text exceed the context the model was trained for.
    """
    if n_token < 1 or not temperature >= 0 or not 0 <= seed < 2**32:
        raise HarnessError(
            f"n_token {n_token}, temperature {temperature}, seed {seed}: "
            "needed are at least 1 token, a temperature of at least 0 and a seed of 32 bits"
        )
    setup = Setup(
        n_expert_used=n_expert_used,
        n_context=0,
        n_batch=_N_BATCH,
        n_threads=threads,
        kv_type="f16",
        flash_attention=True,
        repack=True,
    )
    args = (path, place_on_device(setup, device), prompt, n_token, temperature, seed)
    return Generation(stream_from_child(_generate, *args, what=f"running {path}"))


def _generate(
    path: Path, setup: Setup, prompt: str, n_token: int, temperature: float, seed: int
) -> Generator[str, None, Speed]:
    with open_model(path, setup) as model:
        tokens = model.tokenize_prompt(prompt)
        _require_fit(model, len(tokens), n_token)
        model.start(len(tokens) + n_token)
        sampler = _make_sampler(model.lib, temperature, seed)
        try:
            return (yield from _decode_texts(model, sampler, tokens, n_token))
        finally:
            model.lib.llama_sampler_free(sampler)


def _decode_texts(model: Llama, sampler: Any, prompt: list[int], n_token: int) -> Generator[str, None, Speed]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    began = time.perf_counter()
    for start in range(0, len(prompt), _N_BATCH):
        piece = prompt[start : start + _N_BATCH]
        model.feed(piece, [start + i == len(prompt) - 1 for i in range(len(piece))])
    token = model.lib.llama_sampler_sample(sampler, model.context, -1)
    prompted = time.perf_counter()
    n = 1
    while not model.ends(token) and n <= n_token:
        text = decoder.decode(model.piece(token))
        if text:
            yield text
        if n == n_token:
            break
        model.feed([token], [True])
        token = model.lib.llama_sampler_sample(sampler, model.context, -1)
        n += 1
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
    ended = time.perf_counter()
    return Speed(
        n_prompt=len(prompt),
        n_generated=n,
        prompt_speed=len(prompt) / (prompted - began),
        generation_speed=(n - 1) / (ended - prompted) if n > 1 else 0.0,
        stopped="end of text" if model.ends(token) else "token limit",
    )


def _require_fit(model: Llama, n_prompt: int, n_token: int) -> None:
    if n_prompt == 0:
        raise HarnessError(f"{model.facts.path}: the prompt has no token to start from: write at least one word")
    limit = model.facts.n_context_train
    if limit and n_prompt + n_token > limit:
        raise HarnessError(
            f"a prompt of {n_prompt} tokens and {n_token} more exceed the model's context of {limit}: "
            "shorten the prompt or ask for fewer tokens"
        )


def _make_sampler(lib: Any, temperature: float, seed: int) -> Any:
    """Return a llama.cpp sampler chain: the most likely token at temperature 0, else a draw."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if temperature == 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    else:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    return chain
