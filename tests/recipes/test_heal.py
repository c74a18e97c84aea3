"""moe2gguf.recipes.heal on a two-layer model: heals, resumes, freezes, refuses; llama.cpp routes as torch does."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from chosen_experts import chosen_experts
from click.testing import CliRunner
from flat_options import flat_options
from safetensors.numpy import load_file, save_file

from moe2gguf import convert
from moe2gguf.cli import cli
from moe2gguf.errors import GGUFError, HealError, OutputError
from moe2gguf.experts.heal.log import LayerLine, ScoreLine, StepLine
from moe2gguf.experts.heal.moe_layer import MoELayer
from moe2gguf.experts.heal.optimize import freeze
from moe2gguf.experts.heal.settings import (
    Evaluation,
    HealSettings,
    Optimizer,
    Training,
    draw_batch,
    draw_used,
)
from moe2gguf.experts.heal.work import ExpertWeights
from moe2gguf.experts.text import read_text
from moe2gguf.gguf.set_used import set_used
from moe2gguf.recipes.heal import HealText, heal
from moe2gguf.recipes.hf_output import write_folder

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 60)]
SIZES: dict[str, Any] = {"n_token": 2048, "n_held_out": 256, "n_context": 64}
STEPS = HealSettings(
    Training(used_range=(4, 4), layerwise=0, steps=30),
    optimizer=Optimizer(lr=2e-3, router_lr=2e-3),
    evaluation=Evaluation((4,), every=15),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(dense, sliced, text): a two-layer model whose hidden states share a constant part, and 8 experts of it."""
    root = tmp_path_factory.mktemp("heal")
    dense = checkpoints.make(root / "dense", num_hidden_layers=2)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 6.0
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    text = root / "text.txt"
    text.write_text(read_text(None).text[:40000])
    options = flat_options(experts=8, used=4, n_token=1024, refit=False)
    return dense, write_folder(dense, root / "sliced", options).path, text


def run(models: Any, out: Any, settings: Any, **changes: Any) -> Any:
    """One healing run."""
    dense, sliced, text = models
    return heal(sliced, dense, HealText((text,), **SIZES), out, settings, **changes)


@pytest.fixture(scope="module")
def healed(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Thirty steps at k = 4 of 8, routers and experts."""
    return run(models, tmp_path_factory.mktemp("healed") / "out", STEPS)


ATTENTION = {f"{part}_proj.weight" for part in "qkvo"} | {"input_layernorm.weight", "post_attention_layernorm.weight"}
ATTENTION |= {"norm.weight"}


def change(settings: Any, **changes: Any) -> Any:
    """The settings with other values of these fields, whichever record they are in."""
    records = {}
    for field in dataclasses.fields(settings):
        record = getattr(settings, field.name)
        names = {f.name for f in dataclasses.fields(record)} & changes.keys()
        records[field.name] = dataclasses.replace(record, **{name: changes.pop(name) for name in names})
    assert not changes
    return HealSettings(**records)


def test_held_out_divergence_falls_by_half(healed: Any) -> None:
    """At k = n / 2, in a few seconds of training the whole model; the best is what is written."""
    scores = [line.kl["4"] for line in healed.scores]

    assert min(scores) <= scores[0] / 2
    values = json.loads((healed.path / "config.json").read_text())["moe2gguf"]
    assert min(scores) == values["moe2gguf.heal.kl"]
    assert "| 30 |" in (healed.path / "README.md").read_text()


def test_a_left_over_quantization_is_not_handed_on(models: Any, tmp_path: Path) -> None:
    """transformers would ask for its library, or take the plain weights for packed ones."""
    dense, sliced, text = models
    shutil.copytree(sliced, tmp_path / "sliced")
    checkpoints.rewrite_config(tmp_path / "sliced", quantization_config={"quant_method": "bitsandbytes"})

    done = run((dense, tmp_path / "sliced", text), tmp_path / "out", change(STEPS, steps=1))

    assert "quantization_config" not in json.loads((done.path / "config.json").read_text())


def test_a_tied_head_is_healed_without_a_word_of_it(
    models: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays tied; the libraries that save checkpoints would warn at each."""
    dense = checkpoints.make(tmp_path / "dense", "llama-tied", num_hidden_layers=2)
    sliced = write_folder(dense, tmp_path / "sliced", flat_options(experts=8, used=4, n_token=1024, refit=False)).path
    logging.getLogger("accelerate.utils.other").setLevel(logging.WARNING)

    done = run((dense, sliced, models[2]), tmp_path / "out", change(STEPS, steps=1))

    assert json.loads((done.path / "config.json").read_text())["tie_word_embeddings"]
    assert [] == [record.message for record in caplog.records if record.name.startswith("accelerate")]


def test_layer_by_layer_heals_every_count(models: Any, tmp_path: Path) -> None:
    """One layer in memory, k drawn from 2 .. 8: the held-out error of each layer falls by half, and the divergence."""
    settings = HealSettings(
        Training(used_range=(2, 8), layerwise=2, steps=1, batch=2),
        optimizer=Optimizer(lr=1e-3),
        evaluation=Evaluation((2, 4, 8)),
    )
    before = run(models, tmp_path / "as-it-was", change(settings, layerwise=0, steps=1)).scores[0].kl

    log = run(models, tmp_path / "out", settings).log
    convert(tmp_path / "out", tmp_path / "out.gguf")
    set_used(tmp_path / "out.gguf", 2)  # any count that it was healed for

    layers = [line for line in log if isinstance(line, LayerLine)]
    assert [0, 1] == [line.layer for line in layers]
    assert all(line.error_after <= line.error_before / 2 for line in layers)
    after = next(line for line in log if isinstance(line, ScoreLine)).kl
    assert all(after[k] <= before[k] / 2 for k in ("2", "4", "8"))


def test_the_streams_of_the_layers_give_the_scores_of_the_whole_model(models: Any, tmp_path: Path) -> None:
    """Without whole-model steps, the held-out scores come layer by layer: those of transformers on the result."""
    settings = change(STEPS, layerwise=1, steps=0, used=(2, 8), used_range=(2, 8))
    streamed = run(models, tmp_path / "out", settings).scores[0]

    dense, _, text = models
    again = change(settings, layerwise=0, steps=1)
    whole = heal(tmp_path / "out", dense, HealText((text,), **SIZES), tmp_path / "again", again).scores[0]

    for key in ("kl", "nll"):
        for k in ("2", "8"):
            assert getattr(whole, key)[k] == pytest.approx(getattr(streamed, key)[k], rel=1e-2), (key, k)
    assert whole.nll_dense == pytest.approx(streamed.nll_dense, rel=1e-4)


@pytest.mark.parametrize(
    ("stop", "target"),
    [
        (("steps", 10), "mixtral"),
        (("layerwise", 1), "mixtral"),
        (("evaluation", 8), "mixtral"),
        (("steps", 10), "glm4moe"),
    ],
)
def test_a_stopped_run_ends_with_the_same_bytes(models: Any, tmp_path: Path, stop: Any, target: str) -> None:
    """Stopped among the layers, the steps or the scores: continued, it writes what it would have written."""
    if target != "mixtral":
        options = flat_options(experts=8, n_shared=2, target=target, n_token=1024, refit=False)
        models = (models[0], write_folder(models[0], tmp_path / "sliced", options).path, models[2])
    settings = change(STEPS, layerwise=1, used_range=(3, 8), used=(3, 8), steps=12, every=4)
    whole = run(models, tmp_path / "whole", settings)

    def fail(line: Any) -> None:
        if stop == (line.stage, getattr(line, "layer", getattr(line, "step", None))):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out", settings, on_line=fail)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        OutputError, match=r"out.heal: holds the unfinished work of another job:\n  - lr: 0.002 there, 1.0 now"
    ):
        run(models, tmp_path / "out", change(settings, lr=1.0))
    again = run(models, tmp_path / "out", settings)

    files = [path / "model.safetensors" for path in (whole.path, again.path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole.scores == again.scores
    assert ["out", "whole"] == sorted(path.name for path in tmp_path.iterdir() if path.name != "sliced")


@pytest.mark.parametrize(
    ("train", "moving"),
    [
        (("router",), {"gate.weight"}),
        (("down",), {"w2.weight"}),
        (("experts",), {"w1.weight", "w2.weight", "w3.weight"}),
        (("lora",), {"w1.weight", "w2.weight", "w3.weight"}),
        (("attention",), ATTENTION),
        (("lora", "attention"), {"w1.weight", "w2.weight", "w3.weight"} | ATTENTION),
    ],
)
def test_what_is_frozen_stays_bit_for_bit(models: Any, tmp_path: Path, train: Any, moving: Any) -> None:
    """Only the tensors of the trained part differ from the source's, and they do."""
    layerwise = 1 if train in (("router",), ("down",)) else 0
    out = run(models, tmp_path / "out", change(STEPS, parts=train, steps=3, layerwise=layerwise, lr=3e-4)).path

    old, new = (load_file(folder / "model.safetensors") for folder in (models[1], out))
    changed = {name for name in old if old[name].tobytes() != new[name].tobytes()}
    assert moving == {".".join(name.split(".")[-2:]) for name in changed}


def test_only_what_trains_has_gradients() -> None:
    """`experts` includes the down projections, `down` nothing else; and a layer trains a copy of its weights."""
    rng = np.random.default_rng(0)
    shapes = ((4, 6), (4, 5, 6), (4, 5, 6), (4, 6, 5))
    weights = ExpertWeights(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    layer = MoELayer(weights, 1.0)
    names = {"router": ["router.weight"], "down": ["down"], "experts": ["down", "gate", "up"], "lora": []}

    for part, expected in names.items():
        freeze(layer, [part])
        assert expected == sorted(name for name, p in layer.named_parameters() if p.requires_grad), part
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(getattr(weights, field).all() for field in ("router", "gate", "up", "down"))


def test_llama_cpp_routes_as_torch_after_training(models: Any, healed: Any, tmp_path: Path) -> None:
    """Ordering-only rows stay so: the same sets of experts in both programs, other ones than before training."""
    convert(healed.path, tmp_path / "healed.gguf")
    convert(models[1], tmp_path / "before.gguf")
    with pytest.raises(GGUFError, match="amplified for 4"):
        set_used(tmp_path / "healed.gguf", 6)  # healed at 4 only
    theirs = chosen_experts(tmp_path / "healed.gguf", TOKENS, 4)
    before = chosen_experts(tmp_path / "before.gguf", TOKENS, 4)

    ours, weights = torch_choices(healed.path)

    assert (np.sort(theirs, -1) == np.sort(ours, -1)).all(-1).mean() >= 0.98  # a near-tie may fall either way
    assert (np.sort(theirs, -1) != np.sort(before, -1)).any()
    assert np.abs(weights - 0.25).max() <= 0.025


def torch_choices(folder: Any) -> Any:
    """(experts, weights) that transformers chooses, (n_layer, n_token, 4) each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: found.append(out[1:]))
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    return np.stack([f[1].numpy() for f in found]), np.stack([f[0].numpy() for f in found])


def test_what_does_not_fit_is_refused_with_every_reason(models: Any, tmp_path: Path) -> None:
    """Other sizes, another vocabulary, the wrong way round, counts out of range: one list, nothing left behind."""
    dense, sliced, text = models
    other = checkpoints.make(tmp_path / "other", num_hidden_layers=3, hidden_size=32)

    with pytest.raises(HealError) as caught:
        heal(sliced, other, HealText((text,)), tmp_path / "out", change(STEPS, used_range=(1, 9)))
    with pytest.raises(HealError, match="has no experts"):
        heal(dense, sliced, HealText((text,)), tmp_path / "out", STEPS)

    for word in ("n_layer is 2 in the student, 3", "d_model is 64", "--used-range 1..9"):
        assert word in str(caught.value)
    assert ["other"] == [path.name for path in tmp_path.iterdir()]


def test_of_two_rotary_embeddings_what_differs_is_named(models: Any, tmp_path: Path) -> None:
    """One number, not all of both."""
    dense, sliced, text = models
    shutil.copytree(dense, tmp_path / "other")
    checkpoints.rewrite_config(tmp_path / "other", rope_parameters=None, rope_theta=500.0)

    with pytest.raises(HealError) as caught:
        heal(sliced, tmp_path / "other", HealText((text,)), tmp_path / "out", STEPS)

    said = "cannot heal, 1 problem:\n  - rope theta is 10000.0 in the student, 500.0 in the teacher"
    assert said == str(caught.value)


def test_a_teacher_that_the_student_was_not_cut_from_is_refused(models: Any, tmp_path: Path) -> None:
    """The same sizes and other weights: the digest in config.json tells."""
    _, sliced, text = models
    stranger = checkpoints.make(tmp_path / "stranger", num_hidden_layers=2)

    with pytest.raises(HealError, match="digest"):
        heal(sliced, stranger, HealText((text,)), tmp_path / "out", STEPS)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(models: Any, tmp_path: Path) -> None:
    """A learning rate that blows up: the step and the layer, or the parameter, are named; no folder appears."""
    with pytest.raises(HealError, match=r"step \d+: .*(layer \d|experts|gate|logits)"):
        run(models, tmp_path / "out", change(STEPS, lr=1e30, clip=1e30, router_lr=1e30))

    assert not (tmp_path / "out").exists()


def test_every_loss_is_logged_and_a_step_in_parts_is_the_same_step(models: Any, tmp_path: Path) -> None:
    """Both terms at once; two parts of two windows give the loss of one part of four."""
    settings = change(STEPS, steps=2, top=5, checkpointing=True, next_token=0.1)

    whole = run(models, tmp_path / "whole", settings).log
    parts = run(models, tmp_path / "parts", change(settings, accumulate=2)).log

    first, other = (next(line for line in log if isinstance(line, StepLine)) for log in (whole, parts))
    assert first.kl + first.next_token == pytest.approx(first.loss)  # type: ignore[operator]
    assert first.kl == pytest.approx(other.kl, rel=1e-4)
    assert first.norm == pytest.approx(other.norm, rel=2e-2)


def test_counts_and_batches_follow_from_the_seed() -> None:
    """Every count of the range occurs; a pass takes each window once; another seed gives another order."""
    training = Training(used_range=(4, 16), batch=3)
    seen = np.concatenate([draw_batch(training, 12, step) for step in range(4)])

    assert set(range(4, 17)) == {draw_used(training, step) for step in range(200)}
    assert list(range(12)) == sorted(seen.tolist())
    other = np.concatenate([draw_batch(Training(batch=3, seed=1), 12, step) for step in range(4)])
    assert seen.tolist() != other.tolist()


def test_the_command_heals(models: Any, tmp_path: Path) -> None:
    """Options reach the run, and the table has a row per count."""
    dense, sliced, text = models
    arguments = ["heal", sliced, tmp_path / "out", "--teacher", dense, "--text", text, "--used-range", "2..8"]
    arguments += ["--layerwise", 1, "--steps", 2, "--tokens", 1024, "--context", 64, "--held-out-tokens", 128]

    done = CliRunner().invoke(cli, list(map(str, arguments)))

    assert 0 == done.exit_code, done.output
    assert "experts used" in done.stdout
    assert ["2", "8"] == [line.split()[0] for line in done.stdout.splitlines()[1:3]]
