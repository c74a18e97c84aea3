"""The recipe: which experts of a file run, layer by layer, on a text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.metadata import CALIBRATION_LOAD
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.devices import placed, require_devices
from moe2gguf.llama.library import processors
from moe2gguf.llama.machine import environment
from moe2gguf.llama.model import Setup
from moe2gguf.measure.check import default_text
from moe2gguf.measure.expert_usage import ExpertUse, count, layers
from moe2gguf.measure.sweep import candidate, candidates


def observe(
    path: Path,
    *,
    used: int | None = None,
    text: str | None = None,
    n_token: int | None = 4096,
    n_context: int = 512,
    device: str = "cpu",
    threads: int | None = None,
    timeout: float | None = None,
) -> ExpertUse:
    """Run a text through the file and count which experts every layer runs, and for which tokens.

    Args:
        path: a GGUF file with experts, of any origin.
        used: experts per token; None: the file's own count.
        text: what is read; None: Python's own documentation, which differs between Python versions.
        n_token: how much of it, rounded up to whole windows of `n_context`; None: all.
        device: one of `harness.devices.DEVICES`.
        threads: None: all processors.
        timeout: seconds for all of it.

    Raises:
        GGUFError: the file's header is not sound.
        HarnessError: the file is dense, the count or the device is not possible, the text is too short, or llama.cpp
            cannot run the file.
    """
    require_devices([device])
    file = read_model(path)
    (one,) = candidates([path], [] if used is None else [used], [device])
    if not one.n_expert:
        raise HarnessError(f"{path}: is dense, it has no experts to watch; name a file that `moe2gguf convert` made")
    if one.refusal:
        raise HarnessError(f"{path}: {one.refusal}")
    text = default_text(16 * ((n_token or 0) + 4096)) if text is None else text
    setup = Setup(n_expert_used=one.n_expert_used, n_context=n_context, n_threads=threads or processors())
    tally = count(path, placed(setup, device), text, n_token, timeout)
    expected, why = calibration_load(file, one.n_expert, one.n_expert_used)
    return ExpertUse(
        candidate=candidate(file, one.n_expert_used, device),
        n_token=tally.n_token,
        layers=layers(tally, expected),
        calibration=why,
        settings={"text_sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), "context": n_context},
        environment=environment(),
    )


def calibration_load(file: GGUFFile, n_expert: int, n_expert_used: int) -> tuple[NDArray[np.float64] | None, str]:
    """Return the load (n_layer, n_expert) that calibration saw at this count, or None; and a sentence about it."""
    values = file.metadata.get(CALIBRATION_LOAD)
    n_layer = file.metadata.get("llama.block_count")
    numbers = values if isinstance(values, list) and all(isinstance(v, float) for v in values) else []
    if type(n_layer) is not int or not numbers or len(numbers) != n_layer * n_expert:
        return None, "the file carries no load from a calibration"
    load = np.array(numbers, np.float64).reshape(n_layer, n_expert)
    k = round(load.sum() / n_layer)  # every token runs k experts; `set-used` does not change what calibration saw
    if k != n_expert_used:
        return None, f"the load of calibration is that of {k} experts per token, not of {n_expert_used}"
    return load, f"compared with the load in calibration ({file.metadata.get('moe2gguf.calibration.text', 'a text')})"
