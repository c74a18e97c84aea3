"""Is a sliced file still its dense model? Both run in llama.cpp on the same tokens."""

import re
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe2gguf.experts.text import read_text
from moe2gguf.gguf.outputs import require_room
from moe2gguf.gguf.system import count_processors, temporary_folder
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.library import import_llama
from moe2gguf.llama.model import read_facts
from moe2gguf.measure import metrics
from moe2gguf.measure.logits import Reference, record_reference, score_file
from moe2gguf.measure.metrics import Summary
from moe2gguf.measure.token_ids import TokenCheck, compare_token_ids
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.assign import may_quantize
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.convert import Conversion, convert
from moe2gguf.recipes.inputs import read_inputs
from moe2gguf.recipes.options import CalibrationOptions, Options
from moe2gguf.recipes.plan import Plan, make_plan

KL_LIMIT = 2e-6
"""Mean KL divergence, in nats per token, that rounding in float32 explains on a real model."""

NOISE_FACTOR = 3.0
"""How many times the noise floor a difference may be before it counts."""

_N_BATCH = 128


@dataclass(frozen=True)
class Check:
    """What `compare_with_dense` returns; KL divergences are nats per token, over the whole vocabulary.

    difference  of the sliced file from the dense one
    noise       of the dense file from itself, token by token and on half the threads, over the first window:
                measured the same way, it is what the order of the sums alone does
    tokens      how the token ids compare with the tokenizer's, where there is a folder; no reason not to be `ok`, since
                a GGUF vocabulary cannot express every tokenizer
    """

    sliced: Path
    dense: Path
    n_expert: int
    n_expert_used: int
    difference: Summary
    noise: Summary
    tokens: TokenCheck | None = None

    @property
    def kl_limit(self) -> float:
        """The largest mean KL divergence that counts as none: KL_LIMIT, or NOISE_FACTOR times the noise floor."""
        return max(KL_LIMIT, NOISE_FACTOR * self.noise.kl_mean)

    @property
    def ok(self) -> bool:
        """Whether the two are one model as far as the noise can tell."""
        return self.difference.n_bad == 0 and self.difference.kl_mean <= self.kl_limit

    @property
    def reason(self) -> str:
        """Why it is ok, or not."""
        if self.difference.n_bad:
            return f"{self.difference.n_bad} logits are NaN or infinite"
        mean, limit = f"mean KL divergence {self.difference.kl_mean:.2g}", f"{self.kl_limit:.2g} nats per token"
        if self.ok:
            return f"{mean} is within {limit}: the same model"
        k, n = self.n_expert_used, self.n_expert
        return f"{mean} is above {limit}: another model{f', as expected with {k} of {n} experts' if k < n else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; numbers that are not finite become None."""
        figures = ("max_difference", "kl_mean", "kl_max", "top1", "perplexity")
        values = {
            "sliced": self.sliced,
            "dense": self.dense,
            "n_token": self.difference.n_token,
            "n_expert": self.n_expert,
            "n_expert_used": self.n_expert_used,
            **{name: getattr(self.difference, name) for name in figures},
            "perplexity_dense": self.difference.perplexity_base,
            **{f"noise_{name}": getattr(self.noise, name) for name in ("max_difference", "kl_mean", "top1")},
            "kl_limit": self.kl_limit,
            "ok": self.ok,
            "reason": self.reason,
        }
        tokens = self.tokens.to_dict() if self.tokens else None
        return {**{name: metrics.as_json(value) for name, value in values.items()}, "tokens": tokens}


def compare_with_dense(
    sliced: str | Path,
    dense: str | Path,
    *,
    n_token: int = 512,
    n_expert_used: int | None = None,
    n_context: int = 256,
    text: str | None = None,
    threads: int | None = None,
) -> Check:
    """Compare a sliced file with its dense parent in llama.cpp, in child processes, on the CPU.

    At least `n_token` positions are compared, in windows of `n_context` tokens, all positions but the last of
    each. `n_expert_used` defaults to all experts, where the sliced file should be the dense model. `text` defaults
    to the built-in one. The key/value cache is float32, so that what is left is the arithmetic of the weights.

    Raises HarnessError if llama.cpp cannot run a file, the vocabularies differ, the text is too short, or the
    temporary folder has no room for n_token * n_vocab * 4 bytes.
    """
    sliced, dense = Path(sliced), Path(dense)
    setup = Setup(n_context=n_context, n_batch=_N_BATCH, n_threads=threads)
    facts = run_in_child(read_facts, sliced, what=f"reading {sliced}")
    wanted: int | Literal["all"] = "all" if n_expert_used is None else n_expert_used
    text = read_text().text[: 16 * (n_token + n_context)] if text is None else text
    with temporary_folder() as folder:
        reference = record_reference(dense, setup, text, n_token, 0, folder / "logits")
        ours = _compare(sliced, replace(setup, n_expert_used=wanted), reference)
        noise = _compare(dense, reorder_sums(setup), reference, n_window=1)
    used = facts.n_expert if n_expert_used is None else n_expert_used
    return Check(facts.path, dense, facts.n_expert, used, ours, noise)


def _compare(path: Path, setup: Setup, reference: Reference, n_window: int | None = None) -> Summary:
    with closing(score_file(path, setup, reference, tail=-np.inf)) as scores:
        return metrics.summarize(metrics.join_scores(islice(scores, n_window)))


def reorder_sums(setup: Setup) -> Setup:
    """Return the same computation in another order.

    On CPUs only single tokens meet other kernels (dot products instead of matrix products), and the kernels of
    experts are those: batches of 3, 16, 50 and 64 gave the same bits as 128, and so did other thread counts.
    """
    n = setup.n_threads or count_processors()
    return replace(setup, n_batch=1, n_threads=max(1, n // 2))


def require_reference(dense: str) -> None:
    """Find out what `compare_conversion` needs; `dense` is as there.

    Raises:
        HarnessError: llama.cpp is not installed, or cannot load `dense`.
    """
    if dense == "auto":
        require_llama()
    else:
        run_in_child(read_facts, Path(dense), what=f"reading {dense}")


def require_check_room(dense: str | None, plan: Plan, out: Path) -> None:
    """Raise OutputError unless there is room for `out` and what `compare_conversion` makes beside it for "auto"."""
    if dense != "auto":
        return
    size = make_plan(plan.source, read_inputs(plan.source, _describe_dense(plan))).file_size
    require_room(out, plan.file_size + size, beside=" with the dense file to check it")


def require_llama() -> None:
    """Raise HarnessError where llama.cpp is not installed."""
    run_in_child(_import, what="looking for llama.cpp")


def _import() -> None:
    import_llama()


def compare_conversion(
    done: Conversion, dense: str, *, threads: int | None = None, progress: Progress = silent
) -> Check:
    """Compare the file `done` in llama.cpp with the dense file of the same checkpoint, at all experts.

    Of a folder the tokenizer is compared too, see `compare_token_ids`.

    `dense` is a path, or "auto": the dense file is made beside it from the same checkpoint, with the same type for
    every tensor, and removed afterwards.

    Raises:
        HarnessError: llama.cpp is not installed or cannot run a file.
    """
    source = done.plan.source
    tokens = compare_token_ids(done.path, source.folder) if isinstance(source, Checkpoint) else None
    if dense != "auto":
        return replace(compare_with_dense(done.path, Path(dense), threads=threads), tokens=tokens)
    with temporary_folder(beside=done.path) as folder:
        reference = folder / "dense.gguf"
        convert(source.path, reference, _describe_dense(done.plan), threads=threads, progress=progress)
        return replace(compare_with_dense(done.path, reference, threads=threads), tokens=tokens)


def _describe_dense(plan: Plan) -> Options:
    """The options of the dense file with the types of a sliced one."""
    return replace(
        plan.options,
        dense=True,
        experts=None,
        used=None,
        shard_size=None,
        types=_pin_types(plan),
        calibration=CalibrationOptions(),
    )


def _pin_types(plan: Plan) -> TypeOptions:
    """The type of every matrix of the plan, by its name in the dense file; no rules where all are as stored."""
    rules = (
        f"{re.escape(tensor.name.replace('_exps', ''))}={tensor.type.name}"
        for tensor in plan.tensors
        if may_quantize(tensor.name, tensor.shape)
    )
    return replace(
        plan.options.types,
        type_rules=None,
        target_size=None,
        target_bpw=None,
        tensor_types=tuple(rules) if plan.assigned.counts else (),
        allow_fallback=True,
    )
