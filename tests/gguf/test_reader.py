"""The reader takes what is sound, and refuses everything else in a GGUFError at the cost of the bytes it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_bytes as g
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.file import LaterType, ValueType
from moe2gguf.gguf.reader import read_gguf

I8, I64 = g.I8, g.I64
ALIGN = "general.alignment"
ONE = g.f32("my_tensor", (2, 4))
TWO = [g.f32("a", (3,)), g.f32("b", (2, 8))]


def one(dims: tuple[int, ...], kind: int = g.F32, data: bytes = bytes(32)) -> bytes:
    """A file with one tensor of these dimensions (fastest first), and far fewer bytes than that."""
    return g.gguf([], [g.Tensor("my_tensor", (), kind, data, dims=dims)])


def raw_tensor(entry: bytes, n: int = 1) -> bytes:
    return g.pad(g.header(n, 0) + entry) + bytes(64)


# What llama.cpp's own tests make (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tests/test-gguf.cpp#L20),
# under its names, then the other files in the wild: bytes, and words that the refusal must hold.
BAD: dict[str, tuple[bytes, str]] = {
    "HEADER_BAD_MAGIC": (g.header(0, 0, magic=b"FUGG"), "not a GGUF file.*FUGG"),
    "HEADER_BAD_VERSION_0": (g.header(0, 0, version=0), "version 0"),
    "HEADER_BAD_VERSION_1": (g.header(0, 0, version=1), "version 1, which nothing reads"),
    "HEADER_BAD_VERSION_FUTURE": (g.header(0, 0, version=4), "version 4"),
    "HEADER_BAD_N_TENSORS": (g.header(-1, 0), "18446744073709551615 tensors"),
    "HEADER_BAD_N_KV": (g.header(0, -1), "18446744073709551615 metadata keys"),
    "KV_BAD_KEY_SIZE": (g.header(0, 1) + g.u64(2**64 - 1) + b"my_key" + g.u32(4) + g.u32(1), "metadata key 1 of 1"),
    "KV_EMPTY_KEY": (g.gguf([g.key("", "u32", 1)]), "metadata key 1 of 1.*length of 0"),
    "KV_BAD_TYPE": (g.header(0, 1) + g.text("my_key") + g.u32(13) + bytes(8), "'my_key'.*unknown value type 13"),
    "KV_DUPLICATE_KEY": (g.gguf([g.key("my_key", "u32", 1)] * 2), "'my_key'.*twice"),
    "KV_BAD_ALIGN": (g.gguf([g.key(ALIGN, "u32", 13)]), "alignment.*power of two, found 13"),
    "KV_ZERO_ALIGN": (g.gguf([g.key(ALIGN, "u32", 0)]), "alignment.*power of two, found 0"),
    "KV_WRONG_TYPE_ALIGN": (g.gguf([g.key(ALIGN, "i32", 32)]), "alignment.*expected a UINT32, found INT32"),
    "KV_ARRAY_ALIGN": (g.gguf([g.array(ALIGN, "u32", [32])]), "alignment.*found ARRAY of UINT32"),
    "TENSORS_BAD_NAME_SIZE": (g.gguf([], [g.f32("x" * 64, (4,))]), "1 to 63 bytes, found a length of 64"),
    "TENSORS_BAD_N_DIMS": (g.gguf([], [g.f32("my_tensor", (1, 1, 1, 1, 1))]), "'my_tensor'.*dimensions, found 5"),
    "TENSORS_BAD_SHAPE": (one((-1,)), "'my_tensor'.*64 bits"),
    "TENSORS_NE_TOO_BIG": (one((4 * (2**31 - 1),) * 2), "64 bits|'my_tensor': bytes 0 to"),
    "TENSORS_NE_TOO_BIG_3D": (one((4 * (2**31 - 1),) * 3), "64 bits"),
    "TENSORS_NBYTES_TOO_BIG": (one((1_533_916_920,) * 2, I64), "needs 18823208939698291200: 'my_tensor'"),
    "TENSORS_NBYTES_PAD_WRAP": (one((4, 2**30 - 1, 2**30 + 1)), "needs 18446744073709551600: 'my_tensor'"),
    "TENSORS_BAD_TYPE": (one((4,), 43), "'my_tensor'.*unknown tensor type 43"),
    "TENSORS_REMOVED_TYPE": (one((4,), 4), "'my_tensor'.*unknown tensor type 4;"),
    "TENSORS_BAD_OFFSET": (g.gguf([], [ONE._replace(offset=2**64 - 32)]), "needs 184467.*: 'my_tensor'"),
    "TENSORS_ODD_OFFSET": (g.gguf([], [ONE._replace(offset=1)]), "'my_tensor': its offset 1.*alignment 32"),
    "TENSORS_DUPLICATE_NAME": (g.gguf([], [ONE, ONE]), "'my_tensor'.*twice"),
    "TENSORS_BAD_ALIGN": (g.gguf([g.key(ALIGN, "u32", 13)], TWO), "alignment.*found 13"),
    "TENSORS_INCONSISTENT_ALIGN": (g.gguf([], TWO, alignment=1) + bytes(64), "'b': its offset 12.*alignment 32"),
    "TENSORS_PARTIAL_BLOCK": (one((33,), g.Q8_0, bytes(68)), "33.* not whole Q8_0 blocks of 32"),
    "DATA_NOT_ENOUGH_DATA": (g.gguf([], TWO)[:-1], "1 of 2 tensors end .* 95 bytes of data and needs 96: 'b'"),
    "DATA_INCONSISTENT_ALIGN": (g.gguf([], TWO, alignment=1), "'b': its offset 12"),
    "DATA_MEM_SIZE_OVERFLOW": (
        g.gguf([], [g.Tensor(n, (), I8, bytes(32), dims=(0x7FFFFFFFFFFFFFC0,)) for n in "ab"]),
        "needs 9223372036854775776: 'a'",
    ),
    "EMPTY_FILE": (b"", "at least 24 bytes, this one 0"),
    "ZEROED_MAGIC": (bytes(64), "zeros: the program that wrote it was probably stopped"),
    "LFS_POINTER": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "BIG_ENDIAN": (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "big-endian"),
    # the gguf package's reader tests: a dimension count, and dimensions whose product is 4 in 64 bits
    "MILLION_DIMS": (raw_tensor(g.info("t", (4,), 0, 0, n_dims=10**6)), "found 1000000"),
    "PRODUCT_WRAPS": (one((4194305, 4194305, 211106198978564)), "64 bits"),
    "ZERO_HIDES_PRODUCT": (one((2**62, 0, 2**62)), "64 bits"),
    # an array length of 2^63 in a few bytes, which hangs gguf 0.19.0; its relatives for every count and length
    "ARRAY_OF_2_63": (g.gguf([g.array("k", "u32", [], n=2**63)]), "'k': 9223372036854775808 UINT32 elements"),
    "STRINGS_2_63": (g.gguf([g.array("k", "str", [], n=2**63)]), "'k': 9223372036854775808 strings"),
    "STRING_OF_2_64": (g.header(0, 1) + g.text("k") + g.u32(8) + g.u64(2**64 - 1), "'k': needs 18446744073709551615"),
    "STRING_IN_ARRAY": (g.gguf([g.array("k", "str", ["a"]), b""])[:-1], "remain"),
    "KV_OF_10_18": (g.header(0, 10**18) + bytes(64), "1000000000000000000 metadata keys"),
    "TENSORS_OF_10_18": (g.header(10**18, 0) + bytes(64), "1000000000000000000 tensors"),
    "KV_TOO_MANY": (g.header(0, 100_001) + bytes(14 * 100_001), "100001 metadata keys; .* at most 100000"),
    "TENSORS_TOO_MANY": (g.header(100_001, 0) + bytes(25 * 100_001), "100001 tensors; .* at most 100000"),
    "KEY_OF_70000": (g.gguf([g.key("k" * 70000, "u32", 1)]), "1 to 65535 bytes, found a length of 70000"),
    "KEY_NOT_UTF8": (g.gguf([g.key(b"\xff", "u32", 1)]), "not UTF-8"),
    "KEY_WITH_NUL": (g.gguf([g.key("a\0b", "u32", 1)]), "NUL"),
    "NAME_WITH_NUL": (g.gguf([], [g.f32("a\0b", (1,))]), "NUL"),
    "NAME_EMPTY": (g.gguf([], [g.f32("", (1,))]), "tensor 1 of 1.*length of 0"),
    "NESTED_ARRAY": (g.header(0, 1) + g.text("k") + g.u32(9) + g.u32(9) + g.u64(1) + bytes(64), "array of arrays"),
    "BAD_BOOL": (g.gguf([g.text("k") + g.u32(7) + b"\2"]), "'k': a BOOL must be 0 or 1, found 2"),
    "BAD_BOOLS": (g.gguf([g.array("k", "bool", [0, 1, 7])]), "'k': a BOOL must be 0 or 1, found 7"),
    # sizes that lie, as in the out-of-bounds reads of other programs
    "OVERLAP": (g.gguf([], [ONE, ONE._replace(name="other", offset=0)]), "'my_tensor' and 'other' overlap"),
    "TENSOR_OVER_END": (one((2**20,), I8), "has 32 bytes of data and needs 1048576: 'my_tensor'"),
    "NO_DATA": (g.header(1, 0) + g.info("t", (4,), 0, 0), "has 0 bytes of data and needs 16: 't'"),
    "ALIGN_PAST_END": (g.gguf([g.key(ALIGN, "u32", 2**31)], [ONE]), "which has 0 bytes of data .*'my_tensor'"),
}

GOOD: dict[str, bytes] = {
    "HEADER_EMPTY": g.header(0, 0),
    "KV_SUCCESS": g.gguf([g.key("a", "u8", 255), g.array("b", "str", ["x", ""]), g.array("c", "f64", [])]),
    "TENSORS_SUCCESS": g.gguf([], TWO),
    "TENSORS_ZERO_DIM": g.gguf([], [g.f32("empty", (0, 4)), g.f32("a", (3,))]),
    "TENSORS_CUSTOM_ALIGN": g.gguf([g.key(ALIGN, "u32", 1)], TWO, alignment=1),
    "DATA_CUSTOM_ALIGN": g.gguf([g.key(ALIGN, "u32", 64)], TWO, alignment=64),
    "SCALAR": g.gguf([], [g.f32("scalar", ())]),
    "VERSION_2": g.gguf([g.key("a", "u32", 1)], TWO, version=2),
    "EXTRA_BYTES": g.gguf([], TWO) + bytes(100),
    "Q2_0": g.gguf([], [g.Tensor("t", (2, 64), 42, bytes(36))]),
    "LLAMA": g.LlamaFile(n_expert=4).bytes(),
}

# Where we are stricter than llama.cpp, by intent; it never takes less than we do.
STRICTER = {
    "KEY_OF_70000": "the format's limit, not checked by llama.cpp",
    "KEY_NOT_UTF8": "llama.cpp does not decode",
    "KEY_WITH_NUL": "llama.cpp would end the key there",
    "NAME_WITH_NUL": "llama.cpp would end the name there",
    "NAME_EMPTY": "a name is needed to say which tensor is wrong",
    "BAD_BOOL": "any byte is taken for true",
    "BAD_BOOLS": "any byte is taken for true",
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(raw: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(raw)
        return path

    return _write


@pytest.mark.parametrize("name", BAD)
def test_hostile_files_are_refused_with_the_culprit_named(write: Any, name: Any) -> None:
    """Each malformed file is a GGUFError that names the file and the key or tensor that is wrong."""
    raw, words = BAD[name]
    path = write(raw)

    with pytest.raises(GGUFError, match=f"(?s){words}") as caught:
        read_gguf(path)

    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", GOOD)
def test_sound_files_are_read(write: Any, name: Any) -> None:
    """Files at the edge of what the format allows are no reason for an alarm."""
    read_gguf(write(GOOD[name]))


LLAMA_CPP = """
import ctypes, json, os, sys
os.environ["GGML_NO_BACKTRACE"] = "1"
from llama_cpp import llama_cpp
init = llama_cpp._lib.gguf_init_from_file
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
init.argtypes, init.restype = [ctypes.c_char_p, Params], ctypes.c_void_p
def status(path):  # in a process of its own, as llama.cpp aborts at some files
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    data = ctypes.c_void_p()
    taken = init(path.encode(), Params(False, ctypes.cast(ctypes.pointer(data), ctypes.c_void_p)))
    os._exit(0 if taken else 1)
print(json.dumps([status(path) for path in sys.argv[1:]]))
"""


def test_llama_cpp_agrees_on_every_hand_made_file(write: Any) -> None:
    """llama.cpp's own reader accepts and refuses the same files, but for those where we are stricter on purpose."""
    pytest.importorskip("llama_cpp")
    files = {name: raw for name, (raw, _) in BAD.items()} | GOOD
    paths = [str(write(raw, f"{name}.gguf")) for name, raw in files.items()]

    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, *paths], capture_output=True, text=True, check=True)

    taken = {name for name, status in zip(files, json.loads(done.stdout), strict=True) if status == 0}
    assert set(GOOD) | set(STRICTER) == taken


def test_every_value_type_is_read_as_stored(write: Any) -> None:
    """A key of each type gives its value and its type; an array also the type of its elements."""
    values = {"u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.5}
    values |= {"bool": 1, "str": "grüße\n", "u64": 2**64 - 1, "i64": -(2**63), "f64": 0.1}  # type: ignore[dict-item]
    names = {"u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32"}
    names |= {"f32": "FLOAT32", "bool": "BOOL", "str": "STRING", "u64": "UINT64", "i64": "INT64", "f64": "FLOAT64"}
    keys = [g.key(kind, kind, value) for kind, value in values.items()]
    keys += [g.array(f"{kind}s", kind, [value] * 3) for kind, value in values.items()]

    file = read_gguf(write(g.gguf(keys)))

    assert values | {f"{kind}s": [value] * 3 for kind, value in values.items()} == file.metadata
    scalars = {kind: ValueType(gguf.GGUFValueType[name]) for kind, name in names.items()}
    element = {f"{k}s": ValueType(gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[name]) for k, name in names.items()}
    assert scalars | element == file.types
    assert file.metadata["bools"] == [True, True, True]
    assert file.metadata["bool"] is True


def test_strings_that_are_not_utf8_keep_their_bytes(write: Any) -> None:
    """A token of arbitrary bytes can be carried over without loss."""
    file = read_gguf(write(g.gguf([g.array("tokens", "str", [b"\xff\xfe", b"ok", b"\xed\xa0\x80"])])))

    tokens = file.metadata["tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in tokens] == [b"\xff\xfe", b"ok", b"\xed\xa0\x80"]  # type: ignore[union-attr]


def test_long_string_arrays_cross_the_reading_window(write: Any) -> None:
    """Strings longer than, equal to and split by the window of the reader come out whole and in order."""
    strings = [str(i) * (i % 50) for i in range(60_000)] + ["x" * 400_000, "", "end"]
    keys = [g.array("a", "str", strings), g.key("b", "u32", 7)]

    metadata = read_gguf(write(g.gguf(keys))).metadata

    assert {"a": strings, "b": 7} == metadata


def test_the_gguf_package_reads_the_same(write: Any) -> None:
    """gguf's reader, an independent one, sees the tensors we see, at the same place and with the same values."""
    path = write(g.LlamaFile(n_expert=3, n_layer=1, make=g.f16).bytes())

    theirs = gguf.GGUFReader(path)

    ours = read_gguf(path)
    seen = [(t.name, tuple(t.shape)[::-1], t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors]
    assert seen == [(t.name, t.shape, t.type, t.offset, t.n_bytes) for t in ours.tensors.values()]
    assert theirs.data_offset == ours.data_offset
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(tensor.data, ours.read_tensor(ours.tensors[tensor.name]))
    keys = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert keys == ours.metadata


def test_tensors_come_as_arrays_of_their_type(write: Any) -> None:
    """Float and integer tensors have their dtype and shape, block types are rows of bytes."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    numbers = np.arange(6, dtype="<i4").reshape(2, 3)
    tensors = [make("t" + str(i), values.shape, values) for i, make in enumerate([g.f32, g.f16, g.bf16])]
    tensors += [g.Tensor("q", values.shape, g.Q8_0, blocks.tobytes())]
    tensors += [g.Tensor("i", (2, 3), g.I32, numbers.tobytes())]

    file = read_gguf(write(g.gguf([], tensors)))

    got = {name: file.read_tensor(tensor) for name, tensor in file.tensors.items()}
    np.testing.assert_array_equal(values, got["t0"])
    np.testing.assert_array_equal(values.astype(np.float16), got["t1"])
    np.testing.assert_array_equal(values.view("<u4") >> 16, got["t2"].view("<u2"))
    np.testing.assert_array_equal(blocks.reshape(6, 68), got["q"])
    np.testing.assert_array_equal(numbers, got["i"])
    assert [str(array.dtype) for array in got.values()] == ["float32", "float16", "bfloat16", "uint8", "int32"]


def test_chunks_are_whole_blocks_and_add_up(write: Any) -> None:
    """A tensor read in pieces is the tensor; no piece splits a block or is larger than asked."""
    raw = np.random.default_rng(1).integers(0, 256, 34 * 100, np.uint8).tobytes()
    file = read_gguf(write(g.gguf([], [g.Tensor("q", (50, 64), g.Q8_0, raw), g.f32("none", (0, 2))])))

    pieces = [piece.tobytes() for piece in file.chunks(file.tensors["q"], 1000)]

    assert raw == b"".join(pieces)
    assert [len(piece) for piece in pieces] == [986, 986, 986, 442]
    assert list(file.chunks(file.tensors["none"])) == []


def test_types_younger_than_the_gguf_package_have_a_name(write: Any) -> None:
    """Q2_0, which gguf 0.19 does not know, is read by its block of 64 values in 18 bytes."""
    tensor = read_gguf(write(GOOD["Q2_0"])).tensors["t"]

    assert (tensor.type.name, tensor.n_bytes, tensor.row_bytes) == ("Q2_0", 36, 18)
    assert LaterType.Q2_0 == 42


def test_every_cut_is_noticed(write: Any) -> None:
    """A file cut after any byte is refused, whether in the header or in the data."""
    keys = [
        g.key("general.name", "str", "Tiny"),
        g.array("tokens", "str", ["a", "bc"]),
        g.array("types", "i32", [1, 2]),
    ]
    whole = g.gguf(keys, [*TWO, g.f32("c", (8,))])  # the last needs no padding

    for n in range(len(whole)):
        with pytest.raises(GGUFError):
            read_gguf(write(whole[:n]))


def test_a_cut_names_all_tensors_that_are_outside(write: Any) -> None:
    """Every tensor that lost bytes is named in one sentence, not only the first."""
    tensors = [g.f32(name, (8,)) for name in ("first", "second", "third")]
    path = write(g.gguf([], tensors)[:-40])

    with pytest.raises(GGUFError, match=r"(?s)1 problem.*2 of 3 tensors.*'second', 'third'") as caught:
        read_gguf(path)

    assert "'first'" not in str(caught.value)


def test_names_are_escaped_in_messages(write: Any) -> None:
    """A tensor's name cannot send control sequences to the terminal of whoever reads the error."""
    with pytest.raises(GGUFError) as caught:
        read_gguf(write(g.gguf([], [g.f32("\x1b[2Jx\u202e", (4,))])[:-20]))

    assert str(caught.value).replace("\n", "").isprintable()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe (which would block), a folder, an absent file and an impossible name are refused with a reason."""
    os.mkfifo(tmp_path / "pipe")

    for name in ("pipe", "", "absent.gguf", "a\0b"):
        with pytest.raises(GGUFError, match=r"is a (pipe|folder); expected a file|cannot be opened"):
            read_gguf(tmp_path / name)


def test_a_file_that_shrinks_is_an_error(write: Any) -> None:
    """A tensor whose bytes vanished after the header was read is not returned half filled."""
    path = write(g.gguf([], TWO))
    file = read_gguf(path)
    os.truncate(path, file.tensors["b"].offset + 8)

    with pytest.raises(GGUFError, match="longer a moment ago"):
        file.read_tensor(file.tensors["b"])


CHILD = """
import re, resource, sys
from pathlib import Path
from moe2gguf.errors import GGUFError
from moe2gguf.gguf.reader import read_gguf
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), size + (16 << 20)))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
for path in sys.argv[1:]:
    try:
        read_gguf(Path(path))
    except GGUFError:
        continue
    sys.exit(f"{path} was taken")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RLIMIT_AS")
def test_hostile_files_need_next_to_no_memory(write: Any, tmp_path: Path) -> None:
    """With 16 MiB to spare every hostile file is still refused properly, a sparse one of 10 GB among them."""
    paths = [write(raw, f"{name}.gguf") for name, (raw, _) in BAD.items()]
    huge = [("u8", 9 * 10**9), ("str", 10**9), ("u64", 10**9)]
    paths += [write(g.gguf([g.array("k", kind, [], n=n)]), f"sparse-{kind}.gguf") for kind, n in huge]
    for path in paths[-3:]:
        os.truncate(path, 10**10)

    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


SEED = g.LlamaFile(n_layer=1, n_expert=2, biases=True).bytes()
SHARP = [0, 1, 2, 13, 32, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1, 10**18]
EDIT = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from(SHARP).map(g.u64),
    st.integers(0, 13).map(g.u32),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2600), EDIT), min_size=1, max_size=4), cut=st.integers(0, 3000))
def test_mutated_files_are_read_or_refused(tmp_path: Path, edits: Any, cut: Any) -> None:
    """Whatever is overwritten in a file or cut from it: a GGUFError or a result, in little time and memory."""
    raw = bytearray(SEED[: len(SEED) - cut] if cut < 200 else SEED)
    for at, value in edits:
        raw[at : at + len(value)] = value
    path = tmp_path / "mutated.gguf"
    path.write_bytes(raw)

    tracemalloc.start()
    try:
        read_gguf(path)
    except GGUFError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < 2_000_000
