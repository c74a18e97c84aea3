"""The command densify: a model with experts becomes a dense one."""

from pathlib import Path

import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.command import Command
from moe2gguf.cli.options import MODEL, OUT, emit, force_option, json_option


@cloup.command(cls=Command)
@cloup.argument("source", type=MODEL, help="A folder or a GGUF file with experts.")
@cloup.argument("out", type=OUT, help="The folder or GGUF file to write.")
@option_group(
    "Experts",
    option("--average", is_flag=True, help="Make the mean of experts that are whole MLPs, which is another model."),
)
@option_group("Output", force_option, json_option)
def densify(source: Path, out: Path, average: bool, force: bool, as_json: bool) -> None:
    """Convert a model with experts back into a dense one.

    All experts become one MLP, which computes what they compute together. A sliced model becomes the dense model it was
    made from. Models whose router weights depend on the input are refused: healed ones, and those sliced with
    --amplify any or fitted. Of a mixture such as Mixtral, --average makes a dense model of the size of one expert, and
    the line says how far the experts are from their mean; compare what it is worth. The best expert of each layer is
    what prune --keep 1 --score total leaves, and densify makes that dense too.

    \b
    Example:
      moe2gguf densify half dense-again
      moe2gguf densify moe.gguf dense.gguf
      moe2gguf densify mixtral.gguf small.gguf --average
    """
    from moe2gguf.recipes.densify import densify as write_dense

    done = write_dense(source, out, average=average, force=force, progress=display.progress)
    emit(done.to_dict(), as_json, lambda: tables_convert.print_densified(done))
