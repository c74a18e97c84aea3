"""The second pass: planned tensors become tensors that the writer can write."""

import functools
from collections.abc import Callable, Iterator, Sequence

from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.quant.imatrix import ImportanceMatrix
from moe2gguf.quant.imatrix_match import Guidance, Neurons, guide
from moe2gguf.recipes import tensors_gguf, tensors_hf
from moe2gguf.recipes.plan import Plan
from moe2gguf.recipes.source import Source
from moe2gguf.recipes.tensors import ExpertSource, PlannedTensor
from moe2gguf.recipes.tensors_hf import Array


def output_tensors(
    tensors: Sequence[PlannedTensor], source: Source, experts: ExpertSource, digest: SourceDigest, guidance: Guidance
) -> tuple[OutputTensor, ...]:
    """The tensors with what makes their arrays: nothing is read before the writer asks for it.

    Reading them fills `digest`.
    """
    make: Callable[..., Iterator[Array]] = (
        tensors_hf.make_blocks if isinstance(source, Checkpoint) else tensors_gguf.make_blocks
    )
    return tuple(
        OutputTensor(
            tensor.name,
            tensor.shape,
            tensor.type,
            tensor.sources,
            functools.partial(make, tensor, source, experts, digest),
            copied=tensor.copied,
            importance=guidance.importance.get(tensor.name),
        )
        for tensor in tensors
    )


def find_importance(
    plan: Plan, matrix: ImportanceMatrix | None, tensors: Sequence[PlannedTensor], experts: ExpertSource
) -> Guidance:
    """The importance of every tensor's columns, in the order in which the experts hold them."""
    neurons = Neurons(plan.model.d_ff, lambda i: experts.layer(i).order) if plan.slicing else None
    return guide(matrix, tensors, neurons, plan.options.types.imatrix_repair)
