"""Which experts llama.cpp chose, read from its own tensors."""

import ctypes
from typing import Any

import numpy as np

from moe2gguf.llama.child import run_in_child


def chosen_experts(path: Any, tokens: Any, n_expert_used: Any) -> Any:
    """(n_layer, n_token, n_expert_used): the experts llama.cpp chose, from its own `ffn_moe_topk` tensors."""
    return run_in_child(_chosen, path, tokens, n_expert_used)


def _chosen(path: Any, tokens: Any, k: Any) -> Any:
    import llama_cpp

    class Tensor(ctypes.Structure):
        _fields_ = [
            ("type", ctypes.c_int), ("buffer", ctypes.c_void_p),
            ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
            ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
            ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
            ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
        ]  # fmt: skip

    found = {}

    def see(pointer: Any, ask: Any, _: Any) -> Any:
        tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
        name = tensor.name.decode()
        if not name.startswith("ffn_moe_topk-"):
            return False
        if not ask:
            rows = [
                np.ctypeslib.as_array(
                    (ctypes.c_int32 * tensor.ne[0]).from_address(tensor.data + t * tensor.nb[1])
                ).copy()
                for t in range(tensor.ne[1])
            ]
            found[int(name.split("-")[1])] = np.array(rows)
        return True

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    override = (llama_cpp.llama_model_kv_override * 2)()
    override[0].tag, override[0].key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, b"llama.expert_used_count"
    override[0].value.val_i64 = k
    params.kv_overrides = override
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    context_params = llama_cpp.llama_context_default_params()
    callback = llama_cpp.ggml_backend_sched_eval_callback(see)
    context_params.n_ctx, context_params.cb_eval = 256, callback
    context = llama_cpp.llama_init_from_model(model, context_params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    llama_cpp.llama_decode(context, batch)
    return np.array([found[i] for i in sorted(found)])
