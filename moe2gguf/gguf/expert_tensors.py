"""Which tensors of a file have a row per expert, for every architecture that stacks its experts, and how they are cut.

An expert is a run of whole rows in each of these tensors, so it can be left out without decoding anything.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from moe2gguf.gguf import types
from moe2gguf.gguf.file import GGUFFile, TensorInfo, quote_text
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.gguf.writer import OutputTensor

BLOCK_BYTES = 1 << 24

STACKED = (
    *("llama", "mistral3", "llama4", "grok", "dbrx", "qwen2moe", "qwen3moe", "qwen3vlmoe", "qwen3next"),
    *("qwen35moe", "phimoe", "olmoe", "arctic", "jamba", "deepseek", "deepseek2", "bailingmoe", "bailingmoe2"),
    *("dots1", "glm4moe", "ernie4_5-moe", "hunyuan-moe", "granitemoe", "granitehybrid", "gpt-oss", "lfm2moe"),
    *("smallthinker", "minimax-m2", "afmoe", "exaone-moe", "mimo2", "step35", "hy_v3", "llada-moe"),
    *("nemotron_h_moe", "rnd1", "mellum", "laguna", "cohere2moe", "mistral4", "deepseek32", "glm-dsa"),
    *("kimi-linear", "gemma4", "minimax-m3", "maple"),
)
"""Architectures whose tensors with a row per expert are those of `_PER_EXPERT` and no others, each tested in llama.cpp.

https://github.com/ggml-org/llama.cpp/tree/0c1e57098/src/models
"""

_PER_EXPERT = re.compile(
    r"blk\.(\d+)\.(?:ffn_(?:gate|up|down|gate_up)_exps\.(?:weight|bias|scale|input_scale)"
    r"|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:\.bias)?)"
)
_ABOUT_EXPERTS = re.compile(r"exps|exp_probs|gate_inp|tid2eid")
_WHOLE = re.compile(r"blk\.\d+\.(?:ffn_gate_inp_shexp\.weight|ffn_norm_exps\.weight|ffn_gate_inp\.scale)")
"""Tensors of the router, or around the experts, that are as wide as the model."""


@dataclass(frozen=True)
class ExpertTensors:
    """The tensors with a row per expert, by name, each with its layer; `d_expert` is the width of an expert."""

    n_expert: int
    d_expert: int
    layer_of: dict[str, int]

    @property
    def layers(self) -> list[int]:
        """The layers that have experts."""
        return sorted(set(self.layer_of.values()))


def find_expert_tensors(file: GGUFFile, n_expert: int, problems: list[str]) -> ExpertTensors:
    """The tensors of `n_expert` rows; what does not fit the architecture's table is added to `problems`."""
    architecture = str(file.metadata.get("general.architecture"))
    layer_of = {name: int(match[1]) for name in file.tensors if (match := _PER_EXPERT.fullmatch(name))}
    if architecture not in STACKED:
        problems.append(
            f"architecture {quote_text(architecture)}: which of its tensors have a row per expert is known for "
            f"{', '.join(STACKED)} only"
        )
        return ExpertTensors(n_expert, 0, layer_of)
    problems += (problem for info in file.tensors.values() for problem in _refuse_tensor(info, n_expert))
    problems += _list_missing(layer_of)
    if not layer_of:
        problems.append("has no stacked experts: no tensor ffn_down_exps")
    widths = [
        info.shape[-1] for name, info in file.tensors.items() if name.endswith("ffn_down_exps.weight") and info.shape
    ]
    return ExpertTensors(n_expert, widths[0] if widths else 0, layer_of)


def _refuse_tensor(info: TensorInfo, n_expert: int) -> Iterator[str]:
    """Why a tensor cannot be cut into the rows of `n_expert` experts, though it may be about them."""
    if not _PER_EXPERT.fullmatch(info.name):
        if _ABOUT_EXPERTS.search(info.name) and not _WHOLE.fullmatch(info.name):
            yield f"tensor {quote_text(info.name)}: whether it has a row per expert is not known"
    elif info.shape[:1] != (n_expert,):
        yield f"tensor {info.name}: expected {n_expert} experts, found the shape {info.shape}"
    elif len(info.shape) == 1 and info.type not in types.FLOATS:
        yield f"tensor {info.name}: {info.type.name} cannot be cut between numbers; write it as F32"


def _list_missing(layer_of: Mapping[str, int]) -> Iterator[str]:
    """The tensors that every layer with experts has, where one is not there."""
    for i in sorted(set(layer_of.values())):
        needed = [f"blk.{i}.{name}.weight" for name in ("ffn_gate_inp", "ffn_up_exps", "ffn_down_exps")]
        if f"blk.{i}.ffn_gate_up_exps.weight" in layer_of:
            del needed[1]
        yield from (f"layer {i}: has experts, but no tensor {name}" for name in needed if name not in layer_of)


def copy_tensor(file: GGUFFile, name: str, experts: Sequence[int] | None = None) -> OutputTensor:
    """The tensor as it is stored, or only the rows of these `experts`, in their order."""
    info = file.tensors[name]
    if experts is None:
        parts, shape = [info], info.shape
    else:
        parts, shape = [_select(info, expert) for expert in experts], (len(experts), *info.shape[1:])
    return OutputTensor(name, shape, info.type, (name,), functools.partial(_read, file, parts), copied=True)


def _select(info: TensorInfo, expert: int) -> TensorInfo:
    """One expert of a tensor, as a tensor of its own."""
    size = info.n_bytes // info.shape[0]
    return replace(info, shape=info.shape[1:], offset=info.offset + expert * size, n_bytes=size)


def _read(file: GGUFFile, parts: Sequence[TensorInfo]) -> Iterator[NDArray[Any]]:
    for part in parts:
        yield from SourceTensor(file, part).blocks(BLOCK_BYTES)
