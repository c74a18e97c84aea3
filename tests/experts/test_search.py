"""moe2gguf.experts.search: the always-on experts of every layer, against transformers with each candidate in place."""

from dataclasses import replace

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from moe2gguf import Options, convert, plan_conversion
from moe2gguf.errors import CalibrationError, PlanError
from moe2gguf.experts import calibration
from moe2gguf.experts.calibration import Settings, calibrate
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.search import WINDOWS, choose, variants
from moe2gguf.experts.slice_layer import carve
from moe2gguf.experts.text import read_text, windows
from moe2gguf.recipes.calibrate import subject
from moe2gguf.recipes.options import AUTO, SEARCH
from moe2gguf.recipes.plan import window
from moe2gguf.spec import Recipe, Slicing

QUICK = {"experts": 8, "used": 4, "calibration_tokens": 1024, "always_on": SEARCH}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA of two layers whose hidden states share a constant part, as those of trained models do."""
    folder = checkpoints.make(tmp_path_factory.mktemp("search") / "model", num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 6.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def calibrated(plan, work, counts):
    """The layers with these counts of always-on experts, made one after the other without a search."""
    left = list(counts)

    def carver(mlp, inputs, slicing, seen):
        recipe = replace(slicing.recipe, always_on=left.pop(0))
        return carve(mlp, inputs, replace(slicing, recipe=recipe), seen)

    recipe = replace(plan.slicing.recipe, search=False)
    slicing = replace(plan.slicing, recipe=recipe)
    settings = Settings(plan.options.calibration_tokens, window(plan.checkpoint.model))
    calibrate(subject(plan.checkpoint), plan.text, slicing, settings, work, lambda _: None, carver)
    return [LayerExperts.load(work, i) for i in range(len(counts))]


def experts_forward(mlp, experts, k):
    """A plain version of the graph with experts, in place of the module's own forward."""
    owner = torch.empty(96, dtype=torch.long)
    for e, neurons in enumerate(experts.order):
        owner[torch.from_numpy(neurons[neurons >= 0])] = e
    router, scale = torch.from_numpy(experts.router), torch.from_numpy(experts.amplification)
    down = mlp.down_proj.weight if experts.down is None else torch.from_numpy(experts.down)

    def forward(x):
        p = (x @ router.T).softmax(-1)
        kept = torch.where(p >= p.topk(k).values[..., -1:], p, 0.0)
        weight = kept / kept.sum(-1, keepdim=True) * scale
        h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        return (h * weight[..., owner]) @ down.T

    return forward


def divergences(folder, ids, layers, k):
    """KL of every scored token: the first layers with experts, the others dense, against the dense model."""
    results = []
    for replaced in ([], layers):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for block, experts in zip(model.model.layers, replaced, strict=False):
            block.mlp.forward = experts_forward(block.mlp, experts, k)
        with torch.inference_mode():
            results.append(model(torch.from_numpy(ids)).logits[:, ids.shape[1] // 4 :].double().log_softmax(-1))
    p, q = results
    return (p.exp() * (p - q)).sum(-1).flatten().numpy()


@pytest.mark.parametrize("refit", [False, True])
def test_every_layer_has_the_count_that_brute_force_finds(folder, tmp_path, refit):
    """Each candidate in transformers' model, behind the layers chosen before; other windows than those of the fit."""
    options = Options(**QUICK, refit=refit)
    done = convert(folder, tmp_path / "x.gguf", options)
    plan, chosen = plan_conversion(folder, options), []
    ids = windows(folder, plan.text, 1024, 128, plan.checkpoint.vocabulary.first_id, WINDOWS)
    assert 8 + WINDOWS == len({tuple(row) for row in ids.tolist()})

    for i, report in enumerate(done.layers):
        found = {}
        for s in (2, 1, 3):
            layers = calibrated(plan, tmp_path / f"{i}-{s}", [*chosen, s, 2][: i + 1] + [2] * (1 - i))
            found[s] = divergences(folder, ids[-WINDOWS:], layers[: i + 1], 4)
        best = min(found, key=lambda s: found[s].mean())
        gain = found[2] - found[best]
        chosen.append(best if gain.mean() > gain.std(ddof=1) / len(gain) ** 0.5 else 2)

        assert [2.0, 1.0, 3.0] == report["always_on_tried"]
        np.testing.assert_allclose([kl.mean() for kl in found.values()], report["always_on_kl"], rtol=2e-3)
        assert chosen[i] == report["always_on"]
    assert chosen != [2, 2]  # the default would have been no search


def test_the_default_stays_unless_another_is_surely_better():
    """Better by more than one standard error of the difference; the error is of what differs, not of what both have."""
    generator = torch.Generator().manual_seed(0)
    hard = 5 * torch.rand(400, generator=generator)
    noise = torch.randn(400, generator=generator)
    noise -= noise.mean()

    assert 0 == choose([hard, hard + 0.1, hard + 0.2])
    assert 1 == choose([hard, hard - 0.1 + noise, hard + 1])
    assert 2 == choose([hard, hard - 0.1 + noise, hard - 0.11])
    assert 0 == choose([hard, hard - 0.04 + noise])
    assert 0 == choose([hard])


@pytest.mark.parametrize(
    ("n", "k", "amplify", "expected"),
    [
        (16, 12, "used", [8, 6, 10]),
        (16, 8, "any", [4, 2, 6]),
        (16, 4, "used", [2, 0]),
        (16, 4, "any", [2]),
        (8, 4, "exact", [2, 1, 3]),
        (8, 2, "used", [1, 0]),
        (4, 2, "any", [1]),
    ],
)
def test_what_is_tried(n, k, amplify, expected):
    """The default first; below the count, so that something is left to route; some for the mode that needs some."""
    slicing = Slicing(n, k, 10, Recipe("activations", None, "least-squares", amplify=amplify, search=True))

    tried = variants(slicing)

    assert expected == [variant.recipe.always_on for variant in tried]
    assert {slicing} == {replace(v, recipe=replace(v.recipe, always_on=None)) for v in tried}


def test_a_stopped_search_resumes_with_the_same_bytes(folder, tmp_path, monkeypatch):
    """Stopped at the second layer's second candidate: the next run makes that layer's three, and keeps the first's."""
    options = Options(**QUICK, refit=True)
    convert(folder, tmp_path / "whole.gguf", options)
    real, made = calibration.carve, []

    def stops(*args):
        made.append(args)
        if len(made) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibration, "carve", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "x.gguf", options)
    convert(folder, tmp_path / "x.gguf", options)

    assert 5 + 3 == len(made)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


def test_a_kept_search_is_used_again_and_does_not_pass_for_another(folder, tmp_path):
    """The same bytes without a pass over the text; the counts of every layer in the report."""
    kept = tmp_path / "kept"
    first = convert(folder, tmp_path / "x.gguf", Options(**QUICK, amplify="any", refit=False, save_calibration=kept))

    again = convert(folder, tmp_path / "y.gguf", Options(load_calibration=kept))

    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert first.layers == again.layers
    with pytest.raises(PlanError, match=r"--always-on auto: kept was made with search"):
        plan_conversion(folder, Options(load_calibration=kept, always_on=AUTO))


def test_a_gguf_file_is_searched_like_its_folder(folder, tmp_path):
    """The same numbers in both: the same counts and divergences."""
    convert(folder, tmp_path / "dense.gguf", Options(dense=True))

    of_file = convert(tmp_path / "dense.gguf", tmp_path / "x.gguf", Options(**QUICK, refit=False))
    of_folder = convert(folder, tmp_path / "y.gguf", Options(**QUICK, refit=False))

    for one, other in zip(of_file.layers, of_folder.layers, strict=True):
        assert one["always_on"] == other["always_on"]
        np.testing.assert_allclose(one["always_on_kl"], other["always_on_kl"], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"used": 8, "group": "activations", "router": "least-squares"}, "--used 8 of 8 leaves nothing to search"),
        ({"used": 1}, "--used 1 of 8 leaves nothing to search"),
        ({"router": "zero"}, "--router zero cannot keep experts always on"),
        ({"group": "contiguous"}, "--group contiguous has no important experts"),
    ],
)
def test_what_cannot_be_searched_is_refused(folder, options, words):
    """By the plan, with the way out."""
    with pytest.raises(PlanError, match=words):
        plan_conversion(folder, Options(**QUICK | options))


def test_text_without_windows_to_judge_by(folder, tmp_path):
    """What is fitted does not judge: the error says how much is left to fit."""
    (tmp_path / "some.txt").write_text("some more words " * 400)
    options = Options(**QUICK, calibration=tmp_path / "some.txt", refit=False)
    n_window = len(windows(folder, read_text(tmp_path / "some.txt"), 10**6, 128, None))
    enough = replace(options, calibration_tokens=128 * (n_window - WINDOWS))
    convert(folder, tmp_path / "x.gguf", enough)

    with pytest.raises(
        CalibrationError, match=f"{WINDOWS} windows to judge by.*--calibration-tokens {enough.calibration_tokens}"
    ):
        convert(folder, tmp_path / "y.gguf", replace(options, calibration_tokens=128 * n_window))
