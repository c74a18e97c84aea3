"""GPUs and RPC servers for real: these tests run where the installed llama.cpp has them, and say why they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from devices import has_rpc
from gpu import gpu_is_missing
from rpc_server import servers
from sweeps import settings

from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup, name_rpc_device, place_on_device
from moe2gguf.llama.generate import generate
from moe2gguf.llama.model import open_model
from moe2gguf.measure.bench import Timing, bench
from moe2gguf.measure.compare import compare
from moe2gguf.measure.results import Comparison

TOKENS = [1, 260, 270, 280, 290, 265, 275]
CLOSE = 1e-3  # nats per token: devices round differently, a wrong tensor or order costs whole nats


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random router, because devices order equal router logits differently."""
    folder = tmp_path_factory.mktemp("offload")
    dense = tiny_gguf.dense_weights()
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "moe": tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(dense, 4, router_seed=1)),
    }


def check(found: Comparison, devices: list[str], counts: list[int]) -> None:
    """Every k ran on every device, and all devices agree with the first."""
    assert [(k, name) for k in counts for name in devices] == [
        (row.config.n_expert_used, row.config.device) for row in found.rows
    ]
    assert {"ok"} == {row.status for row in found.rows}, [row.reason for row in found.rows]
    assert len(counts) * (len(devices) - 1) == len(found.agreements)
    for pair in found.agreements:
        assert pair.quality is not None, pair.reason
        assert pair.quality.summary.kl_mean < CLOSE
        assert pair.quality.summary.top1 > 0.9


class TestGpu:
    """Any GPU: CUDA, Metal, Vulkan, or Mesa's software device with GGML_VK_VISIBLE_DEVICES=0."""

    @pytest.fixture(autouse=True)
    def _needs_a_gpu(self) -> None:
        reason = gpu_is_missing()
        if reason:
            pytest.skip(reason)

    def test_rows_of_all_devices_agree(self, files: dict[str, Path], tmp_path: Path) -> None:
        """All layers there, all but the experts there, and none: the same model, k by k."""
        devices = ["cpu", "gpu", "gpu:experts-on-cpu", "gpu:ffn-on-cpu"]
        found = compare([files["moe"]], files["dense"], used=[4, 2], devices=devices, settings=settings(tmp_path))
        check(found, devices, [4, 2])

    def test_the_cpu_row_is_the_cpu_s(self, files: dict[str, Path]) -> None:
        """Nothing of it runs on the GPU, which llama.cpp would use for large batches: other bits than the GPU's."""
        first, again, gpu = (run_in_child(logits, files["moe"], name) for name in ("cpu", "cpu", "gpu"))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, gpu)
        np.testing.assert_allclose(first, gpu, atol=0.1)

    def test_bench_and_run_take_it(self, files: dict[str, Path]) -> None:
        """A speed for each device, no bound where the bandwidth is not known; the same greedy text."""
        found = bench([files["moe"]], devices=["cpu", "gpu"], timing=Timing(8, 4, 1, 1))
        assert found.ok
        assert [True, False] == [row.speed.bound is not None for row in found.rows if row.speed]
        assert "".join(generate(files["moe"], "the", n_token=4)) == "".join(
            generate(files["moe"], "the", n_token=4, device="gpu")
        )


class TestRpc:
    """llama.cpp's RPC backend with two servers on this machine."""

    @pytest.fixture(autouse=True)
    def _needs_rpc(self) -> None:
        if not run_in_child(has_rpc):
            pytest.skip("the installed llama.cpp has no RPC: run vendor/install rpc (or vulkan, cuda)")

    def test_two_servers_compute_what_the_cpu_does(self, files: dict[str, Path], tmp_path: Path) -> None:
        """Layers are spread over both; the reference runs there too when no other device is asked for."""
        with servers(2) as running:
            device = name_rpc_device(list(running))
            asked = {"used": [4, 2], "settings": settings(tmp_path)}
            found = compare([files["moe"]], files["dense"], devices=["cpu", device], **asked)  # type: ignore[arg-type]
            check(found, ["cpu", device], [4, 2])
            alone = compare([files["moe"]], files["dense"], devices=[device], **asked)  # type: ignore[arg-type]
        assert ("ok", device) == (alone.rows[0].status, alone.reference.device)

    def test_a_server_that_is_lost_is_a_row(self, files: dict[str, Path], tmp_path: Path) -> None:
        """The rows before it are kept, the others have the reason."""
        with servers(1) as running:
            (process,) = running.values()
            device = name_rpc_device(list(running))
            found = compare(
                [files["moe"]],
                files["dense"],
                used=[4, 3, 2],
                devices=["cpu", device],
                settings=settings(tmp_path),
                on_row=lambda row: process.kill() if row.config.device == device else None,
            )
        assert ["ok", "ok", "ok", "failed", "ok", "failed"] == [row.status for row in found.rows]
        assert "no RPC server answers" in found.rows[3].reason


def logits(path: Path, device: str) -> np.ndarray:
    with open_model(path, place_on_device(Setup(n_context=len(TOKENS), n_threads=1), device)) as model:
        return np.array(model.logits(np.array(TOKENS, np.int32)), np.float64)
