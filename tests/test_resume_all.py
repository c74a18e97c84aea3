"""Every long job is killed after its first finished piece, and continued to what an undisturbed run makes."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import long_jobs
import pytest

from moe2gguf.errors import OutputError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and texts that the jobs read."""
    return long_jobs.make_inputs(tmp_path_factory.mktemp("inputs"))


def run(name: str, inputs: Path, out: Path, *, stop: bool = False) -> list[str]:
    """Run a job in a process of its own, with `stop` until its first piece is finished; returns its finished pieces."""
    context = long_jobs.start_server()
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=long_jobs.run_job, args=(name, inputs, out, stop, sent))
    process.start()
    sent.close()
    pieces: list[str] = []
    while not (stop and pieces and re.match(long_jobs.STOP_AFTER.get(name, ""), pieces[-1])):
        try:
            pieces.append(received.recv())
        except EOFError:
            break
    if stop:
        process.kill()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if stop else 0)
    return pieces


def contents(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> bytes, of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", long_jobs.JOBS)
def test_a_killed_job_goes_on_where_it_was(inputs: Path, tmp_path: Path, name: str) -> None:
    """The same bytes, no finished piece made twice, nothing left over; another job is refused, or starts anew."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    all_pieces = run(name, inputs, whole / "out.gguf")
    assert len(all_pieces) > 1
    finished = run(name, inputs, stopped / "out.gguf", stop=True)
    assert not [path for path in stopped.iterdir() if path.name.endswith((".gguf", ".npz"))]

    _refuse_and_start_anew(name, inputs, stopped, whole, tmp_path / "anew")

    pieces = run(name, inputs, stopped / "out.gguf")

    assert not {*pieces} & {*finished}
    assert {*all_pieces} == {*pieces, *finished}
    assert contents(whole) == contents(stopped)


def _refuse_and_start_anew(name: str, inputs: Path, stopped: Path, whole: Path, anew: Path) -> None:
    """Another job on the unfinished work: one form of message, nothing touched; --no-resume replaces the work."""
    function, difference = long_jobs.JOBS[name]
    left = contents(stopped)
    shutil.copytree(stopped, anew)
    if difference:
        message = (
            rf"{re.escape(str(stopped / 'out.gguf'))}\.\w+: holds the unfinished work of another job:\n"
            rf"  - {re.escape(difference)}\n"
            r"repeat that job to finish it, or start anew with --no-resume"
        )
        with pytest.raises(OutputError, match=rf"^{message}$"):
            function(inputs, stopped / "out.gguf", True, resume=True)
        assert left == contents(stopped)
    function(inputs, anew / "out.gguf", True, resume=False)
    assert contents(anew).keys() == contents(whole).keys()
