"""The C declarations of ggml that are used through ctypes: two structures, and the signatures of functions."""

import ctypes
from typing import Any


class Tensor(ctypes.Structure):
    """ggml_tensor: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml.h#L685"""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

OBJECT_SIZE = 32
"""Bytes of a ggml_object, which ggml_tensor_overhead() counts as well."""


class TypeTraits(ctypes.Structure):
    """ggml_type_traits: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml.h#L2976"""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


_int, _i64, _size, _pointer, _text = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_quantize_chunk": (_size, (_int, _pointer, _pointer, _i64, _i64, _i64, _pointer)),
    "ggml_validate_row_data": (ctypes.c_bool, (_int, _pointer, _size)),
    "ggml_type_name": (_text, (_int,)),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), (_int,)),
    "ggml_tensor_overhead": (_size, ()),
    "ggml_op_name": (_text, (_int,)),
    "ggml_get_name": (_text, (_pointer,)),
    "ggml_nbytes": (_size, (_pointer,)),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, (_pointer,)),
    "ggml_backend_tensor_get": (None, (_pointer, _pointer, _size, _size)),
    "ggml_backend_cpu_buffer_type": (_pointer, ()),
    "ggml_backend_dev_by_type": (_pointer, (_int,)),
    "ggml_backend_reg_by_name": (_pointer, (_text,)),
    "ggml_backend_reg_get_proc_address": (_pointer, (_pointer, _text)),
    "ggml_backend_reg_dev_count": (_size, (_pointer,)),
    "ggml_backend_reg_dev_get": (_pointer, (_pointer, _size)),
}
"""Result and arguments of each function."""


def declare(library: Any, *names: str) -> Any:
    """Give the functions of an open library their signatures, and return it.

    Raises:
        AttributeError: the library has no such function.
    """
    for name in names:
        function = getattr(library, name)
        function.restype, function.argtypes = _SIGNATURES[name]
    return library
