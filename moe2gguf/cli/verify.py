"""The command verify: check a GGUF file."""

from pathlib import Path

import cloup
from cloup import option

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command
from moe2gguf.cli.options import FILE, emit, json_option, threads_option


@cloup.command(cls=Command)
@cloup.argument("file", type=FILE, help="The GGUF file to verify.")
@option("--check", "dense", type=FILE, metavar="DENSE", help="Also compare with this dense file in llama.cpp.")
@threads_option
@json_option
def verify(file: Path, dense: Path | None, threads: int | None, as_json: bool) -> None:
    """Read a GGUF file and check everything in it.

    Checks the header, the place of each tensor, the shapes against the metadata, and that no weight is NaN or infinite.

    \b
    Example:
      moe2gguf verify moe.gguf
      moe2gguf verify moe.gguf --check dense.gguf
    """
    from moe2gguf.gguf.verify import verify as verify_file
    from moe2gguf.measure.check import compare_with_dense

    with display.progress("verify", file.stat().st_size) as advance:
        found = verify_file(file, threads=threads, progress=advance)
    checked = compare_with_dense(file, dense, threads=threads) if dense and not found.problems else None
    result = {
        "path": str(file),
        "ok": not found.problems,
        "problems": list(found.problems),
        "notes": list(found.notes),
        "tensors": found.n_tensors,
        "bytes": found.n_bytes,
        "check": checked.to_dict() if checked else None,
    }
    emit(result, as_json, lambda: display.print_verification(found, checked))
    if found.problems or (checked and not checked.ok):
        raise SystemExit(1)
