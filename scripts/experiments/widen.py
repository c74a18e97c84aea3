"""Write a checkpoint again with a wider residual stream, the same model: python widen.py FOLDER OUT D_MODEL.

The types with blocks of 256 need rows of such a width; SmolLM2-135M's are 576. Everything new is zero: columns of the
embedding, rows and columns of the projections, whole attention heads of the old size. What is new in the residual
stream therefore stays zero, and RMSNorm, whose mean is now over more numbers, is made up for: with s the old width over
the new, weights times sqrt(s) and epsilon times s give what they gave. Every logit is the original's up to rounding.

With --noise every projection also gets seeded uniform noise of one quantization step, for a model whose weights come
from a file of 4-bit blocks (see scripts/smollm2): on that grid a type with the same grid would look better than it is.
That is another model, slightly worse than the original.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

BLOCK, STEPS = 32, 15  # of Q4_1: the numbers of a block lie on 16 levels
ROWS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")  # make heads, or write to the residual stream
COLUMNS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # read them
COMPANIONS = ("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")

Weights = dict[str, np.ndarray]


def write(source: Path, folder: Path, d_model: int, seed: int | None = None) -> None:
    """Write the checkpoint (one file of f32 weights, arch llama) into a new folder; a `seed` adds the noise."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(source / "model.safetensors")
    if seed is not None:
        weights = noisy(weights, seed)
    folder.mkdir(parents=True)
    save_file(widen(weights, config, d_model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(wider(config, d_model), indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copy(source / name, folder)


def wider(config: dict[str, Any], d_model: int) -> dict[str, Any]:
    """config.json of the wider model; its heads keep their size and their grouping."""
    old = config["hidden_size"]
    changes = {"hidden_size": d_model, "rms_norm_eps": config["rms_norm_eps"] * old / d_model}
    changes["head_dim"] = config.get("head_dim") or old // config["num_attention_heads"]
    for key in ("num_attention_heads", "num_key_value_heads"):
        changes[key], rest = divmod(config[key] * d_model, old)
        if rest:
            raise SystemExit(f"{config[key]} {key} do not grow to a whole number from {old} to {d_model}")
    return {**config, **changes}


def widen(weights: Weights, config: dict[str, Any], d_model: int) -> Weights:
    """The weights of the wider model, by their Hugging Face names: shapes (rows, columns) and (d_model,)."""
    factor = d_model / config["hidden_size"]
    return {name: _wide(name, weight, factor) for name, weight in weights.items()}


def _wide(name: str, weight: np.ndarray, factor: float) -> np.ndarray:
    """One tensor with its new rows and columns of zeros; a norm's weights shrink as its mean does."""
    if weight.ndim == 1:
        return np.pad(weight / np.float32(math.sqrt(factor)), (0, round(len(weight) * (factor - 1))))
    kind = name.split(".")[-2]
    grows = (kind in ROWS, kind in COLUMNS)
    extra = [round(n * (factor - 1)) if grow else 0 for n, grow in zip(weight.shape, grows, strict=True)]
    return np.pad(weight, [(0, n) for n in extra])


def noisy(weights: Weights, seed: int) -> Weights:
    """The weights with every number of a projection moved by up to half a step of its block, evenly spread."""
    random = np.random.default_rng(seed)
    return {
        name: _moved(weight, random) if name.endswith("_proj.weight") else weight
        for name, weight in sorted(weights.items())
    }


def _moved(weight: np.ndarray, random: np.random.Generator) -> np.ndarray:
    blocks = weight.reshape(-1, BLOCK)
    step = np.ptp(blocks, axis=1, keepdims=True) / np.float32(STEPS)
    moved: np.ndarray = blocks + step * random.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
    return moved.reshape(weight.shape)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("d_model", type=int, metavar="D_MODEL")
    parser.add_argument("--noise", type=int, metavar="SEED")
    options = parser.parse_args(arguments)
    write(options.source, options.folder, options.d_model, options.noise)


if __name__ == "__main__":
    main()
