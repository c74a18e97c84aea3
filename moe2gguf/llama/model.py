"""A GGUF file in llama.cpp: its facts, its tokens, its logits. Runs inside a child process only.

This is a thin layer over the low-level functions of llama-cpp-python: the high-level class keeps logits of every
position, forces flash attention off, and hides the settings that make results repeatable.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.counts import count_experts
from moe2gguf.gguf.system import count_processors
from moe2gguf.llama.devices import Setup, list_offload_devices, list_placements
from moe2gguf.llama.library import import_llama, load_model, make_int_overrides, quote_last_lines

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Facts:
    """Facts from the metadata of a file, read without its weights; n_expert is 0 for a dense MLP.

    n_expert and n_expert_used contain the n_shared that are the graph's own shared expert.
    """

    path: Path
    architecture: str
    n_expert: int
    n_expert_used: int
    n_vocab: int
    n_context_train: int
    n_shared: int = 0


def read_facts(path: Path) -> Facts:
    """Read metadata and vocabulary, no weights. Raises HarnessError if llama.cpp refuses the file."""
    with open_vocabulary(path) as llama:
        return llama.facts


@contextmanager
def open_vocabulary(path: Path) -> Iterator[Llama]:
    """Load metadata and vocabulary, no weights: a file that can tokenize but not compute. Raises as `read_facts`."""
    lib = import_llama()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = load_model(lib, path, params)
    try:
        facts = _facts(lib, model, path)
        yield Llama(lib, model, Setup(), facts, facts.n_expert_used)
    finally:
        lib.llama_model_free(model)


def choose_expert_override(facts: Facts, requested: int | Literal["all"] | None) -> int | None:
    """Return the k to override in the file, or None to leave it. Raises HarnessError for a k that cannot run.

    llama.cpp aborts the process on a bad count and ignores an override of the wrong kind, so it is checked here:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L1361
    """
    n, name = facts.n_expert, facts.path.name
    if n == 0:
        if requested not in (None, "all"):
            raise HarnessError(
                f"{name} is dense, it has no experts to choose from: leave the number of used experts out"
            )
        return None
    if not facts.n_shared < facts.n_expert_used <= n:
        raise HarnessError(f"{name} says that {facts.n_expert_used} of {n} experts are used: convert it again")
    if requested is None:
        return None
    k = n if requested == "all" else int(requested)
    if not facts.n_shared < k <= n:
        shared = f", {facts.n_shared} of them shared" if facts.n_shared else ""
        raise HarnessError(f"{name} has {n} experts{shared}, {k} cannot be used: choose {facts.n_shared + 1} to {n}")
    return k


@contextmanager
def open_model(path: Path, setup: Setup) -> Iterator[Llama]:
    """Load a file, ready to compute; a context of 0 tokens leaves `Llama.start` to the caller.

    Raises HarnessError if the file, the settings or the device do not fit.
    """
    lib = import_llama()
    devices = list_offload_devices(lib, setup.n_gpu_layers, setup.rpc_servers)  # must outlive the load
    facts = read_facts(path)
    params = lib.llama_model_default_params()
    params.devices = devices and ctypes.addressof(devices)
    params.n_gpu_layers = setup.n_gpu_layers
    params.use_extra_bufts = setup.repack
    k = choose_expert_override(facts, setup.n_expert_used)
    if k is not None:
        key = f"{facts.architecture}.expert_used_count"
        params.kv_overrides = make_int_overrides(lib, {key: k - facts.n_shared})
    placements = list_placements(lib, setup.on_cpu)  # must outlive the load
    params.tensor_buft_overrides = ctypes.addressof(placements)
    llama = Llama(lib, load_model(lib, path, params), setup, facts, facts.n_expert_used if k is None else k)
    try:
        if setup.n_context:
            llama.start(setup.n_context)
        yield llama
    finally:
        llama.close()


class Llama:
    """An open file; made by `open_model` only."""

    def __init__(self, lib: ModuleType, model: int, setup: Setup, facts: Facts, n_expert_used: int) -> None:
        self.lib = lib
        self.model = model
        self.setup = setup
        self.facts = facts
        self.n_expert_used = n_expert_used
        self.vocab = lib.llama_model_get_vocab(model)
        self.context: int | None = None
        self.n_context = 0
        self.n_past = 0

    def start(self, n_context: int, observer: Any = None) -> None:
        """Make room for `n_context` tokens, once; `observer` is an evaluation callback that the caller keeps alive.

        It is called for every node of the graph: see `measure.watch_routing`. Raises HarnessError if llama.cpp cannot.
        """
        params = _context_params(self.lib, self.setup, n_context)
        if observer is not None:
            params.cb_eval = observer
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            path = self.facts.path
            raise HarnessError(f"{path}: llama.cpp cannot make a context of {n_context} tokens{quote_last_lines()}")
        self.n_context = n_context

    def close(self) -> None:
        """Free everything."""
        if self.context:
            self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, *, special: bool = True, parse_special: bool = False) -> NDArray[np.int32]:
        """Return the token ids of `text` (n_token,); with `special` also BOS/EOS where the file asks for them."""
        return _tokenize(self.lib, self.vocab, text, special, parse_special)

    def tokenize_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text to be continued.

        BOS stands in front where the file asks for it, once: templates write it too. There is never EOS behind it.
        """
        ids = [int(token) for token in self.tokenize(text, special=False, parse_special=True)]
        bos = self.bos()
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def bos(self) -> int | None:
        """Return the token that starts every text, or None if the file wants none."""
        return int(self.lib.llama_vocab_bos(self.vocab)) if self.lib.llama_vocab_get_add_bos(self.vocab) else None

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token, perhaps a part of a character; control tokens have none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self.lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def ends(self, token: int) -> bool:
        """Return whether a token ends the text."""
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))

    def vocabulary_digest(self) -> str:
        """Return a digest of the vocabulary: its kind, BOS rule, and every token's text and attributes."""
        lib, vocab = self.lib, self.vocab
        digest = hashlib.sha256(f"{lib.llama_vocab_type(vocab)} {lib.llama_vocab_get_add_bos(vocab)}".encode())
        for token in range(self.facts.n_vocab):
            text = lib.llama_vocab_get_text(vocab, token) or b""
            digest.update(b"%d %d " % (lib.llama_vocab_get_attr(vocab, token), len(text)) + text)
        return digest.hexdigest()

    def clear(self) -> None:
        """Forget all tokens."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.n_past = 0

    def keep(self, n_token: int) -> int:
        """Forget all tokens but the first `n_token`, and return how many are left: none where that is impossible."""
        memory = self.lib.llama_get_memory(self.context)
        if not self.lib.llama_memory_seq_rm(memory, 0, n_token, -1):
            self.clear()
            return 0
        self.n_past = n_token
        return n_token

    def feed(self, tokens: Sequence[int] | NDArray[np.int32], scored: Sequence[bool] | NDArray[np.bool_]) -> Logits:
        """Compute up to n_batch tokens (n_token,) after those fed so far.

        Returns the logits of the positions where `scored` is true, (n_scored, n_vocab): a view, valid until the
        next call. Raises HarnessError if the context is full or llama.cpp refuses a token.
        """
        n = len(tokens)
        room = min(self.setup.n_batch, self.n_context - self.n_past)
        if not 0 < n <= room:
            raise HarnessError(f"{n} tokens do not fit, there is room for {room}: raise the context or feed fewer")
        batch = self.lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            _view(batch.token, n)[:] = tokens
            _view(batch.pos, n)[:] = np.arange(self.n_past, self.n_past + n)
            _view(batch.n_seq_id, n)[:] = 1
            _view(batch.logits, n)[:] = scored
            for i in range(n):
                batch.seq_id[i][0] = 0
            code = self.lib.llama_decode(self.context, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if code != 0:
            raise HarnessError(f"{self.facts.path}: llama_decode failed with code {code}{quote_last_lines()}")
        self.n_past += n
        n_scored = int(np.sum(scored))
        if n_scored == 0:
            return np.empty((0, self.facts.n_vocab), np.float32)
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (n_scored, self.facts.n_vocab))

    def blocks(
        self, tokens: NDArray[np.int32], first: int = 0, last: int | None = None, n_kept: int = 0
    ) -> Iterator[Logits]:
        """Compute a text of its own, `tokens` (n_token,), and yield the logits of positions first ... last - 1.

        Blocks are (at most n_batch, n_vocab), in order, each a view that is valid until the next one. The first
        `n_kept` tokens, at most `first`, are those of the text before and need not be computed again.
        """
        scored = np.zeros(len(tokens), np.bool_)
        scored[first:last] = True
        if n_kept:
            n_kept = self.keep(n_kept)
        else:
            self.clear()
        for start in range(n_kept, len(tokens), self.setup.n_batch):
            stop = start + self.setup.n_batch
            block = self.feed(tokens[start:stop], scored[start:stop])
            if len(block):
                yield block

    def logits(self, tokens: NDArray[np.int32], first: int = 0, last: int | None = None) -> Logits:
        """Return what `blocks` yields as one array of its own, (last - first, n_vocab)."""
        parts = [block.copy() for block in self.blocks(tokens, first, last)]
        return np.concatenate(parts) if parts else np.empty((0, self.facts.n_vocab), np.float32)


def _context_params(lib: ModuleType, setup: Setup, n_context: int) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = n_context
    params.n_batch = params.n_ubatch = setup.n_batch
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = setup.n_threads or count_processors()
    params.type_k = params.type_v = lib.GGML_TYPE_F32 if setup.kv_type == "f32" else lib.GGML_TYPE_F16
    params.flash_attn_type = (
        lib.LLAMA_FLASH_ATTN_TYPE_AUTO if setup.flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    return params


def _facts(lib: ModuleType, model: int, path: Path) -> Facts:
    architecture = _text_value(lib, model, "general.architecture") or "unknown"
    n_expert, n_used, n_shared = count_experts(lambda key: _count(lib, model, path, f"{architecture}.{key}"))
    return Facts(
        path=path,
        architecture=architecture,
        n_expert=n_expert,
        n_expert_used=n_used,
        n_shared=n_shared,
        n_vocab=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)),
        n_context_train=_count(lib, model, path, f"{architecture}.context_length"),
    )


def _text_value(lib: ModuleType, model: int, key: str) -> str | None:
    buffer = ctypes.create_string_buffer(256)
    n = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return None if n < 0 else buffer.value.decode("utf-8", "replace")


def _count(lib: ModuleType, model: int, path: Path, key: str) -> int:
    text = _text_value(lib, model, key)
    if text is None:
        return 0
    if not text.isdecimal():  # a list has one count per layer, which the `llama` graph does not honor
        raise HarnessError(f"{path.name}: {key} is {text}, not one whole number for all layers: convert it again")
    return int(text)


def _tokenize(lib: ModuleType, vocab: int, text: str, special: bool, parse_special: bool) -> NDArray[np.int32]:
    data = text.encode("utf-8", "replace")
    size = len(data) + 8
    while True:
        tokens = (lib.llama_token * size)()
        n = lib.llama_tokenize(vocab, data, len(data), tokens, size, special, parse_special)
        if n >= 0:
            return np.array(tokens[:n], np.int32)
        if n == -(2**31):
            raise HarnessError(f"a text of {len(data)} bytes is too long for llama.cpp: use a shorter one")
        size = -n


def _view(pointer: Any, n: int) -> NDArray[Any]:
    return np.ctypeslib.as_array(pointer, (n,))
