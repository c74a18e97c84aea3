"""moe2gguf.cli as a user meets it: the installed command, its streams, its exit codes, its help."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import pytest
from click.testing import CliRunner
from command import moe2gguf

from moe2gguf.cli import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA checkpoint."""
    return checkpoints.make(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(sliced, dense) files of it."""
    folder = tmp_path_factory.mktemp("files")
    for name, options in (("sliced.gguf", ["-e", "4"]), ("dense.gguf", ["--dense"])):
        assert 0 == moe2gguf("convert", model, folder / name, *options).returncode
    return folder / "sliced.gguf", folder / "dense.gguf"


def test_convert_prints_one_line_and_no_progress_when_piped(model: Any, tmp_path: Path) -> None:
    """stdout: what was written; stderr: nothing."""
    done = moe2gguf("convert", model, tmp_path / "out.gguf", "-e", 4)

    size = f"{(tmp_path / 'out.gguf').stat().st_size:,}"
    assert (0, "") == (done.returncode, done.stderr)
    assert f"wrote {tmp_path}/out.gguf: {size} bytes, 33 tensors, 4 experts, 4 used; verified\n" == done.stdout


def test_json_is_the_only_thing_on_stdout(model: Any, tmp_path: Path) -> None:
    """Warnings go to stderr, so that a pipe gets JSON whatever happens."""
    done = moe2gguf("convert", model, tmp_path / "out.gguf", "-e", 4, "-k", 2, "--preset", "exact", "--json")

    assert 4 == json.loads(done.stdout)["expert_count"]
    assert "not be coherent" in done.stderr


def test_plan_writes_nothing_and_needs_no_target(model: Any, tmp_path: Path) -> None:
    """The exact size, bytes and bound at each count first; every tensor with --verbose."""
    done = moe2gguf("convert", model, "--plan", "-e", 4, "--verbose")

    assert 0 == done.returncode
    assert re.search(r"blk\.2\.ffn_down_exps\.weight +4 x 64 x 24 +F32 +24,576", done.stdout)
    assert re.search(r"4 of 4 +[\d,]+ +0\.\d\d x +as in the file", done.stdout)
    values = json.loads(moe2gguf("convert", model, "--plan", "-e", 4, "--json").stdout)
    assert f"file size           {values['file_size']:,} bytes" in done.stdout
    assert [] == values["refusals"]
    short = moe2gguf("convert", model, "--plan", "-e", 4).stdout
    assert short.startswith("file size ")
    assert "--verbose lists the tensors" in short
    assert "blk.2.ffn_down_exps" not in short


def test_a_plan_that_is_refused_says_so_in_json_too(model: Any) -> None:
    """The same refusals on stdout for machines, exit code 1."""
    done = moe2gguf("convert", model, "--plan", "--json", "-e", 1000, "-k", 2000)

    assert 1 == done.returncode
    assert ["--experts 1000", "--used 2000"] == [text.split(":")[0] for text in json.loads(done.stdout)["refusals"]]


def test_check_auto_compares_with_a_dense_twin_and_removes_it(model: Any, tmp_path: Path) -> None:
    """In llama.cpp; the folder afterwards holds the one file that was asked for."""
    done = moe2gguf("convert", model, tmp_path / "out.gguf", "--check", "auto", "--json")

    check = json.loads(done.stdout)["check"]
    assert (0, True) == (done.returncode, check["ok"])
    assert check["kl_mean"] < 1e-6
    assert (0, []) == (check["tokens"]["n_differing"], check["tokens"]["named"])
    assert ["out.gguf"] == [path.name for path in tmp_path.iterdir()]


def test_check_names_texts_whose_token_ids_differ(model: Any, tmp_path: Path) -> None:
    """Of a token that swallows the space before it, which is no reason for the check to fail."""
    shutil.copytree(model, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1] |= {"lstrip": True}
    path.write_text(json.dumps(content))
    odd = content["added_tokens"][-1]["content"]

    done = moe2gguf("convert", tmp_path / "m", tmp_path / "out.gguf", "--check", "auto")

    assert 0 == done.returncode
    assert re.search(r"token ids: \d+ of \d+ texts have others than the folder's tokenizer gives", done.stdout)
    assert f"{' ' + odd!r}: llama.cpp [" in done.stdout


def test_verify_says_sound_or_what_is_wrong(files: Any, tmp_path: Path) -> None:
    """Exit code 0, or 1 with every problem."""
    sliced, dense = files
    assert "sound" in moe2gguf("verify", sliced).stdout
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(sliced.read_bytes()[:-1000])

    done = moe2gguf("verify", cut)

    assert 1 == done.returncode
    assert "NOT SOUND" in done.stdout
    assert "problem: " in done.stdout
    same = moe2gguf("verify", sliced, "--check", dense)
    assert 0 == same.returncode, same.stdout + same.stderr
    assert "ok: " in same.stdout


def test_verify_check_fails_for_another_model(files: Any, tmp_path: Path) -> None:
    """A file that is not the dense model is told apart, with exit code 1."""
    other = checkpoints.make(tmp_path / "other", initializer_range=0.2)
    moe2gguf("convert", other, tmp_path / "other.gguf", "--dense")

    done = moe2gguf("verify", files[0], "--check", tmp_path / "other.gguf")

    assert 1 == done.returncode
    assert "NOT THE SAME" in done.stdout


def test_inspect_shows_experts_and_provenance(files: Any) -> None:
    """As a table and as JSON."""
    text = moe2gguf("inspect", files[0]).stdout
    values = json.loads(moe2gguf("inspect", files[0], "--json").stdout)

    assert "moe2gguf.slicing.group" in text
    assert 4 == values["experts"]["count"]


def test_run_streams_text(files: Any) -> None:
    """Deterministic at temperature 0; speeds on stderr; --used changes what runs."""
    first = moe2gguf("run", files[0], "--raw", "-p", "Hello", "-n", 8)
    again = moe2gguf("run", files[0], "--raw", "-p", "Hello", "-n", 8)

    assert 0 == first.returncode, first.stderr
    assert first.stdout.startswith("Hello")
    assert first.stdout == again.stdout
    assert "tokens/s" in first.stderr
    bad = moe2gguf("run", files[0], "-p", "Hello", "--used", 9)
    assert (1, "") == (bad.returncode, bad.stdout)
    assert bad.stderr.startswith("moe2gguf: ")
    assert "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["convert", "nowhere", "out.gguf"],
            1,
            "nowhere: no such file or folder; name a model's folder or file",
        ),
        (["convert", "owner/some-model", "out.gguf"], 1, "hf download owner/some-model --local-dir some-model"),
        (["convert", "MODEL"], 2, "Missing argument 'OUT'"),
        (["convert", "MODEL", "no/such/folder/out.gguf"], 1, "no such folder"),
        (["convert", "MODEL", "/dev/full", "--force"], 1, "not a regular file"),
        (["convert", "MODEL", "out.gguf", "-e", "1000"], 1, "--experts 1000"),
        (["convert", "MODEL", "out.gguf", "-e", "x"], 2, "not a valid integer"),
        (["convert", "MODEL", "out.gguf", "-t", "x"], 2, "not a valid integer."),
        (["shrink", "MODEL", "out.gguf", "--quality", "10%"], 2, "not a valid number."),
        (["convert", "MODEL", "out.gguf", "--frobnicate"], 2, "No such option"),
        (["verify", "nowhere"], 2, "does not exist"),
        (
            ["inspect", "owner/some-model"],
            2,
            "on the Hugging Face Hub? hf download owner/some-model --local-dir some-model",
        ),
        (["inspect", "MODEL/config.json"], 1, "name its folder, MODEL, which `moe2gguf convert` makes a GGUF file of"),
        (["convert", "MODEL/model.safetensors", "out.gguf"], 1, "name its folder, MODEL, which"),
        (["inspect", "MODEL"], 2, "`moe2gguf convert MODEL OUT.gguf --dense` makes a GGUF file of a model's folder."),
        (["inspect", "."], 2, "Name a file in it."),
        (["publish", "MODEL", "out", "--types", ","], 2, "',' names nothing"),
        (["bench", "MODEL/config.json", "--timeout", "0"], 2, "not in the range"),
        (
            ["heal", "MODEL", "o", "--teacher", "MODEL", "--text", "MODEL/config.json", "--used-range", "3..2"],
            2,
            "first; turn it around",
        ),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_wrong_input_is_one_clear_error(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, code: int, words: str
) -> None:
    """Exit 1 for what is wrong with the data, 2 for the usage; no traceback; nothing left."""
    monkeypatch.chdir(tmp_path)
    done = moe2gguf(*(argument.replace("MODEL", str(model)) for argument in arguments))

    assert code == done.returncode, done.stderr
    assert words.replace("MODEL", str(model)) in done.stderr
    assert "Traceback" not in done.stderr
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_conversion_goes_on_with_the_same_command(tmp_path: Path, name: str, code: int) -> None:
    """Ctrl-C and a polite kill in mid-write: exit code and message say so, the second run reuses the first."""
    folder = checkpoints.make(tmp_path / "model", hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    target = tmp_path / "out"
    target.mkdir()
    journal = target / "x.gguf.partial" / "job.jsonl"
    command = [sys.executable, "-c", "from moe2gguf.cli import main; main()", "convert", folder, target / "x.gguf"]
    command += ["--type", "q6_k", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # type: ignore[arg-type]
        while process.poll() is None and not (journal.exists() and journal.read_text().count("xxh3") > 3):
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        message = process.communicate()[1]

    assert code == process.returncode
    assert re.search(r"x.gguf.partial keeps what is finished \(\d+ pieces\); the same command", message)
    assert ["x.gguf.partial"] == [path.name for path in target.iterdir()]

    done = subprocess.run(command, capture_output=True, text=True, check=True)  # type: ignore[arg-type]

    assert re.search(r"tensors \(\d+ of them from the interrupted run\)", done.stdout)
    assert ["x.gguf"] == [path.name for path in target.iterdir()]


def test_python_m_is_the_command() -> None:
    """For who has no path to it; the exit code is passed on."""
    done = subprocess.run(
        [sys.executable, "-m", "moe2gguf", "verify", "x"], capture_output=True, text=True, check=False
    )

    assert 2 == done.returncode
    assert done.stderr.startswith("Usage: moe2gguf verify [OPTIONS] FILE\n")


def test_help_is_immediate_and_needs_nothing_heavy() -> None:
    """--help imports neither torch, transformers nor llama.cpp."""
    code = "import sys; sys.argv = ['moe2gguf', '--help']\nfrom moe2gguf.cli import cli\ntry: cli()\n"
    code += "finally: print([m for m in ('torch', 'transformers', 'llama_cpp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", [None, *cli.commands])
def test_every_command_has_help_with_an_example(command: Any) -> None:
    """`--help` is the manual most people read."""
    result = CliRunner().invoke(cli, [*([command] if command else []), "--help"])

    assert 0 == result.exit_code
    assert "Example:" in result.output
    assert "..." not in result.output.replace("COMMAND [ARGS]...", "").replace("FILES...", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Each names the program and the variable click listens to."""
    result = CliRunner().invoke(cli, ["completion", shell])

    assert "_MOE2GGUF_COMPLETE" in result.output


def test_completion_completes() -> None:
    """What the script asks for while the user types."""
    environment = os.environ | {"_MOE2GGUF_COMPLETE": "bash_complete", "COMP_WORDS": "moe2gguf con", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['moe2gguf']\nfrom moe2gguf.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert "plain,convert" in done.stdout


def test_a_gguf_written_by_the_command_is_a_gguf(files: Any) -> None:
    """Read by the gguf package."""
    assert 33 == len(gguf.GGUFReader(files[0]).tensors)


def test_quantize_in_one_pass_and_from_a_file_give_the_same_tensors(model: Any, tmp_path: Path) -> None:
    """`convert --type` and `quantize` share kernels and rules; one line on stdout."""
    rule = r"blk\..*\.ffn_down_exps\.weight=q8_0"
    options = ["--tensor-type", rule, "--allow-fallback"]
    moe2gguf("convert", model, tmp_path / "full.gguf", "-e", 3)
    direct = moe2gguf("convert", model, tmp_path / "direct.gguf", "-e", 3, "--type", "Q4_K_M", *options)
    done = moe2gguf("quantize", tmp_path / "full.gguf", tmp_path / "out.gguf", "Q4_K_M", *options)

    assert (0, 0) == (direct.returncode, done.returncode), direct.stderr + done.stderr
    size = f"{(tmp_path / 'out.gguf').stat().st_size:,}"
    assert re.fullmatch(
        rf"wrote {tmp_path}/out\.gguf: {size} bytes, 33 tensors, [\d.]+ bits per weight; verified\n", done.stdout
    )
    assert "warning: Q4_K does not fit token_embd.weight" in done.stderr
    files = [gguf.GGUFReader(tmp_path / name).tensors for name in ("direct.gguf", "out.gguf")]
    assert [(t.name, t.tensor_type.name, t.data.tobytes()) for t in files[0]] == [
        (t.name, t.tensor_type.name, t.data.tobytes()) for t in files[1]
    ]
    assert "Q8_0" == next(t.tensor_type.name for t in files[0] if t.name == "blk.0.ffn_down_exps.weight")


def test_quantize_plan_shows_rules_and_refusals(files: Any) -> None:
    """What each pattern decided, bits per weight; for machines the refusals and exit code 1."""
    shown = moe2gguf("quantize", files[1], "unused.gguf", "q8_0", "--plan", "--verbose")
    refused = moe2gguf("quantize", files[1], "unused.gguf", "q4_k", "--plan", "--json")

    assert re.search(r"blk\.0\.attn_q\.weight +64 x 64 +Q8_0 +4,352 +8\.5", shown.stdout)
    assert re.search(r"22 +Q8_0 +Q8_0 +\.\*", shown.stdout)
    assert "bits per weight" in shown.stdout
    assert not os.path.exists("unused.gguf")
    assert 1 == refused.returncode
    assert all("rows whose width" in text for text in json.loads(refused.stdout)["refusals"])

    sliced = moe2gguf("quantize", files[0], "unused.gguf", "q4_k", "--plan")
    assert "ffn_down_exps" in sliced.stderr
    assert not any(name in sliced.stderr for name in ("--align", "--experts", "--type"))


def test_check_auto_compares_the_same_types(tmp_path: Path) -> None:
    """The dense twin of a quantized file has the sliced file's types, tensor by tensor, so only slicing is judged."""
    model = checkpoints.make(tmp_path / "model", intermediate_size=128)
    done = moe2gguf(
        "convert", model, tmp_path / "out.gguf", "-e", 4, "--type", "q8_0",
        "--tensor-type", r"blk\.1\.ffn_.*_exps\.weight=q4_0", "--check", "auto", "--json",
    )  # fmt: skip

    assert (0, True) == (done.returncode, json.loads(done.stdout)["check"]["ok"]), done.stderr
