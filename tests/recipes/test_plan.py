"""moe2gguf.recipes.plan: a plan is a value. It reads no weight, and two of one source are equal."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, NoReturn

import checkpoints
import imatrix_files
import numpy as np
import pytest
from flat_options import flat_options

from moe2gguf import TypeOptions, convert, plan_conversion, plan_quantization
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.hf.safetensors import StoredTensor

CHOICES: dict[str, dict[str, Any]] = {
    "exact": {"experts": 4},
    "sparse": {"experts": 8, "used": 4, "n_token": 1024},
    "dense": {"dense": True, "type": "q8_0", "allow_fallback": True},
    "sharded": {"experts": 4, "shard_size": 200_000},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA."""
    return checkpoints.make(tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a dense GGUF file."""
    path = tmp_path_factory.mktemp("plan") / "dense.gguf"
    convert(folder, path, flat_options(dense=True))
    return path


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, folder: Path, file: Path) -> None:
    """Whoever reads a weight of either kind of source, which are made already, fails."""
    del folder, file

    def read(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a weight was read")

    for reader in (StoredTensor, SourceTensor):
        monkeypatch.setattr(reader, "read", read)
        monkeypatch.setattr(reader, "blocks", read)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("choice", CHOICES)
def test_two_plans_are_equal_and_no_weight_is_read(source: str, choice: str, request: pytest.FixtureRequest) -> None:
    """Also after a way through pickle, which functions and open files would not survive."""
    path, options = request.getfixturevalue(source), flat_options(**CHOICES[choice])

    plan = plan_conversion(path, options)

    assert plan == plan_conversion(path, options)
    assert plan == pickle.loads(pickle.dumps(plan))
    assert plan.to_dict() == pickle.loads(pickle.dumps(plan)).to_dict()
    with pytest.raises(FrozenInstanceError):
        plan.tensors = ()  # type: ignore[misc]


@pytest.mark.usefixtures("poisoned")
def test_a_quantization_is_planned_without_a_weight(file: Path, tmp_path: Path) -> None:
    """With an importance matrix, of which the plan keeps the names only."""
    sums = {"blk.0.ffn_up.weight": (np.ones((1, 64), np.float32), (3,))}
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", sums)
    options = TypeOptions("q8_0", imatrix=matrix, imatrix_repair="ones", allow_fallback=True)

    plan = plan_quantization(file, options)

    assert plan == plan_quantization(file, options)
    assert plan == pickle.loads(pickle.dumps(plan))
    assert any(tensor.guided for tensor in plan.tensors)


@pytest.mark.usefixtures("poisoned")
def test_a_target_needs_the_weights(folder: Path, file: Path) -> None:
    """The one step of planning that reads them: the poison is met, and only there."""
    with pytest.raises(AssertionError, match="a weight was read"):
        plan_conversion(folder, flat_options(dense=True, target_bpw=8.0))
    with pytest.raises(AssertionError, match="a weight was read"):
        plan_quantization(file, TypeOptions(target_bpw=8.0))


def test_reading_weights_for_a_target_is_announced(folder: Path) -> None:
    """As a stage of its own, whose units are the elements that are measured."""
    stages = []

    def progress(stage: str, total: int) -> Any:
        stages.append(stage)
        from moe2gguf.progress import silent

        return silent(stage, total)

    plan = plan_conversion(folder, flat_options(dense=True, target_bpw=8.0), progress=progress)

    assert ["choose types"] == stages
    assert not plan.has_open_types
    assert 7 < plan.bits_per_weight <= 8


def test_what_is_written_is_what_was_planned(folder: Path, tmp_path: Path) -> None:
    """`convert` shows the very plan before it writes, twice the same, and the file has its size."""
    plans: list[Any] = []

    for name in ("a.gguf", "b.gguf"):
        done = convert(str(folder), str(tmp_path / name), flat_options(experts=4), on_plan=plans.append)
        assert done.plan is plans[-1]
        assert done.path.stat().st_size == done.plan.file_size

    assert plans[0] == plans[1] == plan_conversion(folder, flat_options(experts=4))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
