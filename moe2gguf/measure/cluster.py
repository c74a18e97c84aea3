"""Measurements on the workers of a Dask cluster that somebody runs already: `dask scheduler`, `dask worker ADDRESS`.

A worker makes one measurement at a time and computes the reference's logits itself, once: nothing large crosses the
network, and a measurement whose worker is lost can be made by any other. Files are found by path, in a folder that all
machines share.
"""

import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moe2gguf.errors import HarnessError, Moe2GgufError
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.devices import require_devices
from moe2gguf.llama.machine import describe_machine
from moe2gguf.measure.grid import Measurement, RunConfig, digest_identity
from moe2gguf.measure.results import Answer, Quality

_CONNECT_SECONDS = 10

S = TypeVar("S", bound=Hashable)


class MakesAnswers(Protocol):
    """Something that makes measurements, and keeps for the next one what is costly to make."""

    def answer(self, wanted: Measurement) -> Answer:
        """Return the scores, or why there are none."""


_SAME = ("moe2gguf", "llama-cpp-python")


def require_workers(address: str, wanted: Iterable[RunConfig], devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return versions and machine of every worker of the scheduler at `address`, by the worker's name.

    Raises HarnessError, with everything that is amiss on any worker, unless all of them can measure all of `wanted`.
    """
    files = {one.path: one.identity for one in wanted}
    with _client(address) as client:
        found = client.run(_inspect, files, list(devices), on_error="return")
    if not found:
        raise HarnessError(f"the cluster at {address} has no worker: start some with `dask worker {address}`")
    problems = [f"  - {worker}: {line}" for worker, facts in found.items() for line in _list_problems(facts)]
    if problems:
        raise HarnessError("\n".join(["not every worker of the cluster can measure this:", *problems]))
    return {facts["name"]: facts["environment"] for facts in found.values()}


def measure_on_workers(
    address: str, make_runner: Callable[[S, Path], MakesAnswers], settings: S, wanted: Sequence[Measurement]
) -> Iterator[tuple[Measurement, Answer]]:
    """Yield every measurement with its answer, as they come. One whose worker is lost goes to another worker.

    `make_runner` is importable on the workers; each keeps what it makes of `settings` and an empty folder.

    Raises HarnessError if the scheduler is not there.
    """
    from distributed import KilledWorker, as_completed

    with _client(address) as client:
        futures = {client.submit(_answer, one, make_runner, settings, pure=False): one for one in wanted}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except KilledWorker as error:
                yield futures[future], HarnessError(f"the workers that tried it were lost: {error}")


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise HarnessError("a cluster needs Dask: pip install distributed") from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise HarnessError(
            f"no Dask scheduler answers at {address} ({error}): start one with `dask scheduler`"
        ) from error
    with client:
        yield client


def _list_problems(facts: Any) -> list[str]:
    """Return what keeps a worker from measuring; `facts` is what `_inspect` returned or raised there."""
    if isinstance(facts, BaseException):
        return [f"{facts!r}: install there what is installed here, moe2gguf included"]
    here, there = describe_machine(), facts["environment"]
    differing = [f"{name} {there[name]}, here {here[name]}" for name in _SAME if there[name] != here[name]]
    return [*(f"{line}: install the same version" for line in differing), *facts["problems"]]


# --- the worker's side ---

_lock = threading.Lock()
_kept: dict[Any, tuple[MakesAnswers, tempfile.TemporaryDirectory[str]]] = {}


def _inspect(files: dict[Path, str], devices: Sequence[str], dask_worker: Any) -> dict[str, Any]:
    """Return the name, versions and problems of this worker, which Dask gives as `dask_worker`."""
    problems = _list_unseen(files)
    try:
        require_devices(devices)
    except HarnessError as error:
        problems.append(str(error))
    return {"name": str(dask_worker.name), "environment": describe_machine(), "problems": problems}


def _answer(wanted: Measurement, make_runner: Callable[[S, Path], MakesAnswers], settings: S) -> Answer:
    """Return what a measurement comes to on this worker; the reference's logits stay for the next one."""
    from distributed import get_worker

    name = str(get_worker().name)
    problems = _list_unseen({one.path: one.identity for one in (wanted.base, wanted.one)})
    if problems:
        return HarnessError(f"worker {name}: {'; '.join(problems)}")
    with _lock:
        if settings not in _kept:
            _kept.clear()  # and their folders with them
            folder = tempfile.TemporaryDirectory(prefix="moe2gguf-")
            _kept[settings] = make_runner(settings, Path(folder.name)), folder
        answer = _kept[settings][0].answer(wanted)
    return replace(answer, worker=name) if isinstance(answer, Quality) else answer


def _list_unseen(files: dict[Path, str]) -> list[str]:
    """Return which files are not here, or differ from those of the machine that asks."""
    problems = []
    for path, expected in files.items():
        try:
            if digest_identity(read_model(path)) != expected:
                problems.append(f"{path} is another file here (header, size or time of change): use one shared folder")
        except Moe2GgufError as error:
            problems.append(f"{error}; all machines must see the files under the same path: use a shared folder")
    return problems
