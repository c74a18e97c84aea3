"""No name inside a checkpoint leads out of it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.errors import CheckpointError
from moe2gguf.hf.json_file import read_bytes
from moe2gguf.hf.paths import inside


@pytest.mark.parametrize("name", ["a.json", "sub/a.json", "./a.json", "sub//a.json", "..a", "a..b/c...", "missing/x"])
def test_names_inside(tmp_path: Path, name: str) -> None:
    """An ordinary relative name is the folder's file, whether it exists or not."""
    assert tmp_path / name == inside(tmp_path, name)


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
        inside(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    """A link within the folder is fine; one out of it, or through a folder out of it, or in a circle, is not."""
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    (model / "real").touch()
    (other / "secret").touch()
    (model / "alias").symlink_to("real")
    (model / "out").symlink_to("../other/secret")
    (model / "folder").symlink_to(other)
    (model / "circle").symlink_to("circle")
    assert model / "alias" == inside(model, "alias")
    for name in ("out", "folder/secret", "folder/not-yet-there"):
        with pytest.raises(CheckpointError, match="leaves the model's folder"):
            inside(model, name)
    with pytest.raises(CheckpointError, match="circle"):
        read_bytes(inside(model, "circle"), max_bytes=1)


def test_folder_behind_a_link(tmp_path: Path) -> None:
    """The folder itself may be reached through a link."""
    (tmp_path / "model").mkdir()
    (tmp_path / "latest").symlink_to("model")
    assert tmp_path / "latest" / "a" == inside(tmp_path / "latest", "a")


def test_hub_cache(tmp_path: Path) -> None:
    """A snapshot of the hub's cache may link to the blobs of the same model, not to another model's."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for blobs in (cache / "blobs", tmp_path / "models--evil" / "blobs"):
        blobs.mkdir(parents=True)
        (blobs / "hash").touch()
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "evil.json").symlink_to("../../../models--evil/blobs/hash")
    assert snapshot / "config.json" == inside(snapshot, "config.json")
    with pytest.raises(CheckpointError, match="leaves"):
        inside(snapshot, "evil.json")


def test_only_a_cache_is_a_cache(tmp_path: Path) -> None:
    """The exception needs both names, `snapshots` and `models--...`."""
    for parts in (("models--x", "copies"), ("model", "snapshots")):
        folder = tmp_path.joinpath(*parts, "rev")
        folder.mkdir(parents=True)
        blob = tmp_path / parts[0] / "blob"
        blob.touch()
        (folder / "a").symlink_to("../../blob")
        with pytest.raises(CheckpointError, match="leaves"):
            inside(folder, "a")


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20) | st.text("./\\a:\0", max_size=12))
def test_never_outside(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Whatever the name, the answer lies in the folder or is an error of ours."""
    folder = tmp_path_factory.getbasetemp()
    try:
        path = inside(folder, name)
    except CheckpointError:
        return
    assert path.resolve().is_relative_to(folder.resolve())


@pytest.mark.parametrize("name", ["x" * 5000, "./" + "x" * 256, "a/" * 3000 + "b"])
def test_names_too_long_for_the_system(tmp_path: Path, name: str) -> None:
    """A name that no file can have is refused like the others, in a short message."""
    with pytest.raises(CheckpointError, match="cannot follow the file name") as caught:
        inside(tmp_path, name)

    assert len(str(caught.value)) < 600
