"""moe2gguf.gguf.writer: nothing unfinished under the final name, whatever goes wrong."""

import functools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.errors import CorruptWeightError, GGUFError, OutputError
from moe2gguf.gguf import types, writer
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.outputs import check_target
from moe2gguf.gguf.replace_files import replace_files
from moe2gguf.gguf.system import write_at
from moe2gguf.gguf.writer import OutputTensor, write_tensors

RNG = np.random.default_rng(0)
ARRAYS = {f"t{i}": RNG.standard_normal((i + 1, 64)).astype(np.float32) for i in range(9)}


def tensors(arrays: Any = ARRAYS) -> Any:
    """Output tensors that hand out `arrays` row by row."""
    return [
        OutputTensor(name, array.shape, GGMLType.F32, ("source",), functools.partial(iter, array[:, None]))
        for name, array in arrays.items()
    ]


def write(target: Any, arrays: Any = ARRAYS, threads: Any = 3) -> Any:
    """Write `arrays` as a GGUF file."""
    outputs = tensors(arrays)
    layout = lay_out({"digest": "0000"}, outputs)
    with replace_files(target, [target], layout.file_size) as (_, (part,)):
        write_tensors(part, layout, outputs, threads=threads)
    return layout


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_an_independent_reader_finds_every_value(tmp_path: Path, threads: int) -> None:
    """However many threads wrote it."""
    layout = write(tmp_path / "out.gguf", threads=threads)

    reader = gguf.GGUFReader(tmp_path / "out.gguf")

    assert layout.file_size == (tmp_path / "out.gguf").stat().st_size
    assert [*ARRAYS] == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert np.array_equal(ARRAYS[tensor.name], tensor.data)


def test_progress_adds_up_to_the_file(tmp_path: Path) -> None:
    """Header and tensors, padding aside."""
    outputs = tensors()
    layout = lay_out({}, outputs)
    told: list[int] = []
    with replace_files(tmp_path / "x", [tmp_path / "x"], layout.file_size) as (_, (part,)):
        write_tensors(part, layout, outputs, threads=2, advance=told.append)

    assert len(layout.header) + sum(tensor.n_bytes for tensor in outputs) == sum(told)


def test_a_bad_weight_stops_the_writing_and_leaves_nothing(tmp_path: Path) -> None:
    """The error names tensor and source; neither the file nor a partial one remains."""
    arrays = ARRAYS | {"t3": np.full((4, 64), np.nan, np.float32)}

    with pytest.raises(CorruptWeightError, match=r"t3 \(from source\)"):
        write(tmp_path / "out.gguf", arrays)

    assert [] == list(tmp_path.iterdir())


def test_a_tensor_of_the_wrong_size_is_a_defect_that_is_noticed(tmp_path: Path) -> None:
    """Never a shifted offset."""
    outputs = [OutputTensor("t", (2, 64), GGMLType.F32, (), lambda: iter([ARRAYS["t0"]]))]
    layout = lay_out({}, outputs)

    with (
        pytest.raises(GGUFError, match="256 bytes were made, the plan says 512"),
        replace_files(tmp_path / "x", [tmp_path / "x"], layout.file_size) as (_, (part,)),
    ):
        write_tensors(part, layout, outputs, threads=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupt_leaves_the_old_file_as_it_was(tmp_path: Path, error: Any) -> None:
    """Replacing happens at the end or not at all."""
    target = tmp_path / "out.gguf"
    target.write_text("old")

    def interrupted() -> None:
        with replace_files(target, [target], 100) as (_, (part,)):
            part.write_bytes(b"new")
            raise error

    with pytest.raises(error):
        interrupted()

    assert "old" == target.read_text()
    assert [target] == list(tmp_path.iterdir())


WRITER = """
import sys, time, numpy as np
from pathlib import Path
from gguf import GGMLQuantizationType as T
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.replace_files import replace_files
from moe2gguf.gguf.writer import OutputTensor, write_tensors

def slow():
    for i in range(200):
        print(i, flush=True)
        time.sleep(0.01)
        yield np.full((1, 64), i, np.float32)

outputs = [OutputTensor("t", (200, 64), T.F32, (), slow)]
layout = lay_out({}, outputs)
target = Path(sys.argv[1])
with replace_files(target, [target], layout.file_size) as (_, (part,)):
    write_tensors(part, layout, outputs, threads=1)
"""


@pytest.mark.parametrize("after", [0, 20, 150])
def test_a_killed_writer_leaves_no_final_name_and_a_rerun_succeeds(tmp_path: Path, after: int) -> None:
    """SIGKILL at several offsets: at most the partial file remains, which the next run replaces."""
    target = tmp_path / "out.gguf"
    with subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= after:
                process.send_signal(signal.SIGKILL)
                break
    assert not target.exists()

    write(target)

    assert [target] == list(tmp_path.iterdir())
    assert 9 == len(gguf.GGUFReader(target).tensors)


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    """The second is told to wait, and does not disturb the first."""
    target = tmp_path / "out.gguf"
    with subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(OutputError, match="another process"):
            write(target)
        process.stdout.read()

    assert 200 == gguf.GGUFReader(target).tensors[0].data.shape[0]


def limited(_: Any = None) -> None:
    """A file size limit, as a full disk would be met: in the middle of writing."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_full_disk_is_an_error_not_a_success(tmp_path: Path) -> None:
    """The message says so; nothing is left; the exit is no traceback of ours."""
    code = WRITER.replace("with replace", "from moe2gguf.errors import OutputError\ntry:\n with replace").replace(
        "    write_tensors", "  write_tensors"
    )
    code += "except OutputError as error:\n print('refused:', error)\n"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out.gguf"], preexec_fn=limited, capture_output=True, text=True
    )

    assert "refused:" in done.stdout, done.stderr
    assert "no room left" in done.stdout
    assert [] == list(tmp_path.iterdir())


def test_too_little_room_is_noticed_before_writing(tmp_path: Path) -> None:
    """An exabyte does not fit."""
    with pytest.raises(OutputError, match="make room first"), replace_files(tmp_path / "x", [tmp_path / "x"], 10**18):
        pass


def test_targets_that_must_not_be_replaced(tmp_path: Path) -> None:
    """Existing without force; a source by name, symbolic link and hard link also with it; folders and devices."""
    source, other = tmp_path / "source", tmp_path / "other"
    source.write_text("s")
    other.write_text("o")
    (tmp_path / "symbolic").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)

    check_target(other, [source], force=True)
    check_target(tmp_path / "new", [source], force=False)
    with pytest.raises(OutputError, match="--force"):
        check_target(other, [source], force=False)
    for name in ("source", "symbolic", "hard"):
        with pytest.raises(OutputError, match="would replace"):
            check_target(tmp_path / name, [source], force=True)
    for path in (tmp_path, os.devnull):
        with pytest.raises(OutputError, match="not a regular file"):
            check_target(type(tmp_path)(path), [source], force=True)
    with pytest.raises(OutputError, match="no such folder"):
        check_target(tmp_path / "a" / "b", [source], force=False)


def test_a_partial_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """A planted link must not make us overwrite its target."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out.gguf.partial").symlink_to(victim)

    with pytest.raises(OutputError, match="cannot be created"):
        write(tmp_path / "out.gguf")

    assert "precious" == victim.read_text()


def test_a_placeholder_is_replaced(tmp_path: Path) -> None:
    """The digest that is known only at the end."""
    with replace_files(tmp_path / "x", [tmp_path / "x"], 8) as (_, (part,)), part.open("wb", buffering=0) as file:
        file.write(b"ab0000gh")
        write_at(file.fileno(), memoryview(b"cdef"), 2)

    assert b"abcdefgh" == (tmp_path / "x").read_bytes()


def test_the_writer_keeps_only_a_few_tensors_in_memory(tmp_path: Path) -> None:
    """As many at once as there are threads."""
    alive, most = [], []

    def blocks(array: Any) -> Iterator[Any]:
        alive.append(1)
        most.append(len(alive))
        time.sleep(0.01)
        yield array
        alive.pop()

    outputs = [
        OutputTensor(f"t{i}", (1, 64), GGMLType.F32, (), lambda: blocks(np.zeros((1, 64), np.float32)))
        for i in range(20)
    ]
    layout = lay_out({}, outputs)
    with replace_files(tmp_path / "x", [tmp_path / "x"], layout.file_size) as (_, (part,)):
        write_tensors(part, layout, outputs, threads=3)

    assert 1 < max(most) <= 3


def test_one_large_tensor_is_quantized_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of rows, whose bytes arrive in order; the first error stops all."""
    rows = RNG.standard_normal((64, 256)).astype(np.float32)
    output = OutputTensor("t", (64, 256), GGMLType.Q4_0, (), lambda: iter([rows]))
    layout = lay_out({}, [output])
    monkeypatch.setattr(writer, "PIECE", 512)
    seen = set()
    encode = types.encode

    def watched(array: Any, kind: Any, name: Any, importance: Any) -> Any:
        seen.add((threading.get_ident(), len(array)))
        time.sleep(0.005)
        return encode(array, kind, name, importance)

    monkeypatch.setattr(types, "encode", watched)
    with replace_files(tmp_path / "x", [tmp_path / "x"], layout.file_size) as (_, (part,)):
        write_tensors(part, layout, [output], threads=1, quantizers=3)

    (tensor,) = gguf.GGUFReader(tmp_path / "x").tensors
    assert np.array_equal(gguf.quants.quantize(rows, GGMLType.Q4_0), tensor.data)
    assert (3, {2}) == (len({thread for thread, _ in seen}), {n for _, n in seen})


def test_an_error_does_not_wait_for_the_rows_of_other_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor may have minutes of rows in the queue; they are dropped."""
    rows = RNG.standard_normal((1000, 32)).astype(np.float32)
    outputs = [
        OutputTensor("large", rows.shape, GGMLType.Q4_0, (), lambda: iter([rows])),
        OutputTensor("bad", (1, 32), GGMLType.F32, (), late),
    ]
    layout = lay_out({}, outputs)
    monkeypatch.setattr(writer, "PIECE", 32)
    encode = types.encode
    monkeypatch.setattr(types, "encode", lambda *arguments: time.sleep(0.02) or encode(*arguments))
    start = time.monotonic()

    with (
        pytest.raises(CorruptWeightError, match="bad"),
        replace_files(tmp_path / "x", [tmp_path / "x"], layout.file_size) as (_, (part,)),
    ):
        write_tensors(part, layout, outputs, threads=2)

    assert time.monotonic() - start < 5  # of the ten seconds that all rows would take
    assert [] == list(tmp_path.iterdir())


def late() -> Iterator[Any]:
    """A bad weight, after the other tensor has begun."""
    time.sleep(0.1)
    yield np.full((1, 32), np.nan, np.float32)
