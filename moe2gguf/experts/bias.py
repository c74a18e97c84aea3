"""The bias neuron: a constant in the output of an MLP, in a graph that has no bias.

With v the constant direction (v . x close to 1 for every token, see `moe2gguf.experts.routing`) and c = `GAIN`, a
neuron with the gate row c * v and the up row v has the hidden value silu(c * v.x) * (v.x), close to silu(c) for every
token. In an expert that always runs, its down column is then a bias: FLAP's compensation for what is left out
(https://arxiv.org/abs/2312.11983). It takes the place of the MLP's least useful neuron.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe2gguf.experts.hidden_states import Rows, chunks
from moe2gguf.experts.layer import GAIN
from moe2gguf.experts.mlp import MLP, Carved


def placed(carved: Carved, neuron: int, v: Tensor) -> Carved:
    """The same experts with `neuron` made constant by v (d_model,); its down column is zero."""
    gate, up, down = carved.mlp.gate.clone(), carved.mlp.up.clone(), carved.mlp.down.clone()
    gate[neuron], up[neuron], down[neuron] = GAIN * v, v, 0
    return replace(carved, mlp=replace(carved.mlp, gate=gate, up=up, down=down), bias_neuron=neuron)


def filled(carved: Carved, dense: MLP, x: Rows, weight: Tensor, k: int) -> Carved:
    """The same with a down column for the bias neuron: the b that minimizes the sum over tokens of w |r - g b|^2.

    r (n_token, d_model) is what k experts leave out of the `dense` MLP of x (n_token, d_model), g (n_token,) the
    neuron's value times the weight of its expert, w = `weight` (n_token,) how much a token counts. Where g is the same
    for all tokens, b is the weighted mean of r, over g. `bias_error` of the report is the share of sum w |r|^2 left.
    """
    down = carved.mlp.down.clone()
    gr, gg, rr = torch.zeros_like(down[0]), 0.0, 0.0
    for part in chunks(len(x)):
        h, w = carved.masked(x[part], k), weight[part]
        g, r = h[:, carved.bias_neuron], dense.hidden(x[part]) @ dense.down - h @ down
        gr += (w * g) @ r
        gg += float(w @ g.square())
        rr += float(w @ r.square().sum(1))
    down[carved.bias_neuron] = b = gr / max(gg, 1e-30)
    error = (rr - gg * float(b.square().sum())) / max(rr, 1e-30)
    return replace(carved, mlp=replace(carved.mlp, down=down), report=carved.report | {"bias_error": error})
