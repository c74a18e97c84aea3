"""The dense model, one layer in memory at a time, by transformers' own modules for its family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.hidden_states import HiddenStates, LazyRows, Rows, chunks
from moe2gguf.experts.mlp import MLP
from moe2gguf.hf.write_config import describe_config
from moe2gguf.spec import Model

Device: TypeAlias = torch.device

BATCH = 8
"""Windows that attention works on together."""


class Load(Protocol):
    """Reads the model's tensors."""

    def __call__(self, name: str, rows: NDArray[np.int64] | None = None, /) -> NDArray[np.generic]:
        """Return the tensor of a Hugging Face name, in Hugging Face's layout, or these of its rows."""


class Layers:
    """Blocks of `model`; weights come from `load`, computation is float32 on `device`.

    `divisors` (d_head / 2,) are those of the rotary frequencies where the model has a tensor of them, as GGUF files do.
    """

    def __init__(
        self, model: Model, load: Load, device: torch.device, divisors: NDArray[np.float32] | None = None
    ) -> None:
        values = describe_config(model)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        config._attn_implementation = "sdpa"
        config.tie_word_embeddings = False
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        self._blocks = skeleton.model.layers
        self._rotary = type(skeleton.model.rotary_emb)(config).to(device)
        if divisors is not None:
            self._rotary.inv_freq /= torch.from_numpy(divisors).to(device)
        self._norm = skeleton.model.norm
        self._load = load
        self._tied = model.tied_embeddings
        self.device = device
        self.d_model = int(config.hidden_size)

    def __len__(self) -> int:
        return len(self._blocks)

    def embed(self, ids: NDArray[np.int64], hidden: HiddenStates) -> None:
        """Write the rows of the token `ids` (n_window, n_context) into `hidden`, (n_token, d_model)."""
        used, place = np.unique(ids, return_inverse=True)
        table, place = self._load("model.embed_tokens.weight", used), place.reshape(-1)
        for part in chunks(len(place)):
            hidden[part] = torch.from_numpy(table[place[part]].astype(np.float32))

    def head(self) -> Callable[[Tensor], Tensor]:
        """Return the function from the last layer's hidden states (n_token, d_model) to logits (n_token, n_vocab)."""
        norm = self._norm.to_empty(device=self.device)
        norm.load_state_dict({"weight": torch.from_numpy(self._load("model.norm.weight").astype(np.float32))})
        name = "model.embed_tokens.weight" if self._tied else "lm_head.weight"
        matrix = torch.from_numpy(self._load(name).astype(np.float32)).to(self.device)
        return lambda hidden: norm(hidden.to(self.device)) @ matrix.T

    def block(self, i: int) -> Block:
        """Load layer `i`, with its weights."""
        module = self._blocks[i].to_empty(device=self.device)
        state = {
            name: torch.from_numpy(self._load(f"model.layers.{i}.{name}").astype(np.float32))
            for name in module.state_dict()
        }
        module.load_state_dict(state)
        return Block(module.eval().requires_grad_(False), self._rotary, self.device)

    def attend_blocks(
        self, states: Sequence[HiddenStates], n_context: int, first: int = 0
    ) -> Iterator[tuple[int, Block]]:
        """Yield (i, block) from layer `first` on, one in memory, after its attention is added to all hidden `states`.

        The caller adds what the MLP gives, or what takes its place, before it asks for the next block.
        """
        for i in range(first, len(self)):
            block = self.block(i)
            for hidden in states:
                block.attend(hidden, n_context)
            yield i, block
            self.release(i)

    def release(self, i: int) -> None:
        """Drop the weights of layer `i`."""
        self._blocks[i].to("meta")


class Block:
    """One layer: attention into the residual stream, and the MLP with its norm."""

    def __init__(self, module: Any, rotary: Any, device: torch.device) -> None:
        self._module, self._rotary, self.device = module, rotary, device

    @functools.cached_property
    def mlp(self) -> MLP:
        """The weights of the dense MLP; a block of experts has none."""
        mlp = self._module.mlp
        return MLP(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T.contiguous())

    def attend(self, hidden: HiddenStates, n_context: int) -> None:
        """Add attention to `hidden` (n_token, d_model), in place; causal, each window of n_context on its own."""
        positions = torch.arange(n_context, device=self.device)[None]
        for part in chunks(len(hidden), BATCH * n_context):
            h = hidden[part].to(self.device).unflatten(0, (-1, n_context))
            normed = self._module.input_layernorm(h)
            rotary = self._rotary(h, positions)
            attended = self._module.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]
            hidden[part] = (h + attended).flatten(0, 1)

    def mlp_input(self, hidden: Rows) -> LazyRows:
        """Return the MLP's normed input, (n_token, d_model) on the device, computed from `hidden` piece by piece."""
        norm = self._module.post_attention_layernorm
        return LazyRows(len(hidden), lambda part: norm(hidden[part].to(self.device)))


def choose_device(name: str | None) -> torch.device:
    """Return the device `name`, or the best that is there: CUDA, then Apple's MPS, then the CPU.

    Raises:
        CalibrationError: torch knows no device of this name, or it is not there.
    """
    if name:
        try:
            torch.zeros(1, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise CalibrationError(
                f"--torch-device {name}: torch cannot use it ({reason}); leave it out or take cpu"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
