"""What goes into every weight matrix of a file, seen through llama.cpp's evaluation callback. Used in a child process.

For each input column the sum of squares over all tokens, in float64, and the tokens; per expert where there are any.
What llama.cpp's own tool collects:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/imatrix/imatrix.cpp#L248-L455
"""

import ctypes
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.ggml import OBJECT_SIZE, Tensor, declare

_F32 = 0


@dataclass
class Sums:
    """By tensor name: sums of squares (n_mat, width) float64 and tokens (n_mat,) int64, n_mat being 1 or n_expert."""

    squares: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, name: str, squares: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Add what one evaluation saw."""
        if name in self.squares:
            self.squares[name] += squares
            self.counts[name] += counts
        else:
            self.squares[name], self.counts[name] = squares.copy(), counts.copy()


class Watcher:
    """Collects `sums` while llama.cpp computes; `callback` goes into its context parameters.

    `vocabulary`: also the inputs of the output matrix. After every evaluation call `finish`, which raises what went
    wrong inside the callback. Raises HarnessError for a llama.cpp whose tensors are laid out otherwise.
    """

    def __init__(self, lib: ModuleType, sums: Sums, *, vocabulary: bool = False) -> None:
        self.sums = sums
        self.vocabulary = vocabulary
        self.callback = lib.ggml_backend_sched_eval_callback(self._call)
        self._lib = declare(
            lib._lib,
            "ggml_tensor_overhead",
            "ggml_op_name",
            "ggml_backend_buffer_is_host",
            "ggml_backend_tensor_get",
        )
        self._ops = _operations(self._lib)
        self._seen: dict[tuple[int, int, int], tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
        self._error: Exception | None = None

    def finish(self) -> None:
        """The evaluation is over. Raises HarnessError for activations that are not finite."""
        self._seen.clear()
        if self._error is not None:
            raise self._error

    def _call(self, address: int, ask: bool, _data: Any) -> bool:
        """Asked before a tensor is computed: do we want it? And after: here it is; go on?"""
        if self._error is not None:
            return not ask  # let the evaluation run to its end
        try:
            tensor = Tensor.from_address(address)
            kind = self._ops.get(tensor.op)
            if kind is None or not self._wanted(tensor, kind):
                return not ask
            if not ask:
                self._look(tensor, kind)
        except Exception as error:  # noqa: BLE001 - ctypes would print and forget it
            self._error = error
        return True

    def _wanted(self, tensor: Any, kind: str) -> bool:
        weight, x = tensor.src[0].contents, tensor.src[1].contents
        name = _name(weight)
        listed = name.startswith("blk.") or (self.vocabulary and name in ("output.weight", "token_embd.weight"))
        return x.type == _F32 and listed and (kind == "MUL_MAT_ID" or weight.ne[2] * weight.ne[3] == 1)

    def _look(self, tensor: Any, kind: str) -> None:
        weight, x = tensor.src[0], tensor.src[1]
        ids = tensor.src[2] if kind == "MUL_MAT_ID" else None
        n_mat = int(weight.contents.ne[2]) if ids else 1
        key = (_address(x), _address(ids) if ids else 0, n_mat)
        if key not in self._seen:  # gate and up, or q, k and v, share their input
            values = self._array(x, np.dtype(np.float32))
            if ids is None:
                rows = values.reshape(-1, values.shape[-1])
                self._seen[key] = _squares(rows)[None], np.array([len(rows)], np.int64)
            else:
                self._seen[key] = _by_expert(values[0], self._array(ids, np.dtype(np.int32))[0, 0], n_mat)
            if not np.isfinite(self._seen[key][0]).all():
                raise HarnessError(
                    f"the inputs of {_name(weight.contents)} are not finite: check the file with `moe2gguf verify`"
                )
        self.sums.add(_name(weight.contents), *self._seen[key])

    def _array(self, pointer: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A tensor's numbers, axes slowest first; copied out of a GPU's memory, where they are not in ours."""
        tensor = pointer.contents
        size = dtype.itemsize + sum((n - 1) * step for n, step in zip(tensor.ne, tensor.nb, strict=True))
        if self._lib.ggml_backend_buffer_is_host(tensor.buffer):
            memory = (ctypes.c_char * size).from_address(tensor.data)
        else:
            memory = (ctypes.c_char * size)()
            self._lib.ggml_backend_tensor_get(_address(pointer), memory, 0, size)
        return np.ndarray(tuple(reversed(tensor.ne)), dtype, memory, strides=tuple(reversed(tensor.nb)))


def _squares(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, width) -> (width,): sums of squares."""
    sums: NDArray[np.float64] = np.einsum("ij,ij->j", rows, rows, dtype=np.float64, casting="safe")
    return sums


def _by_expert(
    x: NDArray[np.float32], ids: NDArray[np.int32], n_expert: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums (n_expert, width), counts (n_expert,) of x (n_token, 1 or k, width), whose rows go to ids (n_token, k)."""
    squares = np.zeros((n_expert, x.shape[-1]))
    for e in range(n_expert):
        token, rank = np.nonzero(ids == e)
        squares[e] = _squares(x[token, rank if x.shape[1] > 1 else 0])
    return squares, np.bincount(ids.reshape(-1), minlength=n_expert).astype(np.int64)


def _name(tensor: Any) -> str:
    """The weight's name; a copy on a GPU is called GPU#name#0."""
    name: str = tensor.name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


def _address(pointer: Any) -> int:
    return ctypes.addressof(pointer.contents)


def _operations(library: Any) -> dict[int, str]:
    """The numbers of the two matrix products in this llama.cpp."""
    if library.ggml_tensor_overhead() != ctypes.sizeof(Tensor) + OBJECT_SIZE:
        raise HarnessError(
            "the installed llama.cpp lays its tensors out in another way: install llama-cpp-python 0.3.36, "
            "or collect with llama.cpp's own llama-imatrix"
        )
    names = {number: library.ggml_op_name(number).decode() for number in range(64)}
    return {number: name for number, name in names.items() if name in ("MUL_MAT", "MUL_MAT_ID")}
