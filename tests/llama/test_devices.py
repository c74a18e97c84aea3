"""Devices by name: settings for llama.cpp, and a clear refusal where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from devices import has_rpc
from gpu import gpu_is_missing
from llama_logits import llama_logits

from moe2gguf.cli.options import devices_from
from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup, choose_reference_device, name_rpc_device, place_on_device, require_devices
from moe2gguf.llama.model import open_model


def logits_with_experts_on_cpu(path: Path, tokens: list[int]) -> np.ndarray:
    with open_model(path, Setup(n_context=len(tokens), n_threads=1, experts_on_cpu=True)) as model:
        return np.array(model.logits(np.array(tokens, np.int32)), np.float64)


def test_names_become_settings() -> None:
    """All layers or none; experts apart; everything else is left as it was."""
    setup = Setup(n_expert_used=3, n_context=99)
    assert setup == place_on_device(setup, "cpu")
    gpu, split = place_on_device(setup, "gpu"), place_on_device(setup, "gpu:experts-on-cpu")
    assert [(-1, False, 99), (-1, True, 99)] == [(s.n_gpu_layers, s.experts_on_cpu, s.n_context) for s in (gpu, split)]


def test_unknown_devices_are_all_named() -> None:
    """With the names that exist."""
    with pytest.raises(HarnessError, match="no such device: tpu, npu; choose from cpu, gpu, gpu:experts-on-cpu"):
        require_devices(["cpu", "tpu", "npu"])


def test_a_missing_gpu_says_how_to_get_one() -> None:
    """Before anything is measured; the CPU alone is always there."""
    require_devices(["cpu"])
    if gpu_is_missing() is None:
        require_devices(["gpu", "gpu:experts-on-cpu"])
    else:
        with pytest.raises(HarnessError, match=r"vendor/install cuda\|vulkan\|metal"):
            require_devices(["cpu", "gpu:experts-on-cpu"])


def test_rpc_servers_are_one_device() -> None:
    """Named after its servers, so that rows, journal and JSON tell it from others; alone it spares the CPU."""
    assert ["cpu"] == devices_from(None, None)
    assert ["cpu", "gpu"] == devices_from("cpu,gpu", None)
    both = "rpc:a:1+b:2"
    assert ["cpu", both] == devices_from("cpu", "a:1,b:2")
    assert [both] == devices_from(None, "a:1,b:2") == [name_rpc_device(["a:1", "b:2"])]
    setup = place_on_device(Setup(), both)
    assert (-1, ("a:1", "b:2")) == (setup.n_gpu_layers, setup.rpc_servers)
    assert [both, "cpu", "cpu"] == [choose_reference_device(names) for names in ([both], ["cpu", both], ["gpu"])]


def test_missing_rpc_is_said_before_anything_runs() -> None:
    """A build without RPC, else an address where nobody listens, or that is none."""
    words = "no RPC server answers at '127.0.0.1:9'" if run_in_child(has_rpc) else "has no RPC: run vendor/install rpc"
    with pytest.raises(HarnessError, match=words):
        require_devices([name_rpc_device(["127.0.0.1:9"])])
    if run_in_child(has_rpc):
        with pytest.raises(HarnessError, match="no RPC server answers at 'nowhere'"):
            require_devices([name_rpc_device(["nowhere"])])


def test_the_placement_of_experts_is_accepted(tmp_path: Path) -> None:
    """llama.cpp loads a file with experts pinned to the processor's memory and computes the same logits."""
    path = tiny_gguf.write_gguf(tmp_path / "moe.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4))
    tokens = [1, 260, 270, 280, 290]
    found = run_in_child(logits_with_experts_on_cpu, path, tokens)
    np.testing.assert_array_equal(llama_logits(path, tokens), found)
