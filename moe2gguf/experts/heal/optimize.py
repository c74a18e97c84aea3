"""What both stages share: which weights train, their optimizer, and the check for NaN and infinity."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from moe2gguf.errors import HealError
from moe2gguf.experts.heal.settings import Optimizer


def find_part(name: str) -> str:
    """The part of the model a parameter belongs to, of `moe2gguf.experts.methods.TRAINED`; "" for all others."""
    if "lora_" in name:
        return "lora"
    if name.endswith(("router.weight", "mlp.gate.weight")):
        return "router"
    if name == "down" or name.endswith(("experts.down_proj", "experts.down_proj.weight")):
        return "down"
    if ".self_attn." in name or name.endswith("norm.weight"):
        return "attention"
    of_experts = ("experts.gate_up_proj", "experts.gate_proj.weight", "experts.up_proj.weight")
    return "experts" if name in ("gate", "up") or name.endswith(of_experts) else ""


def is_trained(name: str, parts: Iterable[str]) -> bool:
    """Whether a parameter of that name trains; `experts` includes `down`."""
    part = find_part(name)
    return part in parts or (part == "down" and "experts" in parts)


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Require gradients of the parts that train, and of nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, parts))


def make_optimizer(model: nn.Module, settings: Optimizer, steps: int, lr: float) -> tuple[torch.optim.AdamW, Any]:
    """AdamW (https://arxiv.org/abs/1711.05101) and its schedule, warm-up to `lr` then cosine, over `steps`.

    Routers have their own rate and no decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    routers = [p for name, p in named if find_part(name) == "router"]
    others = [p for name, p in named if find_part(name) != "router"]
    groups = [
        {"params": routers, "lr": settings.router_lr, "weight_decay": 0.0},
        {"params": others, "lr": lr, "weight_decay": settings.weight_decay},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    warmup = round(settings.warmup * steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, max(steps, 1))


def require_finite(value: Tensor, where: str) -> None:
    """Raise HealError, naming `where`, unless every element of `value` is finite."""
    if not bool(value.isfinite().all()):
        raise HealError(f"{where}: NaN or infinity; lower --lr and --router-lr, or look for a broken weight or text")
