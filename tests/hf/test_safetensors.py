"""moe2gguf.hf.safetensors: which files make a checkpoint, hostile headers, and reading in blocks."""

import errno
import hashlib
import io
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe2gguf.errors import CheckpointError
from moe2gguf.hf.safetensors import INDEX, SourceDigest, digest_source, read_headers

A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.array([1.5, -2.0], np.float16)
C = np.array([[3.0, -1.0]], ml_dtypes.bfloat16)


def sharded(folder: Any, shards: Any, weight_map: Any = None) -> None:
    """Write {file name: {tensor: array}} and the index that fits (or the given one)."""
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / name)
    own = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map or own}))


def raw(path: Any, header: Any, data: Any = b"") -> None:
    """A safetensors file from its header (bytes or JSON value) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


TWO = {"model-00001-of-00002.safetensors": {"a": A}, "model-00002-of-00002.safetensors": {"b": B}}


def test_one_file_gives_names_shapes_types_and_the_very_values(tmp_path: Path) -> None:
    """f32, f16 and bf16, from one file."""
    save_file({"a": A, "b": B, "c": C}, tmp_path / "model.safetensors")

    tensors = read_headers(tmp_path)

    assert {"a": ("F32", (4, 3)), "b": ("F16", (2,)), "c": ("BF16", (1, 2))} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    for name, array in (("a", A), ("b", B), ("c", C)):
        assert array.dtype == tensors[name].read().dtype
        assert array.tobytes() == tensors[name].read().tobytes()


def test_shards_are_all_read(tmp_path: Path) -> None:
    """Not only the first one; a name in a subfolder is fine."""
    sharded(tmp_path, {"part/x.safetensors": {"a": A}, "y.safetensors": {"b": B}})

    assert ["a", "b"] == sorted(read_headers(tmp_path))


@pytest.mark.parametrize("max_bytes", [1, 12, 13, 25, 1000])
def test_blocks_are_rows_in_order(tmp_path: Path, max_bytes: int) -> None:
    """However small the limit, at least a row at a time; together they are the tensor."""
    save_file({"a": A}, tmp_path / "model.safetensors")
    blocks = list(read_headers(tmp_path)["a"].blocks(max_bytes))

    assert A.tolist() == np.concatenate(blocks).tolist()
    assert max(block.nbytes for block in blocks) <= max(max_bytes, 12)


def test_the_digest_does_not_depend_on_sharding(tmp_path: Path) -> None:
    """Nor on whether a tensor was read whole or in blocks; but on every value and name."""
    digests = []
    shardings = ({"model.safetensors": {"a": A, "b": B}}, TWO, {"model.safetensors": {"a": A + 1, "b": B}})
    for i, shards in enumerate(shardings):
        folder = tmp_path / str(i)
        folder.mkdir()
        sharded(folder, shards)
        tensors, digest = read_headers(folder), SourceDigest()
        digest.read(tensors["b"])
        for _ in digest.blocks(tensors["a"], 12 * (i + 1)):
            pass
        digests.append(digest.hexdigest(tensors))

    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_tensor_that_is_read_twice_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two threads at once as well, which the second one waits for."""
    save_file({"a": A}, tmp_path / "model.safetensors")
    tensors, digest, made = read_headers(tmp_path), SourceDigest(), []
    new = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: made.append(data) or new(*data))

    with ThreadPoolExecutor(4) as pool:
        read = [*pool.map(lambda _: digest.read(tensors["a"]), range(8))]

    assert [()] == made
    assert all(A.tolist() == one.tolist() for one in read)
    assert digest.parts == {"a": new(A.tobytes()).hexdigest()}


def refused(folder: Any) -> Any:
    """The message with which the folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_headers(folder)
    return str(caught.value)


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    """Noticed before anything is read."""
    sharded(tmp_path, TWO)
    for name in TWO:
        (tmp_path / name).unlink()

    message = refused(tmp_path)

    assert all(name in message for name in TWO)


def test_a_surplus_shard_of_the_same_set_is_named(tmp_path: Path) -> None:
    """A leftover of another upload; other safetensors files beside the shards are no concern."""
    sharded(tmp_path, TWO)
    save_file({"x": B}, tmp_path / "consolidated.safetensors")
    assert 2 == len(read_headers(tmp_path))

    save_file({"x": B}, tmp_path / "model-00003-of-00003.safetensors")

    assert "model-00003-of-00003" in refused(tmp_path)


def test_a_second_model_beside_the_shards_is_refused(tmp_path: Path) -> None:
    """transformers would load the single file; both are named. The same numbers twice are no contradiction."""
    sharded(tmp_path, TWO)
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    assert {"a", "b"} == read_headers(tmp_path).keys()

    for other in ({"a": A, "b": B + 1}, {"a": A}, {"a": A, "b": B[:1]}):
        save_file(other, tmp_path / "model.safetensors")
        message = refused(tmp_path)
        assert "model.safetensors and the shards of model.safetensors.index.json" in message


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    """Even when both agree."""
    first, second = TWO
    sharded(tmp_path, {first: {"a": A}, second: {"a": A}}, {"a": first, "b": second})

    assert "stored twice: a" in refused(tmp_path)


def test_an_index_that_disagrees_with_the_shards_lists_every_name(tmp_path: Path) -> None:
    """Named and not stored, stored and not named, stored elsewhere."""
    first, second = TWO
    sharded(tmp_path, {first: {"a": A, "c": B}, second: {"b": B}}, {"a": second, "b": second, "d": first})

    message = refused(tmp_path)

    assert "stored nowhere: d" in message
    assert "not named in the index: c" in message
    assert "another file than the index says: a" in message


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a\\b.safetensors", "C:x.safetensors", "x\0.safetensors", "sub/../../x"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """Whatever an index says, no path leaves the model's folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": A}, tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))

    assert "refused the file name" in refused(folder)


def test_a_folder_of_links_is_its_targets(tmp_path: Path) -> None:
    """Index and shards may lie anywhere: names, values and digest are those of the files behind the links."""
    real, folder = tmp_path / "real", tmp_path / "model"
    real.mkdir()
    folder.mkdir()
    sharded(real, TWO)
    for path in real.iterdir():
        (folder / path.name).symlink_to(path)

    tensors = read_headers(folder)

    assert ["a", "b"] == sorted(tensors)
    assert A.tolist() == tensors["a"].read().tolist()
    assert digest_source(read_headers(real)) == digest_source(tensors)


def test_a_name_behind_a_linked_folder_is_refused(tmp_path: Path) -> None:
    """A link to a folder would let an index name files outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": A}, tmp_path / "x.safetensors")
    (folder / "sub").symlink_to(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "sub/x.safetensors"}}))

    assert "link to another folder" in refused(folder)


@pytest.mark.parametrize("name", [INDEX, "model.safetensors"])
def test_a_link_to_nothing_or_to_a_pipe_is_refused(tmp_path: Path, name: Any) -> None:
    """Neither taken for an absent file nor waited for."""
    save_file({"a": A}, tmp_path / "x.safetensors")
    (tmp_path / name).symlink_to("gone")
    assert "where no file is" in refused(tmp_path)

    os.mkfifo(tmp_path / "gone")

    assert "expected a file" in refused(tmp_path)


def test_the_hubs_cache_layout_is_allowed(tmp_path: Path) -> None:
    """snapshots/REVISION/file -> ../../blobs/HASH, as huggingface_hub lays it out."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": A}, blobs / "hash")
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")

    assert ["a"] == list(read_headers(snapshot))


@pytest.mark.parametrize(
    "weight_map", [{}, [], "x", {"a": 1}, {"a": None}], ids=["empty", "list", "string", "number", "null"]
)
def test_a_senseless_index_is_refused(tmp_path: Path, weight_map: Any) -> None:
    """weight_map must be an object of names."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    assert "weight_map" in refused(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    """Which belong together cannot be known."""
    sharded(tmp_path, TWO)
    (tmp_path / INDEX).unlink()

    assert INDEX in refused(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    """They can run code; the message says what to do."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")

    assert "save the model as safetensors" in refused(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    """No file name matches: an error, never a file of metadata alone."""
    assert "no *.safetensors" in refused(tmp_path)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "not json": struct.pack("<Q", 4) + b"oops",
    "deep json": struct.pack("<Q", 10**6) + b"[" * 10**6,
    "data too short": {"a": ONE | {"shape": [2], "data_offsets": [0, 8]}},
    "reversed offsets": {"a": ONE | {"data_offsets": [4, 0]}},
    "gap": {"a": ONE | {"data_offsets": [2, 6]}},
    "overlap": {"a": ONE, "b": ONE},
    "past the end": {"a": ONE | {"data_offsets": [0, 400]}},
    "negative": {"a": ONE | {"shape": [-1]}},
    "shape and span differ": {"a": ONE | {"shape": [3]}},
    "product overflows": {"a": ONE | {"shape": [2**40, 2**40]}},
    "unknown type": {"a": ONE | {"dtype": "Z9"}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "duplicate key": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: Any) -> None:
    """Each kind of broken header is one clear error that names the file."""
    path = tmp_path / "model.safetensors"
    header = HOSTILE[case]
    if isinstance(header, bytes) and case != "duplicate key":
        path.write_bytes(header)
    else:
        raw(path, header, b"\0" * 4)

    assert "model.safetensors" in refused(tmp_path)


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    """Another process truncates it: an error that names file and tensor, no hang, no zeros."""
    save_file({"a": A}, tmp_path / "model.safetensors")
    tensor = read_headers(tmp_path)["a"]
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-5])

    with pytest.raises(CheckpointError, match="ends inside a"):
        tensor.read()


def test_a_file_that_cannot_be_read_any_more_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the file that is written from it, when a disk is taken away or has an error."""
    save_file({"a": A}, tmp_path / "model.safetensors")
    tensor = read_headers(tmp_path)["a"]

    class Broken(io.FileIO):
        def readinto(self, _: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, *_, **__: Broken(path))
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read in a \(Input/output error\)"):
            tensor.read()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be opened \(No such file or directory\)"):
        tensor.read()
