"""Every metadata key of a GGUF file x everything that can be wrong with it x every command that reads such a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import checkpoints
import gguf_bytes as g
import imatrix_files
import pytest
from command import Done, moe2gguf
from gguf import GGUFValueType

from moe2gguf.errors import Moe2GgufError
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.shards import read_model
from moe2gguf.measure.expert_usage import read_calibration_load
from moe2gguf.measure.grid import note_long_windows, plan_grid

SCALARS: dict[str, tuple[str, object]] = {
    "zero": ("u32", 0),
    "negative": ("i32", -1),
    "huge": ("u64", 2**64 - 1),
    "another integer type": ("i8", 2),
    "NaN": ("f32", float("nan")),
    "bool": ("bool", 1),
    "string": ("str", b"\x1b[2J\0\xff"),
}
ARRAYS: dict[str, tuple[str, Sequence[object]]] = {
    "empty array": ("u32", []),
    "array of integers": ("i32", [2, -1]),
    "array of strings": ("str", ["", "2"]),
    "array of NaN": ("f32", [float("nan")] * 2),
}


def faulty(model: g.LlamaFile, key: str, fault: str) -> bytes:
    """The file with one key missing or wrong."""
    keys = dict(model.keys)
    if fault in SCALARS:
        keys[key] = g.key(key, *SCALARS[fault])
    elif fault in ARRAYS:
        keys[key] = g.array(key, *ARRAYS[fault])
    else:
        keys.pop(key, None)
    return g.gguf([*keys.values()], [*model.tensors.values()])


def dense(architecture: str = "llama") -> g.LlamaFile:
    """A dense model with every key that a computation uses."""
    model = g.LlamaFile(n_layer=1, d_model=32, d_ff=64, make=g.f16)
    model.set("general.type", "str", "model").set("general.alignment", "u32", 32).set("general.file_type", "u32", 1)
    model.set_array("tokenizer.ggml.scores", "f32", [0.0] * 10)
    for key, count in {"attention.key_length": 8, "attention.value_length": 8, "vocab_size": 10}.items():
        model.set(f"llama.{key}", "u32", count)
    model.set("llama.rope.scaling.type", "str", "yarn").set("llama.rope.scaling.original_context_length", "u32", 32)
    numbers = {"freq_base": 1e4, "scaling.factor": 2.0, "scaling.attn_factor": 1.0, "scale_linear": 2.0}
    for key, number in numbers.items():
        model.set(f"llama.rope.{key}", "f32", number)
    model.set("general.architecture", "str", architecture)
    for key in [key for key in model.keys if key.startswith("llama.")]:
        renamed = key.replace("llama", architecture)
        model.keys[renamed] = model.keys.pop(key).replace(g.text(key), g.text(renamed))
    return model


def sliced() -> g.LlamaFile:
    """A model with experts and every key that is computed with; `densify` and `set-used` take it."""
    model = g.LlamaFile(n_expert=2, n_layer=1, d_model=32, d_ff=32, make=g.f16)
    counts = {"expert_count": 2, "expert_used_count": 2, "dense_feed_forward_length": 64, "align": 1}
    for key, count in counts.items():
        model.set(f"moe2gguf.slicing.{key}", "u32", count)
    model.set("moe2gguf.slicing.amplification", "f32", 2.0).set("moe2gguf.slicing.group", "str", "contiguous")
    model.set("moe2gguf.slicing.amplify", "str", "exact").set("moe2gguf.slicing.refit", "bool", 0)
    model.set_array("moe2gguf.calibration.load", "f32", [1.0, 1.0])
    return model


def measure(file: Path) -> Done:
    """What `compare`, `bench` and `experts` do with the keys of a file."""
    try:
        for one in plan_grid([file]):
            if not one.refusal:
                read_calibration_load(whole := read_model(file), read_counts(whole), one.n_expert_used)
        note_long_windows([file], 16)
    except Moe2GgufError as error:
        return Done(1, "", f"moe2gguf: {error}")
    return Done(0, "", "")


def change_count(file: Path) -> Done:
    """`set-used` on a copy."""
    return moe2gguf("set-used", shutil.copy(file, out(file)), 1)


def out(file: Path) -> Path:
    return file.with_name("out-" + file.name)


Run = Callable[[Path], Done]

LOOK: dict[str, Run] = {
    "verify": lambda file: moe2gguf("verify", file, "--threads", 1),
    "inspect": lambda file: moe2gguf("inspect", file, "--json"),
    "measure": measure,
}
DENSE: dict[str, Run] = LOOK | {
    "convert": lambda file: moe2gguf("convert", file, out(file), "--experts", 2, "--shard-size", "6KB"),
    "quantize": lambda file: moe2gguf("quantize", file, out(file), "q8_0"),
    "merge": lambda file: moe2gguf("merge", file, file, file, out(file), "--router", "random", "-f"),
}
SLICED: dict[str, Run] = LOOK | {
    "densify": lambda file: moe2gguf("densify", file, out(file)),
    "set-used": change_count,
    "prune": lambda file: moe2gguf("prune", file, out(file), "--keep", 1, "--score", "random"),
    "views": lambda file: moe2gguf("views", file, file.parent, "--used", 1, "-f"),
    "serve-help": lambda file: moe2gguf("serve-help", file, "--presets", out(file), "--modelfile", f"{out(file)}2"),
    "quantize": lambda file: moe2gguf(
        "quantize", file, out(file), "q8_0", "--imatrix", file.parent / "matrix.gguf", "--plan"
    ),
}
FILES: dict[str, tuple[g.LlamaFile, dict[str, Run]]] = {
    "dense": (dense(), DENSE),
    "qwen2": (dense("qwen2"), DENSE),
    "sliced": (sliced(), SLICED),
}
HARMLESS = ("general.name", "tokenizer.ggml.model")
"""Keys that nothing is computed from."""


def cases() -> list[tuple[str, str]]:
    """Every key that is computed with, once: the general ones in the dense file, in the others what they have more."""
    keys = {
        "dense": [*FILES["dense"][0].keys],
        "qwen2": [key for key in FILES["qwen2"][0].keys if key.startswith("qwen2.")],
        "sliced": [key for key in FILES["sliced"][0].keys if key not in FILES["dense"][0].keys],
    }
    keys["sliced"] += ["llama.block_count", "llama.embedding_length", "llama.feed_forward_length"]
    keys["sliced"] += ["moe2gguf.heal.used_min", "moe2gguf.heal.used_max"]
    return [(kind, key) for kind, some in keys.items() for key in some if key not in HARMLESS]


def matrix(folder: Path) -> None:
    """An importance matrix of the dense model that `sliced` would come from."""
    shapes = {f"blk.0.ffn_{name}.weight": (64, 32) for name in ("gate", "up")} | {"blk.0.ffn_down.weight": (32, 64)}
    shapes |= {f"blk.0.attn_{name}.weight": (32, 32) for name in ("q", "k", "v", "output")}
    imatrix_files.write_gguf(folder / "matrix.gguf", imatrix_files.statistics_for(shapes))


@pytest.mark.parametrize("kind", FILES)
def test_the_sound_file_passes_every_command(kind: str, tmp_path: Path) -> None:
    """Without a fault nothing is refused, so that a refusal below comes from the fault."""
    model, commands = FILES[kind]
    matrix(tmp_path)
    (tmp_path / "model.gguf").write_bytes(model.bytes())

    for name, run in commands.items():
        done = run(tmp_path / "model.gguf")
        assert 0 == done.returncode, (name, done.stderr)
        for path in [*tmp_path.glob("out-*"), *tmp_path.glob("model-k*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("kind", "key"), cases())
def test_a_faulty_key_is_one_message(kind: str, key: str, tmp_path: Path) -> None:
    """Exit code 0, or 1 with one message that names file, key or option, and no half-written output."""
    matrix(tmp_path)
    check_faults(*FILES[kind], key, ("missing", *SCALARS, *ARRAYS), tmp_path / "model.gguf")


@pytest.mark.parametrize("target", ["glm4moe", "step35"])
def test_a_faulty_key_of_a_graph_with_a_shared_expert_is_one_message(target: str, tmp_path: Path) -> None:
    """The same for the keys of its graph, with a few of the faults."""
    folder = checkpoints.make(tmp_path / "hf", num_hidden_layers=2)
    assert 0 == moe2gguf("convert", folder, tmp_path / "whole.gguf", "--target", target, "--experts", 4).returncode
    model = rebuilt(tmp_path / "whole.gguf")
    commands = {name: run for name, run in SLICED.items() if name in ("verify", "densify", "set-used")}

    for key in [key for key in model.keys if key.startswith(f"{target}.")]:
        check_faults(model, commands, key, ("missing", "zero", "array of integers"), tmp_path / "model.gguf")


def rebuilt(path: Path) -> g.LlamaFile:
    """A file as keys and tensors that can be changed."""
    file, model = read_model(path), g.LlamaFile()
    short = {kind.name: name for name, kind in zip(g.KINDS, map(GGUFValueType, g.KINDS.values()), strict=True)}
    model.keys.clear()
    for key, kind in file.types.items():
        value = file.metadata[key]
        if kind.element is not None and isinstance(value, list):
            model.set_array(key, short[kind.element.name], value)
        else:
            model.set(key, short[kind.type.name], value)
    model.tensors = {
        name: g.Tensor(name, tensor.shape, int(tensor.type), file.read_tensor(tensor).tobytes())
        for name, tensor in file.tensors.items()
    }
    return model


def check_faults(model: g.LlamaFile, commands: dict[str, Run], key: str, faults: Sequence[str], file: Path) -> None:
    """Try the commands with every fault of a key."""
    for fault in faults:
        file.write_bytes(faulty(model, key, fault))
        for name, run in commands.items():
            what = f"{key} {fault}: {name}"
            try:
                done = run(file)
            except Exception as error:
                raise AssertionError(what) from error

            assert done.returncode in (0, 1), what
            if done.returncode:
                words = done.stdout if name == "verify" else done.stderr
                assert 1 == words.count("moe2gguf: ") or name == "verify", (what, words)
                assert any(name in words for name in ("model.gguf", "--imatrix", "type q8_0", key)), (what, words)
                assert words.replace("\n", "").isprintable(), (what, words)
            for path in [*file.parent.glob("*out-*"), *file.parent.glob("model-k*")]:
                assert not done.returncode or name == "set-used", (what, path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
