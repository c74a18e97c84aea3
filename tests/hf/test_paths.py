"""Names inside a checkpoint stay in its folder; links to files are followed."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.errors import CheckpointError
from moe2gguf.hf.json_file import read_bytes
from moe2gguf.hf.paths import links_out_of, resolve_inside


@pytest.mark.parametrize("name", ["a.json", "sub/a.json", "./a.json", "sub//a.json", "..a", "a..b/c...", "missing/x"])
def test_names_inside(tmp_path: Path, name: str) -> None:
    """An ordinary relative name is the folder's file, whether it exists or not."""
    assert tmp_path / name == resolve_inside(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../a", r"\.\."),
        ("sub/../../a", r"\.\."),
        ("sub/..", r"\.\."),
        ("/etc/passwd", "absolute"),
        ("C:evil", "absolute"),
        ("c:/evil", "absolute"),
        ("..\\a", "backslash"),
        ("\\\\host\\share", "backslash"),
        ("a\0b", "NUL"),
        ("", "names no file"),
        (".", "names no file"),
        ("./", "names no file"),
    ],
)
def test_names_outside(tmp_path: Path, name: str, says: str) -> None:
    """Every way to write a path out of the folder is refused with its reason."""
    with pytest.raises(CheckpointError, match=says):
        resolve_inside(tmp_path, name)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """Wherever they lead: whoever keeps models on another disk has folders of links."""
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    (model / "real").write_bytes(b"inside")
    (other / "weights").write_bytes(b"outside")
    (model / "alias").symlink_to("real")
    (model / "out").symlink_to("../other/weights")

    assert b"inside" == read_bytes(resolve_inside(model, "alias"), max_bytes=10)
    assert b"outside" == read_bytes(resolve_inside(model, "out"), max_bytes=10)


def test_links_to_folders_stay_inside(tmp_path: Path) -> None:
    """A name such as sub/file in an index must not lead out of the folder by way of a linked folder."""
    model, other = tmp_path / "model", tmp_path / "other"
    (model / "real").mkdir(parents=True)
    other.mkdir()
    (other / "secret").touch()
    (model / "near").symlink_to("real")
    (model / "far").symlink_to(other)

    assert model / "near" / "a" == resolve_inside(model, "near/a")
    for name in ("far", "far/secret", "far/not-yet-there"):
        with pytest.raises(CheckpointError, match="link to another folder"):
            resolve_inside(model, name)


@pytest.mark.parametrize("target", ["gone", "circle"])
def test_links_to_nothing(tmp_path: Path, target: str) -> None:
    """A dangling link is not an absent file: something that belongs to the model is missing."""
    (tmp_path / "circle").symlink_to(target)

    with pytest.raises(CheckpointError, match=f"is a link to {target}, where no file is"):
        resolve_inside(tmp_path, "circle")


def test_pipes_are_no_files(tmp_path: Path) -> None:
    """A pipe, or a link to a device, is refused before anything waits for it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")

    for name in ("pipe", "device"):
        with pytest.raises(CheckpointError, match="expected a file"):
            resolve_inside(tmp_path, name)


def test_folder_behind_a_link(tmp_path: Path) -> None:
    """The folder itself may be reached through a link."""
    (tmp_path / "model").mkdir()
    (tmp_path / "latest").symlink_to("model")
    assert tmp_path / "latest" / "a" == resolve_inside(tmp_path / "latest", "a")


def test_links_out_of_a_folder_are_listed(tmp_path: Path) -> None:
    """With their targets; a snapshot of the hub's cache may link to the blobs of the same model, not to another's."""
    for name, elsewhere in (("models--org--name", "models--evil"), ("models--org--other", "model")):
        snapshot, blobs = tmp_path / name / "snapshots" / "0123abc", tmp_path / name / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (tmp_path / elsewhere).mkdir()
        for folder in (blobs, tmp_path / elsewhere):
            (folder / "hash").touch()
        (snapshot / "real").touch()
        (snapshot / "alias").symlink_to("real")
        (snapshot / "config.json").symlink_to("../../blobs/hash")
        (snapshot / "README.md").symlink_to(f"../../../{elsewhere}/hash")

        assert [f"README.md -> {tmp_path / elsewhere / 'hash'}"] == links_out_of(snapshot)


@pytest.mark.parametrize("parts", [("models--x", "copies"), ("model", "snapshots")])
def test_only_a_cache_is_a_cache(tmp_path: Path, parts: tuple[str, str]) -> None:
    """It needs both names, `snapshots` and `models--...`."""
    folder = tmp_path.joinpath(*parts, "revision")
    folder.mkdir(parents=True)
    (tmp_path / parts[0] / "blob").touch()
    (folder / "a").symlink_to("../../blob")

    assert 1 == len(links_out_of(folder))


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20) | st.text("./\\a:\0", max_size=12))
def test_never_outside(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Whatever the name, the answer lies in the folder or is an error of ours."""
    folder = tmp_path_factory.getbasetemp()
    try:
        path = resolve_inside(folder, name)
    except CheckpointError:
        return
    assert path.resolve().is_relative_to(folder.resolve())


@pytest.mark.parametrize("name", ["x" * 5000, "./" + "x" * 256, "a/" * 3000 + "b"])
def test_names_too_long_for_the_system(tmp_path: Path, name: str) -> None:
    """A name that no file can have is refused like the others, in a short message."""
    with pytest.raises(CheckpointError, match="cannot follow the file name") as caught:
        resolve_inside(tmp_path, name)

    assert len(str(caught.value)) < 600
