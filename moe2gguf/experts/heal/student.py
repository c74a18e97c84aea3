"""The sliced model as transformers' own class, with routers that learn; and its experts as a folder has them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe2gguf.experts.heal.load import build_model
from moe2gguf.experts.heal.optimize import find_part
from moe2gguf.experts.heal.router import Router, find_scale
from moe2gguf.experts.heal.settings import Windows
from moe2gguf.experts.heal.work import ExpertWeights
from moe2gguf.graphs import find_graph_of
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.spec import Model

ALL_EXPERTS = "moe2gguf_all_experts"
SHARED = ("gate", "up", "down")
"""The projections of a shared expert."""


def load_student(
    folder: Path, read_healed: Callable[[int], ExpertWeights] | None, ids: Windows, *, checkpointing: bool
) -> Any:
    """The sliced model, float32; with the experts and routers that `read_healed` gives, if there is one.

    Routers are scaled by their inputs on the first window of `ids`. `checkpointing` recomputes activations.
    """
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint)
    if read_healed is not None:
        for i, mlp in _find_mlps(model):
            _set_weights(mlp, read_healed(i))
    use_all_experts(model)
    _install_routers(model, checkpoint.model, ids)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model


def _find_mlps(model: Any) -> list[tuple[int, Any]]:
    """Every MLP with experts, and the number of its layer."""
    mlps = [(i, layer.mlp) for i, layer in enumerate(_unwrap(model).model.layers)]
    return [(i, mlp) for i, mlp in mlps if hasattr(mlp, "experts")]


def _set_weights(mlp: Any, weights: ExpertWeights) -> None:
    with torch.no_grad():
        gate_up = torch.cat([torch.from_numpy(weights.gate), torch.from_numpy(weights.up)], 1)
        mlp.experts.gate_up_proj.copy_(gate_up)
        mlp.experts.down_proj.copy_(torch.from_numpy(weights.down))
        mlp.gate.weight.copy_(torch.from_numpy(weights.router))
        if weights.shared_gate.size:
            for role in SHARED:
                shared = getattr(weights, f"shared_{role}")
                mlp.shared_experts.get_submodule(f"{role}_proj").weight.copy_(torch.from_numpy(shared))


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _install_routers(model: Any, sliced: Model, ids: Windows) -> None:
    """Replace every router of the `sliced` model by one that learns, scaled by its own input."""
    graph = find_graph_of(sliced)
    seen: dict[int, Tensor] = {}
    hooks = [
        mlp.gate.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].detach()))
        for i, mlp in _find_mlps(model)
    ]
    model.eval()(torch.from_numpy(ids[:1]))
    for hook in hooks:
        hook.remove()
    for i, mlp in _find_mlps(model):
        rows = mlp.gate.weight.detach()
        x = seen[i].reshape(-1, rows.shape[1])
        bias = mlp.gate.e_score_correction_bias if graph.has_selection_bias else None
        mlp.gate = Router(rows, find_scale(rows, x), graph, bias, sliced.n_shared)


def find_routers(model: Any) -> Iterator[Router]:
    """The routers, layer by layer; also of a wrapped model."""
    return (module for module in model.modules() if isinstance(module, Router))


def set_used(model: Any, k: int) -> None:
    """Let every layer use k experts, the shared ones among them."""
    for router in find_routers(model):
        router.use(k)


def add_lora(model: Any, rank: int, seed: int) -> Any:
    """The model with low-rank changes of all experts, by peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if next(find_routers(model)).in_shared:  # as parameters: peft takes modules of these names for parts of the stacks
        names += [f"mlp.shared_experts.{role}_proj.weight" for role in SHARED]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=names))


def read_attention(model: Any) -> dict[str, NDArray[np.float32]]:
    """The attention projections and norms that train, by their names in a folder; float32."""
    return {
        name: parameter.detach().cpu().float().numpy()
        for name, parameter in _unwrap(model).named_parameters()
        if find_part(name) == "attention" and parameter.requires_grad
    }


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def read_layers(model: Any) -> Iterator[tuple[int, ExpertWeights]]:
    """Every layer's number, experts and router, low-rank changes added."""
    for i, mlp in _find_mlps(model):
        weights = _read_parameters(mlp.experts, "gate_up_proj", "down_proj")
        gate, up = weights["gate_up_proj"].chunk(2, 1)
        found = {"router": mlp.gate.rows, "gate": gate, "up": up, "down": weights["down_proj"]}
        if mlp.gate.in_shared:
            found["bias"] = mlp.gate.bias
            for role in SHARED:
                module = getattr(mlp.shared_experts, f"{role}_proj")
                found[f"shared_{role}"] = _read_parameters(module, "weight")["weight"]
        yield i, ExpertWeights.from_tensors(found)


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _read_parameters(module: Any, *names: str) -> dict[str, Tensor]:
    """The parameters of these names, low-rank changes added; peft wraps one parameter after the other."""
    changes: dict[str, Tensor] = {}
    while hasattr(module, "parameter_name"):
        changes[module.parameter_name] = module.get_delta_weight("default")
        module = module.base_layer
    return {name: getattr(module, name) + changes.get(name, 0) for name in names}


def use_all_experts(model: Any) -> None:
    """Let every mixture-of-experts layer of a transformers model run as `run_all_experts` does.

    A training step sends many tokens through few small experts. transformers' own implementations sort tokens by
    expert, which on a CPU costs more than the arithmetic it saves from about a quarter of the experts upwards; its
    default one (`grouped_mm`) also needs rows of a multiple of 16 bytes.
    """
    ALL_EXPERTS_FUNCTIONS.register(ALL_EXPERTS, run_all_experts)
    model.set_experts_implementation(ALL_EXPERTS)


def run_all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(n_token, d_model) -> (n_token, d_model), as `MixtralExperts.forward` computes it: two large products.

    Experts that are not used weigh zero. `self` has gate_up_proj (n_expert, 2 * d_expert, d_model) and down_proj
    (n_expert, d_model, d_expert); indices and weights are (n_token, k).
    """
    gate_up, down, x = self.gate_up_proj, self.down_proj, hidden_states
    weights = torch.zeros(len(x), len(gate_up), dtype=top_k_weights.dtype, device=x.device)
    weights = weights.scatter(1, top_k_index, top_k_weights).to(x.dtype)
    gate, up = (x @ gate_up.flatten(0, 1).T).unflatten(1, (len(gate_up), 2, -1)).unbind(2)
    h = torch.nn.functional.silu(gate) * up * weights[:, :, None]
    return h.flatten(1) @ down.transpose(1, 2).flatten(0, 1)
