"""The two layouts of rotary heads, as orders of the rows of a q or k projection (or of its bias).

Hugging Face and arch `qwen2` rotate element j of a head with j + d_head / 2 ("halves"), llama.cpp's arch `llama`
rotates the neighbors 2j and 2j + 1 ("pairs"):
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L3052-L3117
"""

import numpy as np
from numpy.typing import NDArray


def halves_to_pairs(n_head: int, d_head: int) -> NDArray[np.int64]:
    """Return which row of the layout with halves stands in each row of the layout with pairs: (n_head * d_head,)."""
    return np.arange(n_head * d_head).reshape(n_head, 2, -1).swapaxes(1, 2).reshape(-1)


def pairs_to_halves(n_head: int, d_head: int) -> NDArray[np.int64]:
    """Return which row of the layout with pairs stands in each row of the layout with halves: (n_head * d_head,)."""
    return np.arange(n_head * d_head).reshape(n_head, -1, 2).swapaxes(1, 2).reshape(-1)
