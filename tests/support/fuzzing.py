"""A fuzzer of every reader of foreign files, run as a program: fuzzing.py TARGET SECONDS SEED FOLDER.

Hypothesis makes sound files wrong. Whatever it finds must be read or refused in a `Moe2GgufError`: another exception,
a file opened outside FOLDER, more than `ROOM` bytes of address space, or more than `PATIENCE` seconds of processor time
is a defect. A process that dies (a crash in native code) leaves the files that killed it in FOLDER.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gguf_bytes as g
import hypothesis
import imatrix_files
import numpy as np
import tiny_tokenizers
from flat_options import flat_options
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moe2gguf import TypeOptions, inspect, plan_conversion, verify
from moe2gguf.errors import ImportanceError, Moe2GgufError
from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.saved import CalibrationRecord, read_calibration, save_calibration
from moe2gguf.experts.text import open_tokenizer, read_text
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.set_used import set_used
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.types import find_type
from moe2gguf.llama.serving import list_ways, make_presets
from moe2gguf.measure.expert_usage import read_calibration_load
from moe2gguf.measure.grid import plan_grid
from moe2gguf.quant.assign import Assignment
from moe2gguf.quant.imatrix import ImportanceMatrix, read_imatrix
from moe2gguf.quant.imatrix import merge as merge_matrices
from moe2gguf.quant.imatrix_match import find_neurons, guide
from moe2gguf.quant.rules import read_type_rules
from moe2gguf.recipes.densify import densify
from moe2gguf.recipes.merge import merge
from moe2gguf.recipes.merge_options import Donor, MergeOptions
from moe2gguf.recipes.prune import PruneOptions, prune
from moe2gguf.recipes.quantize import plan_quantization
from moe2gguf.recipes.views import write_views
from moe2gguf.spec import Slicing

ROOM = 512 << 20
PATIENCE = 10.0
BATCH = 25  # examples between two looks at the clock

T = TypeVar("T")

Files = dict[str, bytes]  # name in the folder -> content
Draw = Callable[[st.SearchStrategy[Any]], Any]

SHARP = [0, 1, 2, 13, 32, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1, 10**18]
FLOATS = [float("nan"), float("inf"), -1.0, -0.0, 0.5, 1.0, 1e-45, 1e12, 3e38]
WORDS = [b"", b"\0", b"../x", b"/etc/passwd", b"C:\\x", b"\xff\xfe", b"{{ x }}", b"[" * 3000, b"-1", b"1e999", b"NaN"]
VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**64, 10**400, 0.5, "", "../x", "/etc/passwd", "a\0b", [], {}, [[]]]
VALUES += ["\x1b[2J", "llama", "BPE", [1], {"a": 1}, "x" * 300, 1e308]


def gguf_model() -> bytes:
    """A dense model of two layers with every kind of metadata."""
    model = g.LlamaFile(d_model=32, d_ff=64, n_layer=2, biases=True, make=g.f16)
    model.set("a.u64", "u64", 7).set("a.f64", "f64", 0.5).set_array("a.bool", "bool", [0, 1])
    return model.bytes()


def gguf_shards() -> Files:
    """The same in two shards."""
    model = g.LlamaFile(d_model=32, d_ff=64)
    tensors = list(model.tensors.values())
    files = {}
    for i, part in enumerate((tensors[:9], tensors[9:])):
        keys = [g.key("split.no", "u16", i), g.key("split.count", "u16", 2)]
        keys += [g.key("split.tensors.count", "i32", len(tensors)), *([] if i else model.keys.values())]
        files[f"m-0000{i + 1}-of-00002.gguf"] = g.gguf(keys, part)
    return files


def matrices(folder: Path) -> Files:
    """A sliced model whose order of neurons is known; importance matrices of it and of its parent, in both forms."""
    n, d, width = 2, 32, 32
    model = g.LlamaFile(n_expert=n, d_model=d, d_ff=width)
    for name, value in {"expert_count": n, "dense_feed_forward_length": n * width, "align": 1}.items():
        model.set(f"moe2gguf.slicing.{name}", "u32", value)
    model.set("moe2gguf.slicing.group", "str", "contiguous").put(g.f32("odd.ffn_down_exps.weight", (n, d, width)))
    shapes = {tensor.name: tensor.shape for tensor in model.tensors.values()}
    dense = {
        name.replace("_exps", ""): (n * width,) * 2 if "down_exps" in name else shape[-2:]
        for name, shape in shapes.items()
    }
    kinds = imatrix_files.statistics_for(shapes), imatrix_files.statistics_for(dense)
    files = {"model.gguf": model.bytes()}
    for kind, statistics in zip(("own", "dense"), kinds, strict=True):
        files[f"{kind}.gguf"] = imatrix_files.write_gguf(folder / "m.gguf", statistics).read_bytes()
        calls = {
            name: (2, (2 * sums / np.reshape(n, (-1, 1))).astype(np.float32)) for name, (sums, n) in statistics.items()
        }
        files[f"{kind}.dat"] = imatrix_files.dat(calls)
    return files


def safetensors(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """An F16 file of zeros."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        n_bytes = 2
        for n in shape:
            n_bytes *= n
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def model_folder(folder: Path, tokenizer: Callable[[Path], int]) -> Files:
    """A whole Hugging Face folder in two shards."""
    n_vocab = tokenizer(folder)
    d, d_ff = 8, 12
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": d, "intermediate_size": d_ff, "vocab_size": n_vocab}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 1e4}
    config |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    head = "model.layers.0."
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (4, d),
        "self_attn.v_proj": (4, d),
    }
    layer |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (d_ff, d), "mlp.up_proj": (d_ff, d)}
    layer |= {"mlp.down_proj": (d, d_ff), "input_layernorm": (d,), "post_attention_layernorm": (d,)}
    parts: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (n_vocab, d), "model.norm.weight": (d,)},
        {f"{head}{name}.weight": shape for name, shape in layer.items()},
    ]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {name: safetensors(part) for name, part in zip(names, parts, strict=True)}
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = json.dumps(config).encode()
    files["generation_config.json"] = b'{"eos_token_id": [1, 2]}'
    files["README.md"] = b"---\nlicense: mit\nlanguage: [en]\n---\n# Model\n"
    files["chat_template.jinja"] = b"{{ messages }}"
    return files


def edited(raw: bytes, draw: Draw) -> bytes:
    """Bytes written over, put in, cut out or cut off; near the front more often, where headers are."""
    out = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, min(len(raw), 400)), st.integers(0, len(raw))))
        kind = draw(st.sampled_from(["over", "over", "in", "out", "off"]))
        new = draw(
            st.one_of(
                st.binary(min_size=1, max_size=4),
                st.sampled_from(SHARP).map(lambda n: struct.pack("<Q", n)),
                st.integers(0, 50).map(lambda n: struct.pack("<I", n)),
                st.sampled_from(FLOATS).map(lambda x: struct.pack("<f", x)),
                st.sampled_from(WORDS),
            )
        )
        if kind == "over":
            out[at : at + len(new)] = new
        elif kind == "in":
            out[at:at] = new
        elif kind == "out":
            del out[at : at + draw(st.integers(1, 64))]
        else:
            del out[at:]
    return bytes(out)


def edited_json(raw: bytes, draw: Draw) -> bytes:
    """A JSON text with values replaced, removed, renamed or doubled somewhere inside."""
    value = json.loads(raw)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        box, key = places[draw(st.integers(0, len(places) - 1))]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "nest"]))
        if what == "replace":
            box[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "nest":
            box[key] = [box[key], {"x": box[key]}]
        else:
            old = box.pop(key)
            if what == "rename" and isinstance(box, dict):
                box[draw(st.sampled_from(["", "../x", "a\0b", "x" * 300, "content", "id"]))] = old
        if not value:
            break
    return json.dumps(value).encode()


def _places(value: Any, room: int = 3000) -> Iterator[tuple[Any, Any]]:
    """(container, key) of values inside, breadth first and few of each long list, so that all kinds are found."""
    queue = [value]
    while queue and room > 0:
        box = queue.pop(0)
        keys = list(box) if isinstance(box, dict) else list(range(len(box))) if isinstance(box, list) else []
        for key in keys if len(keys) < 40 else keys[:12] + keys[-3:]:
            room -= 1
            yield box, key
            queue.append(box[key])


def mutated(files: Files, names: list[str], draw: Draw) -> Files:
    """The files with one or two of `names` edited; JSON as text or as values, a safetensors header too."""
    out = dict(files)
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        if name == "keys.json" or (name.endswith(".json") and draw(st.booleans())):
            out[name] = edited_json(out[name], draw)
        elif name.endswith(".safetensors") and draw(st.booleans()):
            size = struct.unpack("<Q", out[name][:8])[0]
            header = edited_json(out[name][8 : 8 + size], draw)
            out[name] = struct.pack("<Q", len(header)) + header + out[name][8 + size :]
        else:
            out[name] = edited(out[name], draw)
    return out


def read_gguf_file(folder: Path) -> None:
    """Everything that opens a GGUF file."""
    path = folder / "model.gguf"
    verify(path, threads=1)
    for step in (
        lambda: inspect(path).to_dict(),
        lambda: plan_conversion(path, flat_options(experts=2)).to_dict(),
        lambda: plan_quantization(path, TypeOptions("q8_0", allow_fallback=True)).to_dict(),
        lambda: merge(path, [Donor(path)] * 2, folder / "merged.gguf", MergeOptions(router="random"), force=True),
    ):
        allowed(step)


def plan_and_show(path: Path) -> None:
    """Plan two experts, and the plan as JSON."""
    plan_conversion(path, flat_options(experts=2)).to_dict()


def merge_and_check(matrices: Sequence[ImportanceMatrix]) -> None:
    """One matrix of several."""
    require_sound_sums(merge_matrices(matrices))


def sliced_keys() -> Files:
    """A sliced model as its keys, [kind, value] each, and the [type, shape] of its tensors, edited as values."""
    counts = {"llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32}
    counts |= {"llama.feed_forward_length": 32, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    counts |= {"llama.attention.key_length": 8, "llama.attention.value_length": 8, "llama.rope.dimension_count": 8}
    counts |= {"llama.expert_count": 2, "llama.expert_used_count": 2, "llama.vocab_size": 10, "general.file_type": 1}
    made = {"expert_count": 2, "expert_used_count": 2, "dense_feed_forward_length": 64, "align": 1}
    counts |= {f"moe2gguf.slicing.{name}": count for name, count in made.items()}
    keys: dict[str, list[Any]] = {name: ["u32", count] for name, count in counts.items()}
    texts = {"general.architecture": "llama", "moe2gguf.slicing.group": "contiguous"}
    texts |= {"moe2gguf.slicing.amplify": "exact", "tokenizer.ggml.model": "gpt2"}
    keys |= {name: ["str", text] for name, text in texts.items()}
    keys["llama.attention.layer_norm_rms_epsilon"] = ["f32", 1e-5]
    keys["moe2gguf.slicing.amplification"] = ["f32", 2.0]
    keys["moe2gguf.calibration.load"] = ["f32", [1.0, 1.0]]
    keys["tokenizer.ggml.tokens"] = ["str", [f"t{i}" for i in range(10)]]
    tensors = {one.name: [0, one.shape] for one in g.LlamaFile(2, n_layer=1, d_model=32, d_ff=32).tensors.values()}
    return {"keys.json": json.dumps({"keys": keys, "tensors": tensors}).encode()}


def read_keys(folder: Path) -> None:
    """Everything that computes with the keys and tensors of a file with experts; what no file can hold is left out."""
    found = json.loads((folder / "keys.json").read_text())
    keys, tensors = (found.get(part) if isinstance(found, dict) else None for part in ("keys", "tensors"))
    path, out = folder / "model.gguf", folder / "dense.gguf"
    path.write_bytes(g.gguf([*_make(_make_key, keys)], [*_make(_make_tensor, tensors)]))
    read_gguf_file(folder)
    allowed(lambda: densify(path, out, force=True))
    allowed(lambda: measure(path))
    allowed(lambda: prune(path, out, PruneOptions(keep=1, score="random"), force=True))
    allowed(lambda: write_views(path, folder, [1], force=True))
    allowed(lambda: list_ways(read_model(path)))
    allowed(lambda: make_presets(read_model(path)))
    allowed(lambda: set_used(path, 1))


def _make(make: Callable[[str, Any, Any], T], parts: object) -> Iterator[T]:
    """What can be made of name -> (kind, value)."""
    for name, pair in parts.items() if isinstance(parts, dict) else ():
        with contextlib.suppress(
            AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error
        ):
            yield make(name, *pair)


def _make_key(name: str, kind: str, value: Any) -> bytes:
    return g.array(name, kind, value) if isinstance(value, list) else g.key(name, kind, value)


def _make_tensor(name: str, kind: int, shape: list[int]) -> g.Tensor:
    """In the file it is as small as it is; a large one is refused here, not by what reads it."""
    if math.prod(shape) > 1 << 16:
        raise ValueError
    return (g.f32, g.f16, g.bf16)[kind](name, tuple(shape))


def measure(path: Path) -> None:
    """What `compare` and `expert-usage` read of a file."""
    for one in plan_grid([path]):
        if not one.refusal:
            read_calibration_load(file := read_model(path), read_counts(file), one.n_expert_used)


def calibration(folder: Path) -> Files:
    """A saved calibration of two layers, and the texts that commands read beside a model."""
    record = CalibrationRecord("0" * 64, "0" * 64, "text", 64, 2, 8, 12, 4, 2, "routed", 1, "zero", True, "used", 0)
    report = LayerReport(1, [1.0, 0.5, 0.25, 0.25], 1.0, [0.25, 0.5, 0.75, 1.0], 0.9)
    layer = LayerExperts(
        order=np.arange(12).reshape(4, 3),
        scale=np.full(4, 2, np.float32),
        router=np.zeros((4, 8), np.float32),
        down=np.zeros((8, 12), np.float32),
        report=report,
    )
    save_calibration(folder / "kept.safetensors", record, lambda _: layer)
    rules = {"rules": [{"pattern": "blk.*", "type": "q8_0"}]}
    files = {path.name: path.read_bytes() for path in folder.glob("kept.*")}
    files |= {"text.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "text.txt": "weiß\n".encode()}
    return files | {"rules.json": json.dumps(rules).encode(), "rules.toml": b'[[rules]]\npattern="x"\ntype="q8_0"\n'}


def read_beside(folder: Path) -> None:
    """A saved calibration with all its layers, and the texts, whole, in part and in pieces."""
    allowed(lambda: read_whole_calibration(folder / "kept.safetensors"))
    for name in ("text.jsonl", "text.txt"):
        allowed(lambda name=name: read_text(folder / name))  # type: ignore[misc]
        allowed(lambda name=name: read_text(folder / name, 8))  # type: ignore[misc]
        allowed(lambda name=name: read_text(folder / name, 64, spread=True))  # type: ignore[misc]
    for name in ("rules.json", "rules.toml"):
        allowed(lambda name=name: read_type_rules(folder / name))  # type: ignore[misc]


def read_whole_calibration(path: Path) -> None:
    """Every layer, for experts as wide as they are."""
    saved = read_calibration(path)
    record = saved.record
    slicing = Slicing(record.n_expert, record.n_expert_used, -(-record.d_ff // record.n_expert))
    for i in range(record.n_layer):
        saved.layer(i, slicing)


def read_shard_set(folder: Path) -> None:
    """The same for a set."""
    for path in sorted(folder.glob("*.gguf")):
        verify(path, threads=1)
        allowed(functools.partial(plan_and_show, path))


def read_matrices(folder: Path) -> None:
    """Every importance matrix alone, for the model with every repair, and with another one."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.name != "model.gguf"):
        with contextlib.suppress(ImportanceError):
            found.append(read_imatrix(path))
            require_sound_sums(found[-1])
    for pair in itertools.permutations(found, 2):
        allowed(functools.partial(merge_and_check, pair))
    allowed(lambda: guide_model(folder / "model.gguf", found))
    options = TypeOptions("q4_0", imatrix=folder / "own.gguf", imatrix_repair="ones", allow_fallback=True)
    allowed(lambda: plan_quantization(folder / "model.gguf", options).to_dict())


def guide_model(path: Path, found: list[ImportanceMatrix]) -> None:
    """Each number that a kernel would be given is sound, and there are as many as it reads."""
    file = read_model(path)
    tensors = [Entry(tensor.name, tensor.shape, tensor.type) for tensor in file.tensors.values()]
    assigned = Assignment(dict.fromkeys(file.tensors, find_type("q8_0")), (), (), (), 0)
    for matrix, repair in itertools.product(found, ("none", "ones")):
        guidance = guide(matrix, tensors, find_neurons(file), repair)
        str([*guidance.refusals(tensors, assigned), *guidance.warnings]).encode()
        for tensor in tensors:
            importance = guidance.importance.get(tensor.name)
            rows = importance() if importance else []
            assert not rows or len(rows) == math.prod(tensor.shape[:-2])
            for row in rows:
                assert row is None or (row.shape == tensor.shape[-1:] and np.isfinite(row).all() and (row >= 0).all())


def require_sound_sums(matrix: ImportanceMatrix) -> None:
    """No count or sum is negative or has overflowed."""
    for entry in matrix.entries.values():
        assert np.isfinite(entry.sums).all()
        assert (entry.sums >= 0).all()
        assert (entry.counts >= 0).all()


def read_folder(folder: Path) -> None:
    """The plan of a conversion, which reads all files but the weights' data, and a text with its tokenizer."""
    allowed(lambda: plan_and_tokenize(folder))


def plan_and_tokenize(folder: Path) -> None:
    """What calibrates and checks reads a text only after the plan was made."""
    plan_conversion(folder, flat_options(experts=2)).to_dict()
    tokenizer = open_tokenizer(folder)
    for text in ("", " a  text, über 7\n\0 🦙", *tokenizer.added[:3]):
        tokenizer.encode(text)


def allowed(step: Callable[[], object]) -> None:
    """Errors of ours are what a broken file deserves; their text can be printed."""
    try:
        step()
    except Moe2GgufError as error:
        str(error).encode()


def bpe(folder: Path) -> int:
    return tiny_tokenizers.byte_level_bpe(folder)


Target = tuple[Files, list[str], Callable[[Path], None]]


def targets(scratch: Path) -> dict[str, Callable[[], Target]]:
    """Name -> what is mutated: the sound files, the names that may be touched, the reader."""

    def folder(tokenizer: Callable[[Path], int], names: str) -> Target:
        files = model_folder(scratch, tokenizer)
        return files, [name for name in files if re.fullmatch(names, name)], read_folder

    return {
        "gguf": lambda: ({"model.gguf": gguf_model()}, ["model.gguf"], read_gguf_file),
        "shards": lambda: (gguf_shards(), list(gguf_shards()), read_shard_set),
        "keys": lambda: (sliced_keys(), ["keys.json"], read_keys),
        "calibration": lambda: (files := calibration(scratch), list(files), read_beside),
        "imatrix": lambda: (files := matrices(scratch), list(files), read_matrices),
        "weights": lambda: folder(bpe, r".*\.safetensors|.*index\.json|config\.json|README\.md"),
        "tokenizer": lambda: folder(bpe, r"token.*|special.*|added.*|generation.*|chat.*"),
        "characters": lambda: folder(tiny_tokenizers.llama_json_only, r"token.*"),
        "sentencepiece": lambda: folder(tiny_tokenizers.sentencepiece_model, r"token.*"),
    }


TARGETS = [*targets(Path())]


def write(folder: Path, files: Files) -> None:
    """Exactly these files."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def guard(folder: Path) -> None:
    """From now on any file that is opened outside `folder`, Python's own and the system's, is an error."""
    places = {folder.resolve(), Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2]}
    inside = tuple(f"{place}{os.sep}" for place in (*places, "/proc", "/dev", "/sys", "/usr"))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[0]:
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not f"{path}{os.sep}".startswith(inside):
                raise AssertionError(f"opened {path!r}, which is outside the model's folder")

    sys.addaudithook(watch)


def main() -> None:
    name, seconds, seed, where = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    scratch = where.with_name(where.name + "-seed")
    scratch.mkdir(parents=True)
    where.mkdir(parents=True)
    files, names, read = targets(scratch)[name]()
    write(where, files)
    read(where)  # everything that is imported late is there now
    guard(where)
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    size = int(found[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    done = 0

    def once(data: st.DataObject) -> None:
        nonlocal done
        write(where, mutated(files, names, data.draw))
        begin = time.process_time()
        read(where)
        used = time.process_time() - begin
        assert used < PATIENCE, f"{used:.1f} s of processor time"
        done += 1

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run = settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(hypothesis.seed(seed)(given(st.data())(once)))
        run()
        seed += 1
    print(f"{name}: {done} files", flush=True)


if __name__ == "__main__":
    main()
