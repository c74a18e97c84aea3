"""The table of methods: what each does and where it comes from. The command line, the docs and reports read it."""

from __future__ import annotations

GROUPS = {
    "contiguous": "neighboring neurons (https://huggingface.co/kalomaze/Mistral-7b-MoEified-8x)",
    "random": "neurons dealt out at random, from the seed (LLaMA-MoE, https://arxiv.org/abs/2406.16554)",
    "weights": "balanced k-means on gate rows (MoEfication, https://arxiv.org/abs/2110.01786)",
    "activations": "balanced k-means on which neurons contribute to the output together (CMoE, "
    "https://arxiv.org/abs/2502.04416)",
    "routed": "activations, then every neuron moves to the expert that the router picks when the neuron contributes; "
    "the default below all experts",
}

ROUTERS = {
    "zero": "no preference: only for all experts on",
    "gate-mean": "the mean gate row of each expert (EMoE, https://arxiv.org/abs/2310.10908)",
    "least-squares": "the norm of each expert's output, regressed on the MLP's input (D2DMoE's target, "
    "https://arxiv.org/abs/2310.04361)",
}

AMPLIFICATIONS = {
    "exact": "the dense model with all experts on; too loud with fewer",
    "used": "the plain sum of the experts at --used; the default there",
    "fitted": "the loudness of each expert that fits the dense output best at --used",
    "any": "one file for every count: the always-on experts hold most of the router's weight",
}
"""Derivations: `moe2gguf.experts.amplification`."""

CORRECTIONS = {
    "refit": "a ridge regression of the down projections on what is missing, given the experts that run; the default "
    "below all experts",
    "bias-neuron": "a constant in place of each MLP's least useful neuron, the mean of what is missing (FLAP's bias, "
    "https://arxiv.org/abs/2312.11983)",
}
"""What is done for the experts that do not run; formulas: `moe2gguf.experts.refit` and `moe2gguf.experts.bias`."""

TRAINED = {
    "router": "which experts run; their weights stay as they are",
    "down": "the experts' down projections",
    "experts": "all three projections of the experts",
    "attention": "the attention's projections and all norms, in whole-model steps",
    "lora": "low-rank changes of the experts, folded in at the end (LoRA, https://arxiv.org/abs/2106.09685)",
}
"""What `moe2gguf heal` can train; the rest stays bit for bit what it was."""
