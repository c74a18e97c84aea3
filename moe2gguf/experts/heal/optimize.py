"""What both stages share: which weights train, their optimizer, and the check for numbers that are none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from moe2gguf.errors import HealError
from moe2gguf.experts.heal.settings import HealSettings


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to, of `moe2gguf.experts.methods.TRAINED`; "" for all others."""
    if "lora_" in name:
        return "lora"
    if name.endswith(("router.weight", "mlp.gate.weight")):
        return "router"
    if name == "down" or name.endswith("experts.down_proj"):
        return "down"
    if ".self_attn." in name or name.endswith("norm.weight"):
        return "attention"
    return "experts" if name in ("gate", "up") or name.endswith("experts.gate_up_proj") else ""


def trained(name: str, train: Iterable[str]) -> bool:
    """Whether a parameter of that name trains; `experts` includes `down`."""
    part = part_of(name)
    return part in train or (part == "down" and "experts" in train)


def freeze(model: nn.Module, train: Iterable[str]) -> None:
    """Require gradients of what trains, and of nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name, train))


def optimizer_for(model: nn.Module, settings: HealSettings, steps: int, lr: float) -> tuple[torch.optim.AdamW, Any]:
    """AdamW (https://arxiv.org/abs/1711.05101) and its schedule, warm-up to `lr` then cosine, over `steps`.

    Routers have their own rate and no decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if part_of(name) == "router"],
            "lr": settings.router_lr,
            "weight_decay": 0.0,
        },
        {
            "params": [p for name, p in named if part_of(name) != "router"],
            "lr": lr,
            "weight_decay": settings.weight_decay,
        },
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    warmup = round(settings.warmup * steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, max(steps, 1))


def require_finite(value: Tensor, where: str) -> None:
    """Raise HealError, naming `where`, unless every element of `value` is finite."""
    if not bool(value.isfinite().all()):
        raise HealError(f"{where}: NaN or infinity; lower --lr and --router-lr, or look for a broken weight or text")
