"""moe2gguf.gguf.resume: a stopped job goes on where it was, and reuses nothing that it has not compared."""

import errno
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.errors import CorruptWeightError, OutputError
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.resume import Interrupted, Job, describe_job
from moe2gguf.gguf.writer import OutputTensor, write_model
from moe2gguf.progress import silent
from moe2gguf.quant.rules import TypeOptions

NAMES = [f"t{i}" for i in range(6)]
JOB = {"type": "q4_k_m"}
HASHES = {f"source of {name}": format(i, "064x") for i, name in enumerate(NAMES)}


def values(name: Any) -> Any:
    """More than one checksum piece of them."""
    return np.full((300, 1024), float(name[1:]), np.float32)


def write(target: Any, stop_at: Any = None, error: Any = KeyboardInterrupt, job: Any = JOB, resume: Any = True) -> Any:
    """Write the six tensors, in order; returns the names of those that were made, and how many were reused."""
    made, hashes = [], {}

    def blocks(name: Any) -> Iterator[Any]:
        made.append(name)
        if name == stop_at:
            raise error("stopped")
        hashes[f"source of {name}"] = HASHES[f"source of {name}"]
        yield values(name)

    outputs = [
        OutputTensor(name, (300, 1024), GGMLType.F32, (f"source of {name}",), functools.partial(blocks, name))
        for name in NAMES
    ]
    files = [(outputs, lay_out({"general.architecture": "test"}, outputs))]
    done = write_model(target, files, job, resume=resume, hashes=hashes, threads=1, progress=silent)
    assert HASHES == hashes
    return made, done.n_reused


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """The bytes that an undisturbed run writes."""
    write(tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.fixture
def stopped(tmp_path: Path) -> Any:
    """A target whose first four tensors are finished."""
    target = tmp_path / "x.gguf"
    with pytest.raises(Interrupted, match=r"x.gguf.partial keeps what is finished \(4 pieces\); the same command"):
        write(target, "t4")
    return target


def journal_of(target: Any) -> Any:
    return partial_of(target).with_name("job.jsonl")


def partial_of(target: Any) -> Any:
    return target.with_name(target.name + ".partial") / target.name


def files(target: Any) -> Any:
    """What there is beside the file of an undisturbed run."""
    return sorted(path.name for path in target.parent.iterdir() if path.name != "whole")


def test_only_what_is_missing_is_made(stopped: Any, whole: Any) -> None:
    """Stopped twice, finished in the third run: the same bytes, the sources' hashes known, no other file left."""
    with pytest.raises(KeyboardInterrupt, match=r"\(5 pieces\)"):
        write(stopped, "t5")

    assert (["t5"], 5) == write(stopped)
    assert whole == stopped.read_bytes()
    assert ["x.gguf"] == files(stopped)


def test_a_job_in_a_job_is_kept_with_it(tmp_path: Path) -> None:
    """The inner one says that the same command goes on: the outer folder, without a piece of its own, stays too."""
    target = tmp_path / "outer" / "x.gguf"
    with pytest.raises(Interrupted, match=r"outer.x.gguf.partial keeps"), Job(target.parent, JOB):
        write(target, "t4")

    with Job(target.parent, JOB):
        assert (["t4", "t5"], 4) == write(target)


def test_a_tensor_whose_bytes_changed_is_made_anew(stopped: Any, whole: Any) -> None:
    """One bit in the middle of the third."""
    partial = partial_of(stopped)
    data = bytearray(partial.read_bytes())
    data[len(data) * 5 // 12] ^= 1
    partial.write_bytes(data)

    made, _ = write(stopped)

    assert ["t2", "t4", "t5"] == made
    assert whole == stopped.read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "made"),
    [
        ('"xxh3": "', '"xxh3": "0', NAMES),
        ('"source of t1": "0', '"source of t1": "x', ["t1", "t4", "t5"]),
        ('"source of t1"', '"source of t5"', ["t1", "t4", "t5"]),
        ('{"piece": "t3"', '{"pie', ["t3", "t4", "t5"]),
        ('{"piece": "t3"', "[" * 100_000, ["t3", "t4", "t5"]),
        ('"type": "q4_k_m"', '"type": 7', NAMES),
        ('{"job"', "{", NAMES),
    ],
)
def test_a_journal_that_makes_no_sense_is_not_believed(
    stopped: Any, whole: Any, before: str, after: Any, made: Any
) -> None:
    """Other checksums, hashes that are none, torn and hostile lines, no job."""
    path = journal_of(stopped)
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))

    assert made == write(stopped)[0]
    assert whole == stopped.read_bytes()


@pytest.mark.parametrize(("what", "made"), [("no partial file", NAMES[1:]), ("another size", ["t4", "t5"])])
def test_only_what_is_there_is_continued(stopped: Any, whole: Any, what: str, made: Any) -> None:
    """A journal alone, though zeros are what a new file has; a partial file that something else has made longer."""
    if what == "no partial file":
        partial_of(stopped).unlink()
    else:
        with partial_of(stopped).open("ab") as file:
            file.write(b"more")

    assert made == write(stopped)[0]
    assert whole == stopped.read_bytes()


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_without_a_job_is_not_emptied(tmp_path: Path, resume: bool) -> None:
    """Whoever made it may want what is in it."""
    (tmp_path / "x.gguf.partial").mkdir()
    (tmp_path / "x.gguf.partial" / "thesis.txt").write_text("precious")

    with pytest.raises(OutputError, match=r"x.gguf.partial: is in the way, and holds no unfinished work; remove it"):
        write(tmp_path / "x.gguf", resume=resume)

    assert "precious" == (tmp_path / "x.gguf.partial" / "thesis.txt").read_text()


def test_the_unfinished_file_of_another_job_is_refused(stopped: Any) -> None:
    """The message names what differs; --no-resume replaces it."""
    before = files(stopped)

    with pytest.raises(OutputError, match=r"(?s)another job:\n  - type: q4_k_m there, q6_k now\n.*--no-resume"):
        write(stopped, job={"type": "q6_k"})

    assert before == files(stopped)
    assert NAMES == write(stopped, job={"type": "q6_k"}, resume=False)[0]


def test_finished_files_and_folders_are_compared_before_they_are_used(tmp_path: Path) -> None:
    """The newest unharmed one counts; a changed file, one that is gone and one that never got its name do not."""
    with Job(tmp_path / "work", JOB) as job:
        for i in range(4):
            with job.save(f"state-{i}") as path:
                path.mkdir()
                (path / "a.txt").write_text(f"a{i}")
        with job.save("layer.txt", {"error": 0.5}) as path:
            path.write_text("layer")
    (tmp_path / "work" / "state-3" / "a.txt").write_text("other")
    (tmp_path / "work" / "state-2" / "b.txt").write_text("more")
    (tmp_path / "work" / "unfinished-state-9").write_text("torn")

    with Job(tmp_path / "work", JOB) as job:
        assert "state-1" == job.last(r"state-\d+")
        assert job.holds("layer.txt")
        piece = job.find("layer.txt")
        assert piece is not None
        assert {"error": 0.5} == piece.facts
        job.drop("layer.txt")
        assert not job.holds("layer.txt")
        assert 2 == job.n_reused
    with Job(tmp_path / "work", JOB, resume=False):
        assert ["job.jsonl"] == [path.name for path in (tmp_path / "work").iterdir()]


@pytest.mark.parametrize("error", [CorruptWeightError, OSError, RuntimeError])
def test_an_error_keeps_nothing(tmp_path: Path, error: Any) -> None:
    """Only an interrupt is worth continuing."""
    with pytest.raises((OutputError, error)):
        write(tmp_path / "x.gguf", "t4", error)

    assert [] == files(tmp_path / "x.gguf")


def test_a_broken_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Also where the job reads what is not in its own folder; what is finished stays."""

    def work() -> None:
        with Job(tmp_path / "work", JOB) as job:
            job.record("piece", "0")
            raise OSError(errno.EIO, "Input/output error", "elsewhere.gguf")

    with pytest.raises(OutputError, match=r"^elsewhere.gguf: cannot be used \(Input/output error\); remove what is in"):
        work()

    assert ["work"] == [path.name for path in tmp_path.iterdir()]


def test_a_journal_that_cannot_be_replaced_is_one_error(stopped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that became read-only."""
    real = os.unlink

    def fail(path: Any, *arguments: Any, **more: Any) -> None:
        if str(path).endswith("job.jsonl"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real(path, *arguments, **more)

    monkeypatch.setattr(os, "unlink", fail)

    with pytest.raises(OutputError, match=r"job.jsonl: cannot be used \(Read-only file system\)"):
        write(stopped, resume=False)


def test_an_interrupt_before_the_first_tensor_keeps_nothing(tmp_path: Path) -> None:
    """There is nothing to continue."""
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        write(tmp_path / "x.gguf", "t0")

    assert [] == files(tmp_path / "x.gguf")


def test_an_interrupt_before_the_job_is_written_down_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk takes the first line of the journal."""

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        write(tmp_path / "new")

    assert not isinstance(caught.value, Interrupted)
    assert [] == [*tmp_path.iterdir()]


def test_a_journal_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """A planted link is replaced, not written through."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x.gguf.partial").mkdir()
    journal_of(tmp_path / "x.gguf").symlink_to(tmp_path / "victim")

    write(tmp_path / "x.gguf")

    assert "precious" == (tmp_path / "victim").read_text()


def test_a_job_names_every_choice_and_input_without_a_path(tmp_path: Path) -> None:
    """Options, files by size and time, the header; the build of the kernels only where one is used."""
    (tmp_path / "a.gguf").write_text("abc")
    (tmp_path / "rules.toml").write_text("rules")
    options = TypeOptions("q8_0", type_rules=tmp_path / "rules.toml")
    job = describe_job("quantize", options, [tmp_path / "a.gguf"], b"header", [GGMLType.F16])

    assert ("quantize", "q8_0", "False") == (job["command"], job["type"], job["allow fallback"])
    assert job["a.gguf"].startswith("a.gguf of 3 bytes, changed ")
    assert job["type rules"].startswith("rules.toml of 5 bytes, changed ")
    assert str(tmp_path) not in json.dumps(job)
    assert "llama.cpp" not in job
    assert "llama.cpp" in describe_job("quantize", TypeOptions("q8_0"), [], b"", [GGMLType.Q8_0])
