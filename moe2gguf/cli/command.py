"""What every command has: hints for the spellings of other programs, and a second page of help for experts."""

import sys
import warnings as python_warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import cloup

from moe2gguf.cli.streams import StreamError
from moe2gguf.cli.tables import VERBOSE, warnings
from moe2gguf.errors import LeftBehindWarning, Moe2GgufError
from moe2gguf.gguf.outputs import check_outputs, identify_output
from moe2gguf.gguf.resume import Interrupted
from moe2gguf.hf.hub import find_model_id

FOREIGN = {
    "-m": "MODEL",
    "--model": "MODEL",
    "--outfile": "OUT",
    "-o": "OUT",
    "--output": "OUT",
    "--outtype": "--type",
    "--dtype": "--type",
    "--torch_dtype": "--type",
    "--dry-run": "--plan",
    "--split-max-size": "--shard-size",
    "-ngl": "--device gpu",
    "--gpu-layers": "--device gpu",
    "--n-gpu-layers": "--device gpu",
    "-c": "--context",
    "--ctx-size": "--context",
    "--predict": "--tokens",
    "--n-predict": "--tokens",
    "--max-new-tokens": "--tokens",
    "--temp": "--temperature",
    "--file": "--text",
    "--include-weights": "--tensor-type",
}
"""Options of llama.cpp and Hugging Face, and what they are called here: an option, or an argument in capitals."""


OTHER_COMMANDS = {
    "help": "--help lists the commands, COMMAND --help explains one",
    "version": "it is --version here",
    **dict.fromkeys(("info", "show", "dump", "metadata"), "inspect shows a file"),
    **dict.fromkeys(("ls", "list", "models"), "a model is named by its path or its id on the Hugging Face Hub"),
    **dict.fromkeys(("download", "pull", "get"), "convert takes a model's id on the Hugging Face Hub"),
    **dict.fromkeys(("slice", "split", "create", "make"), "convert makes a file with experts"),
    **dict.fromkeys(("serve", "server"), "serve-help says what to type"),
    **dict.fromkeys(("generate", "ask", "cli"), "run goes on with a text, chat talks"),
    **dict.fromkeys(("perplexity", "eval", "measure"), "compare measures quality and speed"),
    **dict.fromkeys(("train", "finetune"), "heal trains a sliced model"),
    **dict.fromkeys(("check", "validate"), "verify checks a file"),
    **dict.fromkeys(("upload", "push"), "publish sends files"),
}
"""Commands of other programs, and what to say of them here."""


class Program(cloup.Group):
    """The group of all commands, with hints for the names of other programs' commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, or an error that says what to type."""
        if (hint := OTHER_COMMANDS.get(args[0].lower())) and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command: {args[0]}; {hint}.", ctx)
        return super().resolve_command(ctx, args)


class NoEffect(NamedTuple):
    """Options that change nothing `beside` one of others, which is an error, or `without` all of others, a warning.

    Where both are given they change nothing beside one of the former without all of the latter. Of another option the
    value may be named too: "--format hf", "--steps 0".
    """

    options: Sequence[str]
    beside: Sequence[str] = ()
    without: Sequence[str] = ()


class Input(click.Path):
    """A file or folder that is read: no output may be the same file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or an error that says what to name instead, or how a model gets here from the Hugging Face Hub."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = _advise(Path(value))
            raise click.BadParameter(f"{error.message}{hint}", ctx, param) from error


def _advise(path: Path) -> str:
    """What to do about a path that is not what was wanted, or nothing."""
    if (path / "config.json").is_file():
        return f" `moe2gguf convert {path} OUT.gguf --dense` makes a GGUF file of a model's folder."
    if path.exists():
        return " Name a file in it." if path.is_dir() else " Name a folder."
    if model := find_model_id(path):
        name = model.repository
        return f" Is it on the Hugging Face Hub? hf download {name} --local-dir {Path(name).name}"
    return ""


class ChangedInput(Input):
    """A file that is read, and changed in place."""


class Output(click.Path):
    """A file or folder that is written."""


class ContinuedOutput(Output):
    """A file or folder that may exist: more is written at its end, or into it."""


def allow_replacing(ctx: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    """Remember --force: existing outputs may be replaced."""
    ctx.meta[_FORCE] = value
    return value


_FORCE = "moe2gguf.force"


class Command(cloup.Command):
    """A command with these hints. Options made with `hidden=True` are shown by `--help-all`.

    `afterwards` has what is done when its file is written already: an option, if it is given, or other words.
    """

    def __init__(
        self,
        *args: Any,
        params: list[click.Parameter] | None = None,
        no_effect: Sequence[NoEffect] = (),
        afterwards: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self._no_effect, self._afterwards = no_effect, afterwards
        super().__init__(*args, params=[*(params or []), _help_all(), _verbose()], **kwargs)

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of the help, whole: the list of commands has lines enough in a narrow terminal, too."""
        return super().get_short_help_str(max(limit, 100))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, or name our option where they have another program's."""
        ours = {name for option in self._options() for name in (*option.opts, *option.secondary_opts)}
        for arg in args:
            if arg == "--":
                break
            name = arg.partition("=")[0]
            if name in FOREIGN and name not in ours:
                raise click.UsageError(f"No such option: {name}. {self._hint(FOREIGN[name], ours)}", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless an option has no effect or an output is an input or exists."""
        given = {name for one in self._options() for name in _list_given(one, ctx)}
        for row in self._no_effect:
            _check_effect(row, given, ctx)
        outputs = _Outputs({}, {}) if ctx.params.get("plan_only") else _check_files(self.params, ctx)
        later = [one for one in self._afterwards if one in given or not one.startswith("-")]
        with _tell_written(outputs, later), _tell_left_behind():
            result = super().invoke(ctx)
            sys.stdout.flush()
        return result

    def _options(self) -> list[click.Option]:
        return [parameter for parameter in self.params if isinstance(parameter, click.Option)]

    def _hint(self, name: str, ours: set[str]) -> str:
        if name.startswith("-"):
            return f"It is {name} here." if name.split()[0] in ours else f"{self.name} has no option for it."
        arguments = [parameter for parameter in self.params if isinstance(parameter, click.Argument)]
        metavars = [argument.human_readable_name.upper() for argument in arguments]
        usage = " ".join(["moe2gguf", str(self.name), *metavars])
        if name == "OUT":
            return f"The output is an argument here: {usage}" if "OUT" in metavars else "This command writes no file."
        return f"The model is the first argument here: {usage}"


def _list_given(option: click.Option, ctx: click.Context) -> list[str]:
    """The names of the option if the command line has it, alone and with each of its values."""
    if ctx.get_parameter_source(str(option.name)) is not click.core.ParameterSource.COMMANDLINE:
        return []
    value: Any = ctx.params.get(str(option.name))
    values = [f"{one:g}" if isinstance(one, float) else one for one in (value if option.multiple else [value])]
    names = [*option.opts, *option.secondary_opts]
    return [*names, *(f"{name} {one}" for name in names for one in values)]


def _check_effect(row: NoEffect, given: set[str], ctx: click.Context) -> None:
    """Warn of a given option without effect. Raises UsageError where another option alone is the reason."""
    useless = [name for name in row.options if name in given]
    others = [name for name in row.beside if name in given]
    if not useless or (row.beside and not others) or given.intersection(row.without):
        return
    if not row.without:
        raise click.UsageError(f"{', '.join(useless)}: no effect with {others[0]}; leave one of them out", ctx)
    beside = f"with {others[0]} and " if others else ""
    warnings([f"{', '.join(useless)}: no effect {beside}without {' or '.join(row.without)}"])


class _Outputs(NamedTuple):
    """By name, what a command writes as a whole or changes, and what it goes on with, which may be unfinished."""

    whole: dict[str, Path]
    continued: dict[str, Path]


@contextmanager
def _tell_written(outputs: _Outputs, later: Sequence[str]) -> Iterator[None]:
    """Add to an error or interrupt of the block what is written all the same, and what is not done, `later` included.

    Where it is only standard output that cannot be written, all is done. An interrupt that left no file says that.
    """
    before = {path: identify_output(path) for path in (outputs.whole | outputs.continued).values()}
    try:
        yield
    except (Moe2GgufError, KeyboardInterrupt) as error:
        is_done = isinstance(error, StreamError)
        looked_at = outputs.whole | (outputs.continued if is_done else {})
        written = [name for name, path in looked_at.items() if identify_output(path) - before[path]]
        missing = [] if is_done else [*(name for name in outputs.whole if name not in written), *later]
        if written:
            rest = f"; not done: {', '.join(missing)}" if missing else ""
            error.add_note(f"{', '.join(written)} {'were' if len(written) > 1 else 'was'} written{rest}")
        elif outputs.whole and isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            error.add_note("no unfinished file was kept")
        raise


@contextmanager
def _tell_left_behind() -> Iterator[None]:
    """Show what the block warns of as left behind like every warning of a command."""
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("always", LeftBehindWarning)
        show = python_warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is LeftBehindWarning:
                warnings([str(message)])
            else:
                show(message, category, *where, **more)

        python_warnings.showwarning = tell
        yield


def _check_files(parameters: list[click.Parameter], ctx: click.Context) -> _Outputs:
    """Check every path of type `Output` against every one of type `Input`.

    Raises OutputError.
    """
    inputs: list[Path] = []
    changed: dict[str, Path] = {}
    outputs = _Outputs({}, {})
    for parameter in parameters:
        if not isinstance(parameter.type, (Input, Output)):
            continue
        value = ctx.params[str(parameter.name)]
        paths = [Path(one) for one in (value if isinstance(value, tuple) else [value]) if one is not None]
        if isinstance(parameter.type, Input):
            inputs += paths
            changed |= {str(path): path for path in paths if isinstance(parameter.type, ChangedInput)}
            continue
        option = f"{max(parameter.opts, key=len)} " if isinstance(parameter, click.Option) else ""
        if isinstance(parameter.type, ContinuedOutput):
            outputs.continued.update({f"{option}{path}": path.absolute() for path in paths})
        else:
            outputs.whole.update({f"{option}{path}": path for path in paths})
    force = ctx.meta.get(_FORCE, False)
    check_outputs(outputs.whole | outputs.continued, inputs, force=force, may_exist=outputs.continued)
    return outputs._replace(whole=outputs.whole | changed)


def _verbose() -> click.Option:
    """The option that shows lists in full: of tensors, warnings and (`moe2gguf.cli.main` looks for it) problems."""

    def remember(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
        ctx.meta[VERBOSE] = value

    words = "Show all tensors of a plan, all layers of a calibration, and long lists as a whole."
    return cloup.Option(["--verbose"], is_flag=True, expose_value=False, hidden=True, callback=remember, help=words)


def _help_all() -> click.Option:
    """The option that prints the help with the options that `--help` leaves out."""

    def show(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            with show_everything(ctx.command):
                text = ctx.get_help()
            click.echo(text, color=ctx.color)
            ctx.exit()

    help_text = "Show this message with all other options, and exit."
    names = ["--help-all"]
    return cloup.Option(names, is_flag=True, is_eager=True, expose_value=False, callback=show, help=help_text)


@contextmanager
def show_everything(command: click.Command) -> Iterator[None]:
    """Show the hidden options and groups of a command."""
    shown = [*command.params, *getattr(command, "option_groups", [])]
    hidden = [one for one in shown if getattr(one, "hidden", False)]
    for one in hidden:
        one.hidden = False
    try:
        yield
    finally:
        for one in hidden:
            one.hidden = True
