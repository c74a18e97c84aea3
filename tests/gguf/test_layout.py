"""moe2gguf.gguf.layout: headers that the gguf package reads back, and sizes that are exact."""

from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.file import ValueType
from moe2gguf.gguf.layout import Entry, find_value, lay_out
from moe2gguf.gguf.reader import read_gguf

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.one_of(
    TEXT,
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.lists(TEXT, min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
)
METADATA = st.dictionaries(st.text("abc.", min_size=1, max_size=10), VALUES, max_size=6)
ENTRIES = st.lists(
    st.builds(
        Entry,
        st.text("xyz.", min_size=1, max_size=10),
        st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda dims: (*dims, 32)),
        st.sampled_from([GGMLType.F32, GGMLType.F16, GGMLType.Q8_0]),
    ),
    max_size=5,
    unique_by=lambda entry: entry.name,
)


@given(metadata=METADATA, tensors=ENTRIES)
def test_the_gguf_package_reads_back_what_was_laid_out(
    metadata: Any, tensors: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every value, tensor name, shape, type and offset; and the file has exactly the planned size."""
    path = tmp_path_factory.mktemp("layout") / "file.gguf"
    layout = lay_out(metadata, tensors)
    path.write_bytes(layout.header.ljust(layout.file_size, b"\0"))

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}

    assert metadata == fields
    assert [(t.name, tuple(reversed(t.shape)), t.type) for t in tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type) for t in reader.tensors
    ]
    assert [layout.offsets[t.name] for t in tensors] == [t.data_offset for t in reader.tensors]


def test_the_smallest_file_byte_by_byte() -> None:
    """One key, one tensor: the header written out by hand."""
    layout = lay_out({"a": 7}, [Entry("t", (2, 3), GGMLType.F32)])

    assert (
        bytes.fromhex(
            "47475546 03000000 0100000000000000 0100000000000000"
            "0100000000000000 61 04000000 07000000"
            "0100000000000000 74 02000000 0300000000000000 0200000000000000 00000000 0000000000000000"
        )
        == layout.header[:82]
    )
    assert (96, 96 + 32) == (len(layout.header), layout.file_size)


def test_a_strings_place_can_be_found() -> None:
    """So that a digest, known only at the end, replaces its placeholder."""
    layout = lay_out({"x": "0000", "digest": "0000"}, [])
    offset = find_value(layout, "digest", "0000")

    patched = layout.header[:offset] + b"beef" + layout.header[offset + 4 :]

    assert patched.replace(b"beef", b"0000") == layout.header
    assert patched.index(b"beef") > patched.index(b"digest")


@pytest.mark.parametrize("value", [-1, 2**32, 1e300, [], [2**31], {"a": 1}])
def test_values_that_do_not_fit_name_the_key(value: Any) -> None:
    """No wrap-around, no silently dropped empty array."""
    with pytest.raises(GGUFError, match=r"some\.key"):
        lay_out({"some.key": value}, [])


def test_two_tensors_of_one_name_are_refused() -> None:
    """A file with both would not load."""
    with pytest.raises(GGUFError, match="same name"):
        lay_out({}, [Entry("t", (1,), GGMLType.F32)] * 2)


def test_offsets_are_aligned() -> None:
    """A tensor whose size is no multiple of 32 does not shift the next one off its alignment."""
    layout = lay_out({}, [Entry("a", (3,), GGMLType.F32), Entry("b", (3,), GGMLType.F32)])

    assert layout.offsets["a"] + 32 == layout.offsets["b"]
    assert np.all(np.array(list(layout.offsets.values())) % 32 == 0)


@given(
    kind=st.sampled_from([kind for kind in gguf.GGUFValueType if kind.name[:3] in ("UIN", "INT")]),
    data=st.data(),
    alignment=st.sampled_from([8, 32, 64, 4096]),
)
def test_stored_kinds_and_the_alignment_of_another_file_are_obeyed(
    kind: Any, data: Any, alignment: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A value comes back with the type that it had, alone and in arrays, empty ones too."""
    bits, signed = int(kind.name.lstrip("UINT")), kind.name.startswith("INT")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    value, values = data.draw(st.integers(low, high)), data.draw(st.lists(st.integers(low, high), max_size=3))
    metadata = {"general.alignment": alignment, "one": value, "many": values}
    stored = {"one": ValueType(kind), "many": ValueType(gguf.GGUFValueType.ARRAY, kind)}
    path = tmp_path_factory.mktemp("layout") / "file.gguf"
    layout = lay_out(metadata, [Entry("t", (3, 5), GGMLType.F32), Entry("u", (3,), GGMLType.F32)], stored)

    path.write_bytes(layout.header.ljust(layout.file_size, b"\0"))

    file = read_gguf(path)
    assert metadata == file.metadata
    assert stored.items() <= file.types.items()
    assert [layout.offsets[name] for name in ("t", "u")] == [t.offset for t in file.tensors.values()]
    assert {0} == {offset % alignment for offset in layout.offsets.values()}


def test_a_value_outside_its_stored_type_is_an_error() -> None:
    """Never wrapped around."""
    with pytest.raises(GGUFError, match="metadata a: 256 does not fit"):
        lay_out({"a": 256}, [], {"a": ValueType(gguf.GGUFValueType.UINT8)})
