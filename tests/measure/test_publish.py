"""moe2gguf.measure.publish: measured files and a card, from a tiny model, and their way to a Hub on this machine."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny_gguf
from command import moe2gguf
from hub_server import Hub, serve_hub
from huggingface_hub import ModelCard

from moe2gguf import (
    CalibrationOptions,
    CompareSettings,
    Options,
    Publication,
    PublishSettings,
    TypeOptions,
    convert,
    publish,
)
from moe2gguf.errors import HarnessError, OutputError, PlanError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.resume import Interrupted
from moe2gguf.hf.hub import upload_folder
from moe2gguf.measure.publish import list_variants
from moe2gguf.recipes.convert import plan_conversion
from moe2gguf.recipes.hf_output import write_folder
from moe2gguf.recipes.source import complete_options, open_source

CARD = """---
license: apache-2.0
language: [en]
model_name: Tiny Chat
base_model: org/Tiny-Base
---
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts fit blocks of 32."""
    folder = tmp_path_factory.mktemp("publish") / "model"
    checkpoints.make(folder, hidden_size=32, intermediate_size=256, num_hidden_layers=2)
    (folder / "README.md").write_text(CARD)
    return folder


def settings(folder: Path, *used: int) -> PublishSettings:
    """Two types at every count, measured on a little text."""
    quality = CompareSettings(n_token=64, n_context=32, journal=folder / "rows.jsonl")
    return PublishSettings(("q8_0", "q4_0"), used, Options(4, calibration=CalibrationOptions(n_token=2048)), quality)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Publication:
    """The folder, with files for 4 and 2 of 4 experts."""
    folder = tmp_path_factory.mktemp("made")
    return publish(model, folder / "out", settings(folder, 4, 2))


def test_every_type_and_count_is_a_file(made: Publication) -> None:
    """With its digest; nothing else is left but the card and the picture."""
    names = [f"Tiny-Chat-{k}of4-{kind}.gguf" for k in (4, 2) for kind in ("Q8_0", "Q4_0")]

    assert names == [one.name for one in made.files]
    assert {*names, "README.md", "quality.png"} == {path.name for path in made.folder.iterdir()}
    assert ["out", "rows.jsonl"] == sorted(path.name for path in made.folder.parent.iterdir())
    for one in made.files:
        data = (made.folder / one.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one.n_byte, one.sha256)
    assert [4, 4, 2, 2] == [read_gguf(made.folder / name).metadata["llama.expert_used_count"] for name in names]


def test_the_card_is_what_the_hub_reads(made: Publication) -> None:
    """Licence, base model and language of the source; figures, digests and commands of every file."""
    card = ModelCard.load(made.folder / "README.md")

    assert ("apache-2.0", "org/Tiny-Base", ["en"]) == (card.data.license, card.data.base_model, card.data.language)
    assert [
        "moe2gguf",
        "gguf",
        "moe",
        read_gguf(made.folder / made.files[0].name).metadata["general.architecture"],
    ] == card.data.tags
    for one in made.files:
        assert f"| `{one.sha256}` |" in card.text
        assert f"moe2gguf convert Tiny-Chat {one.name} \\\n  --experts 4 --used" in card.text
    rows = [line for line in card.text.splitlines() if " MB | " in line]
    assert [8, 8, 8, 8, 8, 8] == [line.count("|") for line in rows]
    assert ["4 of 4", "4 of 4", "2 of 4", "2 of 4", "dense", "dense"] == [line.split(" | ")[2] for line in rows]
    assert "![Quality of the files beside the dense model](quality.png)" in card.text
    assert "--override-kv" not in card.text
    assert re.search(r"\nCalibrated on the same text .* flatters the figures: Tiny-Chat-2of4.*gguf\.\n", card.text)
    exact = next(row for row in made.found.rows if row.config.path.name == made.files[0].name)
    assert f"| {exact.quality.summary.perplexity:.3f} |" in rows[0]  # type: ignore[union-attr]


def test_a_file_that_serves_every_count_is_made_once(model: Path, tmp_path: Path) -> None:
    """In a graph with a shared expert: one file a type, measured at all counts."""
    chosen = settings(tmp_path, 4, 3)
    options = replace(chosen.options, target="glm4moe")

    done = publish(model, tmp_path / "out", replace(chosen, options=options, types=("q8_0",)))

    assert ["Tiny-Chat-4of4-Q8_0.gguf"] == [one.name for one in done.files]
    assert [4, 3, 0] == [row.config.n_expert_used for row in done.found.rows]
    text = (tmp_path / "out" / "README.md").read_text()
    again = "--target glm4moe --experts 4 --used 4 --type q8_0 --allow-fallback --calibration-tokens 2048"
    assert again in text
    file = tmp_path / "out" / done.files[0].name
    n_shared = read_gguf(file).metadata["glm4moe.expert_shared_count"]
    serve = f"llama-server -m {file.name} --override-kv glm4moe.expert_used_count=int:{3 - n_shared}"  # type: ignore[operator]
    run = f'moe2gguf run {file.name} "What is the capital of France?" --used 3'
    assert f"# with 3 of 4 experts:\n{serve}\n{run}\n```" in text


@pytest.mark.parametrize(
    ("family", "d_ff", "name"), [("llama", 7 * 32, "7of7"), ("qwen3", 8 * 32, "16of16")], ids=["blocks", "target"]
)
def test_what_the_source_decides_is_in_the_names(family: str, d_ff: int, name: str, tmp_path: Path) -> None:
    """A quantized file's blocks decide the number of experts; a model that one graph alone carries has its default."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": d_ff, "num_hidden_layers": 1}
    source = checkpoints.make(tmp_path / "hf", family, **sizes)
    if family == "llama":
        dense = Options(dense=True, types=TypeOptions("q8_0", allow_fallback=True))
        source = convert(source, tmp_path / "dense.gguf", dense).path
    opened = open_source(source)
    chosen = PublishSettings(("q8_0",), options=complete_options(opened, Options())[0])

    (variant,) = list_variants(opened, chosen, tmp_path / "work")

    assert variant.name.endswith(f"-{name}-Q8_0.gguf")
    assert variant.options.used == variant.options.n_expert


def test_an_interrupted_call_goes_on(model: Path, made: Publication, tmp_path: Path, monkeypatch: Any) -> None:
    """What is finished is not made again, and the result is that of an undisturbed call."""
    calls: list[str] = []

    def stop(model: Path, out: Path, *arguments: Any, **more: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(out.name)
        return convert(model, out, *arguments, **more)

    monkeypatch.setattr("moe2gguf.measure.publish.convert", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(model, tmp_path / "out", settings(tmp_path, 4, 2))
    first = list(calls)
    calls[:] = ["resumed"] * 10

    done = publish(model, tmp_path / "out", settings(tmp_path, 4, 2))

    assert first == [made.files[i].name for i in (2, 3, 0)]  # what is fitted to a text comes first
    assert [made.files[1].name, "dense.gguf", "dense-Q8_0.gguf", "dense-Q4_0.gguf"] == calls[10:]
    assert [one.sha256 for one in made.files] == [one.sha256 for one in done.files]


def test_a_call_that_is_interrupted_early_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """No folder, as there is no file."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe2gguf.measure.publish.convert", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(model, tmp_path / "out", settings(tmp_path, 4, 2))

    assert [] == [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_call_that_is_interrupted_in_its_first_file_goes_on(model: Path, tmp_path: Path) -> None:
    """There is no whole file yet, and the message says that the same call goes on."""

    @contextmanager
    def stop(stage: str, total: int) -> Iterator[Callable[[int], None]]:
        if stage == "verify":
            raise KeyboardInterrupt
        yield lambda _: None

    for _ in range(2):
        with pytest.raises(Interrupted, match=r"out.Tiny-Chat-4of4-Q8_0.gguf.partial keeps"):
            publish(model, tmp_path / "out", settings(tmp_path, 4), progress=stop)


def test_what_cannot_be_made_is_refused_before_anything_is(model: Path, tmp_path: Path) -> None:
    """Every reason at once; a folder with other files is left alone."""
    with pytest.raises(PlanError) as caught:
        publish(model, tmp_path / "out", PublishSettings(("q9", "q8_0"), (9, 4), Options(4)))
    assert 2 == len(caught.value.refusals)
    assert [] == list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="out: exists"):
        publish(model, tmp_path / "out", settings(tmp_path))
    assert "precious" == (tmp_path / "out" / "mine").read_text()
    experts = convert(model, tmp_path / "moe.gguf", Options(4)).path
    with pytest.raises(PlanError, match="has 4 experts already"):
        publish(experts, tmp_path / "new", settings(tmp_path))
    folder = write_folder(model, tmp_path / "half", Options(4)).path
    with pytest.raises(PlanError, match="half: has experts already; name the dense model"):
        publish(folder, tmp_path / "new", settings(tmp_path))
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match="mine: is no folder; name one"):
        publish(model, tmp_path / "out" / "mine", settings(tmp_path))


@pytest.mark.parametrize(("options", "n"), [(["--used", "2,3"], 1), (["--used", 2, "--text", "TEXT"], 0), ([], 0)])
def test_experts_that_were_fitted_to_the_text_are_a_warning(
    options: list[Any], n: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, before the work; not with another text, nor for plain slices."""
    (tmp_path / "text.txt").write_text("Words that no expert has seen. " * 50)

    def stop(source: Path, _out: Path, chosen: Options, on_plan: Any, **_: object) -> None:
        on_plan(plan_conversion(source, chosen))
        if not chosen.slices(open_source(source).model):
            raise KeyboardInterrupt

    monkeypatch.setattr("moe2gguf.measure.publish.convert", stop)
    monkeypatch.setattr("moe2gguf.measure.publish.checksum_path", lambda _: "0")
    words = [tmp_path / "text.txt" if one == "TEXT" else one for one in options]
    done = moe2gguf(
        "publish", model, tmp_path / "out", "-e", 4, "--types", "f16", "--tokens", 16, "--context", 8, *words
    )

    assert (130, n) == (done.returncode, done.stderr.count("measured on the text that they are fitted to")), done.stderr


def test_the_command_sends_the_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a Hub that has none of it, then to one that fails in the middle: the next call sends only the rest."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    words = ["publish", model, tmp_path / "out", "-e", 4, "--types", "q8_0", "--tokens", 64, "--context", 32]
    with serve_hub() as gone:
        gone.use(monkeypatch, tmp_path / "hub")
    failed = moe2gguf(*words, "--upload", "me/tiny")
    assert 1 == failed.returncode
    assert f"hf upload me/tiny {tmp_path / 'out'}" in failed.stderr

    with serve_hub() as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        done = moe2gguf(*words, "--upload", "me/tiny")

        assert 0 == done.returncode, done.stderr
        assert f"sent to {hub.url}/me/tiny" in done.stdout
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert files == hub.repositories["me/tiny"]
        assert 1 == sum(line.startswith("PUT") for line in hub.log)
        _send_again(hub, tmp_path / "out")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("huggingface_hub.get_token", "me/tiny: only who is logged in can write there: hf auth login"),
        ("moe2gguf.measure.check.run_in_child", "llama.cpp is not installed"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_made(
    missing: str, said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may send the folder, and what measures its files."""

    def find(*_: object, **__: object) -> str:
        if "child" in missing:
            raise HarnessError(said)
        return ""

    monkeypatch.setattr(missing, find)
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))

    done = moe2gguf("publish", model, tmp_path / "out", "--upload", "me/tiny", "-e", 4)

    assert (1, f"moe2gguf: {said}\n") == done[::2]
    assert [] == [*tmp_path.iterdir()]


def test_a_context_beyond_the_models_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, and where experts are scored."""
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    options = ("--tokens", 64, "--context", 256)
    said = "a context of 256 tokens is longer than the model was trained on: "

    done = moe2gguf("publish", model, tmp_path / "out", "-e", 4, "--types", "f16", *options)
    assert f"{said}Tiny-Chat-4of4-F16.gguf (128), dense-F16.gguf (128)\n" in done.stderr
    name = "Tiny-Chat-4of4-F16.gguf"
    pruned = moe2gguf("prune", tmp_path / "out" / name, tmp_path / "pruned", "--keep", 2, *options)
    assert f"{said}{name} (128)\n" in pruned.stderr


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(
    ("option", "said"), [("--text", "scoring 2048 tokens takes"), ("--calibration", "are too few to calibrate with")]
)
def test_a_short_text_is_known_before_anything_is_made(
    option: str, said: str, kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is scored, and the one that only the second count is fitted to."""
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delattr("moe2gguf.recipes.convert.write_model")
    source = model if kind == "folder" else tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights())
    (tmp_path / "text").write_text("Hardly a word.")
    before = sorted(tmp_path.iterdir())

    done = moe2gguf(
        "publish", source, tmp_path / "out", "-e", 4, "-k", "4,2", "--types", "f16", option, tmp_path / "text"
    )

    assert 1 == done.returncode
    assert said in done.stderr
    assert before == sorted(tmp_path.iterdir())


def _send_again(hub: Hub, folder: Path) -> None:
    """The large files that arrived are not sent a second time."""
    hub.log.clear()
    shutil.copy(folder / "README.md", folder / "LICENSE.md")
    assert upload_folder(folder, "me/tiny", private=False)
    assert not any(line.startswith("PUT") for line in hub.log)
    assert "LICENSE.md" in hub.repositories["me/tiny"]
