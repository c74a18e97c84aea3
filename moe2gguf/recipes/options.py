"""What the user chooses about a conversion, and every choice that is refused before a weight is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe2gguf.experts.methods import AMPLIFICATIONS, GROUPS, ROUTERS
from moe2gguf.experts.saved import SavedCalibration
from moe2gguf.experts.slicing import default_in_shared
from moe2gguf.experts.text import read_sample
from moe2gguf.graphs import GRAPHS, Graph
from moe2gguf.quant.rules import TypeOptions, refuse_type
from moe2gguf.quant.target import refuse_target
from moe2gguf.spec import EXACT, SPARSE, Method, Model, make_paths

DEFAULT_EXPERTS = 8
DEFAULT_EXPERTS_WITH_SHARED = 16
DEFAULT_TOKENS = 16384
LEAST_TOKENS = 1024
"""Of any calibration. A router has d_model unknowns per expert, a refit d_ff per output, on 4 of 5 tokens."""

PRESETS = {"exact": EXACT, "sparse": SPARSE}

METHOD_FLAGS = {
    "group": "--group",
    "n_shared": "--shared",
    "router": "--router",
    "refit": "--refit",
    "amplify": "--amplify",
    "seed": "--seed",
}
"""The fields of `Method`, and what the command line calls them."""


@dataclass(frozen=True)
class MethodOptions:
    """How experts are made. A preset, and what differs from it: fields of `moe2gguf.spec.Method`, None: as the preset.

    preset  "exact", "sparse", or None: exact where all experts are used, sparse below
    """

    preset: str | None = None
    group: str | None = None
    n_shared: int | None = None
    router: str | None = None
    refit: bool | None = None
    amplify: str | None = None
    seed: int | None = None

    def resolve(self, graph: Graph, *, all_used: bool) -> Method:
        """The method that these options stand for: one file for every count where the graph allows it."""
        if graph.has_shared:
            base = EXACT if self.preset == "exact" else replace(SPARSE, refit=False, amplify="exact")
        else:
            base = PRESETS[self.preset or ("exact" if all_used else "sparse")]
        given: dict[str, Any] = {name: getattr(self, name) for name in METHOD_FLAGS}
        method = replace(base, **{name: value for name, value in given.items() if value is not None})
        return replace(method, n_shared=0) if graph.has_shared and method.group == "contiguous" else method


@dataclass(frozen=True)
class CalibrationOptions:
    """The text on which experts are fitted, and where the result is kept.

    text       file with the calibration text (None: the embedded text, of many kinds)
    n_token    how many tokens of it (None: see `Options.n_token`)
    device     torch device (None: the best there is)
    memory     bytes of hidden states that are kept in memory; more of them go to disk
    save_to    file to keep the calibration in
    load_from  file of a saved calibration to use instead of a new one; options that are not given are taken from it
    """

    text: Path | None = None
    n_token: int | None = None
    device: str | None = None
    memory: int = 4 * 10**9
    save_to: Path | None = None
    load_from: Path | None = None

    def __post_init__(self) -> None:
        make_paths(self, "text", "save_to", "load_from")


@dataclass(frozen=True)
class Options:
    """What `convert` is to make. Every default is the command line's.

    experts    how many experts each dense MLP is cut into (None: 8, or 16 where the graph has a shared expert, which is
               made of some of them). A Mixtral checkpoint keeps its own.
    used       experts that run per token unless the program that runs the file changes it (None: all of them)
    leading_dense  so many layers, the first, keep their dense MLP, in a graph that allows it (None: 0)
    align      every expert is padded with zero neurons to a multiple of this width (32 or 256 for block types)
    expert_scale  amplify by a tensor of scales (`ffn_down_exps.scale`) instead of in the weights
    dense      write the ordinary dense file instead, the reference for every comparison
    name       the model's name in the metadata, instead of the model card's
    shard_size  bytes of the largest file, where the model is to be written as several (None: one file)
    target     the graph to write for, a name of `moe2gguf.graphs.GRAPHS` (None: mixtral, or glm4moe for models
               that only it can carry)
    types      which types tensors get
    method     how experts are made
    calibration  on which text experts are fitted
    """

    experts: int | None = None
    used: int | None = None
    leading_dense: int | None = None
    align: int = 1
    expert_scale: bool = False
    dense: bool = False
    name: str | None = None
    shard_size: int | None = None
    target: str | None = None
    types: TypeOptions = field(default_factory=TypeOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    @property
    def files(self) -> list[Path]:
        """The files that are read, besides the model."""
        return [*self.types.files, *(path for path in (self.calibration.text, self.calibration.load_from) if path)]

    @property
    def graph(self) -> Graph:
        """The target graph."""
        return GRAPHS[self.target or "mixtral"]

    @property
    def n_expert(self) -> int:
        """Experts of a dense checkpoint."""
        default = DEFAULT_EXPERTS_WITH_SHARED if self.graph.has_shared else DEFAULT_EXPERTS
        return default if self.experts is None else self.experts

    @property
    def n_expert_used(self) -> int:
        """Used experts of a dense checkpoint."""
        return self.n_expert if self.used is None else self.used

    def resolve_method(self) -> Method:
        """The method for a dense checkpoint."""
        return self.method.resolve(self.graph, all_used=self.n_expert_used == self.n_expert)

    @property
    def in_shared(self) -> int:
        """How many experts are the graph's own shared expert; 0 where it has none."""
        if not self.graph.has_shared:
            return 0
        given = self.method.n_shared
        return default_in_shared(self.n_expert, self.n_expert_used) if given is None else given

    def n_token(self, model: Model) -> int:
        """How many tokens to calibrate on: 16,384 unless given, or two per neuron of an MLP that is refitted."""
        if self.calibration.n_token is not None:
            return self.calibration.n_token
        return max(DEFAULT_TOKENS, 2 * model.d_ff if self.resolve_method().refit else 0)

    def slices(self, model: Model) -> bool:
        """Whether the MLPs of this model are to be cut into experts."""
        return not model.n_expert and not self.dense


def adopt_calibration(options: Options, saved: SavedCalibration) -> tuple[Options, list[str]]:
    """The options with what they leave open taken from a saved calibration, and every one that does not fit it.

    Raises:
        CalibrationError: the calibration text among the options cannot be read.
    """
    record, theirs = saved.record, saved.record.method()
    used = record.n_expert_used if options.used is None else options.used
    amplify = options.method.amplify or theirs.amplify
    rescaled = record.rescalable and amplify in ("exact", "used")
    refusals = [*_refuse_differences(options, saved, rescaled=rescaled), *_refuse_saved_choices(options, saved, used)]
    method = replace(MethodOptions("sparse", **{name: getattr(theirs, name) for name in METHOD_FLAGS}), amplify=amplify)
    calibration = replace(options.calibration, n_token=record.n_token)
    adopted = replace(
        options,
        target=record.target,
        experts=record.n_expert,
        used=used,
        leading_dense=record.leading_dense,
        method=method,
        calibration=calibration,
    )
    return adopted, refusals


def _refuse_saved_choices(options: Options, saved: SavedCalibration, used: int) -> Iterator[str]:
    """Why a saved calibration does not go with the text, the number of used experts or the preset."""
    record, file, text = saved.record, saved.path.name, options.calibration.text
    if text is not None and read_sample(text, record.n_token).digest != record.text:
        yield f"--calibration {text.name}: {file} was made from another text, {record.label}"
    if used <= saved.n_shared < record.n_expert:
        yield f"--used {used}: {file} has layers with {saved.n_shared} shared experts; use more"
    if options.method.preset == "exact" or options.dense:
        yield "--load-calibration: --preset exact and --dense use no calibration; leave one of them out"


def _refuse_differences(options: Options, saved: SavedCalibration, *, rescaled: bool) -> list[str]:
    """Options that are not those of the calibration; if it is `rescaled`, count and scale may be others."""
    record, theirs = saved.record, saved.record.method()
    pairs = {
        "--target": (options.target, record.target),
        "--experts": (options.experts, record.n_expert),
        "--used": (options.used, record.n_expert_used),
        "--leading-dense": (options.leading_dense, record.leading_dense),
        **{flag: (getattr(options.method, name), getattr(theirs, name)) for name, flag in METHOD_FLAGS.items()},
        "--calibration-tokens": (options.calibration.n_token, record.n_token),
    }
    return [
        f"{flag} {given}: {saved.path.name} was made with {made}; leave it out, or calibrate again without "
        "--load-calibration"
        for flag, (given, made) in pairs.items()
        if given not in (None, made) and not (rescaled and flag in ("--used", "--amplify"))
    ]


def refuse_options(model: Model, options: Options, saved: SavedCalibration | None) -> list[str]:
    """Every reason, with the way out, why `options` do not fit `model`."""
    found = [
        *_refuse_saved(model, saved),
        *_refuse_counts(model, options),
        *_refuse_target_graph(model, options),
        *refuse_type(options.types.type),
        *refuse_target(options.types),
        *_refuse_unknown(options),
    ]
    return found or [*_refuse_calibration_files(model, options), *_refuse_method(model, options)]


def _refuse_saved(model: Model, saved: SavedCalibration | None) -> list[str]:
    """Whether a saved calibration, if any, was made for a model of this shape."""
    if saved is None:
        return []
    if model.n_expert:
        return ["--load-calibration: the checkpoint has experts already, which are kept; leave it out"]
    record, file = saved.record, saved.path.name
    return [
        f"--load-calibration {file}: made for {name} {getattr(record, name)}, the checkpoint has {value}"
        for name in ("n_layer", "d_model", "d_ff")
        if (value := getattr(model, name)) != getattr(record, name)
    ]


def _refuse_counts(model: Model, options: Options) -> Iterator[str]:
    """Numbers of experts that cannot be, and options for experts that the checkpoint has already."""
    n, used = options.n_expert, options.used
    if model.n_expert:
        n = model.n_expert + model.n_shared
        flags = {name: flag for name, flag in METHOD_FLAGS.items() if name != "seed"} | {"preset": "--preset"}
        idle = [flag for name, flag in flags.items() if getattr(options.method, name) is not None]
        others = {
            "--dense": options.dense,
            "--leading-dense": options.leading_dense is not None,
            "--align": options.align > 1,
            "--expert-scale": options.expert_scale,
        }
        idle += [flag for flag, given in others.items() if given]
        if options.experts not in (None, n):
            yield f"--experts {options.experts}: the checkpoint has {n} experts already, which are kept; leave it out"
        if idle:
            yield f"{', '.join(idle)}: the checkpoint has {n} experts already; leave it out"
    elif not 1 <= n <= model.d_ff:
        yield f"--experts {n}: must lie between 1 and the MLP's width, {model.d_ff}"
    if used is not None and not 1 <= used <= n:
        yield f"--used {used}: must lie between 1 and the number of experts, {n}"
    if options.align < 1:
        yield f"--align {options.align}: must be at least 1; 32 and 256 are the quantization blocks"


def _refuse_target_graph(model: Model, options: Options) -> Iterator[str]:
    """What a graph cannot be given, or has no use for."""
    graph, target = options.graph, options.target
    if model.head_norms and graph.architecture in ("llama", "deepseek") and options.slices(model):
        yield (
            f"--target {target}: its graph does not normalize queries and keys, which this model needs; choose "
            "--target glm4moe"
        )
    if (lead := options.leading_dense) and options.slices(model):
        if not graph.has_shared:
            yield f"--leading-dense {lead}: every layer has experts in this target; choose --target glm4moe"
        elif not 0 <= lead < model.n_layer:
            yield f"--leading-dense {lead}: must lie between 0 and {model.n_layer - 1}, so that a layer has experts"
    if graph.has_shared:
        yield from _refuse_idle_options(model, options)
        yield from _refuse_missing_parts(model, options)


def _refuse_idle_options(model: Model, options: Options) -> Iterator[str]:
    """What a graph with a shared expert has no use for."""
    target, in_shared, n, k = options.target, options.in_shared, options.n_expert, options.n_expert_used
    if model.n_expert:
        yield (
            f"--target {target}: the checkpoint has experts already, which stay those of a Mixtral model; leave it out"
        )
    elif not 1 <= in_shared < k:
        yield (
            f"--shared {in_shared}: --target {target} needs a shared expert, of at least 1 of the {n} experts and of "
            f"fewer than run (--used {k}); give --shared 1 to {max(1, k - 1)}"
        )
    if options.method.amplify not in (None, "exact"):
        yield (
            f"--amplify {options.method.amplify}: in --target {target} the weights of experts are the same at every "
            "count; leave it out"
        )
    if options.expert_scale:
        yield f"--expert-scale: --target {target} does not amplify experts; leave it out"


def _refuse_missing_parts(model: Model, options: Options) -> Iterator[str]:
    """What a model has and a graph with a shared expert has not."""
    graph, target, q_width = options.graph, options.target, model.n_head * model.d_head
    if graph.architecture == "deepseek" and q_width != model.d_model:
        yield (
            f"--target {target}: its queries are as wide as the model ({model.d_model}), here they are {q_width} wide; "
            "choose --target glm4moe"
        )
    if model.rope.has_factors and not graph.has_rotary_factors:
        yield (
            f"--target {target}: its graph has no factors for the rotary embedding, which this model needs (LLaMA 3 "
            "scaling); choose --target step35, or mixtral"
        )
    if model.bias_output:
        yield (
            f"--target {target}: its graph has no bias of the attention's output, which this model has; choose "
            "--target mixtral"
        )


def _refuse_unknown(options: Options) -> list[str]:
    """Names that are in no table of methods."""
    tables: dict[str, Mapping[str, object]] = {
        "preset": PRESETS,
        "group": GROUPS,
        "router": ROUTERS,
        "amplify": AMPLIFICATIONS,
    }
    return [
        f"--{name} {value}: unknown; choose {', '.join(table)}"
        for name, table in tables.items()
        if (value := getattr(options.method, name)) is not None and value not in table
    ]


def _refuse_calibration_files(model: Model, options: Options) -> Iterator[str]:
    """A calibration to save where none is made."""
    if options.calibration.save_to is None:
        return
    if not (options.slices(model) and options.resolve_method().needs_calibration):
        yield "--save-calibration: these options need no calibration; give --used below --experts"
    if options.calibration.load_from is not None:
        yield "--save-calibration: --load-calibration makes no new one; leave one of them out"


def _refuse_method(model: Model, options: Options) -> Iterator[str]:
    """Choices of a method that contradict each other, or the counts."""
    if not options.slices(model):
        return
    n, k, method, n_token = options.n_expert, options.n_expert_used, options.resolve_method(), options.n_token(model)
    if not options.in_shared:
        yield from _refuse_routed_only(method, method.n_shared or 0, n, k)
    if method.amplify == "any" and (method.router == "zero" or method.n_shared == 0):
        yield "--amplify any needs shared experts and a router; add --shared and --router least-squares"
    least = max(LEAST_TOKENS, 2 * model.d_model, model.d_ff * 5 // 4 * method.refit)
    if method.needs_calibration and n_token < least:
        way = ", or --no-refit" if method.refit and least > LEAST_TOKENS else ""
        yield f"--calibration-tokens {n_token}: too few for a stable solve of this width; at least {least}{way}"


def _refuse_routed_only(method: Method, shared: int, n: int, k: int) -> Iterator[str]:
    """What a graph whose router always chooses `shared` of n experts, k of them used, cannot be given."""
    if shared >= k and not shared == k == n:
        yield f"--shared {shared}: must be below --used {k}, so that there is something to route"
    if shared > 0 and method.router == "zero":
        yield "--router zero cannot choose shared experts for every token; choose least-squares"
    if shared > 0 and method.group == "contiguous":
        yield "--group contiguous has no important neurons to share; choose another group"
    if method.refit and k == n:
        yield "--refit corrects for experts that do not run, but all run; give --used below --experts"
