"""What a conversion may start from: a Hugging Face folder, a model of the Hub, or a dense GGUF file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeAlias

from moe2gguf.experts.slicing import plain_scale
from moe2gguf.gguf.blocks import is_power_of_two
from moe2gguf.gguf.dense_model import DenseFile, largest_block, open_dense
from moe2gguf.hf import hub
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.spec import Slicing

Source: TypeAlias = Checkpoint | DenseFile
"""Both have `path`, `model`, `tensors`, `files`, `own_files` and `warnings`."""


def open_source(path: Path, *, name: str | None = None, weights: bool = True) -> Source:
    """Open the model at `path`; `name` replaces its name in the metadata.

    Where nothing is at `path`, OWNER/NAME or OWNER/NAME@REVISION is a model of the Hugging Face Hub. It is fetched, or
    without the `weights` only its small files and the headers of the others.

    Raises:
        CheckpointError: there is no model, or it cannot be fetched.
        GGUFError: a file that is no sound GGUF file, or a set of shards that is not whole.
        PlanError: every reason why the model cannot be converted.
    """
    if path.is_file():
        return open_dense(path, name=name)
    if (model := hub.find_model_id(path)) is None:
        return open_checkpoint(path, name=name)
    folder = hub.fetch_model(model, weights=weights)
    return open_checkpoint(folder, name=name, headers=None if weights else hub.read_remote_headers(folder))


def fit_slicing(source: Source, slicing: Slicing) -> Slicing:
    """`slicing` for this source: blocks of a GGUF file stay whole, and are amplified only by powers of two."""
    if isinstance(source, Checkpoint):
        return slicing
    exact = all(is_power_of_two(factor) for factor in set(plain_scale(slicing).tolist()))
    grain = largest_block(source, slicing.d_expert, slicing.n_expert)
    scale_tensor = slicing.scale_tensor or not (exact or slicing.method.needs_calibration)
    return dataclasses.replace(slicing, grain=grain, scale_tensor=scale_tensor)
