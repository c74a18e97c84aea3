"""What the user chooses about the file, and every choice that is refused before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe2gguf.experts.methods import AMPLIFICATIONS, GROUPS, ROUTERS
from moe2gguf.experts.saved import SavedCalibration
from moe2gguf.experts.text import read_text
from moe2gguf.quant.rules import TypeOptions, refuse_type
from moe2gguf.spec import EXACT, SPARSE, Method, Model

DEFAULT_EXPERTS = 8
DEFAULT_TOKENS = 16384
AUTO = -1
"""What `Options.n_shared` may be beside a number."""
LEAST_TOKENS = 1024
"""Of any calibration. A router has d_model unknowns per expert, a refit d_ff per output, on 4 of 5 tokens."""

FLAGS = {"n_shared": "shared"}

PRESETS = {"exact": EXACT, "sparse": SPARSE}


@dataclass(frozen=True)
class Options:
    """Every default is the command line's.

    experts    how many experts each dense MLP is cut into (None: 8). A Mixtral checkpoint keeps its own.
    used       experts that run per token unless the program that runs the file says otherwise (None: all of them)
    align      every expert is padded with zero neurons to a multiple of this width (32 or 256 for block types)
    expert_scale  amplify by a tensor of scales (`ffn_down_exps.scale`) instead of in the weights
    type       "auto" (as stored), a preset or a tensor type; it and the nine below are `TypeOptions`
    shard_size  bytes of the largest file, where the model is to be written as several (None: one file)
    dense      write the ordinary dense file instead, the reference for every comparison
    name       the model's name in the metadata, instead of the model card's
    preset     "exact", "sparse", or None: exact where all experts are used, sparse below; the next six change it
    group, n_shared, router, refit, amplify, seed     fields of `moe2gguf.spec.Method`; n_shared AUTO (-1) takes the
                default number
    calibration         text file to calibrate on (None: the embedded text, of many kinds)
    calibration_tokens  how many tokens of it (None: see `tokens_for`)
    device              torch device of the calibration (None: the best there is)
    calibration_memory  bytes of hidden states that are kept in memory; more of them go to disk
    save_calibration    file to keep the calibration in
    load_calibration    file of a calibration to use instead of a new one; it decides what is left open here
    """

    experts: int | None = None
    used: int | None = None
    align: int = 1
    expert_scale: bool = False
    type: str = "auto"
    tensor_types: tuple[str, ...] = ()
    type_rules: Path | None = None
    pure: bool = False
    allow_fallback: bool = False
    llama_cpp_mix: bool = False
    imatrix: Path | None = None
    imatrix_repair: str = "none"
    target_size: int | None = None
    target_bpw: float | None = None
    shard_size: int | None = None
    dense: bool = False
    name: str | None = None
    preset: str | None = None
    group: str | None = None
    n_shared: int | None = None
    router: str | None = None
    refit: bool | None = None
    amplify: str | None = None
    seed: int = 0
    calibration: Path | None = None
    calibration_tokens: int | None = None
    device: str | None = None
    calibration_memory: int = 4 * 10**9
    save_calibration: Path | None = None
    load_calibration: Path | None = None

    def counts(self) -> tuple[int, int]:
        """(n_expert, n_expert_used) of a dense checkpoint."""
        n = DEFAULT_EXPERTS if self.experts is None else self.experts
        return n, n if self.used is None else self.used

    def types(self) -> TypeOptions:
        """What concerns the types of tensors."""
        return TypeOptions(**{field.name: getattr(self, field.name) for field in fields(TypeOptions)})

    def choose_method(self) -> Method:
        """The preset with the user's changes."""
        n, k = self.counts()
        base = PRESETS[self.preset] if self.preset else (EXACT if k == n else SPARSE)
        changes = {
            name: value
            for name in ("group", "router", "refit", "amplify")
            if (value := getattr(self, name)) is not None
        }
        if self.n_shared is not None:
            changes |= {"n_shared": None if self.n_shared < 0 else self.n_shared}
        return replace(base, seed=self.seed, **changes)

    def tokens_for(self, model: Model) -> int:
        """How many tokens to calibrate on: 16,384 unless given, or two per neuron of an MLP that is refitted."""
        if self.calibration_tokens is not None:
            return self.calibration_tokens
        return max(DEFAULT_TOKENS, 2 * model.d_ff if self.choose_method().refit else 0)


def adopted(options: Options, saved: SavedCalibration) -> tuple[Options, list[str]]:
    """The options with what they leave open taken from a saved calibration, and every one that does not fit it.

    Raises:
        CalibrationError: `options.calibration` cannot be read.
    """
    record, file = saved.record, saved.path.name
    made: dict[str, Any] = {
        "experts": record.n_expert,
        "used": record.n_expert_used,
        "group": record.group,
        "n_shared": AUTO if record.n_shared is None else record.n_shared,
        "router": record.router,
        "refit": record.refit,
        "amplify": record.amplify,
        "calibration_tokens": record.n_token,
        "seed": record.seed,
    }
    unset = Options()
    given = {name: value for name in made if (value := getattr(options, name)) != getattr(unset, name)}
    together = made | given
    rescalable = record.rescalable and together["amplify"] in ("exact", "used")
    found = [
        f"--{FLAGS.get(name, name.replace('_', '-'))} {_said(name, value)}: {file} was made with "
        f"{_said(name, made[name])}; leave it out, or calibrate again without --load-calibration"
        for name, value in given.items()
        if value != made[name] and not (rescalable and name in ("used", "amplify"))
    ]
    if options.calibration and read_text(options.calibration).digest != record.text:
        found.append(f"--calibration {options.calibration.name}: {file} was made from another text, {record.label}")
    if together["used"] <= saved.n_shared < record.n_expert:
        found.append(f"--used {together['used']}: {file} has layers with {saved.n_shared} always-on experts; use more")
    if options.preset == "exact" or options.dense:
        found.append("--load-calibration: --preset exact and --dense use no calibration; leave one of them out")
    return replace(options, preset="sparse", **together), found


def _said(name: str, value: Any) -> str:
    """The value of an option as the command line has it."""
    return "auto" if name == "n_shared" and value == AUTO else str(value)


def refusals(model: Model, options: Options) -> list[str]:
    """Every reason, with the way out, why `options` do not fit `model`."""
    found = _refuse_experts(model, options) + _refuse_output(options)
    sliced = not model.n_expert and not options.dense
    if options.save_calibration and not (sliced and options.choose_method().needs_calibration):
        found.append("--save-calibration: these options need no calibration; give --used below --experts")
    if options.save_calibration and options.load_calibration:
        found.append("--save-calibration: --load-calibration makes no new one; leave one of them out")
    return found or (_refuse_method(model, options) if sliced else [])


def _refuse_experts(model: Model, options: Options) -> list[str]:
    found = []
    experts, used = options.experts, options.used
    n = model.n_expert or options.counts()[0]
    if model.n_expert and experts not in (None, n):
        found.append(f"--experts {experts}: the checkpoint has {n} experts already, which are kept; leave it out")
    if model.n_expert and options.dense:
        found.append(f"--dense: the checkpoint has {n} experts already; leave it out")
    if not model.n_expert and not 1 <= n <= model.d_ff:
        found.append(f"--experts {n}: must lie between 1 and the MLP's width, {model.d_ff}")
    if used is not None and not 1 <= used <= n:
        found.append(f"--used {used}: must lie between 1 and the number of experts, {n}")
    return found


def _refuse_output(options: Options) -> list[str]:
    found = []
    if options.align < 1:
        found.append(f"--align {options.align}: must be at least 1; 32 and 256 are the quantization blocks")
    return found + refuse_type(options.type)


def _refuse_method(model: Model, options: Options) -> list[str]:
    tables = (("preset", PRESETS), ("group", GROUPS), ("router", ROUTERS), ("amplify", AMPLIFICATIONS))
    found = [
        f"--{name} {value}: unknown; choose {', '.join(table)}"
        for name, table in tables
        if (value := getattr(options, name)) is not None and value not in table
    ]
    if found:
        return found
    (n, k), method = options.counts(), options.choose_method()
    shared = method.n_shared
    if shared:
        if not (shared < k or shared == k == n):
            found.append(f"--shared {shared}: must be below --used {k}, so that there is something to route")
        if method.router == "zero":
            found.append("--router zero cannot keep experts always on; choose least-squares")
        if method.group == "contiguous":
            found.append("--group contiguous has no important experts to keep always on; choose another group")
    if method.refit and k == n:
        found.append("--refit corrects for experts that do not run, but all run; give --used below --experts")
    if method.amplify == "any" and (method.router == "zero" or shared == 0):
        found.append("--amplify any needs always-on experts and a router; add --shared and --router least-squares")
    least = max(LEAST_TOKENS, 2 * model.d_model, model.d_ff * 5 // 4 if method.refit else 0)
    if method.needs_calibration and (n_token := options.tokens_for(model)) < least:
        found.append(
            f"--calibration-tokens {n_token}: too few for a stable solve of this width; at least "
            f"{least}" + (", or --no-refit" if method.refit and least > LEAST_TOKENS else "")
        )
    return found
