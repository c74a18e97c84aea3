"""Train a small Qwen2 model from scratch: a second family for scripts/bench quality, where no download is wanted.

    python scripts/experiments/train_small.py OUT --text FILE [--epochs N] [--embedded] ...
    scripts/bench quality --model OUT --text FILE

The first 70 % of the text train a byte-level BPE tokenizer (Qwen2's pre-tokenizer) and the model; the rest is never
trained on, as in `scripts/bench quality`. OUT is a folder that `moe2gguf convert` reads. The same seed, on one thread,
gives the same weights.

Cost: with the default sizes (7 M parameters) 19 steps of 1,024 tokens took 21 s of processor time, scoring included, on
a busy core; by that, four epochs of 220,000 tokens take about 15 minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from environment import fail
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

from moe2gguf.experts.text import read_text
from moe2gguf.hf.tokenizer.pretokenizers import PRE_TOKENIZERS

SPLIT = 0.7
SCORED = 40
"""Held-out windows, at most, that the perplexity is taken from."""

END = "<|endoftext|>"
WARMUP, CLIP, BETAS = 0.05, 1.0, (0.9, 0.95)

Windows = NDArray[np.int64]
"""Token ids, (n_window, n_context)."""


def main() -> None:
    """Train, and write the folder."""
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    seen, held_out = texts(options)
    tokenizer = train_tokenizer(seen, options.vocabulary)
    ids = [np.array(tokenizer.encode(text).ids, np.int64) for text in seen]
    scored = windows(np.array(tokenizer.encode(held_out).ids, np.int64), options.context)[:SCORED]
    if not len(scored):
        fail(f"{options.text}: its last part has no whole window of {options.context} tokens")
    model = Qwen2ForCausalLM(config(options, tokenizer))
    print(f"{model.num_parameters():,} parameters, {sum(map(len, ids)):,} tokens to train on", flush=True)
    train(model, ids, scored, options)
    write(options.out, tokenizer, model)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--embedded", action="store_true", help="train on the text that comes with moe2gguf too")
    sizes = {"vocabulary": 4096, "d-model": 256, "d-ff": 1024, "layers": 6, "heads": 4, "kv-heads": 2, "context": 512}
    for name, default in (sizes | {"epochs": 4, "batch": 2, "seed": 0, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    return parser.parse_args()


def texts(options: argparse.Namespace) -> tuple[list[str], str]:
    """The texts to train on, and the part of --text that is held out."""
    whole = read_text(options.text).text
    cut_at = int(SPLIT * len(whole))
    more = [read_text(None).text] if options.embedded else []
    return [whole[:cut_at], *more], whole[cut_at:]


def train_tokenizer(seen: list[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of Qwen2's kind: NFC, digits one by one, no token in front."""
    (pattern,) = next(row.steps for row in PRE_TOKENIZERS if row.name == "qwen2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(seen, trainer)
    return tokenizer


def config(options: argparse.Namespace, tokenizer: Tokenizer) -> Qwen2Config:
    """The model's sizes; the rest is Qwen2's default."""
    end = tokenizer.token_to_id(END)
    return Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.d_model,
        intermediate_size=options.d_ff,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )


def windows(ids: NDArray[np.int64], n_context: int, start: int = 0) -> Windows:
    """Whole windows of `ids` (n_token,), one after the other from `start`."""
    n_window = (len(ids) - start) // n_context
    return ids[start : start + n_window * n_context].reshape(n_window, n_context)


def train(model: Qwen2ForCausalLM, ids: list[NDArray[np.int64]], scored: Windows, options: argparse.Namespace) -> None:
    """AdamW with warm-up and a cosine, `epochs` times through the text, cut elsewhere and shuffled every time."""
    random = np.random.default_rng(options.seed)
    epochs = [list(epoch(ids, options, random)) for _ in range(options.epochs)]
    optimizer = optimizer_for(model, options)
    steps = sum(map(len, epochs))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    for number, batches in enumerate(epochs, 1):
        losses, began = [], time.process_time()
        for batch in batches:
            tokens = torch.from_numpy(batch)
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(
            f"epoch {number}: {len(batches)} steps, loss {np.mean(losses):.4f}, held-out perplexity "
            f"{perplexity(model, scored):.2f}, {time.process_time() - began:.0f} s of processor time",
            flush=True,
        )


def epoch(ids: list[NDArray[np.int64]], options: argparse.Namespace, random: np.random.Generator) -> Iterator[Windows]:
    """Batches of one pass through all texts."""
    cuts = [windows(text, options.context, int(random.integers(options.context))) for text in ids]
    every = random.permutation(np.concatenate(cuts))
    yield from (every[i : i + options.batch] for i in range(0, len(every), options.batch))


def optimizer_for(model: Qwen2ForCausalLM, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101); biases and norms do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": options.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=BETAS)


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
def perplexity(model: Qwen2ForCausalLM, scored: Windows) -> float:
    """Of all tokens of all windows but their first."""
    return math.exp(np.mean([float(model(part, labels=part).loss) for part in torch.from_numpy(scored)[:, None]]))


def write(out: Path, tokenizer: Tokenizer, model: Qwen2ForCausalLM) -> None:
    """The folder, under its name when it is whole."""
    unfinished = out.with_name(out.name + ".part")
    model.save_pretrained(unfinished)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(unfinished)
    unfinished.rename(out)


if __name__ == "__main__":
    main()
