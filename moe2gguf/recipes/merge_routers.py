"""The routers of a merge: prompts run through the base, and what the finished file does with those kept back."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import PlanError
from moe2gguf.experts.donor_router import average_states, draw_router, fit_router
from moe2gguf.gguf.dense_model import DenseFile
from moe2gguf.gguf.system import temporary_folder
from moe2gguf.llama.child import run_in_child, stream_from_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.watch_mlps import Piece, cut_prompts, watch_mlps
from moe2gguf.progress import Progress
from moe2gguf.recipes.convert import convert
from moe2gguf.recipes.merge_options import Donor, LayerRouting, MergeOptions
from moe2gguf.recipes.options import Options
from moe2gguf.recipes.plan import Plan

HELD_OUT = 4
"""Every so manieth piece of an expert's prompts is kept from its router, and tells how well that routes."""

Routers = dict[int, NDArray[np.float32]]
"""The router of each layer, (n_expert, d_model)."""

Group = Sequence[Piece]
States = NDArray[Any]


def find_routers(
    base: Plan, donors: Sequence[Donor], options: MergeOptions, out: Path, setup: Setup, progress: Progress
) -> tuple[Routers, list[Group]]:
    """The routers, and for each expert the pieces of its prompts that were kept back.

    Raises:
        PlanError: the prompts of an expert have no tokens.
        HarnessError: llama.cpp is not installed or cannot run the base.
    """
    model, n = base.model, len(donors)
    held_out: list[Group] = [[] for _ in donors]
    states: list[States] = []
    if any(donor.prompts for donor in donors):
        with _open_file(base, out) as file:
            own, negative, held_out = _cut_prompts(file, donors, setup.n_context, options.n_token)
            if options.router != "random":
                states = _watch(file, setup, [*own, *negative, *held_out], progress)
    if options.router == "random":
        return {i: draw_router(n, model.d_model, options.seed, i) for i in range(model.n_layer)}, held_out
    return {i: _make_router(options, [one[i] for one in states], n) for i in range(model.n_layer)}, held_out


def _cut_prompts(
    file: Path, donors: Sequence[Donor], n_context: int, n_token: int
) -> tuple[list[Group], list[Group], list[Group]]:
    """For each expert: the pieces of its own prompts, of its negative ones, and those of its own that are kept back.

    Raises:
        PlanError: the prompts of an expert have no tokens.
    """
    texts = [*(donor.prompts for donor in donors), *(donor.negative for donor in donors)]
    cut = run_in_child(cut_prompts, file, texts, n_context, what=f"reading prompts as {file} does")
    pieces = [_spread(one, n_token) for one in cut]
    own, negative = pieces[: len(donors)], pieces[len(donors) :]
    if empty := [donor.model for donor, one in zip(donors, own, strict=True) if donor.prompts and not one]:
        raise PlanError([f"{model}: its prompts have no tokens" for model in empty])
    learned: list[Group] = [[piece for j, piece in enumerate(one) if (j + 1) % HELD_OUT] for one in own]
    return learned, [*negative], [one[HELD_OUT - 1 :: HELD_OUT] for one in own]


def score_routers(path: Path, held_out: Sequence[Group], setup: Setup, progress: Progress) -> tuple[LayerRouting, ...]:
    """Run the pieces that were kept back through the merged file; nothing where there are none.

    Errors as `watch_mlps`.
    """
    if not any(held_out):
        return ()
    chosen, layers = _watch(path, setup, held_out, progress), []
    for i in range(max(map(len, chosen))):
        ids = [(e, one[i]) for e, one in enumerate(chosen)]  # (n_token, k)
        first = tuple(float(np.mean(one[:, 0] == e)) if len(one) else None for e, one in ids)
        runs = tuple(float(np.mean((one == e).any(axis=1))) if len(one) else None for e, one in ids)
        layers.append(LayerRouting(i, fmean(share for share in first if share is not None), first, runs))
    return tuple(layers)


@contextlib.contextmanager
def _open_file(base: Plan, out: Path) -> Iterator[Path]:
    """The base as a file for llama.cpp; of a folder, one beside `out` for a while."""
    if isinstance(base.source, DenseFile):
        yield base.source.path
        return
    with temporary_folder(beside=out) as folder:
        yield convert(base.source.path, folder / "base.gguf", Options(dense=True)).path


def _spread(pieces: Sequence[Piece], n_token: int) -> list[Piece]:
    """Pieces from all parts of a text, of about `n_token` tokens, but enough to keep one back."""
    n = round(n_token * len(pieces) / max(1, sum(map(len, pieces))))
    places = np.linspace(0, len(pieces) - 1, min(max(n, HELD_OUT), len(pieces)))
    return [pieces[int(at)] for at in places]


def _watch(file: Path, setup: Setup, groups: Sequence[Group], progress: Progress) -> list[States]:
    """What `watch_mlps` sees of the pieces of each group, (n_layer, n_token, width)."""
    pieces, seen = [piece for group in groups for piece in group], list[States]()
    with progress("calibrate", sum(map(len, pieces))) as advance:
        for piece, one in zip(
            pieces, stream_from_child(watch_mlps, file, setup, pieces, what=f"running {file}"), strict=True
        ):
            seen.append(one)
            advance(len(piece))
    nothing, rest = seen[0][:, :0], iter(seen)
    return [np.concatenate([next(rest) for _ in group], axis=1) if group else nothing for group in groups]


def _make_router(options: MergeOptions, states: Sequence[States], n: int) -> NDArray[np.float32]:
    """The router of a layer, from the states (n_token, d_model) of its experts' own, negative and held-out prompts."""
    own, others, held_out = (states[start : start + n] for start in (0, n, 2 * n))
    return average_states(own, others) if options.router == "hidden" else fit_router(own, others, held_out)
