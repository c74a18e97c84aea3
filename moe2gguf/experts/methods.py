"""The table of methods: what each does and where it comes from. The command line, the docs and reports read it."""

from __future__ import annotations

GROUPS = {
    "contiguous": "neighboring neurons (https://huggingface.co/kalomaze/Mistral-7b-MoEified-8x)",
    "random": "neurons dealt out at random, from the seed (LLaMA-MoE, https://arxiv.org/abs/2406.16554)",
    "weights": "balanced k-means on gate rows (MoEfication, https://arxiv.org/abs/2110.01786)",
    "activations": "balanced k-means on which neurons contribute to the output together (CMoE, "
    "https://arxiv.org/abs/2502.04416)",
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
    "fitted": "the loudness that fits the dense output best at --used, per layer",
    "any": "one file for every count: the always-on experts hold most of the router's weight",
}
"""Derivations: `moe2gguf.experts.amplification`."""
