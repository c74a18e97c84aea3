"""The sliced model as transformers' own Mixtral, with routers that learn; and its experts as a file has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe2gguf.experts.heal import all_experts
from moe2gguf.experts.heal.load import load_model
from moe2gguf.experts.heal.moe_layer import Stored
from moe2gguf.experts.heal.optimize import part_of
from moe2gguf.experts.heal.router import Router, scale_of
from moe2gguf.experts.heal.settings import HealSettings, Windows


def load_student(folder: Path, overlay: Callable[[int], Stored | None], ids: Windows, settings: HealSettings) -> Any:
    """The sliced model, float32; where `overlay` has a layer, with its experts and router.

    Routers are scaled by what they see on the first window of `ids`.
    """
    model = load_model(folder)
    for i, layer in enumerate(model.model.layers):
        if (stored := overlay(i)) is not None:
            _put(layer.mlp, stored)
    _install_routers(model, ids)
    all_experts.install(model)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model


def _put(mlp: Any, stored: Stored) -> None:
    with torch.no_grad():
        gate_up = torch.cat([torch.from_numpy(stored.gate), torch.from_numpy(stored.up)], 1)
        mlp.experts.gate_up_proj.copy_(gate_up)
        mlp.experts.down_proj.copy_(torch.from_numpy(stored.down))
        mlp.gate.weight.copy_(torch.from_numpy(stored.router))


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _install_routers(model: Any, ids: Windows) -> None:
    """Replace every router by one that learns, scaled by its own input."""
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].detach()))
        for i, layer in enumerate(model.model.layers)
    ]
    model.eval()(torch.from_numpy(ids[:1]))
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(model.model.layers):
        rows = layer.mlp.gate.weight.detach()
        x = seen[i].reshape(-1, rows.shape[1])
        layer.mlp.gate = Router(rows, scale_of(rows, x), layer.mlp.gate.top_k)


def routers(model: Any) -> Iterator[Router]:
    """The routers, layer by layer; also of a wrapped model."""
    return (module for module in model.modules() if isinstance(module, Router))


def use(model: Any, k: int) -> None:
    """Run k experts per token."""
    for router in routers(model):
        router.top_k = k


def add_lora(model: Any, rank: int, seed: int) -> Any:
    """The model with low-rank changes of all experts, by peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=names))


def attention(model: Any) -> dict[str, NDArray[np.float32]]:
    """Those of the attention's projections and of the norms that train, by their names in a folder; float32."""
    return {
        name: parameter.detach().cpu().float().numpy()
        for name, parameter in _plain(model).named_parameters()
        if part_of(name) == "attention" and parameter.requires_grad
    }


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def stored_layers(model: Any) -> Iterator[Stored]:
    """Every layer's experts and router, low-rank changes folded in."""
    for layer in _plain(model).model.layers:
        weights = _expert_weights(layer.mlp.experts)
        gate, up = weights["gate_up_proj"].chunk(2, 1)
        arrays = [t.cpu().float().numpy().copy() for t in (layer.mlp.gate.stored, gate, up, weights["down_proj"])]
        yield Stored(*arrays)


def _plain(model: Any) -> Any:
    """The model without peft's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _expert_weights(experts: Any) -> dict[str, Tensor]:
    """gate_up_proj and down_proj; peft wraps one parameter after the other."""
    changes: dict[str, Tensor] = {}
    while hasattr(experts, "parameter_name"):
        changes[experts.parameter_name] = experts.get_delta_weight("default")
        experts = experts.base_layer
    names = ("gate_up_proj", "down_proj")
    return {name: getattr(experts, name) + changes.get(name, 0) for name in names}
