"""The step that `--target-size` and `--target-bpw` need: weights are read to choose the types of a plan."""

from collections.abc import Callable
from dataclasses import replace

from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.metadata import model_metadata, provenance, vocabulary_metadata
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.target import choose_types
from moe2gguf.recipes import tensors_hf
from moe2gguf.recipes.inputs import Inputs
from moe2gguf.recipes.outputs import find_importance, output_tensors
from moe2gguf.recipes.plan import Plan, make_plan
from moe2gguf.recipes.tensors import plain_experts
from moe2gguf.spec import Method


def fit_types(
    plan: Plan, inputs: Inputs, progress: Progress = silent, on_size: Callable[[int], None] = lambda _: None
) -> Plan:
    """The plan with the types that have the least error under its target; a plan without a target as it is.

    Rows of every tensor are quantized in every type that fits. They are measured in contiguous experts, whatever the
    grouping will be. `on_size` is given the bytes of the file to come before that.

    Raises:
        PlanError: the target cannot be reached; the range that can be is named.
        HarnessError: llama.cpp's kernels are missing.
        CorruptWeightError: a weight is NaN or infinite.
    """
    source, slicing, options = plan.source, plan.slicing, plan.options.types
    if not plan.has_open_types or not isinstance(source, Checkpoint):
        return plan
    model, stored = source.model, tensors_hf.plan_tensors(source, slicing)
    experts = plain_experts(
        model, slicing and replace(slicing, n_expert_used=1, method=Method(amplify="used"), target="mixtral")
    )
    guidance = find_importance(plan, inputs.types.matrix, stored, experts)
    tensors = output_tensors(stored, source, experts, SourceDigest(), guidance)
    metadata = {
        **source.card,
        **vocabulary_metadata(source.vocabulary),
        **model_metadata(model, slicing, 0),
        **provenance(model, slicing),
    }
    header_size = len(lay_out(metadata, tensors).header)
    rules = choose_types(options, inputs.types.rules, tensors, guidance.importance, header_size, progress, on_size)
    return make_plan(source, inputs, rules)
