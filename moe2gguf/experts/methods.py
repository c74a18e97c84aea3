"""The table of methods: what each does and where it comes from. The command line, the docs and reports read it."""

GROUPS = {
    "contiguous": "neighboring neurons (https://huggingface.co/kalomaze/Mistral-7b-MoEified-8x)",
    "activations": "balanced k-means on which neurons contribute to the output together (CMoE, "
    "https://arxiv.org/abs/2502.04416)",
    "routed": "as activations, then every neuron moves to the expert that the router picks when the neuron "
    "contributes; the default below all experts",
}

ROUTERS = {
    "zero": "no preference: only where all experts are used",
    "least-squares": "a regression of the norm of each expert's output on the MLP's input (D2DMoE's target, "
    "https://arxiv.org/abs/2310.04361)",
}

AMPLIFICATIONS = {
    "exact": "the dense model with all experts used; too large outputs with fewer",
    "used": "the plain sum of the experts at --used; the default below all experts",
    "fitted": "the output scale of each expert that fits the dense output best at --used",
    "any": "one file for every count: the shared experts hold most of the router's weight",
}
"""How the experts' outputs are scaled; derivations: `moe2gguf.experts.refit`."""

CORRECTIONS = {
    "refit": "a ridge regression of the down projections on what is missing, given the experts that run; the default "
    "below all experts",
}
"""What is done for the experts that do not run; formulas: `moe2gguf.experts.refit`."""

TRAINED = {
    "router": "which experts run; their weights stay as they are",
    "down": "the experts' down projections",
    "experts": "all three projections of the experts",
    "attention": "the attention's projections and all norms, in whole-model steps",
    "lora": "low-rank changes of the experts, folded in at the end (LoRA, https://arxiv.org/abs/2106.09685)",
}
"""What `moe2gguf heal` can train; the rest stays bit for bit what it was."""
