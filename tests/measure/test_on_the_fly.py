"""Types made on the fly: the files `quantize` makes, measured like any other, gone afterwards, found on resume."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import imatrix_files
import pytest
import tiny_gguf
from click.testing import CliRunner

from moe2gguf.cli import cli
from moe2gguf.errors import OutputError, PlanError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.measure.compare import CompareSettings, compare
from moe2gguf.measure.on_the_fly import compare_types, plan_copies, write_copies
from moe2gguf.measure.results import ResultRow
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize

CONTEXT = 32
TEXT = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. " * 4
KINDS = ["q8_0", "Q4_K_M"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights(d_ff=128)
    moe = tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(dense, 4), f16=True)
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "moe": moe,
        "q8_0": quantize(moe, folder / "small.gguf", TypeOptions("q8_0")).path,
        "q4_k_m": quantize(moe, folder / "tiny.gguf", TypeOptions("q4_k_m", allow_fallback=True)).path,
    }


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings() -> CompareSettings:
    return CompareSettings(text=Text(TEXT, "tan"), n_token=CONTEXT // 2 - 1, n_context=CONTEXT, threads=1)


def left(cache: Path) -> list[Path]:
    return [path for path in (cache / "types").rglob("*") if path.is_file()]


def test_rows_are_those_of_the_quantized_files(files: dict[str, Path], cache: Path) -> None:
    """Every file, then every type of every float file, at every count: the same numbers as from `quantize`'s files."""
    found = compare_types([files["moe"], files["q8_0"]], files["dense"], kinds=KINDS, used=[4, 2], settings=settings())
    names = ["moe.gguf", "small.gguf", "moe-Q8_0.gguf", "moe-Q4_K_M.gguf"]
    assert [f"{name} k={k}/4" for name in names for k in (4, 2)] == [row.config.label for row in found.rows]
    plain = compare([files["q8_0"], files["q4_k_m"]], files["dense"], used=[4, 2], settings=settings())
    assert [row.quality.summary for row in plain.rows if row.quality] == [
        row.quality.summary for row in found.rows[4:] if row.quality
    ]
    assert found.ok
    assert [] == left(cache)
    origins = found.settings["made"]
    assert "moe2gguf quantize moe.gguf OUT q8_0 --allow-fallback" == origins["moe-Q8_0.gguf"]
    assert "tensors took a substitute)" in origins["moe-Q4_K_M.gguf"]


def test_an_interrupted_sweep_finds_its_files_and_rows_again(files: dict[str, Path], cache: Path) -> None:
    """An interrupt leaves the files, the next run uses them as they are; made again the journal knows them."""

    def stop(_: ResultRow) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_types([files["moe"]], files["dense"], kinds=KINDS, settings=settings(), on_row=stop)
    inodes = {path.name: path.stat().st_ino for path in left(cache)}
    assert ["moe-Q4_K_M.gguf", "moe-Q8_0.gguf"] == sorted(inodes)
    with write_copies(plan_copies([files["moe"]], KINDS, cache / "types")) as paths:
        assert inodes == {path.name: path.stat().st_ino for path in paths}
    assert [] == left(cache)
    for expected in ([True, False, False], [True, True, True]):
        found = compare_types([files["moe"]], files["dense"], kinds=KINDS, settings=settings())
        assert expected == [row.resumed for row in found.rows]
        assert [] == left(cache)


def test_a_file_of_another_version_is_made_again(files: dict[str, Path], cache: Path) -> None:
    """What stands in the cache is used only if its header is the one that would be written."""
    (one,) = plan_copies([files["moe"]], ["q8_0"], cache / "types")
    one.path.parent.mkdir(parents=True)
    one.path.write_bytes(b"GGUF of another time")
    with write_copies([one]) as (path,):
        assert files["q8_0"].read_bytes() == path.read_bytes()


def test_errors_leave_nothing_behind(files: dict[str, Path], cache: Path) -> None:
    """An error while measuring removes the files too."""
    with (
        pytest.raises(RuntimeError, match="boom"),
        write_copies(plan_copies([files["moe"]], ["q8_0"], cache / "types")),
    ):
        raise RuntimeError("boom")
    assert [] == left(cache)


def test_a_file_that_cannot_be_removed_is_named_unless_there_was_another_error(
    files: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that became read-only: it stays in the cache."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    wanted = plan_copies([files["moe"]], ["q8_0"], cache / "types")
    said = r"moe-Q8_0.gguf: cannot be removed \(Read-only file system\); remove it by hand"
    with monkeypatch.context() as patched:
        with pytest.raises(OutputError, match=said), write_copies(wanted):
            patched.setattr(Path, "unlink", fail)
        with pytest.raises(RuntimeError, match="boom"), write_copies(wanted):
            raise RuntimeError("boom")


def test_types_that_cannot_be_had_are_refused_together(files: dict[str, Path], cache: Path) -> None:
    """Before anything is made: unknown types, each named, and files that are all quantized already."""
    with pytest.raises(PlanError) as caught:
        compare_types([files["moe"]], files["dense"], kinds=["q8_0", "q9", "zip"], settings=settings())
    assert 2 == len(caught.value.refusals)
    assert "`moe2gguf quantize moe.gguf OUT q9` is refused: type q9: unknown" in caught.value.refusals[0]
    with pytest.raises(PlanError, match="no file is f32, f16 or bf16"):
        compare_types([files["q8_0"]], files["dense"], kinds=["q4_0"], settings=settings())
    assert not cache.exists()


def test_an_importance_matrix_guides_every_type(files: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """The rows are those of `quantize --imatrix`; other numbers under the same name are not taken for them."""
    matrix = tmp_path / "m.gguf"
    shapes = {tensor.name: tensor.shape for tensor in read_gguf(files["moe"]).tensors.values()}
    kl, options = [], TypeOptions("q4_0", allow_fallback=True, imatrix=matrix)
    for seed in (0, 1):
        imatrix_files.write_gguf(matrix, imatrix_files.statistics_for(shapes, seed))
        found = compare_types([files["moe"]], files["dense"], kinds=["q4_0"], imatrix=matrix, settings=settings())
        alone = quantize(files["moe"], tmp_path / "alone.gguf", options, force=True).path
        plain = compare([alone], files["dense"], settings=settings())
        assert [row.quality and row.quality.summary for row in plain.rows] == [
            row.quality and row.quality.summary for row in found.rows[1:]
        ]
        assert not found.rows[1].resumed
        kl.append(found.rows[1].flat()["kl_mean"])
    assert kl[0] != kl[1]
    words = "moe2gguf quantize moe.gguf OUT q4_0 --allow-fallback --imatrix m.gguf"
    assert found.settings["made"]["moe-Q4_0.gguf"].startswith(words)
    with pytest.raises(PlanError, match="name --types, too"):
        compare_types([files["moe"]], files["dense"], imatrix=matrix, settings=settings())


def test_an_interrupted_sweep_uses_no_file_of_another_matrix(
    files: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Same name, same header, other numbers: another place."""
    matrix, shapes = tmp_path / "m.gguf", {t.name: t.shape for t in read_gguf(files["moe"]).tensors.values()}
    places = set()
    for seed in (0, 1):
        imatrix_files.write_gguf(matrix, imatrix_files.statistics_for(shapes, seed))
        places |= {one.path for one in plan_copies([files["moe"]], ["q4_0"], cache / "types", matrix)}
    assert 2 == len(places)


def test_the_command(files: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """`--types` adds rows; the report says how each file was made instead of a digest."""
    (tmp_path / "text").write_text(TEXT)
    arguments = [str(files["moe"]), "--reference", str(files["dense"]), "--types", "q8_0, q4_0", "--threads", "1"]
    arguments += ["--text", str(tmp_path / "text"), "--tokens", "15", "--context", "32"]
    done = CliRunner().invoke(cli, ["compare", *arguments, "--json", "--report", str(tmp_path / "report.html")])
    assert 0 == done.exit_code, done.output
    assert ["F16", "Q8_0", "Q4_0"] == [row["type"] for row in json.loads(done.stdout)["rows"]]
    assert "<code>moe2gguf quantize moe.gguf OUT q4_0 --allow-fallback" in (tmp_path / "report.html").read_text()
