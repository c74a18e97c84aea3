"""The first pass: from a checkpoint's description to every tensor, byte and refusal of the file; no data is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.errors import PlanError
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.saved import SavedCalibration, read_calibration
from moe2gguf.experts.slicing import expert_width
from moe2gguf.experts.text import Text, read_text
from moe2gguf.gguf import types
from moe2gguf.gguf.layout import Layout, active_bytes, lay_out, mean_bits_per_weight
from moe2gguf.gguf.shards import lay_out_shards
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.limits import check_expert_counts, expert_count_warnings
from moe2gguf.quant.assign import Assignment
from moe2gguf.recipes import gguf_as_hf as weights_gguf
from moe2gguf.recipes.options import Options, adopted, refusals
from moe2gguf.recipes.source import Source, draft, fitted, open_source
from moe2gguf.recipes.tensors_hf import Experts
from moe2gguf.spec import Calibration, MetadataValue, Model, Slicing

WINDOW = 512
NO_TEXT = (
    "no --calibration: a text of many kinds is taken, mostly English; better is text of the kind that this model is "
    "meant for; a model of another language or trade can write its own (`moe2gguf sample`)"
)


@dataclass(frozen=True)
class Plan:
    """Everything about the file to come. `slicing` is None where the MLPs are not cut; `text` calibrates, if any,
    unless `saved` has a calibration.

    `assigned` is why every tensor has its type. `layout` is of one file; `shards`, unless empty, are what is written
    instead: the tensors of each and where they stand.
    """

    options: Options
    checkpoint: Source
    slicing: Slicing | None
    experts: Experts
    text: Text | None
    saved: SavedCalibration | None
    assigned: Assignment
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[OutputTensor, ...]
    layout: Layout
    digest: SourceDigest
    warnings: tuple[str, ...]
    shards: tuple[tuple[tuple[OutputTensor, ...], Layout], ...] = ()

    @property
    def file_size(self) -> int:
        """Bytes of the finished file, or of all its shards, exactly."""
        return sum(layout.file_size for _, layout in self.shards) or self.layout.file_size

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together, zero neurons included."""
        return mean_bits_per_weight(self.tensors)

    @property
    def n_expert(self) -> int:
        """Experts per layer in the file; 0 for a dense file."""
        return self.slicing.n_expert if self.slicing else self.checkpoint.model.n_expert

    @property
    def n_expert_used(self) -> int:
        """Experts that run per token unless the user says otherwise; 0 for a dense file."""
        return self.slicing.n_expert_used if self.slicing else self.checkpoint.model.n_expert_used

    @property
    def expert_bytes(self) -> int:
        """Bytes of all merged expert tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors if _is_expert(tensor.name))

    @property
    def padding_bytes(self) -> int:
        """Bytes that zero neurons add to the expert tensors."""
        if self.slicing is None:
            return 0
        places = self.slicing.n_expert * self.slicing.d_expert
        return self.expert_bytes - self.expert_bytes * self.checkpoint.model.d_ff // places

    def active_bytes(self, n_expert_used: int) -> int:
        """Bytes of weights read per generated token when `n_expert_used` experts run (ignored for a dense file)."""
        return active_bytes(self.tensors, self.n_expert, n_expert_used)

    def speed_bound(self, n_expert_used: int) -> float:
        """Upper bound of the generation speed-up over the dense model, from the bytes read per token."""
        routers = sum(tensor.n_bytes for tensor in self.tensors if tensor.name.endswith("ffn_gate_inp.weight"))
        dense = self.active_bytes(self.n_expert) - routers - self.padding_bytes
        return dense / self.active_bytes(n_expert_used)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        k_range = range(1, self.n_expert + 1)
        return {
            "model": dataclasses.asdict(self.checkpoint.model),
            "slicing": dataclasses.asdict(self.slicing) if self.slicing else None,
            "file_size": self.file_size,
            "shards": [{"tensors": len(tensors), "bytes": layout.file_size} for tensors, layout in self.shards],
            "bits_per_weight": round(self.bits_per_weight, 4),
            **self.assigned.to_dict(),
            "padding_bytes": self.padding_bytes,
            "expert_count": self.n_expert,
            "expert_used_count": self.n_expert_used,
            "active_bytes_per_token": {k: self.active_bytes(k) for k in k_range or (0,)},
            "speed_bound": {k: round(self.speed_bound(k), 4) for k in k_range},
            "metadata": {key: _short(value) for key, value in self.metadata.items()},
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "type": tensor.type.name,
                    "bytes": tensor.n_bytes,
                    "bits_per_weight": types.bits_per_weight(tensor.type),
                    "importance": tensor.importance is not None,
                    "sources": list(tensor.sources),
                    "copied": tensor.copied,
                }
                for tensor in self.tensors
            ],
            "warnings": list(self.warnings),
            "refusals": [],
        }


def plan_conversion(model: Path, options: Options | None = None) -> Plan:
    """Plan the conversion of `model`, a Hugging Face folder or a dense GGUF file.

    Raises:
        PlanError: every reason, all at once, why this cannot be converted.
        CheckpointError: `model` is neither.
        GGUFError: a file that is no sound GGUF file, or a set of shards that is not whole.
    """
    options, saved = options or Options(), None
    differing: list[str] = []
    checkpoint = open_source(model, name=options.name)
    if options.load_calibration:
        saved = read_calibration(options.load_calibration)
        options, differing = adopted(options, saved)
        differing += _refuse_saved(checkpoint.model, saved)
    if found := [*differing, *refusals(checkpoint.model, options), *_refuse_gguf(checkpoint, options)]:
        raise PlanError(found)
    slicing = None
    if isinstance(checkpoint, Checkpoint) and checkpoint.model.n_expert and options.used:
        hyper = dataclasses.replace(checkpoint.model, n_expert_used=options.used)
        checkpoint = dataclasses.replace(checkpoint, model=hyper)
    elif not checkpoint.model.n_expert and not options.dense:
        slicing = fitted(checkpoint, _slicing(checkpoint.model, options))
    needs_text = slicing and slicing.method.needs_calibration and not saved
    text = read_text(options.calibration) if needs_text else None
    calibration = Calibration(text.label, text.digest, _whole_windows(checkpoint.model, options)) if text else None
    if saved:
        calibration = Calibration(saved.record.label, saved.record.text, _whole_windows(checkpoint.model, options))
    experts, digest = Experts(_plain_experts(checkpoint.model, slicing)), SourceDigest()
    made = draft(checkpoint, slicing, experts, digest, options.types(), calibration)
    assigned, tensors, metadata = made.assigned, made.tensors, made.metadata
    if found := [*assigned.refusals, *made.refusals, *_refuse_counts(checkpoint.model, slicing, tensors)]:
        raise PlanError(found)
    notes = [*checkpoint.warnings, *assigned.warnings, *made.warnings]
    if saved and not isinstance(checkpoint, Checkpoint):
        notes.append(
            f"--load-calibration {saved.path.name}: only its shapes are compared with a GGUF file, whose weights are "
            "rounded; see that it was made from the same model"
        )
    if text and options.calibration is None:
        notes.append(NO_TEXT)
    warnings = (*notes, *_warnings(checkpoint.model, slicing, tensors))
    layout = lay_out(metadata, tensors, made.kinds)
    shards = lay_out_shards(metadata, tensors, made.kinds, options.shard_size)
    return Plan(
        options,
        checkpoint,
        slicing,
        experts,
        text,
        saved,
        assigned,
        metadata,
        tensors,
        layout,
        digest,
        warnings,
        shards,
    )


def _whole_windows(model: Model, options: Options) -> int:
    """The tokens that a calibration reads: those asked for, less what does not fill a window."""
    n_context = window(model)
    return max(options.tokens_for(model) // n_context, 2) * n_context


def window(model: Model) -> int:
    """Tokens of a calibration window: 512, or what the model can hold."""
    return min(WINDOW, model.n_context)


def _refuse_saved(model: Model, saved: SavedCalibration) -> list[str]:
    """Whether a calibration was made for a model of this shape."""
    if model.n_expert:
        return ["--load-calibration: the checkpoint has experts already, which are kept; leave it out"]
    record, file = saved.record, saved.path.name
    return [
        f"--load-calibration {file}: made for {name} {getattr(record, name)}, the checkpoint has {value}"
        for name in ("n_layer", "d_model", "d_ff")
        if (value := getattr(model, name)) != getattr(record, name)
    ]


def _refuse_gguf(source: Source, options: Options) -> list[str]:
    """Why a GGUF file cannot be calibrated, if that is what the options want."""
    if isinstance(source, Checkpoint) or options.dense or options.load_calibration:
        return []
    return weights_gguf.refusals(source) if options.choose_method().needs_calibration else []


def _plain_experts(model: Model, slicing: Slicing | None) -> LayerExperts | None:
    """The experts of a method that needs no calibration, the same in every layer."""
    if slicing is None or slicing.method.needs_calibration:
        return None
    factor = slicing.n_expert if slicing.method.amplify == "exact" else slicing.n_expert_used
    return LayerExperts.plain(model.d_ff, model.d_model, slicing.n_expert, slicing.align, factor, slicing.grain)


def _slicing(model: Model, options: Options) -> Slicing:
    n_expert, n_expert_used = options.counts()
    width = expert_width(model.d_ff, n_expert, options.align)
    return Slicing(
        n_expert, n_expert_used, width, options.choose_method(), options.align, scale_tensor=options.expert_scale
    )


def _warnings(model: Model, slicing: Slicing | None, tensors: Sequence[OutputTensor]) -> list[str]:
    k = (slicing or model).n_expert_used
    count = {"n_layer": model.n_layer, "n_tensor": len(tensors), "n_scale": _n_scale(slicing)}
    warnings = expert_count_warnings(k, **count) if k else []
    return warnings + (_slicing_warnings(slicing) if slicing else [])


def _slicing_warnings(slicing: Slicing) -> list[str]:
    warnings = []
    n, k = slicing.n_expert, slicing.n_expert_used
    if k < n and slicing.method.router == "zero":
        warnings.append(
            f"--used {k} of {n} with a zero router: llama.cpp runs a fixed, arbitrary choice of experts, and the "
            "output will not be coherent"
        )
    if slicing.method.refit:
        warnings.append(f"--refit: with all {n} experts on the file is no longer the dense model; it is fitted to {k}")
    if slicing.scale_tensor:
        warnings.append("the file has tensors of expert scales, which older builds of llama.cpp refuse to load")
    elif n & (n - 1):
        warnings.append(f"{n} is not a power of two: amplified weights are rounded once more to the file's type")
    return warnings


def _refuse_counts(model: Model, slicing: Slicing | None, tensors: Sequence[OutputTensor]) -> list[str]:
    source = slicing or model
    if not source.n_expert:
        return []
    count = {"n_layer": model.n_layer, "n_tensor": len(tensors), "n_scale": _n_scale(slicing)}
    return check_expert_counts(source.n_expert, source.n_expert_used, **count)


def _n_scale(slicing: Slicing | None) -> int:
    """Tensors of expert scales per layer."""
    return int(slicing is not None and slicing.scale_tensor)


def _is_expert(name: str) -> bool:
    return "_exps." in name


def _short(value: MetadataValue) -> Any:
    """Long arrays (the vocabulary) as their length, everything else as it is."""
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > 16 else value
