"""The dense model, frozen: its hidden states of a window of text are computed once and kept."""

from pathlib import Path

import torch
from torch import Tensor

from moe2gguf.experts.heal.load import build_model
from moe2gguf.experts.heal.settings import Windows
from moe2gguf.hf.folder import open_checkpoint

KEPT_BYTES = 4 << 30
"""Hidden states are kept up to this size; windows beyond it run through the dense model every time."""


class Teacher:
    """The dense model of a folder, float32 on `device`.

    The last hidden states are kept, (n_context, d_model) a window: making `logits` of them costs a fraction of the
    layers. A window always runs alone, so its states do not depend on the others of a batch.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._model = build_model(open_checkpoint(folder)).requires_grad_(False).to(device)
        self._device = device
        self._kept: dict[bytes, Tensor] = {}
        self._bytes = 0

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def last_states(self, windows: Windows) -> Tensor:
        """The last hidden states (n_window, n_context, d_model) of token ids (n_window, n_context)."""
        return torch.stack([self._read_window(window) for window in windows]).to(self._device)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def logits(self, last: Tensor) -> Tensor:
        """(..., d_model) -> logits (..., n_vocab)."""
        logits: Tensor = self._model.lm_head(last)
        return logits

    def _read_window(self, window: Windows) -> Tensor:
        key = window.tobytes()
        if (known := self._kept.get(key)) is not None:
            return known
        ids = torch.from_numpy(window[None]).to(self._device)
        last: Tensor = self._model.model(ids).last_hidden_state[0].cpu()
        if self._bytes + last.nbytes <= KEPT_BYTES:
            self._kept[key] = last
            self._bytes += last.nbytes
        return last
