"""moe2gguf.gguf.shards: sets that llama.cpp loads, and every way in which a set can be wrong."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import gguf_bytes as g
import numpy as np
import pytest
import tiny_gguf
from hypothesis import given
from hypothesis import strategies as st
from llama_logits import llama_logits

from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.gguf.layout import Entry, lay_out
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.shards import lay_out_files, list_shard_paths, read_model, read_shards
from moe2gguf.gguf.verify import verify

TOKENS = [1, 60, 200, 280, 290, 17, 33]


def write_set(whole: Path, stem: Path, max_bytes: int) -> list[Path]:
    """The file `whole` as a set of shards, made by `lay_out_files`."""
    file = read_gguf(whole)
    entries = [Entry(t.name, t.shape, t.type) for t in file.tensors.values()]
    shards = lay_out_files(file.metadata, entries, file.types, max_bytes)
    paths = list_shard_paths(stem, len(shards))
    for path, (tensors, layout) in zip(paths, shards, strict=True):
        raw = bytearray(layout.header.ljust(layout.file_size, b"\0"))
        for tensor in tensors:
            data = file.read_tensor(file.tensors[tensor.name]).tobytes()
            raw[layout.offsets[tensor.name] : layout.offsets[tensor.name] + len(data)] = data
        path.write_bytes(raw)
    return paths


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("whole") / "model.gguf", tiny_gguf.dense_weights())


@pytest.fixture
def shards(whole: Any, tmp_path: Path) -> Any:
    """Five or so shards of a tiny model."""
    return write_set(whole, tmp_path / "model", 100_000)


def test_llama_cpp_loads_the_set(whole: Any, shards: Any) -> None:
    """Stock llama.cpp, given the first shard, computes what it computes from the one file."""
    assert len(shards) > 3
    assert max(path.stat().st_size for path in shards) <= 100_000

    np.testing.assert_array_equal(llama_logits(whole, TOKENS), llama_logits(shards[0], TOKENS))


def test_the_set_reads_like_the_file(whole: Any, shards: Any) -> None:
    """From any of its shards: the same metadata, tensors and values, and no problem for verify."""
    file = read_gguf(whole)

    for path in (shards[0], shards[2]):
        model = read_model(path)
        result = verify(path)

        assert (model.metadata, model.types) == (file.metadata, file.types)
        assert list(model.tensors) == list(file.tensors)
        for name, tensor in file.tensors.items():
            np.testing.assert_array_equal(file.read_tensor(tensor), model.read_tensor(model.tensors[name]))
        assert (result.problems, result.notes) == ((), ())
        assert set(model.files) == set(shards)


def test_gguf_split_by_the_gguf_package_is_read(tmp_path: Path) -> None:
    """A set written by gguf's own writer, which numbers shards the same way."""
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama", split_max_tensors=2)
    values = {f"t{i}": np.full((4, 32), i, np.float32) for i in range(5)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = read_model(tmp_path / "other-00002-of-00003.gguf")

    assert {name: model.read_tensor(t).max() for name, t in model.tensors.items()} == {f"t{i}": i for i in range(5)}


def renamed(shards: Any) -> None:
    shards[1].rename(shards[1].parent / "else.gguf")
    shards[2].rename(shards[1])
    (shards[1].parent / "else.gguf").rename(shards[2])


def other_set(shards: Any, whole: Any, n_layer: Any = 2, seed: Any = 1) -> Any:
    weights = tiny_gguf.dense_weights(seed, n_layer=n_layer)
    folder = shards[0].parent / "other"
    folder.mkdir()
    return write_set(tiny_gguf.write_gguf(folder / "whole.gguf", weights), folder / "model", 100_000)


def foreign_count(shards: Any, whole: Any) -> None:
    shutil.copy(other_set(shards, whole, n_layer=1)[1], shards[1])


def twice(shards: Any, whole: Any) -> None:
    """Another set with as many shards and tensors, cut elsewhere."""
    file = read_gguf(whole)
    entries = [Entry(t.name, t.shape, t.type) for t in reversed(file.tensors.values())]
    layouts = lay_out_files(file.metadata, entries, file.types, 100_000)
    assert len(layouts) == len(shards)
    layout = layouts[-2][1]
    shards[-2].write_bytes(layout.header.ljust(layout.file_size, b"\0"))


FAULTS = {
    "missing": (lambda s, w: s[1].unlink(), r"00002-of-\d+\.gguf is missing; fetch the whole set"),
    "several missing": (lambda s, w: [p.unlink() for p in s[1:3]], r"2 problem.*00002-of.*00003-of"),
    "reordered": (lambda s, w: renamed(s), r"00002-of\S+ is shard 3 by its own words.*00003-of\S+ is shard 2"),
    "duplicated": (
        lambda s, w: shutil.copy(s[1], s[2]),
        r"00003-of\S+ is shard 2 by its own words: renamed, or a copy",
    ),
    "foreign": (foreign_count, r"00002-of\S+ is of another set: it says"),
    "tensor twice": (twice, r"stands in two shards, model-0000\d-of-\d+\.gguf and"),
    "cut": (lambda s, w: s[2].write_bytes(s[2].read_bytes()[:-1000]), r"00003-of.*it is cut or corrupt"),
    "name": (lambda s, w: s[0].rename(s[0].parent / "model.gguf"), r"only if its name ends in -00001-of-"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_set_is_refused_with_the_shards_named(whole: Any, shards: Any, fault: Any) -> None:
    """By read_model and by verify, whichever shard is given."""
    damage, words = FAULTS[fault]
    damage(shards, whole)
    path = shards[0] if shards[0].exists() else shards[0].parent / "model.gguf"

    with pytest.raises(GGUFError, match=f"(?s){words}"):
        read_model(path)
    assert verify(path).problems


def test_a_foreign_shard_shows_by_keys_that_should_be_equal(shards: Any) -> None:
    """A key that stands in several shards, such as the digest of their source, must have one value."""
    for i, path in enumerate(shards):
        keys = [g.key("moe2gguf.source.sha256", "str", "ab"[i == 1])]
        keys += [g.key("split.no", "u16", i), g.key("split.count", "u16", len(shards))]
        path.write_bytes(g.gguf([*keys, g.key("split.tensors.count", "i32", len(shards))], [g.f32(f"t{i}", (4,))]))

    with pytest.raises(GGUFError, match=r"00002-of\S+ is of another set: its 'moe2gguf.source.sha256' differs"):
        read_model(shards[0])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"split.count": ("u32", 3)}, "split.count: expected a UINT16 in a shard, found UINT32"),
        ({"split.count": ("str", "3")}, "split.count: expected a UINT16 in a shard, found STRING"),
        ({"split.no": ("u16", 9)}, "says it is shard 10 of 3"),
        ({"split.count": ("u16", 0)}, "says it is shard 1 of 0"),
        ({"split.count": ("u16", 65535)}, "00001-of-65535.gguf"),
        ({"split.tensors.count": ("i32", 7)}, "the shards hold 3 tensors, their metadata says 7"),
        ({"split.tensors.count": ("u32", 3)}, "expected a INT32"),
    ],
)
def test_hostile_numbers_are_refused(tmp_path: Path, keys: Any, words: str) -> None:
    """Wrong types (llama.cpp aborts at them), impossible and enormous numbers cost one clear error."""
    for i in range(3):
        pairs = {"split.no": ("u16", i), "split.count": ("u16", 3), "split.tensors.count": ("i32", 3), **keys}
        raw = g.gguf([g.key(name, *pair) for name, pair in pairs.items()], [g.f32(f"t{i}", (4,))])
        (tmp_path / f"m-0000{i + 1}-of-00003.gguf").write_bytes(raw)

    with pytest.raises(GGUFError, match=words):
        read_shards(tmp_path / "m-00001-of-00003.gguf")


def test_one_shard_is_a_file(tmp_path: Path) -> None:
    """split.count 1 means a whole file under any name."""
    path = tmp_path / "any.gguf"
    path.write_bytes(g.gguf([g.key("split.count", "u16", 1), g.key("split.no", "u16", 0)], [g.f32("a", (4,))]))

    assert list(read_model(path).tensors) == ["a"]
    assert read_model(path).metadata == {}


def test_metadata_that_is_too_large_is_named() -> None:
    """A vocabulary cannot be cut: the first shard must hold it."""
    metadata, tensors = {"general.name": "x" * 5000}, [Entry("t", (4, 8), gguf.GGMLQuantizationType.F32)]
    with pytest.raises(PlanError, match=r"--shard-size 4,000: too small for the metadata; give at least") as caught:
        lay_out_files(metadata, tensors, {}, 4000)
    enough = int(str(caught.value).split("at least ")[1].removesuffix(" bytes").replace(",", ""))

    assert [(), tuple(tensors)] == [group for group, _ in lay_out_files(metadata, tensors, {}, enough)]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(300, 5000))
def test_no_shard_is_larger_than_asked(sizes: Any, limit: Any) -> None:
    """Header included; every tensor stands in exactly one shard, in order; or the tensor that is too large is named."""
    tensors = [Entry(f"t{i}", (n, 8), gguf.GGMLQuantizationType.F32) for i, n in enumerate(sizes)]
    metadata = {"general.name": "x" * 100, "moe2gguf.source.sha256": "0" * 20}
    try:
        shards = lay_out_files(metadata, tensors, {}, limit)
    except PlanError as error:
        shards, refusal = None, str(error)
    if shards is None:
        assert "--shard-size" in refusal
        return

    assert (lay_out(metadata, tensors).file_size <= limit) == (len(shards) == 1)
    assert tensors == [tensor for group, _ in shards for tensor in group]
    assert all(layout.file_size <= limit for _, layout in shards)
