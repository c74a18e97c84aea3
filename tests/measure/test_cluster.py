"""A sweep on a Dask cluster: a scheduler and workers in processes of their own, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import tiny_gguf
from sweeps import settings

from moe2gguf.cli.tables_compare import comparison
from moe2gguf.errors import HarnessError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.measure import cluster
from moe2gguf.measure.bench import Timing
from moe2gguf.measure.compare import compare
from moe2gguf.measure.grid import plan_run

psutil = pytest.importorskip("psutil", reason="comes with Dask: pip install 'moe2gguf[cluster]'")
Client = pytest.importorskip("distributed", reason="needs Dask: pip install 'moe2gguf[cluster]'").Client

T = TypeVar("T")
USED = [4, 3, 2]


class Cluster:
    """A scheduler and two workers, each a process that can be killed."""

    def __init__(self, folder: Path) -> None:
        file = folder / "scheduler.json"
        self.folder = folder
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", str(file))
        self.address = until(lambda: address_in(file))
        self.workers = {name: self._worker(name) for name in ("ant", "bee")}
        with Client(self.address) as client:
            client.wait_for_workers(len(self.workers))

    def end(self) -> None:
        for process in (*self.workers.values(), self.scheduler):
            process.kill()
            process.wait()

    def _worker(self, name: str) -> subprocess.Popen[bytes]:
        return self._start("worker", self.address, "--name", name, "--nthreads", "1", "--no-nanny")

    def _start(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        code = f"from distributed.cli.dask_{what} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments, "--host", "127.0.0.1", "--no-dashboard"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stderr=subprocess.DEVNULL,
        )


def address_in(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError):  # not there yet, or half of it
        return None


def until(look: Callable[[], T | None], seconds: float = 60) -> T:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = look()
        if found is not None:
            return found
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.end()


@pytest.fixture
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for one test, which kills its workers."""
    started = Cluster(tmp_path_factory.mktemp("doomed"))
    yield started
    started.end()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    dense = tiny_gguf.dense_weights()
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "moe": tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(dense, 4)),
    }


def test_files_that_a_worker_does_not_see_are_all_listed(running: Cluster, files: dict[str, Path]) -> None:
    """Before anything runs, for every worker, with what to do."""
    one = plan_run(read_gguf(files["moe"]), 4)
    wanted = [one, replace(one, path=Path("/no/such.gguf")), replace(one, path=files["dense"], identity="other")]
    with pytest.raises(HarnessError) as found:
        cluster.require_workers(running.address, wanted, ["cpu", "tpu"])
    lines = str(found.value).splitlines()[1:]
    assert 2 * 3 == len(lines), lines
    for words in ("/no/such.gguf", "dense.gguf is another file here", "no such device: tpu"):
        assert 2 == sum(words in line for line in lines), words


def test_a_worker_of_another_version_is_refused(running: Cluster, files: dict[str, Path]) -> None:
    """Rows of different versions do not belong into one table; a worker without the package says so itself."""
    facts = {"environment": {"moe2gguf": "0", "llama-cpp-python": "0"}, "problems": ["x"]}
    ours, binding, other = cluster._list_problems(facts)
    assert ours.startswith("moe2gguf 0, here ")
    assert binding.startswith("llama-cpp-python 0, here ")
    assert "x" == other
    assert "moe2gguf included" in cluster._list_problems(ModuleNotFoundError("No module named 'moe2gguf'"))[0]


def test_a_worker_killed_in_mid_job_costs_nothing_but_time(
    doomed: Cluster, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep completes with the numbers of one machine, each measured once, and says who measured it."""
    here = compare([files["moe"]], files["dense"], used=USED, settings=settings(tmp_path / "here"))
    victim = doomed.workers["ant"]

    def kill() -> None:
        until(lambda: psutil.Process(victim.pid).children() or None)  # llama.cpp runs: the job is under way
        victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    there = settings(tmp_path / "there", scheduler=doomed.address)
    found = compare([files["moe"]], files["dense"], used=USED, settings=there)
    killer.join()

    assert victim.wait() < 0
    assert [row.quality.summary for row in here.rows] == [row.quality.summary for row in found.rows]  # type: ignore[union-attr]
    assert ["bee"] * len(USED) == [row.to_dict()["quality"]["worker"] for row in found.rows]
    assert {"ant", "bee"} == set(found.environment["workers"])
    keys = [
        json.loads(line)["piece"] for line in (tmp_path / "there" / "journal.jsonl").read_text().split("\n") if line
    ]
    assert len(USED) + 1 == len(keys) == len(set(keys))
    comparison(found)
    assert "rows measured by workers: bee 3" in capsys.readouterr().out


def test_speed_is_not_for_a_cluster(files: dict[str, Path], tmp_path: Path) -> None:
    """Speeds of different machines in one table would mislead."""
    with pytest.raises(HarnessError, match="leave out the scheduler"):
        compare([files["moe"]], files["dense"], settings=settings(tmp_path, scheduler="tcp://x:1"), timing=Timing())


def test_no_cluster_and_no_dask_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where nothing listens; an installation without the extra."""
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(HarnessError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9 .* `dask scheduler`"):
        cluster.require_workers("tcp://127.0.0.1:9", [], ["cpu"])
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(HarnessError, match="pip install distributed"):
        cluster.require_workers("tcp://127.0.0.1:9", [], ["cpu"])


def test_a_cluster_without_workers_is_said(doomed: Cluster) -> None:
    """Rather than waited for."""
    for process in doomed.workers.values():
        process.kill()
        process.wait()
    until(lambda: None if workers_of(doomed.address) else True)
    with pytest.raises(HarnessError, match="has no worker: start some with `dask worker"):
        cluster.require_workers(doomed.address, [], ["cpu"])


def workers_of(address: str) -> list[str]:
    with Client(address) as client:
        return list(client.scheduler_info()["workers"])
