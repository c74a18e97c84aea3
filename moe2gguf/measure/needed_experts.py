"""How many experts a token needs: each count of one file against all its experts, token by token.

Only files that are sliced here, for a graph that weighs a chosen expert alike at every count, tell that of tokens: all
experts are then the dense model, and fewer are a plain partial sum of it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.experts.text import Text, read_text
from moe2gguf.gguf.counts import find_graph, read_counts
from moe2gguf.gguf.expected import is_sliced
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.layout import active_bytes
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.system import temporary_folder
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup, place_on_device, require_devices
from moe2gguf.llama.machine import describe_machine
from moe2gguf.llama.model import open_vocabulary
from moe2gguf.measure.grid import list_notes, plan_run
from moe2gguf.measure.logits import Reference, open_logits, read_rows, record_reference, score_file
from moe2gguf.measure.metrics import CHUNK_ENTRIES, TokenScores, as_json, join_scores, log_sum_exp
from moe2gguf.progress import Progress, silent

Floats = NDArray[np.float64]

_MLP = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_inp)(_exps|_shexp)?\.")
_DIGITS, _LETTERS = re.compile(r"\s*\d+"), re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class FixedCount:
    """All tokens at one count: mean KL divergence from all experts (nats), `same_top` and `acceptance` as in `Summary`.

    mlp_bytes, total_bytes   weights that a token reads, of the MLPs and of everything
    """

    count: int
    kl: float
    same_top: float
    acceptance: float
    mlp_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Need:
    """The smallest counts at which each token's prediction is within `limit` nats: what an oracle would use.

    mean, kl  of these counts, and of the divergences there
    lasting   mean of the counts from which on all larger ones are within the limit too
    shares    share of the tokens that need each count
    same_kl   the fixed count of this mean divergence; between two counts, tokens take either by chance
    mlp_gain, gain   bytes that a token reads at `same_kl` over the oracle's: of the MLPs, and of everything
    groups    by kind of group and name: how many tokens, and the mean of what they need
    """

    limit: float
    mean: float
    lasting: float
    kl: float
    shares: tuple[float, ...]
    same_kl: float
    mlp_gain: float
    gain: float
    groups: dict[str, dict[str, tuple[int, float]]]


@dataclass(frozen=True)
class NeededExperts:
    """What `measure_needed_experts` returns: `fixed` has every count of the file, the last one all its experts."""

    path: Path
    n_token: int
    fixed: tuple[FixedCount, ...]
    need: Need
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return dict(as_json(self))


def measure_needed_experts(
    path: str | Path,
    *,
    limit: float = 0.1,
    text: Text | None = None,
    n_token: int | None = 4096,
    n_context: int = 512,
    device: str = "cpu",
    threads: int | None = None,
    timeout: float | None = None,
    progress: Progress = silent,
) -> NeededExperts:
    """Score a text at every count of experts, and find the smallest one that each token's prediction needs.

    Args:
        path: a file that is sliced for a target whose weights do not depend on the count, which is all but `mixtral`.
        limit: nats of KL divergence from the prediction with all experts that a token may have.
        n_token: scored positions, in whole windows of which the second half is scored; None: the whole text.
        timeout: seconds per window.
        progress: receives the stage "sweep" and the counts done.
        text, n_context, device, threads: as in `measure_expert_usage`.

    Raises:
        GGUFError, HarnessError: as there; or the counts of the file cannot be compared in this way.
    """
    path, text = Path(path), text or read_text()
    require_devices([device])
    file = read_model(path)
    _require_partial_sums(file)
    counts, kl = read_counts(file), list[NDArray[np.float64]]()
    setup = place_on_device(Setup(n_context=n_context, n_threads=threads), device)
    smaller, fixed = range(counts.n_shared + 1, counts.n_expert), list[FixedCount]()
    with temporary_folder() as folder, progress("sweep", len(smaller) + 1) as advance:
        full = replace(setup, n_expert_used=counts.n_expert)
        reference = record_reference(path, full, text.text, n_token, n_context // 2, folder / "logits")
        entropy = measure_entropy(reference)
        advance(1)
        for k in smaller:
            windows = score_file(path, replace(setup, n_expert_used=k), reference, timeout=timeout)
            scores = join_scores(windows)
            fixed.append(_describe_count(file, k, scores))
            kl.append(scores.kl)
            advance(1)
    fixed.append(_describe_count(file, counts.n_expert))
    surest = np.searchsorted(np.quantile(entropy, [1 / 3, 2 / 3]), entropy)
    tokens, first = reference.windows.tokens, reference.windows.first
    read, to_come = (run_in_child(_name_kinds, path, ids) for ids in (tokens[:, first:-1], tokens[:, first + 1 :]))
    groups = {"prediction": [("easy", "medium", "hard")[i] for i in surest], "token to come": to_come, "read": read}
    return NeededExperts(
        path=path,
        n_token=len(entropy),
        fixed=tuple(fixed),
        need=find_need(limit, np.array([*kl, np.zeros(len(entropy))]), fixed, groups),
        settings={"text_sha256": text.digest, "context": n_context},
        environment=describe_machine(),
        notes=tuple(list_notes([path], text, n_context)),
    )


def _require_partial_sums(file: GGUFFile) -> None:
    """Raise HarnessError for a file whose smaller counts are no partial sums of a full model that llama.cpp runs."""
    counts, name = read_counts(file), str(file.metadata.get("general.architecture"))
    graph, why = find_graph(name), plan_run(file, counts.n_expert).refusal
    if not counts.n_expert:
        why = "is dense, every token needs all of it"
    elif graph is None or graph.gating == "renormalized":
        why = f"in {name} the weight of an expert depends on how many are used"
    elif not is_sliced(file):
        why = "was not sliced here, so all its experts are no full model"
    if why:
        raise HarnessError(f"{file.path}: {why}; slice the dense model with `moe2gguf convert --target glm4moe`")


def measure_entropy(reference: Reference) -> Floats:
    """Return the entropy of every prediction of the reference, whose logits are all kept, nats, (n_token,)."""
    n_token, n_vocab, out = reference.windows.n_token, reference.facts.n_vocab, list[Floats]()
    step = max(1, CHUNK_ENTRIES // n_vocab)
    with open_logits(reference) as file:
        for i in range(0, n_token, step):
            rows = read_rows(file, np.dtype(np.float32), min(step, n_token - i) * n_vocab)
            logits = rows.reshape(-1, n_vocab).astype(np.float64)
            lse, weights, total = log_sum_exp(logits.copy())
            out.append(lse - np.einsum("ij,ij->i", weights, logits) / total)
    return np.concatenate(out)


def _name_kinds(path: Path, ids: NDArray[np.int32]) -> list[str]:
    """The kind of every token; runs in a child process."""
    with open_vocabulary(path) as model:
        return [name_kind(model.piece(int(i)).decode("utf-8", "replace")) for i in ids.ravel()]


def name_kind(piece: str) -> str:
    """Return what kind of token has this text."""
    if "\n" in piece:
        return "line break"
    if _DIGITS.fullmatch(piece):
        return "digits"
    if _LETTERS.search(piece):
        return "start of a word" if piece[0].isspace() else "rest of a word"
    return "punctuation" if piece else "control token"


def _describe_count(file: GGUFFile, k: int, scores: TokenScores | None = None) -> FixedCount:
    """What is known of a count; of all experts without scores, as they are the reference."""
    counts = read_counts(file)
    kl, top, overlap = map(np.mean, (scores.kl, scores.same_top, scores.overlap)) if scores else (0, 1, 1)
    mlp = [tensor for tensor in file.tensors.values() if _MLP.match(tensor.name)]
    read = (active_bytes(part, counts.n_routed, k - counts.n_shared) for part in (mlp, file.tensors.values()))
    return FixedCount(k, float(kl), float(top), float(overlap), *read)


def find_need(limit: float, kl: Floats, fixed: Sequence[FixedCount], groups: Mapping[str, Sequence[str]]) -> Need:
    """Return what an oracle does; `kl` (n_count, n_token) at the counts of `fixed`, the last of which is all experts.

    `groups` gives every token a name.
    """
    counts, means = (np.array([getattr(one, name) for one in fixed]) for name in ("count", "kl"))
    within = kl <= limit
    first = within.argmax(axis=0)
    lasting = len(counts) - np.logical_and.accumulate(within[::-1]).sum(axis=0)
    needed, mean_kl = counts[first], float(kl[first, np.arange(len(first))].mean())
    same = float(np.interp(-mean_kl, -np.minimum.accumulate(means), counts))

    def gain(field: str) -> float:
        ours, theirs = np.interp([needed.mean(), same], counts, [getattr(one, field) for one in fixed])
        return float(theirs / ours)

    labels = {title: np.array(names) for title, names in groups.items()}
    return Need(
        limit=limit,
        mean=float(needed.mean()),
        lasting=float(counts[lasting].mean()),
        kl=mean_kl,
        shares=tuple(float(share) for share in np.bincount(first, minlength=len(counts)) / len(first)),
        same_kl=same,
        mlp_gain=gain("mlp_bytes"),
        gain=gain("total_bytes"),
        groups={
            title: {str(name): (int((of == name).sum()), float(needed[of == name].mean())) for name in np.unique(of)}
            for title, of in labels.items()
        },
    )
