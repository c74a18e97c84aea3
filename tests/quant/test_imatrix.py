"""export.imatrix: both of llama.cpp's formats are read as they are written, and nothing in them is believed."""

import struct
from pathlib import Path
from typing import Any

import gguf
import gguf_bytes as g
import imatrix_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.errors import ImportanceError, OutputError
from moe2gguf.quant import imatrix
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix, label, merge, read_imatrix, write_imatrix

SUMS = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
NAME = "blk.0.ffn_up_exps.weight"
META = [
    g.key("general.type", "str", "imatrix"),
    g.array("imatrix.datasets", "str", ["a/b.txt"]),
    g.key("imatrix.chunk_count", "u32", 2),
    g.key("imatrix.chunk_size", "u32", 512),
]


def pair(sums: Any, counts: Any, name: Any = NAME) -> Any:
    sums, counts = np.asarray(sums, np.float32), np.asarray(counts, np.float32)
    return [g.f32(name + ".in_sum2", sums.shape, sums), g.f32(name + ".counts", counts.shape, counts)]


def read_bytes(folder: Any, data: Any) -> Any:
    (folder / "x").write_bytes(data)
    return read_imatrix(folder / "x")


def test_the_gguf_form_is_read(tmp_path: Path) -> None:
    """Written by gguf's writer; sums and counts per expert, and the text's name without its folder."""
    path = imatrix_files.write_gguf(tmp_path / "m.gguf", {NAME: (SUMS, [4, 0, 8])})
    path.write_bytes(path.read_bytes())
    with pytest.raises(ImportanceError, match="sum of squares of no token"):
        read_imatrix(path)
    imatrix_files.write_gguf(path, {NAME: (SUMS * [[1], [0], [1]], [4, 0, 8])})  # type: ignore[dict-item]

    found = read_imatrix(path)

    assert (("words.txt",), 3, 512, False) == (found.datasets, found.chunk_count, found.chunk_size, found.legacy)
    assert [4, 0, 8] == found.entries[NAME].counts.tolist()
    np.testing.assert_array_equal([SUMS[0] / 4, [np.nan] * 4, SUMS[2] / 8], found.entries[NAME].means())


def test_the_older_form_is_read(tmp_path: Path) -> None:
    """Averages times calls; with and without what newer programs append."""
    entries = {"blk.0.attn_q.weight": (5, np.array([5, 10, 0.5], np.float32))}

    found = read_bytes(tmp_path, imatrix_files.dat(entries))
    bare = read_bytes(tmp_path, imatrix_files.dat(entries, end=b""))

    assert (("words.txt",), 7, True) == (found.datasets, found.chunk_count, found.legacy)
    assert ((), 0, True) == (bare.datasets, bare.chunk_count, bare.legacy)
    for one in (found, bare):
        np.testing.assert_array_equal(np.array([[1, 2, 0.1]], np.float32), one.entries["blk.0.attn_q.weight"].means())


def test_what_is_written_is_llama_cpps_file(tmp_path: Path) -> None:
    """gguf's reader finds the same keys, names, shapes and numbers; it reads back equal; twice the same bytes."""
    entries = {
        "blk.1.b.weight": Activity(SUMS.reshape(-1), np.array([4, 5, 6])),
        "blk.0.a.weight": Activity(SUMS[0], np.array([9])),
    }
    matrix = ImportanceMatrix(entries, ("words.txt",), 3, 512)

    write_imatrix(matrix, tmp_path / "a.gguf")
    write_imatrix(matrix, tmp_path / "b.gguf")

    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert ["imatrix", ["words.txt"], 3, 512] == [
        reader.fields[key].contents()
        for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    ]
    assert {
        "blk.0.a.weight.in_sum2": [4, 1],
        "blk.0.a.weight.counts": [1, 1],
        "blk.1.b.weight.in_sum2": [4, 3],
        "blk.1.b.weight.counts": [1, 3],
    } == {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    np.testing.assert_array_equal(SUMS, reader.tensors[2].data)
    back = read_imatrix(tmp_path / "a.gguf")
    assert {name: entry.counts.tolist() for name, entry in entries.items()} == {
        name: entry.counts.tolist() for name, entry in back.entries.items()
    }
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        write_imatrix(matrix, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("data", "words"),
    {
        "nan": (g.gguf(META, pair([[1, np.nan]], [[2]])), "NaN or infinite"),
        "inf": (g.gguf(META, pair([[1, np.inf]], [[2]])), "NaN or infinite"),
        "negative": (g.gguf(META, pair([[1, -2]], [[2]])), r"negative \(-2\)"),
        "absurd": (g.gguf(META, pair([[1, 1e30]], [[2]])), "no activation reaches"),
        "count nan": (g.gguf(META, pair([[1, 2]], [[np.nan]])), "a count is NaN"),
        "count negative": (g.gguf(META, pair([[1, 2]], [[-1]])), "a count is NaN, infinite, negative"),
        "count absurd": (g.gguf(META, pair([[1, 2]], [[1e30]])), "a count is NaN, infinite, negative or absurd"),
        "no token": (g.gguf(META, pair([[1, 2]], [[0]])), "no token"),
        "width": (g.gguf(META, pair([[1, 2, 3]], [[1], [1]])), "3 sums cannot be shared by 2 counts"),
        "half": (g.gguf(META, pair([[1, 2]], [[1]])[:1]), "only one of"),
        "empty": (g.gguf(META, pair(np.zeros((1, 0)), [[1]])), "not empty"),
        "f16": (g.gguf(META, [g.f16(NAME + ".in_sum2", (1, 2)), pair([[1, 2]], [[1]])[1]]), "must be F32"),
        "keys": (g.gguf(META[:2], pair([[1, 2]], [[1]])), "is missing or of another kind"),
        "kinds": (
            g.gguf([*META[:2], g.key("imatrix.chunk_count", "str", "2"), META[3]], pair([[1, 2]], [[1]])),
            "of another kind",
        ),
        "model": (g.LlamaFile().bytes(), "without importance data"),
        "cut": (g.gguf(META, pair([[1, 2]], [[1]]))[:-40], "not a sound importance matrix"),
        "dat entries": (struct.pack("<i", 2**31 - 1) + bytes(100), "2147483647 entries in 104 bytes"),
        "dat negative": (struct.pack("<i", -5) + bytes(100), "-5 entries"),
        "dat name": (struct.pack("<ii", 1, 2**31 - 1) + bytes(100), "needs 2147483647 bytes where 100 remain"),
        "dat name negative": (struct.pack("<ii", 1, -7) + bytes(100), "needs -7 bytes"),
        "dat values": (struct.pack("<ii4sii", 1, 4, b"name", 1, 2**30) + bytes(50), "needs 4294967296 bytes"),
        "dat calls": (struct.pack("<ii4sii", 1, 4, b"name", -1, 1) + bytes(50), "-1 calls"),
        "dat utf8": (struct.pack("<ii4sii", 1, 4, b"\xff\xff\xff\xff", 1, 1) + bytes(50), "not UTF-8"),
        "dat nan": (imatrix_files.dat({"a": (1, np.array([np.nan], np.float32))}), "NaN"),
        "dat no call": (imatrix_files.dat({"a": (0, np.array([1], np.float32))}), "no token"),
        "text": (b"The quick brown fox jumps over the lazy dog", "neither a GGUF nor a .dat"),
        "nothing": (b"", "needs 4 bytes where 0 remain"),
    }.values(),
)
def test_hostile_and_broken_files_are_named(tmp_path: Path, data: Any, words: Any) -> None:
    """Each is one error that says what is wrong; no count is believed before the bytes that remain have been asked."""
    with pytest.raises(ImportanceError, match=words):
        read_bytes(tmp_path, data)


@given(st.data())
def test_no_mutation_crashes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes changed or cut anywhere: an importance matrix, or an ImportanceError, nothing else."""
    folder = tmp_path_factory.mktemp("mutation")
    whole = data.draw(
        st.sampled_from(
            [
                g.gguf(META, pair(SUMS, [[1], [2], [3]])),
                imatrix_files.dat({"blk.0.attn_q.weight": (5, SUMS[0]), "blk.1.x.weight": (5, SUMS[1])}),
            ]
        )
    )
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 4)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_bytes(folder, bytes(changed))
    except ImportanceError:
        return
    for entry in found.entries.values():
        assert np.isfinite(entry.sums).all()


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by its size."""
    monkeypatch.setattr(imatrix, "MAX_FILE", 10)
    with pytest.raises(ImportanceError, match="no importance matrix has more than 10"):
        read_bytes(tmp_path, imatrix_files.dat({"a": (1, SUMS[0])}))


def test_merging_adds() -> None:
    """Sums and counts add up, chunks are counted in tokens, and what only one file has stays."""
    a = ImportanceMatrix({"x": Activity(SUMS[0], np.array([4])), "y": Activity(SUMS[1], np.array([1]))}, ("a",), 3, 512)
    b = ImportanceMatrix({"x": Activity(SUMS[1], np.array([6]))}, ("b", "a"), 4, 256)
    c = ImportanceMatrix({"x": Activity(SUMS[2], np.array([2]))}, ("c",), 2, 0, legacy=True)

    both, three = merge([a, b]), merge([a, b, c])

    np.testing.assert_array_equal(SUMS[0] + SUMS[1], both.entries["x"].sums)
    assert ([10], [1]) == (both.entries["x"].counts.tolist(), both.entries["y"].counts.tolist())
    assert (("a", "b"), 5, 512) == (both.datasets, both.chunk_count, both.chunk_size)
    np.testing.assert_array_equal(SUMS[0] + SUMS[1] + 512 * SUMS[2], three.entries["x"].sums)
    assert ([10 + 2 * 512], 7) == (three.entries["x"].counts.tolist(), three.chunk_count)


def test_files_of_different_models_are_not_merged() -> None:
    """Other widths or expert counts, and experts of a `.dat`, whose tokens are not known."""
    one = ImportanceMatrix({"x": Activity(SUMS[0], np.array([4]))}, ("a",), 1, 512)
    other = ImportanceMatrix({"x": Activity(SUMS.reshape(-1), np.array([1, 2, 3]))}, ("b",), 1, 512)
    old = ImportanceMatrix({NAME: Activity(SUMS.reshape(-1), np.array([3]))}, ("b",), 1, 0, legacy=True)

    with pytest.raises(ImportanceError, match="'x': 4 sums of 1 matrices and 12 sums of 3 matrices: from different"):
        merge([one, other])
    with pytest.raises(ImportanceError, match="how many tokens each expert saw"):
        merge([one, old])


@pytest.mark.parametrize(
    ("counts", "chunks", "size", "legacy", "words"),
    [
        (2**31 - 1, 1, 2**31 - 1, True, "'x': 4,611,686,014,132,420,609 tokens, more than any text has"),
        (2**52, 1, 512, False, "'x': 9,007,199,254,740,992 tokens"),
        (1, 2**31 - 1, 1, False, "4,294,967,294 chunks of 1 tokens"),
    ],
)
def test_counts_that_no_text_has_are_not_merged(counts: Any, chunks: Any, size: Any, legacy: bool, words: str) -> None:
    """Each file alone may say them; their sum is refused before it overflows, or can't be written."""
    one = ImportanceMatrix({"x": Activity(SUMS[0], np.array([counts]))}, ("a",), chunks, size, legacy)

    with pytest.raises(ImportanceError, match=words):
        merge([one, one], size)


@pytest.mark.parametrize(
    ("text", "name"),
    [("/a/b/c.txt", "c.txt"), (r"C:\a\b.txt", "b.txt"), ("x", "x"), ("a/\x1b[31m", "[31m"), ("", "unnamed")],
)
def test_names_of_texts_carry_no_path(text: str, name: str) -> None:
    """Nor control characters."""
    assert name == label(text)
