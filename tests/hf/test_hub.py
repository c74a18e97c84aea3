"""moe2gguf.hf.hub: models by their id, from a Hub on this machine that huggingface_hub itself talks to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
from command import moe2gguf
from hub_server import COMMIT, Hub, serve_hub

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import CheckpointError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.hf.hub import find_model_id
from moe2gguf.hf.paths import Origin

NAME = "Tiny/Chat-1B"
ORIGIN = {"moe2gguf.source.repository": NAME, "moe2gguf.source.revision": COMMIT}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with files that no conversion needs."""
    folder = checkpoints.make(tmp_path_factory.mktemp("hub") / "model", shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"x" * 1000)
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub of this process, which has the model; its cache is `tmp_path / "cache"`."""
    with serve_hub() as hub:
        hub.add_folder(NAME, model)
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def test_a_model_is_converted_by_its_id(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Its tensors are the folder's, its commit is in the metadata, and only what is needed was fetched.

    In a process of its own, whose environment names the Hub: nothing but the result is printed.
    """
    done = hub.run("convert", NAME, tmp_path / "out.gguf", "-e", 4, home=tmp_path / "home")

    assert (0, "", 1) == (done.returncode, done.stderr, done.stdout.count("\n"))
    convert(model, tmp_path / "local.gguf")
    file, local = read_gguf(tmp_path / "out.gguf"), read_gguf(tmp_path / "local.gguf")
    assert ORIGIN.items() <= file.metadata.items()
    assert "Chat 1B" == file.metadata["general.name"]
    assert file.metadata["moe2gguf.source.sha256"] == local.metadata["moe2gguf.source.sha256"]
    fetched = {line.rpartition("/")[2] for line in hub.log if line.startswith("GET") and "/resolve/" in line}
    needed = {path.name for path in model.glob("model*")} | {"config.json", "tokenizer.json"}
    assert needed <= fetched
    assert not {"consolidated.safetensors", "pytorch_model.bin", "model.onnx"} & fetched


def test_a_fetched_model_is_there_without_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id offline, and by the folder in the cache, whose files are links: both give the same bytes."""
    convert(NAME, tmp_path / "a.gguf")
    snapshot = next(tmp_path.glob("cache/models--*/snapshots/*"))
    assert (snapshot / "config.json").is_symlink()
    hub.use(monkeypatch, tmp_path / "cache", offline=True)

    for name, source in (("b.gguf", f"{NAME}@main"), ("c.gguf", str(snapshot))):
        convert(source, tmp_path / name)

        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / name).read_bytes()


def test_a_plan_reads_headers_only(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is the file's to come; no shard was fetched, and the cache holds the small files only."""
    planned = moe2gguf("convert", NAME, "--plan", "--json")

    assert (0, "") == (planned.returncode, planned.stderr)
    shards = [line for line in hub.log if line.startswith("GET") and line.split()[1].endswith(".safetensors")]
    assert shards
    assert all(line.endswith("bytes=0-100000") for line in shards)
    assert [] == list((tmp_path / "cache").rglob("*.safetensors"))
    convert(NAME, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").stat().st_size == json.loads(planned.stdout)["file_size"]
    hub.log.clear()
    hub.use(monkeypatch, tmp_path / "cache", offline=True)
    assert (planned.stdout, []) == (moe2gguf("convert", NAME, "--plan", "--json").stdout, hub.log)


@pytest.mark.parametrize(
    ("name", "offline", "words"),
    [
        ("Tiny/Nothing", False, "no folder here and no model on the Hub has this name"),
        (f"{NAME}@v9", False, "has no such revision"),
        ("Tiny/Gated", False, "accept its terms on"),
        ("Tiny/Pickles", False, "Pickles"),
        ("Tiny/Empty", False, "Tiny/Empty: has no config.json"),
        (NAME, True, f"HF_HUB_OFFLINE is set); where it can: hf download {NAME} --local-dir Chat-1B"),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_what_cannot_be_had_is_one_sentence(
    hub: Hub,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    offline: bool,
    words: str,
    plan: bool,
) -> None:
    """With what to do; nothing is written."""
    config = (model / "config.json").read_bytes()
    hub.repositories |= {"Tiny/Gated": {}, "Tiny/Pickles": {"x.bin": b"x", "config.json": config}, "Tiny/Empty": {}}
    hub.gated.add("Tiny/Gated")
    hub.use(monkeypatch, tmp_path / "cache", offline=offline)

    done = moe2gguf("convert", name, *(["--plan"] if plan else [tmp_path / "out.gguf"]))

    assert 1 == done.returncode
    assert words in done.stderr
    assert done.stderr.count("\n") <= 4
    assert not (tmp_path / "out.gguf").exists()


def test_a_hub_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason, and how to get the model where there is a network."""
    with serve_hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")

    with pytest.raises(CheckpointError, match=f"(?i)refused.*where it can: hf download {NAME}"):
        convert(NAME, tmp_path / "out.gguf")


def test_a_head_beside_tied_embeddings_is_left_to_the_conversion(hub: Hub, tmp_path: Path) -> None:
    """A plan that reads headers cannot compare it with the embedding, and says so."""
    folder = checkpoints.make(tmp_path / "model")
    checkpoints.rewrite_config(folder, tie_word_embeddings=True)
    hub.add_folder("Tiny/Head", folder)

    plan = plan_conversion("Tiny/Head")

    assert any("lm_head.weight is stored although config.json ties it" in warning for warning in plan.warnings)


def test_a_folder_of_that_name_wins(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, NAME)

    convert(NAME, "out.gguf")

    assert [] == hub.log
    assert not ORIGIN.keys() & read_gguf(tmp_path / "out.gguf").metadata.keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a/b", Origin("a/b", "")),
        ("a/b.c-1@v1.0", Origin("a/b.c-1", "v1.0")),
        ("a/b@refs/pr/1", Origin("a/b", "refs/pr/1")),
        ("a", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("../b", None),
        ("a/..", None),
        ("a b/c", None),
    ],
)
def test_ids(text: str, found: Origin | None) -> None:
    """OWNER/NAME and OWNER/NAME@REVISION; a path is none."""
    assert found == find_model_id(Path(text))
