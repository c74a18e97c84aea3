"""One mixture-of-experts layer in training form, and its hand-over on disk.

Experts stand one behind the other: m = n_expert * d_expert neurons. All are computed and those that do not run are
weighted zero, so that a step is a few large products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe2gguf.experts.heal.router import Router


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Write `path`, an .npz, by rename."""
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)  # type: ignore[arg-type]  # a keyword could be allow_pickle; none is
    unfinished.replace(path)


def load_arrays(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read what `save_arrays` wrote; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@dataclass(frozen=True)
class Stored:
    """A layer's tensors as a file has them, float32.

    router (n_expert, d_model), gate and up (n_expert, d_expert, d_model), down (n_expert, d_model, d_expert).
    """

    router: NDArray[np.float32]
    gate: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write by rename."""
        save_arrays(path, {"router": self.router, "gate": self.gate, "up": self.up, "down": self.down})

    @classmethod
    def load(cls, path: Path) -> Stored:
        """Read what `save` wrote."""
        return cls(**load_arrays(path))


class Layer(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The experts and the router of one layer, float32; a copy of what is `stored`."""

    def __init__(self, stored: Stored, scale: float) -> None:
        super().__init__()
        n, d_expert, d_model = stored.gate.shape
        self.router = Router(torch.from_numpy(stored.router).clone(), scale, n)
        self.gate = nn.Parameter(torch.tensor(stored.gate).reshape(-1, d_model))
        self.up = nn.Parameter(torch.tensor(stored.up).reshape(-1, d_model))
        self.down = nn.Parameter(torch.tensor(stored.down).transpose(1, 2).reshape(-1, d_model).contiguous())
        self.d_expert = d_expert

    def masked(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, m): hidden activations times the weight of their expert."""
        self.router.top_k = k
        _, top, chosen = self.router(x)
        weights = torch.zeros(len(x), len(self.router.weight), device=x.device).scatter(1, chosen, top)
        h = nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)
        return h * weights.repeat_interleave(self.d_expert, 1)

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model), with k experts per token."""
        return self.masked(x, k) @ self.down

    def stored(self) -> Stored:
        """The tensors as a file has them."""
        n = len(self.router.weight)
        gate, up, down = (p.detach().cpu().reshape(n, self.d_expert, -1) for p in (self.gate, self.up, self.down))
        router = self.router.stored.detach().cpu().numpy()
        return Stored(router, gate.numpy(), up.numpy(), down.transpose(1, 2).contiguous().numpy())
