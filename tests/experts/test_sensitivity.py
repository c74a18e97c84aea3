"""moe2gguf.experts.sensitivity: what it says of a change is what the change does to transformers' predictions."""

from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.forward import Layers
from moe2gguf.experts.sensitivity import LEAST, find_root, measure_sensitivity
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.progress import silent

LAYER, D_MODEL = 1, 64
IDS = np.random.default_rng(0).integers(5, 250, (64, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA of three layers."""
    return checkpoints.make(tmp_path_factory.mktemp("sensitivity") / "model")


def measure(folder: Path, spill: Path, seed: int = 0, memory: int = 10**9) -> list[Tensor]:
    checkpoint = open_checkpoint(folder)
    layers = Layers(checkpoint.model, checkpoint.read, torch.device("cpu"))
    return measure_sensitivity(layers, IDS, seed, memory, spill, silent)


def find_divergence(folder: Path, change: Tensor) -> float:
    """Nats that the predictions of a window move if `change` is added to a layer's output at one token; the mean."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, moved = torch.from_numpy(IDS), 0.0
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1).double()
        for place in range(IDS.shape[1]):
            at = torch.zeros(IDS.shape[1], 1).index_fill(0, torch.tensor(place), 1.0)
            added = model.model.layers[LAYER].mlp.register_forward_hook(
                lambda _, __, output, at=at: output + at * change
            )
            after = model(ids).logits.log_softmax(-1).double()
            moved += float((before.exp() * (before - after)).sum()) / IDS.size
            added.remove()
    return moved


def test_what_is_felt_is_the_divergence_of_the_predictions(folder: Path, tmp_path: Path) -> None:
    """Along the directions that other draws say are felt most and least, and the mean of all: the same ratios."""
    root, other = (measure(folder, tmp_path, seed)[LAYER].double() for seed in (0, 1))
    vectors = torch.linalg.eigh(other @ other.T).eigenvectors.T
    chosen = [vectors[-1], vectors[0], torch.nn.functional.normalize(torch.ones(D_MODEL).double(), dim=0)]

    felt = np.array([float((vector @ root).square().sum()) for vector in chosen])
    done = np.array([find_divergence(folder, 1e-2 * vector.float()) for vector in chosen])

    assert felt[0] > 3 * felt[1]
    np.testing.assert_allclose(done / done[2], felt / felt[2], rtol=0.25)


def test_hidden_states_on_disk_give_the_same(folder: Path, tmp_path: Path) -> None:
    """With no memory allowed for them."""
    for a, b in zip(measure(folder, tmp_path), measure(folder, tmp_path, memory=0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_token_does_not_decide_alone() -> None:
    """The gradients of one token are a million times the others': its direction is not all that counts."""
    gradients = torch.randn(LEAST, 8, generator=torch.Generator().manual_seed(0))
    expected = find_root(gradients)
    gradients[7] = 0
    gradients[7, 0] = 1e6

    found = find_root(gradients)

    assert float(found.square().sum()) == pytest.approx(float(expected.square().sum()))
    assert float(found[0].square().sum()) < 2 * float(expected[0].square().sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_are_refused(value: float) -> None:
    gradients = torch.ones(4, 2)
    gradients[1, 1] = value
    with pytest.raises(CalibrationError, match="not finite"):
        find_root(gradients)
