"""--shard-size of convert and quantize: a set that llama.cpp loads, and that is there as a whole or not at all."""

import contextlib
import dataclasses
import errno
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner
from flat_options import flat_options
from llama_logits import llama_logits_of

from moe2gguf import convert, plan_conversion
from moe2gguf.cli import cli
from moe2gguf.cli.options import Size
from moe2gguf.errors import GGUFError, OutputError, PlanError
from moe2gguf.gguf.metadata import SOURCE_DIGEST
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.shards import read_model, read_shards
from moe2gguf.gguf.verify import verify
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import plan_quantization, quantize

SIZE = 100_000
SLICED = flat_options(experts=4, shard_size=SIZE)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("dense") / "dense.gguf", tiny_gguf.dense_weights())


def names(folder: Any) -> Any:
    return sorted(path.name for path in folder.iterdir())


def test_the_set_is_the_file(dense: Any, tmp_path: Path) -> None:
    """Same tensors and metadata as one file, exactly the planned sizes, and llama.cpp's logits."""
    convert(dense, tmp_path / "one.gguf", flat_options(experts=4))
    plan = plan_conversion(dense, SLICED)

    done = convert(dense, tmp_path / "out.gguf", SLICED)

    shards = read_shards(done.path)
    assert len(shards) > 4
    assert [layout.file_size for _, layout in plan.shards] == [shard.file_size for shard in shards]
    assert max(shard.file_size for shard in shards) <= SIZE
    assert plan.file_size == sum(shard.file_size for shard in shards) == done.to_dict()["file_size"]
    assert plan.to_dict()["shards"][0] == {"tensors": len(shards[0].tensors), "bytes": shards[0].file_size}
    assert {shard.metadata[SOURCE_DIGEST] for shard in shards} == {done.source_digest}
    one, model = read_gguf(tmp_path / "one.gguf"), read_model(done.path)
    assert (one.metadata, one.types, list(one.tensors)) == (model.metadata, model.types, list(model.tensors))
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(one.read_tensor(tensor), model.read_tensor(model.tensors[name]))
    assert names(tmp_path) == [
        "one.gguf",
        *(f"out-{i:05d}-of-{len(shards):05d}.gguf" for i in range(1, len(shards) + 1)),
    ]
    first, second = llama_logits_of([tmp_path / "one.gguf", done.path], [1, 60, 200, 280, 17])
    np.testing.assert_array_equal(first, second)


def test_a_set_goes_in(dense: Any, tmp_path: Path) -> None:
    """A dense set, by any of its shards, gives the bytes that the one file gives; --dense puts it together."""
    done = convert(dense, tmp_path / "set.gguf", flat_options(dense=True, shard_size=SIZE))
    second = next(tmp_path.glob("set-00002-*"))

    convert(dense, tmp_path / "a.gguf", flat_options(experts=4))
    convert(second, tmp_path / "b.gguf", flat_options(experts=4))
    convert(second, tmp_path / "whole.gguf", flat_options(dense=True))
    convert(dense, tmp_path / "same.gguf", flat_options(dense=True))

    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    a, b = (read_gguf(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert all((a.read_tensor(tensor) == b.read_tensor(b.tensors[name])).all() for name, tensor in a.tensors.items())
    with pytest.raises(OutputError, match="which is read; choose another name"):
        convert(done.path, second, flat_options(experts=4), force=True)


def test_a_model_that_fits_is_one_file(dense: Any, tmp_path: Path) -> None:
    """Under the name that was asked for."""
    done = convert(dense, tmp_path / "out.gguf", flat_options(experts=4, shard_size=10**9))

    assert names(tmp_path) == ["out.gguf"]
    assert done.plan.to_dict()["shards"] == []


def test_existing_shards_are_kept_unless_forced(dense: Any, tmp_path: Path) -> None:
    """Any of the names that is taken is an error; --force replaces all of them."""
    first = convert(dense, tmp_path / "out.gguf", SLICED).path
    before = first.read_bytes()
    first.unlink()

    with pytest.raises(OutputError, match=r"out-00002-of-\d+\.gguf: exists"):
        convert(dense, tmp_path / "out.gguf", SLICED)
    convert(dense, tmp_path / "out.gguf", SLICED, force=True)

    assert first.read_bytes() == before
    assert not verify(first).problems


def test_sizes_that_are_too_small_name_what_does_not_fit(dense: Any, tmp_path: Path) -> None:
    """In the plan, before anything is written: one sentence, and the size that it gives is enough, to the byte."""
    for options in (flat_options(experts=4), flat_options(dense=True)):
        for size in (50_000, 1000, 0, -5):
            with pytest.raises(PlanError) as caught:
                plan_conversion(dense, dataclasses.replace(options, shard_size=size))
            assert 1 == len(caught.value.refusals)
            words = r"--shard-size (\S+): too small for (\S+) and \d+ more; give at least (\S+) bytes"
            match = re.fullmatch(words, caught.value.refusals[0])
            assert match is not None
            shown, name, least = match.groups()
            assert (f"{size:,}", "token_embd.weight") == (shown, name)
            enough = int(least.replace(",", ""))
            assert 303 * 64 * 4 < enough < 303 * 64 * 4 + 1000  # the embedding and a small header
            plan_conversion(dense, dataclasses.replace(options, shard_size=enough))
            with pytest.raises(PlanError, match=r"too small for token_embd\.weight( and 1 more)?; give at least"):
                plan_conversion(dense, dataclasses.replace(options, shard_size=enough - 1))


@pytest.mark.parametrize("command", ["convert", "quantize"])
@pytest.mark.parametrize(
    "size", ["2 elephants", "-1", "", "1e9", "nan", "0x10", "5iB", "1.GB", "1,000", "9" * 16, "GB"]
)
def test_sizes_that_are_none_are_usage_errors(dense: Any, tmp_path: Path, command: str, size: Any) -> None:
    """One line with an example of a size, exit code 2, and no file."""
    arguments = [command, dense, tmp_path / "out.gguf", *(["q8_0"] if command == "quantize" else [])]

    result = CliRunner().invoke(cli, [*map(str, arguments), "--shard-size", size])

    assert 2 == result.exit_code
    assert f"{size!r} is not a size such as 500MB or 2GB" in result.output
    assert [] == names(tmp_path)


@pytest.mark.parametrize(
    ("size", "n_byte"),
    [
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        ("500 mb", 500_000_000),
        ("7", 7),
        ("7B", 7),
        ("1k", 1000),
        ("2Ti", 2 << 40),
    ],
)
def test_sizes_are_read(size: str, n_byte: Any) -> None:
    """Decimal and binary, with and without the B."""
    assert n_byte == Size().convert(size, None, None)


def test_places_where_a_set_cannot_be_are_refused(dense: Any, tmp_path: Path) -> None:
    """A folder's name, and a folder that is not there."""
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        convert(dense, tmp_path, SLICED)
    with pytest.raises(OutputError, match="no such folder; create it first"):
        convert(dense, tmp_path / "a" / "out.gguf", SLICED)
    assert [] == names(tmp_path)


def tensors_of(path: Any) -> Any:
    """Name -> (type, shape, bytes) of a file or a set."""
    model = read_model(path)
    return {t.name: (t.type, t.shape, model.read_tensor(t).tobytes()) for t in model.tensors.values()}


def test_a_quantized_set_is_the_quantized_file(dense: Any, tmp_path: Path) -> None:
    """Of one file and of a set alike: its tensors, its metadata, the planned sizes, and llama.cpp's logits."""
    one = quantize(dense, tmp_path / "one.gguf", TypeOptions("q8_0")).path
    source = convert(dense, tmp_path / "f32.gguf", flat_options(dense=True, shard_size=SIZE)).path
    plan = plan_quantization(source, TypeOptions("q8_0"), shard_size=40_000)

    done = quantize(source, tmp_path / "out.gguf", TypeOptions("q8_0"), shard_size=40_000)
    again = quantize(dense, tmp_path / "again.gguf", TypeOptions("q8_0"), shard_size=40_000).path

    shards = read_shards(done.path)
    assert 4 == len(shards)
    assert not verify(done.path).problems
    assert [layout.file_size for _, layout in plan.shards] == [shard.file_size for shard in shards]
    assert max(shard.file_size for shard in shards) <= 40_000
    assert plan.to_dict()["file_size"] == sum(shard.file_size for shard in shards)
    assert plan.to_dict()["shards"][1] == {"tensors": len(shards[1].tensors), "bytes": shards[1].file_size}
    assert tensors_of(one) == tensors_of(done.path) == tensors_of(again)
    assert (read_gguf(one).metadata, read_gguf(one).types) == (read_model(again).metadata, read_model(again).types)
    first, second = llama_logits_of([one, done.path], [1, 60, 200, 280, 17])
    np.testing.assert_array_equal(first, second)
    assert tensors_of(one) == tensors_of(quantize(done.path, tmp_path / "joined.gguf", TypeOptions()).path)


def test_quantize_treats_targets_as_convert_does(dense: Any, tmp_path: Path) -> None:
    """From the command line: plan and JSON, what exists, --force, the source itself, and bad sizes."""

    def run(*words: Any, source: Any = dense) -> Any:
        command = ["quantize", str(source), str(tmp_path / "out.gguf"), "q8_0", *words]
        result = CliRunner().invoke(cli, command)
        return result.exit_code, f"{result.output}{result.exception or ''}"

    code, shown = run("--shard-size", "40kB", "--plan")
    assert (0, True, []) == (code, ", in 4 files" in shown, names(tmp_path))
    assert 4 == len(json.loads(run("--shard-size", "40kB", "--plan", "--json")[1])["shards"])
    code, shown = run("--shard-size", "40kB")
    assert (0, True) == (code, "out-00001-of-00004.gguf and 3 more files" in shown)
    first = tmp_path / "out-00001-of-00004.gguf"
    before = contents(tmp_path)

    first.unlink()
    code, shown = run("--shard-size", "40kB")
    assert (1, True) == (code, "out-00002-of-00004.gguf: exists; choose another name, or replace it" in shown)
    assert 0 == run("--shard-size", "40kB", "--force")[0]
    assert before == contents(tmp_path)
    code, shown = run("--shard-size", "40kB", "--force", source=first)
    assert (1, True) == (code, "out-00001-of-00004.gguf, which is read; choose another name" in shown)
    assert 2 == run("--shard-size", "many")[0]
    code, shown = run("--shard-size", "20kB", "--force")
    assert (1, True) == (code, "--shard-size 20,000: too small for token_embd.weight" in shown)
    assert before == contents(tmp_path)


def test_shards_of_another_type_are_foreign(dense: Any, tmp_path: Path) -> None:
    """Every shard says the file type: one of a set with the same names and numbers is told from the others."""
    a, b = (
        quantize(dense, tmp_path / name / "x.gguf", TypeOptions(kind), shard_size=size).path
        for name, kind, size in (("a", "q8_0", 40_000), ("b", "f16", 75_000))
        if (tmp_path / name).mkdir() is None
    )
    assert a.name == b.name
    a.with_name("x-00003-of-00004.gguf").write_bytes(b.with_name("x-00003-of-00004.gguf").read_bytes())

    with pytest.raises(GGUFError, match=r"00003-of-00004.gguf is of another set: its 'general.file_type' differs"):
        read_model(a)


SLOW = """
import contextlib, sys, time
from pathlib import Path
from moe2gguf import Options, convert
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize

@contextlib.contextmanager
def slow(stage, total):
    def advance(n):
        print(stage, flush=True)
        time.sleep(0.01)
    yield advance

replace = Path.replace
def slowly(self, target):
    replace(self, target)
    print("moved", target.name, flush=True)
    time.sleep(0.05)
Path.replace = slowly
source, target = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3] == "convert":
    convert(source, target, Options(experts=4, shard_size=100_000), threads=1, progress=slow)
elif sys.argv[3] == "one":
    convert(source, target, Options(experts=4), threads=1, progress=slow)
else:
    quantize(source, target, TypeOptions("q8_0"), shard_size=40_000, threads=1, progress=slow)
"""


def killed(source: Any, target: Any, moment: Any, nth: Any = 1, command: Any = "convert") -> None:
    """SIGKILL when the `nth` line that begins with `moment` is printed."""
    with subprocess.Popen([sys.executable, "-c", SLOW, source, target, command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            nth -= line.decode().startswith(moment)
            if not nth:
                break
        process.kill()
    assert nth == 0


def contents(folder: Any) -> Any:
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run writes that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    convert(dense, folder / "out.gguf", SLICED)
    return contents(folder)


@pytest.mark.parametrize("moment", ["write", "verify", "moved out-00003"])
def test_a_killed_run_leaves_nothing_that_looks_finished(
    dense: Any, tmp_path: Path, undisturbed: Any, moment: str
) -> None:
    """SIGKILL while writing, verifying or moving: no first shard; what is left is refused, and the next run works."""
    killed(dense, tmp_path / "out.gguf", moment)

    assert not list(tmp_path.glob("out-00001-*"))
    assert all(verify(path).problems for path in tmp_path.glob("out-*.gguf"))

    convert(dense, tmp_path / "out.gguf", SLICED, force=moment.startswith("moved"))

    assert undisturbed == contents(tmp_path)


@pytest.mark.parametrize("moments", [(("write", 4), ("write", 22)), (("write", 13), ("verify", 2))])
def test_a_killed_run_goes_on_where_it_was(dense: Any, tmp_path: Path, undisturbed: Any, moments: Any) -> None:
    """SIGKILL twice, in several shards: the third run makes only what is missing, and the bytes are the same."""
    for moment in moments:
        killed(dense, tmp_path / "out.gguf", *moment)

    done = convert(dense, tmp_path / "out.gguf", SLICED)

    assert done.reused == len(done.plan.tensors) if moments[1][0] == "verify" else 5 < done.reused < 22
    assert done.source_digest == read_gguf(done.path).metadata[SOURCE_DIGEST]
    assert undisturbed == contents(tmp_path)


def test_a_killed_quantization_goes_on_where_it_was(dense: Any, tmp_path: Path) -> None:
    """The same for quantize; other options and another source are refused, with what differs."""
    target, whole = tmp_path / "out" / "x.gguf", tmp_path / "whole" / "x.gguf"
    target.parent.mkdir()
    whole.parent.mkdir()
    quantize(dense, whole, TypeOptions("q8_0"), shard_size=40_000)
    killed(dense, target, "write", 8, "quantize")
    other = tmp_path / "other.gguf"
    other.write_bytes(dense.read_bytes())
    for source, kind, size, difference in (
        (dense, "q8_0", 50_000, "shard size: 40000 there, 50000 now"),
        (dense, "q8_0", None, "shard size: 40000 there, none now"),
        (dense, "f16", 40_000, "type: q8_0 there, f16 now"),
        (other, "q8_0", 40_000, "other.gguf: none there, other.gguf of"),
    ):
        with pytest.raises(OutputError, match=rf"(?s)x.gguf.partial: holds the unfinished work.*  - {difference}"):
            quantize(source, target, TypeOptions(kind), shard_size=size)
    killed(dense, target, "write", 18, "quantize")

    done = quantize(dense, target, TypeOptions("q8_0"), shard_size=40_000)

    assert 5 < done.reused < 18
    assert contents(whole.parent) == contents(target.parent)


def test_an_unfinished_set_of_another_job_is_refused(dense: Any, tmp_path: Path, undisturbed: Any) -> None:
    """The option or the source that differs is named, nothing is lost; resume=False starts anew."""
    target = tmp_path / "out.gguf"
    other = tmp_path / "other.gguf"
    other.write_bytes(dense.read_bytes())
    killed(dense, target, "write", 8)
    before = names(tmp_path)

    for source, options, difference in (
        (dense, flat_options(experts=4, shard_size=150_000), "shard size: 100000 there, 150000 now"),
        (dense, flat_options(experts=4), "shard size: 100000 there, none now"),
        (dense, flat_options(experts=2, shard_size=SIZE), "experts: 4 there, 2 now"),
        (dense, flat_options(experts=4, shard_size=SIZE, type="f16"), "type: auto there, f16 now"),
        (other, SLICED, "other.gguf: none there, other.gguf of"),
    ):
        with pytest.raises(OutputError, match=rf"(?s)out.gguf.partial: holds.*  - {difference}.*--no-res"):
            convert(source, target, options)
    assert before == names(tmp_path)
    other.unlink()

    assert convert(dense, target, SLICED, resume=False).reused == 0
    assert undisturbed == contents(tmp_path)


def test_a_set_and_a_file_give_way_to_each_other(dense: Any, tmp_path: Path, undisturbed: Any) -> None:
    """What another kind of job left under the same name is replaced where the user starts anew; other files are not."""
    target = tmp_path / "out.gguf"
    killed(dense, target, "write", 8)
    one = convert(dense, target, flat_options(experts=4), resume=False).path
    assert names(tmp_path) == ["out.gguf"]
    one.rename(tmp_path / "out.gguf.partial")

    with pytest.raises(OutputError, match=r"out.gguf.partial: cannot be created .*; remove what is in the way"):
        convert(dense, target, SLICED, resume=False)
    (tmp_path / "out.gguf.partial").unlink()
    killed(dense, target, "write", 8, "one")

    convert(dense, target, SLICED, resume=False)

    assert undisturbed == contents(tmp_path)


def test_a_shard_that_changed_is_made_anew(dense: Any, tmp_path: Path, undisturbed: Any) -> None:
    """One that is gone, one that is cut, one with other bytes, and one with more of them."""
    killed(dense, tmp_path / "out.gguf", "verify")
    gone, cut, changed, longer, *_ = sorted((tmp_path / "out.gguf.partial").glob("*.gguf"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1000])
    changed.write_bytes(bytes(changed.stat().st_size))
    longer.write_bytes(longer.read_bytes() + b"more")

    done = convert(dense, tmp_path / "out.gguf", SLICED)

    assert 0 < done.reused < len(done.plan.tensors)
    assert undisturbed == contents(tmp_path)


@pytest.mark.parametrize("n", [0, 3])
def test_an_interrupt_while_moving_can_be_continued(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, n: int
) -> None:
    """Shards that have their names already go back to the others, and the message says how to go on."""
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Any) -> Any:
        calls.append(target)
        if len(calls) == n + 1:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(
        KeyboardInterrupt, match=r"out.gguf.partial keeps what is finished \(\d+ pieces\); the same command"
    ):
        convert(dense, tmp_path / "out.gguf", SLICED)
    assert names(tmp_path) == ["out.gguf.partial"]

    done = convert(dense, tmp_path / "out.gguf", SLICED)

    assert done.reused == len(done.plan.tensors)
    assert undisturbed == contents(tmp_path)


@pytest.mark.parametrize("n", [1, 3])
def test_an_interrupt_behind_a_move_leaves_no_shard(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """It may come when a file has its name already: the shard goes back to where it is continued."""
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Any) -> None:
        replace(self, target)
        calls.append(target)
        if len(calls) == n:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out.gguf", SLICED)

    assert names(tmp_path) == ["out.gguf.partial"]


@pytest.mark.parametrize("n", [0, 3])
def test_an_error_while_moving_leaves_nothing(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """A full disk or the like in the last moment: one OutputError, and an empty folder."""
    replace, calls = Path.replace, []

    def failing(self: Path, target: Any) -> Any:
        calls.append(target)
        if len(calls) > n:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="no room left"):
        convert(dense, tmp_path / "out.gguf", SLICED)

    assert names(tmp_path) == []


def test_two_writers_of_one_set(dense: Any, tmp_path: Path) -> None:
    """The second is refused while the first works, and does it no harm."""
    errors = []

    @contextlib.contextmanager
    def meanwhile(stage: Any, total: Any) -> Iterator[Any]:
        if stage == "verify":
            with pytest.raises(OutputError, match="another process is writing") as caught:
                convert(dense, tmp_path / "out.gguf", SLICED)
            errors.append(caught.value)
        yield lambda _: None

    done = convert(dense, tmp_path / "out.gguf", SLICED, progress=meanwhile)

    assert len(errors) == 1
    assert not verify(done.path).problems
