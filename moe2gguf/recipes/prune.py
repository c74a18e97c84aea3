"""A GGUF file with experts becomes one with fewer of them, and nothing is decoded: `prune`, from top to bottom."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import PlanError
from moe2gguf.experts.text import Text, read_text
from moe2gguf.gguf.counts import ExpertCounts, find_graph, read_counts, require_architecture
from moe2gguf.gguf.expected import MAX_LAYERS, check_architecture, is_sliced, read_count
from moe2gguf.gguf.expert_tensors import ExpertTensors, copy_tensor, find_expert_tensors
from moe2gguf.gguf.file import Findings, GGUFFile, refuse_alignment
from moe2gguf.gguf.made_for import USED_HERE
from moe2gguf.gguf.metadata import CALIBRATION_LOAD
from moe2gguf.gguf.outputs import check_model_target
from moe2gguf.gguf.set_used import require_count
from moe2gguf.gguf.shards import lay_out_files, read_model
from moe2gguf.gguf.writer import Files, write_model
from moe2gguf.limits import MAX_EXPERTS
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.devices import Setup, place_on_device, require_devices
from moe2gguf.llama.score_experts import LayerSums, sum_answers
from moe2gguf.progress import Progress, silent
from moe2gguf.spec import MetadataValue

Score = Literal["reap", "total", "frequency", "random"]
Floats = NDArray[np.float64]
Kept = Mapping[int, list[int]]
"""The routed experts that stay in each layer, in ascending order."""

PREFIX = "moe2gguf.prune."
KEPT = PREFIX + "kept"
"""The metadata key with the numbers that the kept experts had in the file before any pruning, layer after layer."""

_DENSE_WIDTH = ("moe2gguf.slicing.dense_feed_forward_length", "moe2gguf.slicing.padding")
STALE = ("general.size_label", CALIBRATION_LOAD, *_DENSE_WIDTH)
"""Keys that say how large the model was, and how often its experts were chosen when there were more of them."""


@dataclass(frozen=True)
class PruneOptions:
    """How many experts stay, and which.

    keep       experts that stay in each layer, shared ones included
    used       how many of them run per token; None: as many as before, or all where fewer stay
    score      "reap": the mean length of an expert's weighted answer, over the tokens that chose it; "frequency": how
               many tokens chose it; "total": the sum of the lengths; "random"
    n_token    how much of the text is read; None: all
    n_context  tokens of a window
    seed       of the score "random"
    """

    keep: int
    used: int | None = None
    score: Score = "reap"
    n_token: int | None = 8192
    n_context: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Pruning:
    """What `prune` did.

    n_expert, n_used   experts before, and those that run per token now, shared ones included
    kept      the routed experts that stay, by layer
    dropped   by layer, the share of the lengths of all answers that came from experts which are gone; not for "random"
    notes     sentences that a user must know
    """

    path: Path
    n_expert: int
    n_used: int
    options: PruneOptions
    kept: dict[int, list[int]]
    dropped: dict[int, float]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """A line for the terminal: the counts, and what the text says was lost."""
        line = f"wrote {self.path}: {self.options.keep} of {self.n_expert} experts, {self.n_used} used per token"
        if not self.dropped:
            return line
        mean, most = sum(self.dropped.values()) / len(self.dropped), max(self.dropped.values())
        share = f"{mean:.1%} of all answers to this text, by length, and up to {most:.1%} in a layer"
        return f"{line}; those left out gave {share}"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {
            "path": str(self.path),
            "experts": self.n_expert,
            "kept": self.options.keep,
            "used": self.n_used,
            "score": self.options.score,
            "layers": [{"layer": i, "kept": ids, "dropped": self.dropped.get(i)} for i, ids in self.kept.items()],
            "notes": list(self.notes),
        }


def prune(
    source: str | Path,
    out: str | Path,
    options: PruneOptions,
    text: Text | None = None,
    *,
    device: str = "cpu",
    shard_size: int | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Pruning:
    """Write the GGUF file `source` again as `out`, with fewer experts in every layer. No weight is changed.

    Args:
        source: a file with experts of an architecture in `gguf.expert_tensors.STACKED`, or a shard of one.
        out: the file to write; it appears only when it is complete and verified.
        options: how many experts stay, and which.
        text: what the experts are scored on (None: the built-in text).
        device: where llama.cpp runs it, one of `llama.devices.DEVICES`.
        shard_size: write a larger file as a set of shards of at most so many bytes; the result names the first.
        force: replace `out` if it exists.
        threads: None: all processors.
        progress: receives stages ("score", "write", "verify") and the units done.

    Raises:
        PlanError: the file cannot be pruned in this way; every reason is listed.
        GGUFError: `source` is not a sound GGUF file, its experts were made for another count, or the written file did
            not verify.
        HarnessError: llama.cpp is not installed or cannot run the file, or the text is too short.
        OutputError: `out` cannot be written or must not be replaced.
    """
    out, file = Path(out), read_model(Path(source))

    # Find out what is cut in each layer, and what the counts become.
    counts, n_group = _require_counts(file, options)
    tensors = _require_tensors(file, counts)
    if (n_used := _choose_used(counts, options)) != counts.n_used:
        require_count(file, replace(counts, n_expert=options.keep), n_used)
    require_devices([device])

    # Lay the file out as if the first experts stayed, which takes the same room, and see that it can be written.
    text, sums, n_kept = text or read_text(), dict[int, LayerSums](), options.keep - counts.n_shared
    lay_out = partial(_lay_out, file, counts, tensors, options, text, shard_size)
    files = lay_out({i: [*range(n_kept)] for i in tensors.layers})
    size = sum(layout.file_size for _, layout in files)
    check_model_target(out, len(files), file.files, force=force, size=size)

    # Score the experts of every layer on the text, and keep the best.
    if options.score != "random":
        setup = Setup(n_context=options.n_context, n_threads=threads)
        sums = _watch(file.path, place_on_device(setup, device), text, options.n_token, progress)
    scores = score_layers(tensors, sums, options)
    kept = {i: keep_best(score, n_kept, n_group) for i, score in scores.items()}

    # Copy what stays of every tensor, write, verify and name the file.
    path, _ = write_model(out, lay_out(kept), threads=threads, progress=progress)
    unseen = () if options.score == "random" else [i for i in kept if i not in sums]
    notes = [f"layer {i} did not run, so its experts have no score: the first ones stay" for i in unseen]
    return Pruning(
        path=path,
        n_expert=counts.n_expert,
        n_used=n_used,
        options=options,
        kept=kept,
        dropped={i: _measure_loss(one, kept[i]) for i, one in sums.items() if i in kept},
        notes=(*notes, *_note_louder(file, counts, n_kept, n_used)),
    )


def _lay_out(
    file: GGUFFile,
    counts: ExpertCounts,
    tensors: ExpertTensors,
    options: PruneOptions,
    text: Text,
    shard_size: int | None,
    kept: Kept,
) -> Files:
    """What stays of every tensor, and where it stands."""
    metadata = {
        **_change_metadata(file, counts, tensors, options.keep, _choose_used(counts, options)),
        **_record(file, counts, options, text, kept),
    }
    outputs = [copy_tensor(file, name, kept.get(tensors.layer_of.get(name, -1))) for name in file.tensors]
    return lay_out_files(metadata, outputs, file.kinds_of(metadata), shard_size)


def score_layers(tensors: ExpertTensors, sums: Mapping[int, LayerSums], options: PruneOptions) -> dict[int, Floats]:
    """A number for every routed expert (n_expert,) of every layer: the larger, the sooner it stays."""
    if options.score == "random":
        random = np.random.default_rng(options.seed)
        return {i: random.random(tensors.n_expert) for i in tensors.layers}
    scores = dict.fromkeys(tensors.layers, np.zeros(tensors.n_expert))
    for i, one in sums.items():
        mean = one.lengths / np.maximum(one.counts, 1)
        scores[i] = {"reap": mean, "total": one.lengths, "frequency": one.counts.astype(float)}[options.score]
    return scores


def keep_best(score: Floats, n_kept: int, n_group: int = 1) -> list[int]:
    """The `n_kept` experts with the largest score (n_expert,), in ascending order; of each group equally many."""
    groups = score.reshape(n_group, -1)
    best = np.argsort(-groups, axis=1, kind="stable")[:, : n_kept // n_group]
    return sorted((best + np.arange(n_group)[:, None] * groups.shape[1]).ravel().tolist())


def _require_counts(file: GGUFFile, options: PruneOptions) -> tuple[ExpertCounts, int]:
    """The counts of the file, and into how many groups the router sorts its experts.

    Raises:
        PlanError: they cannot be read, or do not allow what is wanted.
        GGUFError: the file is no model.
    """
    prefix, problems = f"{require_architecture(file)}.", list[str]()
    for key in ("expert_count", "expert_used_count", "expert_shared_count"):
        read_count(file, prefix + key, problems, 0, MAX_EXPERTS)
    n_group = read_count(file, prefix + "expert_group_count", problems, 0, MAX_EXPERTS)
    n_group_used = read_count(file, prefix + "expert_group_used_count", problems, 0, MAX_EXPERTS)
    read_count(file, prefix + "block_count", problems, limit=MAX_LAYERS)
    counts = read_counts(file)
    if problems or not counts.n_shared < counts.n_used <= counts.n_expert:
        problems = problems or ["has no experts; only a file with an expert_count can have fewer"]
        raise PlanError([f"{file.path}: {problem}" for problem in problems])
    shared = f", {counts.n_shared} of them shared" if counts.n_shared else ""
    has = f"{file.path}: has {counts.n_expert} experts in each layer{shared}"
    if not counts.n_shared < options.keep < counts.n_expert:
        raise PlanError([f"{has}; keep {counts.n_shared + 1} to {counts.n_expert - 1}"])
    if options.score == "frequency" and counts.n_used == counts.n_expert:
        raise PlanError([f"{has}, and every token runs all: frequency cannot tell them apart; use --score reap"])
    if n_group:
        _require_groups(counts, options, n_group, n_group_used, has)
    return counts, n_group or 1


def _require_groups(counts: ExpertCounts, options: PruneOptions, n_group: int, n_group_used: int, has: str) -> None:
    """Raise PlanError, which begins with what the file `has`, unless each group can keep equally many experts."""
    n_each, rest = divmod(options.keep - counts.n_shared, n_group)
    if rest or n_each < 2 or counts.n_routed % n_group:
        raise PlanError([f"{has}, routed in {n_group} groups of one size; keep 2 or more of each, equally many"])
    if (n_used := _choose_used(counts, options)) - counts.n_shared > (n_group_used or 1) * n_each:
        raise PlanError([f"{has}; {n_used} per token are more than the {n_group_used} chosen groups would have"])


def _require_tensors(file: GGUFFile, counts: ExpertCounts) -> ExpertTensors:
    """What is cut in each layer. Raises PlanError with all that does not fit the architecture."""
    check_architecture(file, found := Findings())
    tensors = find_expert_tensors(file, counts.n_routed, found.problems)
    if problems := [f"{file.path}: {problem}" for problem in found.problems] + refuse_alignment(file):
        raise PlanError(problems)
    return tensors


def _choose_used(counts: ExpertCounts, options: PruneOptions) -> int:
    return options.used or min(counts.n_used, options.keep)


def _watch(path: Path, setup: Setup, text: Text, n_token: int | None, progress: Progress) -> dict[int, LayerSums]:
    """Run the text in a child process; errors as `sum_answers`."""
    stream = stream_from_child(sum_answers, path, setup, text.text, n_token, what=f"running {path}")
    _, n_window = next(stream)
    with progress("score", n_window) as advance:
        while True:
            try:
                next(stream)
            except StopIteration as end:
                sums: dict[int, LayerSums] = end.value
                return sums
            advance(1)


def _note_louder(file: GGUFFile, counts: ExpertCounts, n_routed: int, n_used: int) -> Iterator[str]:
    """A sentence where the slices that stay weigh more than before, which makes the layer's answer too loud."""
    graph = find_graph(str(file.metadata["general.architecture"]))
    if graph is None or not is_sliced(file) or file.metadata.get("moe2gguf.slicing.amplify") == "any":
        return
    shares = {"renormalized": counts.n_used / n_used, "softmax": counts.n_routed / n_routed}
    if (factor := shares.get(graph.gating, 1.0)) > 1:
        way = f"let {counts.n_used} run and stay, or " if graph.gating == "renormalized" else ""
        yield (
            f"each slice that runs now weighs {factor:.2f} times as much as before, so the answers of the layers are "
            f"too loud; {way}slice the dense model by `moe2gguf convert --target glm4moe`, where weights stay"
        )


def _measure_loss(sums: LayerSums, kept: list[int]) -> float:
    """The share of the summed lengths of a layer's answers that came from experts which are not kept."""
    total = float(sums.lengths.sum())
    return 1 - float(sums.lengths[kept].sum()) / total if total else 0.0


def _change_metadata(
    file: GGUFFile, counts: ExpertCounts, tensors: ExpertTensors, keep: int, n_used: int
) -> dict[str, MetadataValue]:
    """The keys of the file with the new counts, without those that would be wrong now."""
    prefix = f"{file.metadata['general.architecture']}."
    metadata = {key: value for key, value in file.metadata.items() if key not in STALE and not key.startswith(PREFIX)}
    changes: dict[str, MetadataValue] = {
        prefix + "expert_count": keep - counts.n_shared,
        prefix + "expert_used_count": n_used - counts.n_shared,
        USED_HERE: n_used,
        "moe2gguf.slicing.expert_count": keep,
    }
    metadata |= {key: value for key, value in changes.items() if key in metadata}
    if metadata.get(prefix + "feed_forward_length") != tensors.d_expert:
        # without it llama.cpp divides the width of all used experts by their number
        metadata.setdefault(prefix + "expert_feed_forward_length", tensors.d_expert)
    return metadata


def _record(
    file: GGUFFile, counts: ExpertCounts, options: PruneOptions, text: Text, kept: Kept
) -> dict[str, MetadataValue]:
    """`moe2gguf.prune.*`: how this file was made; no path, no time. Experts have the numbers of the first original."""
    before, names = file.metadata.get(KEPT), np.tile(np.arange(counts.n_routed), (len(kept), 1))
    if isinstance(before, list) and len(before) == names.size and all(type(one) is int for one in before):
        names = np.array(before).reshape(names.shape)
    chosen = [int(one) for row, ids in zip(names, kept.values(), strict=True) for one in row[ids]]
    result: dict[str, MetadataValue] = {
        PREFIX + "version": version("moe2gguf"),
        PREFIX + "score": options.score,
        PREFIX + "expert_count": file.metadata.get(PREFIX + "expert_count", counts.n_expert),
        KEPT: chosen,
    }
    if options.score == "random":
        return {**result, PREFIX + "seed": options.seed}
    tokens = {} if options.n_token is None else {PREFIX + "tokens": options.n_token}
    return {**result, PREFIX + "text": text.label, PREFIX + "sha256": text.digest, **tokens}
