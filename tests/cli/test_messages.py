"""What a command says when it refuses: options that it has, all that are needed at once, few lines."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import checkpoints
import click
import pytest
import tiny_gguf
from command import Done, moe2gguf

import moe2gguf as moe2gguf_package
from moe2gguf.cli import cli
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OTHERS = re.compile(r"`moe2gguf ([a-z-]+)([^`]*)`( is refused| refuses)?")
ELSEWHERE = {"--help", "--version", "--local-dir", "--cpu-moe", "--spec-type", "--models-dir", "--override-kv"}
"""Options that click adds, and those of `hf download` and llama.cpp."""

Folder = dict[str, Path]


def options_of(command: str) -> set[str]:
    """Every option of a command, hidden ones too."""
    known = [one for one in cli.commands[command].params if isinstance(one, click.Option)]
    return {name for one in known for name in (*one.opts, *one.secondary_opts)}


def foreign_options(command: str, text: str) -> set[str]:
    """Options that `command` names and has not, but those within another's quoted line or in why that is refused."""
    found = set()
    for line in text.splitlines():
        others = OTHERS.findall(line)
        speakers = [command, *(name for name, _, refused in others if refused)]
        said = [(options_of(name), words) for name, words, _ in others]
        said.append((set().union(*map(options_of, speakers)), OTHERS.sub("", line)))
        found |= {word for known, words in said for word in OPTION.findall(words) if word not in known}
    return found - ELSEWHERE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """By name: folders and files of every kind that a command may be given."""
    root = tmp_path_factory.mktemp("inputs")
    made: Folder = {
        "NOWHERE": root / "nowhere",
        "OUT": root / "out.gguf",
        "FOLDER": root / "folder",
        "TEXT": root / "text.txt",
    }
    made["TEXT"].write_text("too short")
    made["SHORT"] = root / "short.txt"
    made["SHORT"].write_text("a text of some length " * 50)
    made["MODEL"] = checkpoints.make(root / "model")
    made["MIXTRAL"] = checkpoints.write(
        root / "mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )
    made["PREFIX"] = shutil.copytree(made["MODEL"], root / "prefix")
    made["HF"] = root / "hf"
    made["BROAD"] = checkpoints.make(
        root / "broad", hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=1024
    )
    made["DENSE"] = tiny_gguf.write_gguf(root / "dense.gguf", tiny_gguf.dense_weights())
    sliced = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4)
    made["SLICED"] = tiny_gguf.write_gguf(root / "sliced.gguf", sliced, n_expert_used=2)
    amplified = {"moe2gguf.slicing.amplify": "used"}
    made["FITTED"] = tiny_gguf.write_gguf(root / "fitted.gguf", sliced, n_expert_used=2, strings=amplified)
    made["Q8"] = quantize(made["DENSE"], root / "q8.gguf", TypeOptions("q8_0")).path
    assert 0 == moe2gguf("convert", made["MODEL"], made["HF"], "-e", 4, "--format", "hf").returncode
    made["EVEN"] = root / "even.gguf"
    assert 0 == moe2gguf("convert", made["MODEL"], made["EVEN"], "-e", 4).returncode
    made["WIDE"] = root / "wide.gguf"
    assert 0 == moe2gguf("convert", made["BROAD"], made["WIDE"], "--dense").returncode
    checkpoints.rewrite_config(made["PREFIX"], hidden_size=32, attention_bias=True)  # two causes
    return made


def run(inputs: Folder, command: str) -> Done:
    """Run a command line with the names of inputs replaced."""
    return moe2gguf(*(inputs.get(word, word) for word in command.split()))


REFUSED = """
convert NOWHERE OUT
convert owner/model OUT
convert MODEL OUT -e 1000 -k 2000 --align 0
convert MODEL OUT -e 32 --type q4_k
convert MODEL OUT --type q4_k_n
convert BROAD OUT --type iq1_s --dense
convert MODEL OUT --tensor-type nothing=q8_0
convert MODEL OUT --tensor-type x
convert MODEL OUT --target-size 1
convert MODEL OUT --target-size 1GB --target-bpw 4 --type q8_0 --pure
convert MODEL OUT --shard-size 100
convert MODEL OUT -e 4 -k 2 --shared 9
convert MODEL OUT -e 4 -k 2 --calibration TEXT
convert MODEL OUT -e 4 --refit
convert MODEL OUT -e 4 -k 2 --calibration-tokens 10
convert MODEL OUT --save-calibration x.cal
convert MODEL OUT --load-calibration TEXT
convert MODEL OUT --dense --experts 4
convert MODEL OUT --report x.html
convert MODEL OUT --format hf --type q8_0 -e 4
convert MODEL OUT --format hf --dense
convert MODEL DENSE
convert MIXTRAL OUT -e 8 --dense
convert MIXTRAL OUT --type q4_k
convert PREFIX OUT
convert Q8 OUT --target-size 1MB
convert Q8 OUT -e 4
convert SLICED OUT
convert TEXT OUT
quantize DENSE OUT q3_k_m
quantize SLICED OUT q4_k
quantize Q8 OUT q4_k_m
quantize Q8 OUT q3_k_m
quantize WIDE OUT iq1_s
compare WIDE --reference WIDE --types iq1_s
quantize DENSE OUT q9
quantize DENSE OUT --target-size 1
quantize DENSE OUT q8_0 --target-size 1GB --pure
quantize DENSE OUT --tensor-type nothing=q8_0 q8_0
quantize DENSE OUT q8_0 --shard-size 100
quantize DENSE OUT q8_0 --imatrix TEXT
quantize DENSE Q8 q8_0
quantize DENSE OUT
merge DENSE SLICED DENSE OUT --router random
merge DENSE DENSE OUT --router random --used 1
merge DENSE DENSE DENSE OUT
merge DENSE DENSE DENSE DENSE OUT --router random --used 4
prune SLICED OUT --keep 8
prune SLICED OUT --keep 3 --used 4
prune DENSE OUT --keep 2
prune SLICED SLICED --keep 2 --score random
set-used SLICED 9
set-used DENSE 2
set-used FITTED 3
densify DENSE OUT
densify SLICED Q8
densify MIXTRAL OUT
heal HF OUT --teacher MIXTRAL --text TEXT --used-range 1..9
heal MODEL OUT --teacher MODEL --text TEXT --used-range 1..4
heal HF HF --teacher MODEL --text TEXT --used-range 1..4
run SLICED -p x --used 9
run DENSE -p x --used 2
run TEXT -p x
compare SLICED --reference DENSE --types q9,q4_k
compare Q8 --reference DENSE --types q8_0
compare SLICED --reference DENSE --used 9
compare SLICED --reference DENSE --text TEXT
bench SLICED --used 9
bench SLICED --device nowhere
expert-usage SLICED --used 9
expert-usage DENSE
expert-usage SLICED --text TEXT
imatrix SLICED OUT
imatrix SLICED OUT --text TEXT
imatrix SLICED OUT --text TEXT --used 9
publish MODEL FOLDER --types q9,q8_0 --used 9,8
publish MODEL FOLDER --upload x
publish NOWHERE FOLDER
publish MODEL FOLDER --types f16 --experts 4 --used 2 --calibration TEXT
publish MODEL FOLDER --types f16 --experts 4 --used 2 --calibration SHORT
shrink MODEL OUT --faster 999 --types f16 --text SHORT --tokens 8
shrink MODEL OUT --quality 1.0001 --types f16 --text TEXT
shrink BROAD OUT --faster 999 --types iq1_s --text SHORT --tokens 8
publish DENSE HF
verify TEXT
verify SLICED --check TEXT
inspect TEXT
"""


@pytest.mark.parametrize("command", REFUSED.strip().splitlines())
def test_a_refusal_names_only_options_of_its_command(inputs: Folder, command: str) -> None:
    """Or those of another command whose whole line it gives; and it takes no more than a screen."""
    inputs["OUT"].unlink(missing_ok=True)

    done = run(inputs, command)

    assert 0 != done.returncode, done.stdout
    assert set() == foreign_options(command.split()[0], done.stderr + done.stdout)
    assert len(done.stderr.splitlines()) <= 9
    assert not inputs["OUT"].exists()


@pytest.mark.parametrize("command", ["prune EVEN OUT --keep 2 --score random"])
def test_a_warning_names_only_options_of_its_command(inputs: Folder, command: str) -> None:
    """As a refusal does."""
    done = run(inputs, f"{command} --force")

    assert "warning: " in done.stderr
    assert set() == foreign_options(command.split()[0], done.stderr)
    assert 0 == done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("adapter_config.json", "holds an adapter, which is no model"), ("m-q4_0.gguf", "name one of them: m-q4_0.gguf")],
)
@pytest.mark.parametrize("command", ["convert ODD OUT", "merge ODD ODD ODD OUT --router random", "densify ODD FOLDER"])
def test_a_folder_without_a_config_is_told_apart(
    inputs: Folder, command: str, name: str, said: str, tmp_path: Path
) -> None:
    """An adapter alone, and a folder of GGUF files."""
    (tmp_path / name).write_text("{}")
    inputs["OUT"].unlink(missing_ok=True)

    done = run({**inputs, "ODD": tmp_path}, command)

    assert 1 == done.returncode
    assert done.stderr.startswith(f"moe2gguf: {tmp_path}: ")
    assert said in done.stderr


def test_of_two_folders_the_wrong_one_is_named(inputs: Folder) -> None:
    """In every line of it."""
    done = run(inputs, "heal HF FOLDER --teacher PREFIX --text TEXT --used-range 2")

    assert [] == [line for line in done.stderr.splitlines()[1:6] if f"  - {inputs['PREFIX']}: " not in line]
    assert not inputs["FOLDER"].exists()


def test_every_option_in_the_package_exists() -> None:
    """No sentence of any module names an option that no command has."""
    known = set().union(ELSEWHERE, *map(options_of, cli.commands))
    others = {"command.py", "serving.py", "page.py"}  # options of other programs, and variables of CSS
    paths = [path for path in Path(moe2gguf_package.__file__).parent.rglob("*.py") if path.name not in others]
    nodes = [(path.name, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    texts = [(name, one.value) for name, one in nodes if isinstance(one, ast.Constant) and isinstance(one.value, str)]

    assert set() == {(name, word) for name, text in texts for word in OPTION.findall(text) if word not in known}
    assert len(texts) > 5000


def test_all_options_that_are_needed_are_named_at_once(inputs: Folder) -> None:
    """Substitutes and quantizing twice are allowed by one line, which works."""
    done = run(inputs, "quantize Q8 OUT q3_k_m")

    last = done.stderr.splitlines()[-1]
    assert "to allow all of it: --allow-fallback --allow-requantize" == last
    assert 0 == run(inputs, f"quantize Q8 OUT q3_k_m --plan {last.partition(': ')[2]}").returncode


def test_long_lists_end_after_five_lines(inputs: Folder) -> None:
    """And say how many more there are; --verbose shows all."""
    short, whole = (run(inputs, f"convert PREFIX OUT{more}").stderr for more in ("", " --verbose"))

    n = len(whole.splitlines()) - 1
    assert n > 20
    assert 7 == len(short.splitlines())
    assert f"  and {n - 5} more (--verbose shows all)" == short.splitlines()[-1]
