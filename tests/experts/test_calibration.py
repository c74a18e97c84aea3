"""Calibrated conversions end to end: experts from real activations, in llama.cpp, resumable and repeatable."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
import torch
from chosen_experts import chosen_experts
from flat_options import change_options, flat_options
from interruptions import stop_in_third_layer
from llama_logits import llama_logits, llama_logits_at, mean_kl
from reference import reference_logits
from safetensors.numpy import load_file, save_file

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import CalibrationError, OutputError, PlanError
from moe2gguf.experts.layer import LayerExperts, LayerReport

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 64)]
QUICK = {"experts": 8, "n_token": 2048}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA whose hidden states share a constant part, as those of trained models do."""
    folder = checkpoints.make(tmp_path_factory.mktemp("calibration") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 6.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("group", "router", "always_on"),
    [
        ("activations", "least-squares", 2),
        ("activations", "zero", 0),
        ("routed", "least-squares", 2),
        ("routed", "least-squares", 0),
        ("contiguous", "least-squares", 0),
        ("activations", "least-squares", None),
    ],
)
def test_exact_mode_is_the_dense_model_with_all_experts(
    folder: Any, tmp_path: Path, group: str, router: str, always_on: int | None
) -> None:
    """Whatever the grouping and the router, in llama.cpp; and every k equals the numpy graph."""
    options = flat_options(
        **QUICK, used=4, group=group, router=router, n_shared=always_on, refit=False, amplify="exact", preset="sparse"
    )
    convert(folder, tmp_path / "sliced.gguf", options)
    expected = checkpoints.torch_logits(folder, TOKENS)

    counts = [8, 5, 4]
    logits = dict(zip(counts, llama_logits_at(tmp_path / "sliced.gguf", TOKENS, counts), strict=True))

    assert mean_kl(expected, logits[8]) <= 2e-6
    for k in counts:
        difference = np.abs(reference_logits(tmp_path / "sliced.gguf", TOKENS, k) - logits[k]).max(axis=1)
        # float32 decides a near-tie otherwise once in a while, which later tokens see a little
        assert (difference <= 1e-2).mean() >= 0.9, k


def test_always_on_experts_are_chosen_by_llama_cpp_for_every_token(folder: Any, tmp_path: Path) -> None:
    """Read from llama.cpp's own routing tensors: experts 0 and 1 in every layer, for every token, at every k."""
    convert(folder, tmp_path / "x.gguf", flat_options(**QUICK, used=4, n_shared=2, group="activations", refit=False))

    routed = set[int]()
    for k in (3, 4, 6):
        chosen = chosen_experts(tmp_path / "x.gguf", TOKENS, k)
        assert (3, len(TOKENS), k) == chosen.shape
        assert [{0, 1}] == [set(np.unique(np.sort(chosen, axis=2)[:, :, :2]).tolist())]
        routed |= set(np.unique(chosen[:, :, 2:]).tolist()) if k < 6 else set()
    assert len(routed) > 3  # the others differ from token to token


def test_the_coherent_recipe_is_the_default_below_all_and_better_than_the_seed(folder: Any, tmp_path: Path) -> None:
    """On text it was not calibrated on (the tokens above): KL against the dense model, at half of the experts."""
    done = convert(folder, tmp_path / "ours.gguf", flat_options(**QUICK, used=4))
    assert all(layer.shared_rate > 0.99 for layer in done.layers)
    convert(folder, tmp_path / "seed.gguf", flat_options(experts=8, used=4, preset="exact"))
    expected = checkpoints.torch_logits(folder, TOKENS)

    ours, seed = (mean_kl(expected, llama_logits(tmp_path / name, TOKENS)) for name in ("ours.gguf", "seed.gguf"))

    assert ours < 0.75 * seed
    fields = {key: f.contents() for key, f in gguf.GGUFReader(tmp_path / "ours.gguf").fields.items()}
    expected_fields = {
        "moe2gguf.slicing.group": "routed",
        "moe2gguf.slicing.router": "least-squares",
        "moe2gguf.slicing.refit": True,
        "moe2gguf.slicing.amplify": "used",
        "moe2gguf.calibration.text": "moe2gguf texts 1",
        "moe2gguf.calibration.tokens": 2048,
    }
    assert expected_fields == {key: fields[key] for key in expected_fields}


@pytest.mark.parametrize("family", ["qwen2", "mistral", "llama-bias", "llama3-rope", "yarn-rope"])
def test_every_family_calibrates(tmp_path: Path, family: str) -> None:
    """The dense stream of the calibration is transformers' own forward pass: with all experts kept, nothing changes."""
    folder = checkpoints.make(tmp_path / family, family)
    done = convert(
        folder, tmp_path / "x.gguf", flat_options(**QUICK, used=8, group="activations", router="least-squares")
    )

    assert 3 == len(done.layers)
    assert mean_kl(checkpoints.torch_logits(folder, TOKENS), llama_logits(tmp_path / "x.gguf", TOKENS)) <= 2e-6


def test_the_streams_are_transformers_own_hidden_states(folder: Any, tmp_path: Path) -> None:
    """Layer by layer, one layer's weights in memory, the same numbers as the whole model."""
    import transformers

    from moe2gguf.experts.forward import Layers
    from moe2gguf.hf.folder import open_checkpoint

    checkpoint = open_checkpoint(folder)
    ids = np.array([TOKENS[:32], TOKENS[32:]])
    with torch.inference_mode():
        layers = Layers(checkpoint.model, checkpoint.read, torch.device("cpu"))
        hidden = torch.zeros(ids.size, 64)
        layers.embed(ids, hidden)
        for _, block in layers.attend_blocks([hidden], 32):
            hidden += block.mlp(block.mlp_input(hidden))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model.model(torch.from_numpy(ids), output_hidden_states=True)

    torch.testing.assert_close(
        expected.last_hidden_state, model.model.norm(hidden.reshape(2, 32, -1)), rtol=1e-4, atol=1e-4
    )


def test_the_same_input_gives_the_same_bytes(folder: Any, tmp_path: Path) -> None:
    """Seed, text and machine being equal."""
    for name in ("a", "b"):
        convert(folder, tmp_path / name, flat_options(**QUICK, used=4, refit=True))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ["a", "b"] == sorted(path.name for path in tmp_path.iterdir())


def test_hidden_states_on_disk_give_the_same_bytes(folder: Any, tmp_path: Path) -> None:
    """With no memory allowed for them; the folder they were in is gone."""
    convert(folder, tmp_path / "a", flat_options(**QUICK, used=4, refit=True))
    convert(folder, tmp_path / "b", flat_options(**QUICK, used=4, refit=True, memory=0))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ["a", "b"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_device_that_is_not_there(folder: Any, tmp_path: Path) -> None:
    """One error with the way out, for a name torch does not know and for one it knows but has not got."""
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(CalibrationError, match=f"--torch-device {device}: torch cannot use it"):
            convert(folder, tmp_path / "x.gguf", flat_options(**QUICK, used=4, device=device))


@pytest.mark.parametrize("refit", [True, False])
def test_a_stopped_calibration_resumes_with_the_same_bytes(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool
) -> None:
    """Stopped after its second layer: the next run does the third only."""
    options = flat_options(**QUICK, used=4, refit=refit)
    convert(folder, tmp_path / "whole.gguf", options)
    done = stop_in_third_layer(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "x.gguf", options)
    assert ["whole.gguf", "x.gguf.calibration"] == sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"another job:\n  - n expert used: 4 there, 5 now\n"):
        convert(folder, tmp_path / "x.gguf", flat_options(**QUICK, used=5))

    convert(folder, tmp_path / "x.gguf", options)

    assert 4 == len(done)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    assert not (tmp_path / "x.gguf.calibration").exists()


def test_a_conversion_without_calibration_leaves_another_ones_work_alone(folder: Any, tmp_path: Path) -> None:
    """A stopped calibration of the same name is still there after a plain conversion."""
    (tmp_path / "x.gguf.calibration").mkdir()
    (tmp_path / "x.gguf.calibration" / "job.json").write_text("{}")

    convert(folder, tmp_path / "x.gguf", flat_options(experts=8))

    assert (tmp_path / "x.gguf.calibration" / "job.json").exists()


def test_without_transformers_the_error_says_what_to_install(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else, in the plan too; torch alone is not enough, and the message names both ways out."""
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(PlanError, match="pip install transformers; or take --preset exact"):
        plan_conversion(folder, flat_options(**QUICK, used=4))
    with pytest.raises(PlanError, match="pip install transformers"):
        convert(folder, tmp_path / "x.gguf", flat_options(**QUICK, used=4))
    assert [] == list(tmp_path.iterdir())
    plan_conversion(folder, flat_options(experts=8))


def test_a_layers_file_is_read_back(tmp_path: Path) -> None:
    """With and without a corrected down projection."""
    rng = np.random.default_rng(0)
    for down in (None, rng.standard_normal((4, 6)).astype(np.float32)):
        report = LayerReport(1, [1.0, 0.5], 1.0, [0.6, 1.0], 0.9, hit_rate=0.5)
        layer = LayerExperts(
            np.arange(6).reshape(2, 3), np.ones((2, 4), np.float32), np.ones(2, np.float32), down, report
        )
        layer.save(tmp_path, 7)

        again = LayerExperts.load(tmp_path, 7)

        assert (down is None) == (again.down is None)
        assert layer.order.tolist() == again.order.tolist()
        assert report == again.report
        if down is not None:
            assert down is not None
            assert again.down is not None
            assert np.array_equal(down, again.down)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"used": 4, "n_shared": 4}, "--shared 4: must be below --used 4"),
        ({"used": 4, "router": "zero", "n_shared": 1}, "--router zero cannot"),
        ({"used": 4, "group": "contiguous", "n_shared": 1}, "--group contiguous has no important"),
        ({"used": 8, "refit": True}, "--refit corrects for experts that do not run"),
        ({"used": 4, "amplify": "any", "n_shared": 0}, "--amplify any needs shared"),
        ({"used": 4, "group": "x", "router": "y"}, "--router y: unknown; choose zero, least-squares"),
        ({"used": 4, "n_token": 10}, "too few for a stable solve of this width; at least 1024"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(folder: Any, options: Any, words: str) -> None:
    """By the plan, with the way out."""
    with pytest.raises(PlanError) as caught:
        plan_conversion(folder, flat_options(experts=8, **options))

    assert words in str(caught.value)


def test_a_wide_model_needs_more_tokens(tmp_path: Path) -> None:
    """A refit solves for d_ff weights per output, on four fifths of the tokens; without one two per input will do."""
    wide = checkpoints.make(tmp_path / "wide", intermediate_size=1600, num_hidden_layers=1)
    options = flat_options(**QUICK | {"n_token": 1536}, used=4)

    with pytest.raises(PlanError, match="at least 2000, or --no-refit"):
        plan_conversion(wide, change_options(options, refit=True))

    plain = plan_conversion(wide, change_options(options, refit=False))
    assert [] == [w for w in plain.warnings if "no longer" in w]
    enough = change_options(options, refit=True, n_token=2048)
    assert any("no longer the dense model" in warning for warning in plan_conversion(wide, enough).warnings)


def test_less_text_than_was_asked_for(folder: Any, tmp_path: Path) -> None:
    """No silent half of it: the metadata says how many tokens were read."""
    (tmp_path / "some.txt").write_text("some more words " * 400)

    with pytest.raises(CalibrationError, match=r"some.txt: too few tokens, .* give more text, or --calibration-tokens"):
        convert(
            folder,
            tmp_path / "x.gguf",
            flat_options(**QUICK | {"n_token": 8192}, used=4, text=tmp_path / "some.txt"),
        )


def test_unusable_text_is_refused_and_nothing_is_written(folder: Any, tmp_path: Path) -> None:
    """Empty or too short; no file, no partial file."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("few words")
    for name in ("empty.txt", "short.txt"):
        with pytest.raises(CalibrationError):
            convert(folder, tmp_path / "x.gguf", flat_options(experts=8, used=4, text=tmp_path / name))
        assert not (tmp_path / "x.gguf").exists()
        shutil.rmtree(tmp_path / "x.gguf.calibration", ignore_errors=True)


def test_the_report_is_json_ready(folder: Any, tmp_path: Path) -> None:
    """Per layer: what was kept, how well it was chosen, who works how much."""
    done = convert(folder, tmp_path / "x.gguf", flat_options(**QUICK, used=4, refit=True))

    layers = json.loads(json.dumps(done.to_dict()))["layers"]

    assert 3 == len(layers)
    for layer in layers:
        assert 0 < layer["energy_kept"] <= layer["energy_oracle"] + 1e-6 <= 1 + 1e-5
        assert 8 == len(layer["load"])
        assert sorted(layer["energy_by_used"]) == layer["energy_by_used"]
        assert 8 == len(layer["energy_by_used"])
        assert abs(layer["energy_by_used"][-1] - 1) < 1e-6
        assert {"hit_rate", "constant_min", "refit_error", "n_shared"} <= layer.keys()


def test_tokens_by_default(folder: Any, tmp_path: Path) -> None:
    """16,384, or two per neuron where that is more and a refit is to come, so that a wide model needs no option."""
    wide = checkpoints.make(tmp_path / "wide", intermediate_size=9000, num_hidden_layers=1)
    plans = [plan_conversion(wide, flat_options(experts=8, used=4, refit=refit)) for refit in (True, False)]

    assert [18000 // 128 * 128, 16384] == [plan.metadata["moe2gguf.calibration.tokens"] for plan in plans]
