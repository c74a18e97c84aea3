"""Devices by name: settings for llama.cpp, and a clear refusal where there is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny_gguf
from devices import has_rpc
from gpu import gpu_is_missing
from llama_logits import llama_logits

from moe2gguf.cli.options import devices_from
from moe2gguf.errors import HarnessError
from moe2gguf.llama import library
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup, choose_reference_device, name_rpc_device, place_on_device, require_devices
from moe2gguf.llama.model import open_model


def place(path: Path, on_cpu: Literal["experts", "ffn"] | None, tokens: list[int]) -> tuple[np.ndarray, set[str]]:
    """Logits with some weights kept on the CPU, and the tensors that llama.cpp says it placed by such a rule."""
    lib, placed = library.import_llama(), set()

    @lib.llama_log_callback
    def keep_names(_level: int, line: bytes, _data: object) -> None:
        if found := re.match(rb"tensor (\S+) .* buffer type overridden to CPU", line):
            placed.add(found[1].decode())

    library._callbacks.insert(0, keep_names)  # the log that is set whenever a file is opened
    with open_model(path, Setup(n_context=len(tokens), n_threads=1, on_cpu=on_cpu)) as model:
        library._callbacks.pop(0)
        return np.array(model.logits(np.array(tokens, np.int32)), np.float64), placed


def test_names_become_settings() -> None:
    """All layers or none; experts apart; everything else is left as it was."""
    setup = Setup(n_expert_used=3, n_context=99)
    assert setup == place_on_device(setup, "cpu")
    placed = [place_on_device(setup, name) for name in ("gpu", "gpu:experts-on-cpu", "gpu:ffn-on-cpu")]
    assert [(-1, None, 99), (-1, "experts", 99), (-1, "ffn", 99)] == [
        (s.n_gpu_layers, s.on_cpu, s.n_context) for s in placed
    ]


def test_unknown_devices_are_all_named() -> None:
    """With the names that exist."""
    with pytest.raises(
        HarnessError, match="no such device: tpu, npu; choose from cpu, gpu, gpu:experts-on-cpu, gpu:ffn-on-cpu"
    ):
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


@pytest.mark.parametrize(
    ("kind", "on_cpu", "expected"),
    [
        ("dense", "ffn", {"ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"}),
        ("dense", "experts", set()),
        ("moe", "ffn", {"ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"}),
        ("moe", "experts", {"ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"}),
        ("moe", None, set()),
    ],
)
def test_what_stays_on_the_cpu(tmp_path: Path, kind: str, on_cpu: Any, expected: set[str]) -> None:
    """llama.cpp's log names what the rule pins in every layer, no router or norm; the logits are the same."""
    weights = tiny_gguf.dense_weights()
    path = tiny_gguf.write_gguf(
        tmp_path / "file.gguf", weights if kind == "dense" else tiny_gguf.sliced_weights(weights, 4)
    )
    tokens = [1, 260, 270, 280, 290]

    found, placed = run_in_child(place, path, on_cpu, tokens)

    np.testing.assert_array_equal(llama_logits(path, tokens), found)
    assert expected == {name.split(".", 2)[2] for name in placed}
    assert len(placed) == len(expected) * len({name.split(".")[1] for name in placed})
