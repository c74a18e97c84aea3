"""A disk that fills while a command writes: one sentence that names the file, and nothing that looks finished."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import tiny_gguf
from command import moe2gguf
from full_disk import limit_files

from moe2gguf.errors import OutputError
from moe2gguf.gguf.outputs import write_whole
from moe2gguf.measure.check import require_llama

HF, MOE, FILE, OUT, TEXT, KEPT = "HF", "MOE", "FILE", "OUT", "TEXT", "KEPT"
CALIBRATED = f"--experts 4 --used 2 --calibration {TEXT} --calibration-tokens 1024"
LINES = {
    "folder": f"convert {HF} {OUT} --experts 4 --format hf",
    "dense folder": f"densify {MOE} {OUT}",
    "calibration": f"convert {HF} {OUT} {CALIBRATED}",
    "kept calibration": f"convert {HF} {OUT} {CALIBRATED} --save-calibration {KEPT}",
    "calibrated folder": f"convert {HF} {OUT} {CALIBRATED} --format hf",
    "pruning": f"prune {FILE} {OUT} --keep 2 --tokens 64 --context 32",
    "shrink": f"shrink {HF} {OUT} --quality 2 --types q8_0 --text {TEXT}",
    "target": f"convert {HF} {OUT} --experts 4 --target-size 100KB",
    "target of a file": f"quantize {FILE} {OUT} --target-size 200KB",
    "check": f"convert {HF} {OUT} --experts 4 --check auto",
    "healing": f"heal {MOE} {OUT} --teacher {HF} --text {TEXT} --used-range 2 --tokens 1024 --layerwise 0 --steps 1",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What stands for the words in capitals."""
    require_llama()  # its process is there before a limit that it would inherit
    folder = tmp_path_factory.mktemp("full")
    hf = checkpoints.make(folder / "hf", hidden_size=32, intermediate_size=256, num_hidden_layers=1)
    assert 0 == moe2gguf("convert", hf, folder / "moe", "--experts", 4, "--format", "hf").returncode
    (folder / "text.txt").write_text("hello the world " * 800)
    file = tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4))
    return {HF: hf, MOE: folder / "moe", FILE: file, TEXT: folder / "text.txt"}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_full_disk_is_one_sentence(line: str, files: dict[str, Path], tmp_path: Path) -> None:
    """Whatever writes the file: Python, NumPy or safetensors."""
    words = {**files, OUT: tmp_path / "out", KEPT: tmp_path / "kept"}

    with limit_files(4096):
        done = moe2gguf(*(words.get(word, word) for word in line.split()))

    assert 1 == done.returncode
    message = done.stderr[done.stderr.index("moe2gguf: ") :]
    first = "/vocabulary.gguf: " if line.startswith("shrink") else f"moe2gguf: {tmp_path / 'out'}"
    assert first in message  # shrink counts the text's tokens before it writes a file
    assert os.strerror(errno.EFBIG) in message
    assert 1 == message.count("\n")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "kept").exists()


ROOM = (
    "folder",
    "dense folder",
    "calibration",
    "calibrated folder",
    "pruning",
    "healing",
    "publication",
    "target",
    "target of a file",
)


@pytest.mark.parametrize("kind", ROOM)
def test_what_does_not_fit_is_known_before_anything_is_made(
    kind: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much is needed is said; what takes long, such as a calibration, does not begin."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    monkeypatch.delattr("moe2gguf.recipes.prune.stream_from_child")
    monkeypatch.delattr("moe2gguf.quant.target.choose_under_budget")
    words = {**files, OUT: tmp_path / "out"}

    line = {**LINES, "publication": f"publish {HF} {OUT} --experts 4 --used 2 --types q8_0"}[kind]
    done = moe2gguf(*(words.get(word, word) for word in line.split()))

    assert 1 == done.returncode
    assert f"moe2gguf: {tmp_path}: 10,000 bytes are free, out needs " in done.stderr
    assert [] == list(tmp_path.iterdir())


def test_the_dense_file_of_a_check_is_counted_before_anything_is_made(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file alone would fit; it is beside the other one as long as both are compared."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
    words = {**files, OUT: tmp_path / "out"}

    done = moe2gguf(*(words.get(word, word) for word in LINES["check"].split()))

    assert 1 == done.returncode
    assert f"moe2gguf: {tmp_path}: 300,000 bytes are free, out with the dense file to check it needs " in done.stderr
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["gguf", "hf"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_calibration_whose_file_failed_goes_on(
    form: str, error: BaseException, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same command, which needs no --force: the calibration is kept when the file is written."""
    words = {**files, OUT: tmp_path / "out", KEPT: tmp_path / "kept"}
    line = [str(words.get(word, word)) for word in f"{LINES['kept calibration']} --format {form}".split()]

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(
            "moe2gguf.gguf.resume.Job.record" if form == "gguf" else "moe2gguf.recipes.write_folder.check_blocks", fail
        )
        assert {130, 1} & {moe2gguf(*line).returncode}
    monkeypatch.setattr("moe2gguf.experts.calibration.slice_layer", fail)

    done = moe2gguf(*line)

    assert (0, ["kept", "out"]) == (done.returncode, sorted(path.name for path in tmp_path.iterdir())), done.stderr


STAYS = {
    f"convert {HF} {OUT} --experts 4": ".partial",
    f"convert {HF} {OUT} {CALIBRATED}": ".calibration",
    f"convert {HF} {OUT} --experts 4 --format hf --force": ".old",
    LINES["healing"]: ".heal",
    f"imatrix {FILE} {OUT} --text {TEXT} --tokens 64 --context 32": ".work",
}


@pytest.mark.parametrize("line", STAYS)
def test_work_that_cannot_be_removed_is_a_warning(
    line: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written by then, and the folder takes room."""
    words, real = {**files, OUT: tmp_path / "out"}, shutil.rmtree
    left = tmp_path / f"out{STAYS[line]}"
    if "--force" in line:
        shutil.copytree(files[MOE], words[OUT])
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: None if Path(path) == left else real(path, **how))

    done = moe2gguf(*(words.get(word, word) for word in line.split()))

    assert 0 == done.returncode, done.stderr
    assert f"warning: {left}: cannot be removed, and is not needed any more\n" in done.stderr
    assert words[OUT].exists()


@pytest.fixture
def sliced(tmp_path: Path) -> Path:
    """A file with experts."""
    return tiny_gguf.write_gguf(tmp_path / "moe.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4))


def test_a_count_that_cannot_be_changed_is_one_sentence(sliced: Path) -> None:
    """On a disk that takes nothing; the file is as it was."""
    before = sliced.read_bytes()

    with limit_files(0):
        done = moe2gguf("set-used", sliced, 2)

    reason = os.strerror(errno.EFBIG)
    assert (1, f"moe2gguf: {sliced}: cannot be changed ({reason}); make it writable, or copy it\n") == done[::2]
    assert before == sliced.read_bytes()


@pytest.mark.parametrize("line", ["compare MOE --reference MOE --tokens 20 --context 16", "verify MOE --check MOE"])
def test_a_missing_folder_for_temporary_files_is_one_sentence(
    line: str, sliced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose only writable place is another one."""
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))

    done = moe2gguf(*(str(sliced) if word == "MOE" else word for word in line.split()))

    expected = (
        "moe2gguf: no temporary folder can be made (No such file or directory); set TMPDIR to a folder with room\n"
    )
    assert (1, expected) == done[::2]


def test_token_ids_that_cannot_be_compared_are_a_warning(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written by then."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))

    done = moe2gguf("convert", files[HF], tmp_path / "out.gguf", "--dense")

    assert 0 == done.returncode
    assert "token ids were not compared with the folder's tokenizer: no temporary folder can be made" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "compare MOE --reference MOE",
        "compare MOE --reference MOE --types q8_0",
        f"publish {HF} {OUT} --experts 4 --types q8_0",
    ],
)
def test_a_cache_that_cannot_be_written_is_said_at_once(
    line: str, files: dict[str, Path], sliced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first measurement or file, not when its row is to be kept."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path).name != "cache")
    words = {**files, "MOE": sliced, OUT: tmp_path / "out"}

    done = moe2gguf(*(words.get(word, word) for word in line.split()))

    assert 1 == done.returncode
    assert (
        f": {tmp_path / 'cache'} is not writable; choose another place, or set MOE2GGUF_CACHE to one\n" in done.stderr
    )
    assert ["cache", "moe.gguf"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_disk_that_fails_at_the_flush_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some disks tell only then that there is no room: a table or page must have been flushed to replace another."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "rows.csv").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OutputError, match=r"rows.csv: no room left while writing \(No space left on device\)"),
        write_whole(tmp_path / "rows.csv") as partial,
    ):
        partial.write_text("new")

    assert ["old"] == [file.read_text() for file in tmp_path.iterdir()]
