"""A pipe, a device, a socket or a folder where a file is expected is one message; nothing waits for ever."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoints
import imatrix_files
import pytest
import tiny_gguf
from command import moe2gguf

from moe2gguf.cli import cli
from moe2gguf.cli.command import Input

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes"),
    pytest.mark.timeout(120),
]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket may have some hundred characters only
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": make_pipe,
    "device": make_device,
    "socket": make_socket,
    "folder": Path.mkdir,
}

HEAL = "heal MOE OUT --used-range 2 --layerwise 0 --steps 1"
LINES = {
    ("convert", "model"): "convert ODD OUT --experts 4",
    ("convert", "text"): "convert HF OUT --experts 4 --used 2 --calibration ODD",
    ("convert", "load_from"): "convert HF OUT --experts 4 --used 2 --load-calibration ODD",
    ("convert", "imatrix"): "convert HF OUT --experts 4 --imatrix ODD",
    ("convert", "check"): "convert HF OUT --experts 4 --check ODD",
    ("convert", "type_rules"): "convert HF OUT --experts 4 --type-rules ODD",
    ("quantize", "source"): "quantize ODD OUT q8_0",
    ("quantize", "imatrix"): "quantize DENSE OUT q8_0 --imatrix ODD",
    ("quantize", "type_rules"): "quantize DENSE OUT q8_0 --type-rules ODD",
    ("densify", "source"): "densify ODD OUT",
    ("heal", "student"): "heal ODD OUT --used-range 2 --teacher HF --text TEXT",
    ("heal", "teacher"): f"{HEAL} --teacher ODD --text TEXT",
    ("heal", "files"): f"{HEAL} --teacher HF --text ODD",
    ("heal", "held_out"): f"{HEAL} --teacher HF --text TEXT --held-out ODD",
    ("merge", "base"): "merge ODD DENSE DENSE OUT --router random",
    ("merge", "donors"): "merge DENSE DENSE ODD OUT --router random",
    ("merge", "prompts"): "merge DENSE DENSE DENSE OUT -t 1 --prompts ODD --prompts TEXT",
    ("prune", "model"): "prune ODD OUT --keep 2",
    ("prune", "text"): "prune DENSE OUT --keep 2 --tokens 64 --context 32 --text ODD",
    ("set-used", "file"): "set-used ODD 2",
    ("inspect", "file"): "inspect ODD",
    ("verify", "file"): "verify ODD",
    ("verify", "dense"): "verify DENSE --check ODD",
    ("run", "file"): "run ODD x",
    ("chat", "file"): "chat ODD",
    ("expert-usage", "file"): "expert-usage ODD",
    ("expert-usage", "text"): "expert-usage DENSE --text ODD",
    ("compare", "files"): "compare ODD --reference DENSE",
    ("compare", "reference"): "compare DENSE --reference ODD",
    ("compare", "imatrix"): "compare DENSE --reference DENSE --types q8_0 --imatrix ODD",
    ("compare", "text"): "compare DENSE --reference DENSE --text ODD",
    ("bench", "files"): "bench ODD",
    ("bench", "reference"): "bench DENSE --reference ODD",
    ("imatrix", "model"): "imatrix ODD OUT --text TEXT",
    ("imatrix", "text"): "imatrix DENSE OUT --text ODD",
    ("imatrix", "merged"): "imatrix DENSE OUT --merge ODD",
    ("views", "file"): "views ODD OUT",
    ("shrink", "model"): "shrink ODD OUT --quality 1.5",
    ("shrink", "text"): "shrink HF OUT --quality 1.5 --types f16 --text ODD",
    ("serve-help", "file"): "serve-help ODD",
    ("publish", "model"): "publish ODD OUT --types f16",
    ("publish", "calibration"): "publish HF OUT --types f16 --experts 4 --used 2 --calibration ODD",
    ("publish", "imatrix"): "publish HF OUT --types q8_0 --experts 4 --imatrix ODD",
    ("publish", "text"): "publish HF OUT --types f16 --experts 4 --text ODD",
}
"""(command, input) -> a command line whose other inputs are sound."""

TEXTS = [line for (_, name), line in LINES.items() if name == "text" and "HF" not in line]
"""Of commands that take any text, as it is, at once."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What stands for the words in capitals."""
    folder = tmp_path_factory.mktemp("odd")
    hf = checkpoints.make(folder / "hf")
    assert 0 == moe2gguf("convert", hf, folder / "moe", "--experts", 4, "--format", "hf").returncode
    dense = tiny_gguf.write_gguf(folder / "dense.gguf", tiny_gguf.dense_weights(), f16=True)
    (folder / "text.txt").write_text("hello the world " * 400)
    yield {"HF": str(hf), "MOE": str(folder / "moe"), "DENSE": str(dense), "TEXT": str(folder / "text.txt")}
    shutil.rmtree(folder)


def test_every_input_of_every_command_is_tried() -> None:
    """A new option that names a file needs a line."""
    inputs = {
        (name, one.name)
        for name, command in cli.commands.items()
        for one in command.params
        if isinstance(one.type, Input) and one.name
    }

    assert inputs == LINES.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", LINES.values())
def test_what_is_no_file_is_refused(
    line: str, kind: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, or 2 from the parser, naming it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    odd, out = tmp_path / "odd", tmp_path / "out.gguf"
    KINDS[kind](odd)
    words = {**files, "ODD": str(odd), "OUT": str(out)}

    done = moe2gguf(*(words.get(word, word) for word in line.split()))

    assert done.returncode in (1, 2)
    assert "odd" in done.stderr + done.stdout
    assert {odd} == {*tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md", "model.safetensors", "tokenizer.model"])
def test_what_is_no_file_in_a_folder_is_refused(name: str, files: dict[str, str], tmp_path: Path) -> None:
    """A pipe in the place of a file of the model."""
    shutil.copytree(files["HF"], tmp_path / "hf")
    (tmp_path / "hf" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "hf" / name)

    done = moe2gguf("convert", tmp_path / "hf", tmp_path / "out.gguf", "--experts", 4)

    assert f"{name}: is a pipe; expected a file" in done.stderr
    assert 1 == done.returncode


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
@pytest.mark.parametrize(("line", "how"), [*zip(TEXTS, itertools.cycle(["/dev/stdin", "<(command)"]), strict=False)])
def test_a_text_may_come_through_a_pipe(line: str, how: str, files: dict[str, str], tmp_path: Path) -> None:
    """Standard input, and what a shell puts in the place of <(command)."""
    moe = tiny_gguf.write_gguf(tmp_path / "moe.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4))
    reading, writing = os.pipe()
    odd = how if how == "/dev/stdin" else f"/dev/fd/{reading}"
    words = {**files, "ODD": odd, "OUT": str(tmp_path / "out.gguf")} | (
        {"DENSE": str(moe)} if line.startswith(("expert-usage", "prune")) else {}
    )
    program = [sys.executable, "-c", "from moe2gguf.cli import main; main()"]
    command = [*program, *(words.get(word, word) for word in line.split())]
    child = subprocess.Popen(command, stdin=reading, stderr=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[reading])
    os.close(reading)
    with open(writing, "wb") as pipe:
        pipe.write(Path(files["TEXT"]).read_bytes())

    _, said = child.communicate()

    assert 0 == child.returncode, said.decode()


@pytest.mark.parametrize("line", ["prune ODD OUT --keep 2", "set-used ODD 2", "serve-help ODD"])
def test_a_file_that_is_no_model_is_refused(line: str, tmp_path: Path) -> None:
    """An importance matrix is a GGUF file too."""
    matrix = imatrix_files.write_gguf(
        tmp_path / "m.gguf", imatrix_files.statistics_for({"blk.0.ffn_up.weight": (8, 32)})
    )
    before = matrix.read_bytes()

    done = moe2gguf(*({"ODD": matrix, "OUT": tmp_path / "out.gguf"}.get(word, word) for word in line.split()))

    assert (1, "moe2gguf: ") == (done.returncode, done.stderr[:10])
    assert "m.gguf: has no general.architecture, so it is no model" in done.stderr
    assert ([matrix], before) == ([*tmp_path.iterdir()], matrix.read_bytes())
