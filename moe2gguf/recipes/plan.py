"""The first pass: from a model's description to every tensor, byte and refusal of the file; no weight is read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe2gguf.errors import PlanError
from moe2gguf.experts.saved import SavedCalibration
from moe2gguf.experts.slicing import expert_width
from moe2gguf.gguf.layout import active_bytes
from moe2gguf.gguf.shards import lay_out_files
from moe2gguf.graphs import GRAPHS, find_graph_of
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.limits import Size, check_expert_counts, expert_count_warnings
from moe2gguf.quant.rules import Rule
from moe2gguf.recipes.draft import Wanted, draft_file
from moe2gguf.recipes.file_plan import FilePlan
from moe2gguf.recipes.inputs import Inputs
from moe2gguf.recipes.options import CalibrationOptions, Options
from moe2gguf.recipes.source import Source, fit_slicing
from moe2gguf.spec import Calibration, MetadataValue, Model, Slicing

WINDOW = 512
BETTER_TARGET = (
    "--target {} makes one file that is the dense model with all experts used and loses less with fewer; it needs a "
    "llama.cpp of {} or later"
)
NO_TEXT = (
    "no --calibration: the built-in text is used, which is mostly English; a text of the kind that the model is meant "
    "for gives better experts"
)


@dataclass(frozen=True, kw_only=True)
class Plan(FilePlan):
    """The plan of a conversion, a value: two plans of one source and options are equal and share nothing.

    options      with what they left open taken from a saved calibration
    slicing      how the MLPs are cut; None where they are not
    calibration  on which text the experts are fitted, if they are
    saved        the calibration that is used instead of a new one, if any
    has_open_types  the types for a target size are not chosen yet: see `moe2gguf.recipes.fit_types.fit_types`
    """

    options: Options
    source: Source
    slicing: Slicing | None
    calibration: Calibration | None
    saved: SavedCalibration | None
    has_open_types: bool = False

    @property
    def model(self) -> Model:
        """The hyper-parameters of the source."""
        return self.source.model

    @property
    def n_expert(self) -> int:
        """Experts per layer in the file; 0 for a dense file."""
        return _count_experts(self.model, self.slicing)[0]

    @property
    def n_expert_used(self) -> int:
        """Experts that run per token unless the user says otherwise; 0 for a dense file."""
        return _count_experts(self.model, self.slicing)[1]

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors if "_exps." in tensor.name or "_shexp." in tensor.name)

    @property
    def padding_bytes(self) -> int:
        """Bytes that zero neurons add to the expert tensors."""
        if self.slicing is None:
            return 0
        places = self.slicing.n_expert * self.slicing.d_expert
        return self.expert_bytes - self.expert_bytes * self.model.d_ff // places

    @property
    def in_shared(self) -> int:
        """Experts that are the graph's own shared expert, and so always run."""
        return _count_experts(self.model, self.slicing)[2]

    def active_bytes(self, n_expert_used: int) -> int:
        """Bytes of weights read per generated token when `n_expert_used` experts run (ignored for a dense file)."""
        return active_bytes(self.tensors, self.n_expert - self.in_shared, n_expert_used - self.in_shared)

    def speed_bound(self, n_expert_used: int) -> float:
        """Upper bound of the generation speed-up over the dense model, from the bytes read per token."""
        routers = sum(tensor.n_bytes for tensor in self.tensors if tensor.name.endswith("ffn_gate_inp.weight"))
        dense = self.active_bytes(self.n_expert) - routers - self.padding_bytes
        return dense / self.active_bytes(n_expert_used)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        k_range = range(self.in_shared + 1, self.n_expert + 1)
        return {
            **super().to_dict(),
            "model": dataclasses.asdict(self.model),
            "slicing": dataclasses.asdict(self.slicing) if self.slicing else None,
            "padding_bytes": self.padding_bytes,
            "expert_count": self.n_expert,
            "expert_used_count": self.n_expert_used,
            "active_bytes_per_token": {k: self.active_bytes(k) for k in k_range or (0,)},
            "speed_bound": {k: round(self.speed_bound(k), 4) for k in k_range},
            "metadata": {key: _shorten(value) for key, value in self.metadata.items()},
        }


def make_plan(source: Source, inputs: Inputs, base: Sequence[Rule] | None = None) -> Plan:
    """Plan the conversion of `source`; `base` are rules for types in place of those that `--type` stands for.

    Raises:
        PlanError: every reason, all at once, why this cannot be converted.
    """
    options, saved = inputs.options, inputs.saved
    source = _set_used(source, options)
    slicing = fit_slicing(source, _slice(source.model, options)) if options.slices(source.model) else None
    calibration, open_types = _describe_calibration(source.model, inputs), options.types.has_target and base is None
    draft = draft_file(source, Wanted(slicing, options.types, inputs.types, calibration, base))
    refusals, limits = _check_counts(source.model, slicing, [tensor.name for tensor in draft.tensors])
    if found := [*draft.assigned.refusals, *draft.refusals, *refusals]:
        raise PlanError(found)
    warnings = [
        *source.warnings,
        *inputs.notes,
        *draft.assigned.warnings,
        *draft.warnings,
        *_warn_of_calibration(source, inputs),
    ]
    return Plan(
        options=options,
        source=source,
        slicing=slicing,
        calibration=calibration,
        saved=saved,
        assigned=draft.assigned,
        metadata=draft.metadata,
        tensors=draft.tensors,
        files=lay_out_files(draft.metadata, draft.tensors, draft.kinds, None if open_types else options.shard_size),
        warnings=(*warnings, *limits, *(_warn_of_slicing(source.model, slicing) if slicing else [])),
        has_open_types=open_types,
    )


def _set_used(source: Source, options: Options) -> Source:
    """A checkpoint that has experts already, with the user's count of those that run."""
    if not (isinstance(source, Checkpoint) and source.model.n_expert and options.used):
        return source
    n_used = options.used - source.model.n_shared
    return dataclasses.replace(source, model=dataclasses.replace(source.model, n_expert_used=n_used))


def _slice(model: Model, options: Options) -> Slicing:
    n_expert = options.n_expert
    return Slicing(
        n_expert,
        options.n_expert_used,
        expert_width(model.d_ff, n_expert, options.align),
        options.resolve_method(),
        options.align,
        scale_tensor=options.expert_scale,
        target=options.target or "mixtral",
        in_shared=options.in_shared,
        leading_dense=options.leading_dense or 0,
    )


def _describe_calibration(model: Model, inputs: Inputs) -> Calibration | None:
    """Which text the experts are fitted to: whole windows of it."""
    n_context = calibration_window(model)
    n_token = max(inputs.options.n_token(model) // n_context, 2) * n_context if inputs.text or inputs.saved else 0
    if inputs.saved:
        return Calibration(inputs.saved.record.label, inputs.saved.record.text, n_token)
    return Calibration(inputs.text.label, inputs.text.digest, n_token) if inputs.text else None


def calibration_window(model: Model) -> int:
    """Tokens of a calibration window: 512, or what the model can hold."""
    return min(WINDOW, model.n_context)


def _warn_of_calibration(source: Source, inputs: Inputs) -> list[str]:
    warnings = []
    if inputs.saved and not isinstance(source, Checkpoint):
        warnings.append(
            f"--load-calibration {inputs.saved.path.name}: only its shapes can be compared with a GGUF file, whose "
            "weights are rounded; make sure that it was made from the same model"
        )
    wishes = inputs.options.calibration
    if inputs.text and wishes.text is None:
        warnings.append(NO_TEXT)
    given = {
        "--calibration": wishes.text,
        "--calibration-tokens": wishes.n_token,
        "--calibration-memory": None if wishes.memory == CalibrationOptions.memory else wishes.memory,
        "--torch-device": wishes.device,
        "--seed": inputs.options.method.seed,
    }
    useless = [name for name, value in given.items() if value is not None]
    if useless and not inputs.text and not inputs.saved:
        warnings.append(f"{', '.join(useless)}: no effect, since these experts are not fitted to a text; see --used")
    return warnings


def find_target(model: Model) -> str:
    """Return the target whose files serve every count of experts, for a model that such a graph can carry."""
    return "step35" if model.rope.has_factors else "glm4moe"


def _warn_of_scales(slicing: Slicing) -> list[str]:
    gating = GRAPHS[slicing.target].gating
    amplified = slicing.n_routed if gating == "softmax" else slicing.n_expert
    rounds = bool(amplified & (amplified - 1))
    if slicing.scale_tensor:
        way = "; a power of two of experts needs none" if rounds else ""
        return [f"the file has tensors of expert scales, which older builds of llama.cpp refuse to load{way}"]
    if rounds and gating != "sigmoid":
        return [f"{amplified} is not a power of two: amplified weights are rounded once more to the file's type"]
    return []


def _warn_of_slicing(model: Model, slicing: Slicing) -> list[str]:
    warnings = []
    n, k = slicing.n_expert, slicing.n_expert_used
    fits = slicing.method.router != "zero" and slicing.target == "mixtral"
    if k < n and fits and not model.bias_output:
        better = find_target(model)
        warnings.append(BETTER_TARGET.format(better, GRAPHS[better].since))
    if k < n and slicing.method.router == "zero":
        warnings.append(
            f"--used {k} of {n} with a zero router: llama.cpp runs a fixed, arbitrary choice of experts, and the "
            "output will not be coherent"
        )
    if slicing.method.refit and not slicing.in_shared:
        warnings.append(f"refitted to {k} experts: with all {n} on, the file is no longer the dense model")
    return [*warnings, *_warn_of_scales(slicing)]


def _check_counts(model: Model, slicing: Slicing | None, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What llama.cpp's limits on experts forbid, and which of its settings cannot run the file."""
    n_expert, n_expert_used, in_shared = _count_experts(model, slicing)
    if not n_expert:
        return [], []
    size = Size.of(names, model.n_layer, GRAPHS[slicing.target] if slicing else find_graph_of(model))
    refusals = check_expert_counts(n_expert, n_expert_used, size, in_shared)
    return refusals, expert_count_warnings(n_expert_used, size, in_shared)


def _count_experts(model: Model, slicing: Slicing | None) -> tuple[int, int, int]:
    """Experts of the file, used ones, and those of both that are the graph's own shared expert."""
    if slicing:
        return slicing.n_expert, slicing.n_expert_used, slicing.in_shared
    return model.n_expert + model.n_shared, model.n_expert_used + model.n_shared, model.n_shared


def _shorten(value: MetadataValue) -> Any:
    """Long arrays (the vocabulary) as their length, everything else as it is."""
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > 16 else value
