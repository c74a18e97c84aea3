"""A whole model in transformers, made of a folder's checked config and tensors and of nothing else that lies there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.write_config import describe_config


def build_model(checkpoint: Checkpoint) -> Any:
    """The model of a folder, float32, on the CPU.

    `from_pretrained` would also load pickled weights and adapters, and offer to run Python files. Here the class
    follows from the config that we have checked, and every parameter is copied from a safetensors file.
    """
    values = describe_config(checkpoint.model)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):  # no time for numbers that are replaced at once
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not stored
    model.tie_weights()
    read, stored = _reader(checkpoint), model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored:
                tensor.copy_(read(name))
    return model.eval()


def _reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """Reads a parameter by its name in transformers 5, which joins the experts of a layer to one tensor."""

    def read(name: str) -> Tensor:
        return torch.from_numpy(checkpoint.read(name).astype("float32"))

    def read_joined(name: str) -> Tensor:
        layer = name.split(".")[2]
        stored = {role: source for role, (source, _) in checkpoint.mlp.tensors.items()}
        if name.endswith("mlp.gate.weight"):
            return read(stored["router"].format(i=layer))
        roles = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
        experts = range(checkpoint.model.n_expert)
        return torch.stack([torch.cat([read(stored[role].format(i=layer, e=e)) for role in roles]) for e in experts])

    return lambda name: read(name) if name in checkpoint.tensors else read_joined(name)
