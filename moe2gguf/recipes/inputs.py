"""The files that the options name: a saved calibration, a text, rules for types, an importance matrix.

They are read before a plan is made, so that `make_plan` reads nothing.
"""

from dataclasses import dataclass

from moe2gguf.errors import PlanError, advise_install
from moe2gguf.experts.saved import SavedCalibration, read_calibration
from moe2gguf.experts.text import Text, read_sample
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.quant.imatrix import ImportanceMatrix, read_imatrix
from moe2gguf.quant.rules import Rule, TypeOptions, read_own_rules
from moe2gguf.recipes.gguf_as_hf import refuse_calibration
from moe2gguf.recipes.options import Options, adopt_calibration, refuse_options
from moe2gguf.recipes.source import Source, complete_options


@dataclass(frozen=True)
class TypeInputs:
    """What decides the types of tensors, apart from the options: the user's rules, and an importance matrix."""

    rules: tuple[Rule, ...] = ()
    matrix: ImportanceMatrix | None = None


@dataclass(frozen=True)
class Inputs:
    """What a conversion needs besides its source.

    options  the user's, with what they left open taken from a saved calibration
    text     to calibrate on, where that is needed
    saved    a calibration to use instead
    notes    what was chosen for the user, in sentences
    """

    options: Options
    types: TypeInputs
    text: Text | None = None
    saved: SavedCalibration | None = None
    notes: tuple[str, ...] = ()


def read_type_inputs(options: TypeOptions) -> TypeInputs:
    """Read the files that the options of types name.

    Raises:
        PlanError: the options name unknown types, broken patterns or an unreadable file of rules.
        ImportanceError: the importance matrix cannot be read or holds values that cannot be.
    """
    rules = read_own_rules(options)
    return TypeInputs(rules, None if options.imatrix is None else read_imatrix(options.imatrix))


def read_inputs(source: Source, options: Options) -> Inputs:
    """Read the files that the options name.

    Raises:
        PlanError: the options do not fit the model, or torch is missing; every reason is listed.
        CalibrationError: a text or a saved calibration cannot be read.
        ImportanceError: the importance matrix cannot be read.
    """
    saved: SavedCalibration | None = None
    refusals: list[str] = []
    if options.calibration.load_from:
        saved = read_calibration(options.calibration.load_from)
        options, refusals = adopt_calibration(options, saved)
    options, notes = complete_options(source, options)
    refusals += refuse_options(source.model, options, saved)
    slices = not refusals and options.slices(source.model)
    calibrates = slices and options.resolve_method().needs_calibration and not saved
    if calibrates:
        refusals += _refuse_to_calibrate(source)
    if refusals:
        raise PlanError(refusals)
    text = read_sample(options.calibration.text, options.n_token(source.model)) if calibrates else None
    return Inputs(options, read_type_inputs(options.types), text, saved, tuple(notes))


def _refuse_to_calibrate(source: Source) -> list[str]:
    """Return why the source cannot be calibrated on a text here: what it is, and libraries that are missing."""
    refusals = [] if isinstance(source, Checkpoint) else list(refuse_calibration(source))
    if install := advise_install("torch", "transformers"):
        refusals.append(f"experts are fitted to a text with torch and transformers: {install}; or take --preset exact")
    return refusals
