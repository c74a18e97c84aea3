"""What a conversion may start from: a Hugging Face folder, a model of the Hub, or a dense GGUF file."""

import dataclasses
import math
from pathlib import Path
from typing import TypeAlias

from moe2gguf.experts.slicing import expert_width, plain_scale
from moe2gguf.gguf.blocks import is_power_of_two
from moe2gguf.gguf.dense_model import DenseFile, largest_block, open_dense
from moe2gguf.graphs import GRAPHS, Graph
from moe2gguf.hf import hub
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.limits import Size, max_experts_used
from moe2gguf.recipes.options import Options
from moe2gguf.spec import Model, Slicing

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


def complete_options(source: Source, options: Options) -> tuple[Options, list[str]]:
    """The options with what the source decides where the user left it open, and sentences about that.

    These are the target graph, where only one can carry the model, and the number of experts of a quantized file.
    """
    if not options.slices(source.model):
        return options, []
    if source.model.head_norms and not options.target:
        options = dataclasses.replace(options, target="glm4moe")  # `mixtral` has no norms of heads
    return _choose_counts(source, options)


def _choose_counts(source: Source, options: Options) -> tuple[Options, list[str]]:
    """The options with a number of experts that keeps the blocks of a quantized file whole, and a sentence about it.

    Nothing changes where the user gave a number, a width or types, or where the default number divides the blocks. If
    none divides them that llama.cpp can run, experts are padded to whole blocks.
    """
    if isinstance(source, Checkpoint) or options.experts is not None or options.align != 1 or options.types.chooses:
        return options, []
    downs = [tensor.block for name, tensor in source.tensors.items() if name.endswith(".ffn_down.weight")]
    block, default, graph = max(downs, default=1), options.n_expert, options.graph
    n_block, rest = divmod(source.model.d_ff, block)
    if rest or n_block % default == 0:
        return options, []
    whole = [n for n in _list_dividing(source.model, graph, n_block) if n <= 4 * default]
    if whole:
        n = min(whole, key=lambda n: abs(math.log(n / default)))
        others = [str(other) for other in whole if other != n]
        also = f"; so do {', '.join(others)} (--experts)" if others else ""
        note = f"{n} experts, not {default}: they divide the {n_block} blocks of every MLP{also}"
        return dataclasses.replace(options, experts=n), [note]
    width, price = _price_padding(source.model.d_ff, default, block)
    note = f"{default} experts are padded to {width} neurons, whole blocks of {block}: {price}"
    return dataclasses.replace(options, align=block), [note]


def _list_dividing(model: Model, graph: Graph, n_block: int) -> list[int]:
    """The numbers of experts that divide so many blocks and that llama.cpp can run all at once, 64 at most."""
    per_layer = graph.layer_tensors + 3 * model.bias_qkv
    limit = max_experts_used(Size(model.n_layer, 2 + model.n_layer * per_layer, graph=graph))
    return [n for n in range(2, min(limit, 64) + 1) if n_block % n == 0]


def _price_padding(d_ff: int, n_expert: int, block: int) -> tuple[int, str]:
    """The width of experts that are padded to whole blocks, and what that costs, in words."""
    width = expert_width(d_ff, n_expert, block)
    return width, f"{n_expert * width / d_ff - 1:.0%} more bytes in the MLPs"


def list_whole_cuts(source: Source, slicing: Slicing, block: int) -> list[str]:
    """The ways to give the experts of a cut a width of whole blocks, each with its option and its price."""
    n_block, rest = divmod(source.model.d_ff, block)
    counts = [] if rest else _list_dividing(source.model, GRAPHS[slicing.target], n_block)
    listed = ", ".join(map(str, counts))
    ways = [f"choose --experts {' or '.join(listed.rsplit(', ', 1))}, which divide the blocks evenly"] if counts else []
    if isinstance(source, Checkpoint) or n_block >= slicing.n_expert:
        _, price = _price_padding(source.model.d_ff, slicing.n_expert, block)
        ways.append(f"pad the experts with --align {block}, which loses nothing: {price}")
    return ways


def fit_slicing(source: Source, slicing: Slicing) -> Slicing:
    """`slicing` for this source: blocks of a GGUF file stay whole, and are amplified only by powers of two.

    Other factors stand in a tensor of scales, which of the target graphs `mixtral` alone multiplies by.
    """
    if isinstance(source, Checkpoint):
        return slicing
    exact = all(is_power_of_two(factor) for factor in set(plain_scale(slicing).tolist()))
    grain = largest_block(source, slicing.d_expert, slicing.n_expert)
    in_weights = exact or slicing.method.needs_calibration or GRAPHS[slicing.target].has_shared
    scale_tensor = slicing.scale_tensor or not in_weights
    return dataclasses.replace(slicing, grain=grain, scale_tensor=scale_tensor)
