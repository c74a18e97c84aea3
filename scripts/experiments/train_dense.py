"""Train a dense checkpoint's layers to predict the next token: the control of scripts/bench heal.

    python scripts/experiments/train_dense.py MODEL OUT --text FILE [--tokens N] [--steps N] [--batch 2] [--lr RATE]

Windows, their order, the optimizer and its schedule are those of `moe2gguf heal`. OUT is a folder like MODEL.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moe2gguf.experts.heal.optimize import optimizer_for
from moe2gguf.experts.heal.settings import HealSettings, batch_at
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.recipes.heal import read_texts

N_CONTEXT = 512


def main() -> None:
    """Train, and write the folder."""
    options = parse()
    settings = HealSettings(batch=options.batch, lr=options.lr, steps=options.steps)
    texts = read_texts(open_checkpoint(options.model), [options.text], None, options.tokens, N_CONTEXT, N_CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name or name.endswith("norm.weight"))
    optimizer, schedule = optimizer_for(model, settings, settings.steps, settings.lr)
    for step in range(settings.steps):
        ids = torch.from_numpy(texts.ids[batch_at(settings, len(texts.ids), step)])
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
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
    parser.add_argument("--lr", type=float, default=HealSettings.lr)
    for name, default in (("tokens", 184320), ("steps", 240), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
