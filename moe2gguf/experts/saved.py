"""A calibration in one file, to write the same experts again: as another type, with another name, scaled for another
count of experts used, without another pass over the text.

The file is safetensors: per layer the order of neurons, the router, the output scale and, where it is not the
checkpoint's, the down projection; its metadata tells what it was made from. What depends on the inputs
of a layer is not kept (it would be every hidden state), hence another number of experts, grouping, router or correction
needs a new pass.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe2gguf.errors import CalibrationError, name_odd_file
from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.slicing import EXACT_ROUTER_SIZE, PADDING, ROUTER_SIZE, expert_width, plain_scale
from moe2gguf.gguf.outputs import write_whole
from moe2gguf.graphs import GRAPHS
from moe2gguf.spec import Method, Slicing

FORMAT = "1"
_DTYPES: dict[type[np.generic], str] = {np.int64: "I64", np.float32: "F32"}
_KINDS = {"str": (str,), "int": (int,), "int | None": (int, type(None)), "bool": (bool,)}


@dataclass(frozen=True)
class CalibrationRecord:
    """What a calibration was made from, and how: see `moe2gguf.spec.Method` for six of the fields.

    checkpoint   digest of the checkpoint's embedding and layers
    text, label  SHA-256 of the calibration text, and what to call it
    """

    checkpoint: str
    text: str
    label: str
    n_token: int
    n_layer: int
    d_model: int
    d_ff: int
    n_expert: int
    n_expert_used: int
    group: str
    n_shared: int | None
    router: str
    refit: bool
    amplify: str
    seed: int
    target: str = "mixtral"
    leading_dense: int = 0

    @property
    def layers(self) -> range:
        """The layers that are sliced."""
        return range(self.leading_dense, self.n_layer)

    @property
    def rescalable(self) -> bool:
        """Whether only the router's size and the output scale depend on `n_expert_used` and `amplify`."""
        return not self.refit and self.amplify in ("exact", "used")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibrationRecord:
        """Make the record of the JSON in a file.

        Raises:
            AttributeError, TypeError, ValueError: a field is missing or unknown, of another type, or out of range.
        """
        record = cls(**values)
        for field in fields(cls):
            if type(getattr(record, field.name)) not in _KINDS[str(field.type)]:
                raise ValueError(f"{field.name} is of another type")
        counts = (record.n_token, record.n_layer, record.d_model, record.d_ff, record.n_expert, record.n_expert_used)
        if not 0 < min(counts) <= max(counts) < 2**40:
            raise ValueError("a count is out of range")
        if not 0 <= (record.n_shared or 0) <= record.n_expert_used <= record.n_expert <= record.d_ff:
            raise ValueError("the numbers of experts do not fit together")
        if not 0 <= record.leading_dense < record.n_layer:
            raise ValueError("the number of dense layers is out of range")
        if record.target not in GRAPHS:
            raise ValueError(f"its target {record.target} is unknown")
        return record

    def method(self) -> Method:
        """Return the method it was made with."""
        return Method(**{field.name: getattr(self, field.name) for field in fields(Method)})


def save_calibration(path: Path, record: CalibrationRecord, layer: Callable[[int], LayerExperts]) -> None:
    """Write a calibration, layer by layer; it appears under its name when it is complete.

    Raises:
        OutputError: it cannot be written.
    """
    shapes = _shapes(record)
    text = json.dumps(_make_header(record, [layer(i).report for i in record.layers])).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as safetensors writes them
    with write_whole(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i in record.layers:
            experts = layer(i)
            parts = experts.arrays() | {"order": experts.order[:, : shapes["order"][1][1]]}  # without padding
            for name, (kind, shape) in shapes.items():
                file.write(np.ascontiguousarray(parts[name], kind).reshape(shape).data)


def _make_header(record: CalibrationRecord, reports: Sequence[LayerReport | None]) -> dict[str, Any]:
    """Return the header of a safetensors file: the description, and where each tensor stands behind it."""
    found = json.dumps([report.to_dict() if report else {} for report in reports])
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "job": json.dumps(asdict(record)), "reports": found}}
    end = 0
    for i in record.layers:
        for name, (kind, shape) in _shapes(record).items():
            start, end = end, end + math.prod(shape) * np.dtype(kind).itemsize
            header[f"{i}.{name}"] = {"dtype": _DTYPES[kind], "shape": shape, "data_offsets": [start, end]}
    return header


def _shapes(record: CalibrationRecord) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Return the element type and shape of each layer's tensors."""
    n = record.n_expert
    shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "order": (np.int64, (n, expert_width(record.d_ff, n))),
        "router": (np.float32, (n, record.d_model)),
        "amplification": (np.float32, (n,)),
    }
    if GRAPHS[record.target].has_selection_bias:
        shapes["bias"] = np.float32, (n,)
    if record.refit:
        shapes["down"] = np.float32, (record.d_model, record.d_ff)
    return shapes


@dataclass(frozen=True)
class SavedCalibration:
    """A calibration in a file: what it was made from, and what it found. Its tensors are read layer by layer."""

    path: Path
    record: CalibrationRecord
    reports: tuple[LayerReport, ...]

    @property
    def n_shared(self) -> int:
        """The most shared experts that a layer has."""
        return max(report.n_shared for report in self.reports)

    def layer(self, i: int, slicing: Slicing) -> LayerExperts:
        """Read the experts of layer `i`, padded, and scaled for the count and the mode of `slicing`.

        Raises:
            CalibrationError: the tensors are not what the file's own description says.
        """
        shapes, parts = _shapes(self.record), {}
        with _open_file(self.path) as file:
            for name, (kind, shape) in shapes.items():
                view = file.get_slice(f"{i}.{name}")
                stored = tuple(view.get_shape()), view.get_dtype()
                if stored != (shape, _DTYPES[kind]):
                    raise _broken_error(self.path, f"layer {i} has a {name} of {stored[1]} {stored[0]}")
                parts[name] = file.get_tensor(f"{i}.{name}")
        order = np.full((self.record.n_expert, slicing.d_expert), PADDING, np.int64)
        order[:, : parts["order"].shape[1]] = parts["order"]
        neurons = np.sort(order[order != PADDING])
        if not np.array_equal(neurons, np.arange(self.record.d_ff)):
            raise _broken_error(self.path, f"layer {i} does not place every neuron once")
        if not all(np.isfinite(part).all() for part in parts.values()):
            raise _broken_error(self.path, f"layer {i} holds numbers that are not finite")
        report = self.reports[i - self.record.leading_dense]
        experts = LayerExperts.from_arrays(parts | {"order": order}, report)
        return _rescale(experts, self.record, slicing)


def _rescale(experts: LayerExperts, record: CalibrationRecord, slicing: Slicing) -> LayerExperts:
    """Return the experts for another count or mode, as `moe2gguf.experts.slice_layer` would with these groups."""
    amplify = slicing.method.amplify
    if slicing.in_shared or (record.amplify, record.n_expert_used) == (amplify, slicing.n_expert_used):
        return experts
    size = {"exact": EXACT_ROUTER_SIZE, "used": ROUTER_SIZE}
    router = experts.router * np.float32(size[amplify] / size[record.amplify])
    return replace(experts, router=router, scale=plain_scale(slicing))


def read_calibration(path: Path) -> SavedCalibration:
    """Open a saved calibration; no tensor is read.

    Raises:
        CalibrationError: it is not one, or it is damaged.
    """
    with _open_file(path) as file:
        metadata, names = file.metadata() or {}, set(file.keys())
    if metadata.get("format") != FORMAT:
        raise _broken_error(path, "its format is unknown")
    try:
        record = CalibrationRecord.from_dict(json.loads(metadata["job"]))
        reports = tuple(LayerReport.from_dict(report, record.n_expert) for report in json.loads(metadata["reports"]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _broken_error(path, str(error)) from error
    if len(reports) != len(record.layers):
        raise _broken_error(path, f"it has reports of {len(reports)} of {len(record.layers)} layers")
    if names != {f"{i}.{name}" for i in record.layers for name in _shapes(record)}:
        raise _broken_error(path, "tensors are missing, or too many")
    return SavedCalibration(path, record, reports)


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Any]:
    if what := name_odd_file(path):
        raise _broken_error(path, what)
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _broken_error(path, str(error)) from error


def _broken_error(path: Path, why: str) -> CalibrationError:
    return CalibrationError(f"{path}: not a calibration that --save-calibration wrote ({why}); calibrate again")
