"""moe2gguf.experts.heal.student: all experts at once give what transformers' own give, forward and backward."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe2gguf.experts.heal import student


@pytest.mark.parametrize("k", [1, 3, 4])
def test_logits_and_gradients_are_those_of_transformers(k: int) -> None:
    """At every count, also with all experts on."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_local_experts": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_experts_per_tok=k))
    ids = torch.arange(14).reshape(2, 7)
    model.set_experts_implementation("eager")
    expected = run(model, ids)

    student.use_all_experts(model)
    found = run(model, ids)

    assert model.config._experts_implementation == student.ALL_EXPERTS
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def run(model: Any, ids: Any) -> Any:
    """The logits, and the gradient of every parameter."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}
