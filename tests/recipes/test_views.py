"""Views: one set of weights, several counts of used experts, each a model that llama.cpp loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import checkpoints
import gguf
import numpy as np
import pytest
from command import moe2gguf
from flat_options import flat_options
from llama_logits import llama_logits_at, llama_logits_of

from moe2gguf import convert
from moe2gguf.errors import GGUFError, OutputError
from moe2gguf.gguf.verify import verify
from moe2gguf.recipes.views import write_views

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 300, 32)]
COUNTS = [8, 6, 4]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    source = checkpoints.make(folder / "hf", "llama")
    options = flat_options(8, target="glm4moe", n_shared=2, preset="exact")
    return convert(source, folder / "moe.gguf", options).path


def test_every_view_is_the_file_at_its_count(file: Path, tmp_path: Path) -> None:
    """Bit for bit llama.cpp's logits with an override, from weights that are one file on disk."""
    views = write_views(file, tmp_path / "views", COUNTS)

    ours = llama_logits_of([views.paths[k] for k in COUNTS], TOKENS)

    for k, one, other in zip(COUNTS, ours, llama_logits_at(file, TOKENS, COUNTS), strict=True):
        assert np.array_equal(one, other), k
    assert sorted(path.name for path in (tmp_path / "views").iterdir()) == [f"moe-k{k}" for k in sorted(COUNTS)]
    weights = sorted((tmp_path / "views").glob("*/*-00002-of-00002.gguf"))
    assert len(weights) == 3
    assert len({os.stat(path).st_ino for path in weights}) == 1
    assert views.linked
    assert all(verify(path).problems == () for path in views.paths.values())
    assert len(gguf.GGUFReader(views.paths[4]).tensors) == 0


@pytest.mark.parametrize("missing", [["link"], ["link", "symlink"]])
def test_views_are_symbolic_links_or_copies_where_hard_links_fail(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    """As on a file system without them; either is a model that llama.cpp loads, also from where the folder is moved."""

    def fail(*_: object) -> None:
        raise OSError(1, "no links")

    for name in missing:
        monkeypatch.setattr(os, name, fail)
    views = write_views(file, tmp_path / "a", [8, 4])
    assert views.linked is (missing == ["link"])
    assert [path.is_symlink() for path in sorted((tmp_path / "a").glob("*/*-00002-of-*"))] == [views.linked, False]
    moved = (tmp_path / "a").rename(tmp_path / "b") / "moe-k4" / views.paths[4].name
    assert verify(moved).problems == ()
    assert np.array_equal(llama_logits_of([moved], TOKENS)[0], llama_logits_at(file, TOKENS, [4])[0])


def test_a_view_that_fails_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder, no half of a copy, and what was there stays: here the disk is full at the second view."""

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    old = write_views(file, tmp_path / "old", [8]).paths[8]
    for module, name in ((os, "link"), (os, "symlink"), (shutil, "copyfile")):
        monkeypatch.setattr(module, name, fill)

    for place in ("old", "new/er"):
        with pytest.raises(OutputError, match="no room left while writing"):
            write_views(file, tmp_path / place, [8, 4], force=True)

    assert sorted(tmp_path.rglob("*")) == sorted([old.parents[1], old.parent, *old.parent.iterdir()])
    assert verify(old).problems == ()


@pytest.mark.parametrize("name", ["link", "replace"])
def test_a_view_never_describes_other_weights(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where views replace those of another file, an interrupt leaves the old pair, or no first shard."""
    views = write_views(file, tmp_path, [8, 4])
    head = views.paths[4]
    tail = head.with_name(head.name.replace("00001-of", "00002-of"))
    before, real = (head.read_bytes(), tail.read_bytes()), getattr(os, name)

    def interrupt(source: object, target: object) -> None:
        real(source, target)
        if head.parent.name in str(target):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupt)
    other = convert(file.parent / "hf", tmp_path / "moe.gguf", flat_options(8, type="f16")).path
    with pytest.raises(KeyboardInterrupt):
        write_views(other, tmp_path, [8, 4], force=True)

    assert not head.exists() or before == (head.read_bytes(), tail.read_bytes())
    assert [] == [path for path in head.parent.iterdir() if path not in (head, tail)]


def test_what_cannot_be_a_view_is_refused(file: Path, tmp_path: Path) -> None:
    """A count that cannot run, a file made for one count, a dense file; nothing is left."""
    with pytest.raises(GGUFError, match="there are only 8"):
        write_views(file, tmp_path / "a", [9])
    source = file.parent / "hf"
    dense = convert(source, tmp_path / "dense.gguf", flat_options(dense=True)).path
    with pytest.raises(GGUFError, match="has no experts"):
        write_views(dense, tmp_path / "a", [4])
    one = convert(source, tmp_path / "one.gguf", flat_options(8, used=4, preset="exact", amplify="used")).path
    with pytest.raises(GGUFError, match="amplified for 4 of them"):
        write_views(one, tmp_path / "a", [4, 6])
    assert not (tmp_path / "a").exists()


def test_views_may_lie_beside_their_file(file: Path) -> None:
    """The folder holds an input, and no view replaces it: not those that it is made of itself either."""
    assert 0 == moe2gguf("views", file, file.parent, "--used", "8,4").returncode
    first = file.parent / "moe-k8" / "moe-k8-00001-of-00002.gguf"

    done = moe2gguf("views", first, file.parent, "--used", "4", "--force")

    assert 0 == done.returncode, done.stderr
    assert verify(first).problems == ()


def test_views_are_replaced_only_when_told(file: Path, tmp_path: Path) -> None:
    """And the command says where they are."""
    done = moe2gguf("views", file, tmp_path, "--used", "8,4")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(tmp_path / f"moe-k{k}" / f"moe-k{k}-00001-of-00002.gguf") for k in (8, 4)]
    with pytest.raises(OutputError, match="exists"):
        write_views(file, tmp_path, [4])
    write_views(file, tmp_path, [4], force=True)
