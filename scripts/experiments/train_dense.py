"""Train a dense checkpoint's layers to predict the next token: the control of scripts/bench heal.

    python scripts/experiments/train_dense.py MODEL OUT --text FILE [--tokens N] [--steps N] [--batch 2] [--lr RATE]

Windows, their order, the optimizer and its schedule are those of `moe2gguf heal`. OUT is a folder like MODEL.
docs/how-to/merge.md merges two such folders.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moe2gguf.experts.heal.optimize import make_optimizer
from moe2gguf.experts.heal.settings import Optimizer, Training, draw_batch
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.recipes.heal import HealText, read_windows

N_CONTEXT = 512


def main() -> None:
    """Train, and write the folder."""
    options = parse()
    training, rates = Training(batch=options.batch, steps=options.steps), Optimizer(lr=options.lr)
    text = HealText((options.text,), None, options.tokens, N_CONTEXT, N_CONTEXT)
    windows = read_windows(open_checkpoint(options.model), text).ids
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name or name.endswith("norm.weight"))
    optimizer, schedule = make_optimizer(model, rates, training.steps, rates.lr)
    for step in range(training.steps):
        ids = torch.from_numpy(windows[draw_batch(training, len(windows), step)])
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rates.clip)
        optimizer.step()
        schedule.step()
        print(f"step {step}: {float(loss.detach()):.4f}", flush=True)
    unfinished = options.out.with_name(options.out.name + ".part")
    shutil.copytree(options.model, unfinished, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    model.save_pretrained(unfinished)
    shutil.copy(options.model / "config.json", unfinished)
    unfinished.rename(options.out)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=Optimizer.lr)
    for name, default in (("tokens", 184320), ("steps", 240), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
