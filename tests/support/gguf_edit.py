"""A GGUF file with some keys changed and some tensors left out, written by the gguf package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf


def edit_keys(source: Path, out: Path, changes: Mapping[str, Any], drop: Sequence[str] = ()) -> Path:
    """Copy `source` to `out` with these `changes`: a new value of the old one's type, or None to remove the key."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, value = field.types[0], changes.get(name, field.contents())
        if value is not None:
            element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, kind, element)
    for name in changes.keys() - reader.fields.keys():
        kind = gguf.GGUFValueType.UINT32 if isinstance(changes[name], int) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(name, changes[name], kind)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
