"""The experts of a plan: from a saved calibration, or by running the dense model on text, whatever it is kept in."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.saved import CalibrationRecord, save_calibration
from moe2gguf.experts.text import Text, spread_windows, tokenize_windows
from moe2gguf.gguf.dense_model import DenseFile
from moe2gguf.gguf.system import clear_away
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.safetensors import Readable, SourceDigest, digest_source
from moe2gguf.llama.tokens import read_tokens
from moe2gguf.progress import Progress
from moe2gguf.recipes.gguf_as_hf import Weights
from moe2gguf.recipes.inputs import Inputs
from moe2gguf.recipes.plan import Plan, calibration_window
from moe2gguf.recipes.source import Source
from moe2gguf.recipes.tensors import ExpertSource, loaded_experts, plain_experts
from moe2gguf.spec import Slicing

if TYPE_CHECKING:
    from moe2gguf.experts.calibration import CalibrationModel
    from moe2gguf.experts.forward import Device, Layers


def find_experts(plan: Plan, inputs: Inputs, work: Path, progress: Progress, *, resume: bool = True) -> ExpertSource:
    """The experts of every layer: contiguous slices, those of a saved calibration, or new ones that fit a text.

    New ones are made in the folder `work`, where a calibration that was stopped is continued; without `resume` it
    starts anew. The result reads them from there.

    Raises:
        CalibrationError: the text or the activations cannot be used.
        OutputError: `work` cannot be written, or has the work of another job.
        HarnessError: the model is a GGUF file, whose tokenizer is llama.cpp's, and that is not installed.
    """
    text, saved, slicing = inputs.text, inputs.saved, plan.slicing
    if slicing is None or not slicing.method.needs_calibration:
        return plain_experts(plan.model, slicing)
    if saved:
        return loaded_experts(lambda i: saved.layer(i, slicing), saved.reports, (saved.path,))
    if text is None:
        raise CalibrationError("these experts are made by running the model on text, and no text was read")
    model = open_calibration_model(plan.source)
    reports = _calibrate_on_text(plan, model, text, slicing, work, progress, resume=resume)
    load = functools.partial(LayerExperts.load, work)

    def finish() -> None:
        if target := plan.options.calibration.save_to:
            save_calibration(target, _describe(plan, text, slicing, model.identity), load)
        clear_away(work)

    return loaded_experts(load, tuple(reports), tuple(sorted(work.glob("layer-*.npz"))), finish)


def require_own_calibration(plan: Plan, digest: SourceDigest) -> None:
    """Compare a folder with the checkpoint of its loaded calibration, if any, once `digest` has seen all tensors.

    The plan warns that the weights of GGUF files are not compared.

    Raises:
        CalibrationError: they differ.
    """
    source, saved = plan.source, plan.saved
    if not saved or not isinstance(source, Checkpoint):
        return
    if digest.hexdigest(_select_calibrated(source)) != saved.record.checkpoint:
        raise CalibrationError(
            f"{saved.path}: made from another checkpoint than {source.folder} (other weights, or those of a GGUF "
            "file); calibrate again without --load-calibration"
        )


def open_calibration_model(source: Source) -> CalibrationModel:
    """Open what a calibration runs on: blocks with the weights of `source`, windows from its tokenizer."""
    return _Folder(source) if isinstance(source, Checkpoint) else _GGUF(source)


@dataclass(frozen=True)
class _Folder:
    """A Hugging Face folder to calibrate."""

    checkpoint: Checkpoint

    @functools.cached_property
    def identity(self) -> str:
        return digest_source(_select_calibrated(self.checkpoint))

    def layers(self, device: Device) -> Layers:
        from moe2gguf.experts.forward import Layers

        return Layers(self.checkpoint.model, self.checkpoint.read, device)

    def windows(self, text: Text, n_token: int, n_context: int) -> NDArray[np.int64]:
        return tokenize_windows(self.checkpoint.folder, text, n_token, n_context, self.checkpoint.vocabulary.first_id)


@dataclass(frozen=True)
class _GGUF:
    """A dense GGUF file to calibrate; its tokenizer is llama.cpp's."""

    dense: DenseFile

    @functools.cached_property
    def identity(self) -> str:
        return digest_source(_select_calibrated(self.dense))

    def layers(self, device: Device) -> Layers:
        from moe2gguf.experts.forward import Layers

        weights = Weights(self.dense)
        return Layers(self.dense.model, weights.read, device, weights.rope_divisors())

    def windows(self, text: Text, n_token: int, n_context: int) -> NDArray[np.int64]:
        ids, bos = read_tokens(self.dense.path, text.text)
        return spread_windows(text, ids, n_token, n_context, bos)


def _select_calibrated(source: Source) -> dict[str, Readable]:
    """Return the tensors of the embedding and all layers."""
    parts = ("model.layers.", "model.embed") if isinstance(source, Checkpoint) else ("blk.", "token_embd.", "rope_")
    return {name: tensor for name, tensor in source.tensors.items() if name.startswith(parts)}


def _calibrate_on_text(
    plan: Plan, model: CalibrationModel, text: Text, slicing: Slicing, work: Path, progress: Progress, *, resume: bool
) -> list[LayerReport]:
    from moe2gguf.experts.calibration import CalibrationSettings, calibrate

    options, dense = plan.options.calibration, plan.model
    n_token, n_context = plan.options.n_token(dense), calibration_window(dense)
    settings = CalibrationSettings(n_token, n_context, options.device, options.memory)
    return calibrate(model, text, slicing, settings, work, progress, resume=resume)


def _describe(plan: Plan, text: Text, slicing: Slicing, identity: str) -> CalibrationRecord:
    model = plan.model
    return CalibrationRecord(
        checkpoint=identity,
        text=text.digest,
        label=text.label,
        n_token=plan.options.n_token(model),
        n_layer=model.n_layer,
        d_model=model.d_model,
        d_ff=model.d_ff,
        n_expert=slicing.n_expert,
        n_expert_used=slicing.n_expert_used,
        **vars(replace(slicing.method, n_shared=slicing.in_shared or slicing.method.n_shared)),
        target=slicing.target,
        leading_dense=slicing.leading_dense,
    )
