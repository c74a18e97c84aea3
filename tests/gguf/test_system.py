"""moe2gguf.gguf.system: the same bytes and the same refusals with what every operating system has."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
import pytest

from moe2gguf import Options, TypeOptions, convert, quantize, verify
from moe2gguf.errors import OutputError
from moe2gguf.gguf.system import (
    count_processors,
    link_or_copy,
    open_here,
    open_locked,
    read_at,
    temporary_folder,
    write_at,
)

UNIX = ("preadv", "pwrite", "O_DIRECTORY", "O_NOFOLLOW")
"""What Windows does not have, of what is asked for at run time; and `fcntl`."""


def without_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what Windows lacks."""
    for name in UNIX:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)


def test_a_temporary_folder_that_stays_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that became read-only."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", fail)
        with pytest.raises(RuntimeError, match="boom"), temporary_folder() as folder:
            raise RuntimeError("boom")
    folder.rmdir()


@pytest.mark.parametrize("unix", [True, False])
def test_threads_read_and_write_at_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unix: bool) -> None:
    """Many at once on one descriptor; behind the end there is nothing."""
    if not unix:
        without_unix(monkeypatch)
    parts = [bytes([i]) * 1000 for i in range(64)]
    descriptor = open_here(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_at(descriptor, memoryview(parts[i]), 1000 * i), range(64)))

        def read(i: int) -> bytes:
            buffer = bytearray(1000)
            assert 1000 == read_at(descriptor, memoryview(buffer), 1000 * i)
            return bytes(buffer)

        assert parts == list(pool.map(read, range(64)))
    assert 0 == read_at(descriptor, memoryview(bytearray(10)), 64000)
    os.close(descriptor)


@pytest.mark.parametrize("missing", [[], ["link"], ["link", "symlink"]])
def test_a_second_name_is_a_link_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]) -> None:
    """A copy where the file system has no links; what had the name is replaced, not written into."""

    def fail(*_: object) -> None:
        raise PermissionError

    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    (tmp_path / "d").mkdir()
    target = tmp_path / "d" / "c"
    os.symlink(tmp_path / "b", target)
    for name in missing:
        monkeypatch.setattr(os, name, fail)

    links = link_or_copy(tmp_path / "a", target)

    assert links is (len(missing) < 2)
    assert ("new", "old") == (target.read_text(), (tmp_path / "b").read_text())
    assert links is (tmp_path / "a").samefile(target)
    assert target.is_symlink() is (missing == ["link"])


def test_a_folder_has_one_lock(tmp_path: Path) -> None:
    """Another process is refused until the descriptor is closed; a link to a folder and a file in its place always."""
    code = f"from moe2gguf.gguf.system import *; open_locked(Path({str(tmp_path / 'work')!r}))"
    command = [sys.executable, "-c", code]
    descriptor = open_locked(tmp_path / "work")

    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    os.close(descriptor)

    assert "another process is writing it" in refused.stderr
    assert 0 == subprocess.run(command, check=False).returncode
    (tmp_path / "link").symlink_to(tmp_path / "work")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(OutputError, match="cannot be created"):
            open_locked(tmp_path / name)


def test_files_are_the_same_without_unix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted and quantized with what Windows has."""
    model = checkpoints.make(tmp_path / "model", num_hidden_layers=1)
    options = Options(experts=3, types=TypeOptions("f16"))
    convert(model, tmp_path / "a.gguf", options)
    quantize(tmp_path / "a.gguf", tmp_path / "a8.gguf", TypeOptions("q8_0"))

    without_unix(monkeypatch)
    convert(model, tmp_path / "b.gguf", options)
    quantize(tmp_path / "b.gguf", tmp_path / "b8.gguf", TypeOptions("q8_0"))

    assert not verify(tmp_path / "b8.gguf").problems
    for one, other in (("a", "b"), ("a8", "b8")):
        assert (tmp_path / f"{one}.gguf").read_bytes() == (tmp_path / f"{other}.gguf").read_bytes()


def test_four_commands_work_where_windows_is(tmp_path: Path) -> None:
    """inspect, verify, convert and quantize without Unix's modules, and with Windows' refusals: the same bytes."""
    model = checkpoints.make(tmp_path / "model", num_hidden_layers=1)
    dense = convert(model, tmp_path / "dense.gguf", Options(dense=True, types=TypeOptions("f16"))).path
    options = Options(experts=3, types=TypeOptions("f16"))
    convert(model, tmp_path / "a.gguf", options)
    quantize(tmp_path / "a.gguf", tmp_path / "a8.gguf", TypeOptions("q8_0"))
    commands: list[list[str | Path]] = [
        ["convert", model, "b.gguf", "--experts", "3", "--type", "f16"],
        ["convert", model, "b.gguf", "--experts", "3", "--type", "f16", "--force"],
        ["convert", dense, "c.gguf", "--experts", "2", "--shard-size", "160KB"],
        ["convert", model, "folder", "--experts", "3", "--format", "hf"],
        ["quantize", "b.gguf", "b8.gguf", "q8_0"],
        ["inspect", "b8.gguf"],
        ["verify", "b8.gguf"],
        ["set-used", "b.gguf", "3"],
    ]

    (tmp_path / "b.gguf.partial").mkdir()
    (tmp_path / "b.gguf.partial" / "job.jsonl").touch()  # of a run that was killed
    for command in commands:
        program = Path(__file__).parents[1] / "support" / "windows.py"
        done = subprocess.run(
            [sys.executable, program, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (0, "") == (done.returncode, done.stderr if done.returncode else ""), command

    assert [] == [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    for one, other in (("a", "b"), ("a8", "b8")):
        assert (tmp_path / f"{one}.gguf").read_bytes() == (tmp_path / f"{other}.gguf").read_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a system without processors of a process's own")
def test_counts_the_processors_that_a_process_may_use() -> None:
    """As many as taskset, a container or a batch system leaves, not all of the machine."""
    own = os.sched_getaffinity(0)
    assert count_processors() == len(own)

    code = (
        f"import os; os.sched_setaffinity(0, {{{min(own)}}});"
        "from moe2gguf.gguf.system import count_processors; print(count_processors())"
    )
    assert "1\n" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
