"""The table of scripts/bench quality: every method on one model, one text, one run. Started by bench_quality.py.

What fits llama.cpp's graph is written as a GGUF file and scored there by `moe2gguf compare`; CMoE's router does not, so
that row is computed by transformers, beside the dense model. The first 70 % of the text calibrate, the rest scores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe2gguf.experts.calibration import CalibrationSettings, Slicer, calibrate
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.mlp import LayerInputs, SlicedLayer
from moe2gguf.experts.slice_layer import slice_layer
from moe2gguf.experts.text import Text, read_text
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.llama.windows import cut_windows
from moe2gguf.measure.compare import CompareSettings, compare
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.calibrate import open_calibration_model
from moe2gguf.recipes.convert import convert, plan_conversion
from moe2gguf.recipes.inputs import Inputs
from moe2gguf.recipes.options import CalibrationOptions, MethodOptions, Options
from moe2gguf.recipes.plan import Plan
from moe2gguf.recipes.tensors import ExpertSource, loaded_experts
from moe2gguf.spec import Slicing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts/
import rivals
from measure import machine, table, write_json

SPLIT = 0.7
N_EXPERT = 16
N_CONTEXT = 512


@dataclass(frozen=True)
class Run:
    """What all methods share: the model, the texts of calibration and of scoring, and where files go."""

    model: Path
    calibration: Path
    held_out: str
    n_token: int
    n_window: int
    threads: int
    work: Path

    def options(self, k: int, **method: Any) -> Options:
        """A conversion at k of N_EXPERT experts; `method` are fields of `MethodOptions`."""
        calibration = CalibrationOptions(self.calibration, self.n_token)
        return Options(N_EXPERT, k, types=TypeOptions("f16"), method=MethodOptions(**method), calibration=calibration)


@dataclass(frozen=True)
class Method:
    """A row of the table: its name, its source, and how it makes a file for k experts used."""

    name: str
    source: str
    make: Callable[[Run, int, Path], None]


def by_options(**changes: Any) -> Callable[[Run, int, Path], None]:
    """A method that `moe2gguf convert` has."""
    return lambda run, k, out: _ignore(convert(run.model, out, run.options(k, **changes), threads=run.threads))


def _ignore(_: object) -> None:
    return None


def by_slicer(slicer: Callable[[int], Slicer], *, refit: bool = False, all_shared: bool = False) -> Any:
    """A method of ours or of others that is a slicer; `all_shared` runs a fixed choice of neurons."""

    def make(run: Run, k: int, out: Path) -> None:
        def find_experts(
            plan: Plan, inputs: Inputs, work: Path, progress: Progress, *, resume: bool = True
        ) -> ExpertSource:
            del inputs, progress, resume
            slicing = cut_of(plan)
            if all_shared:
                slicing = replace(slicing, method=replace(slicing.method, group="activations", n_shared=k))
            _calibrate(run, plan, slicing, work, slicer(k))
            load, finish = functools.partial(LayerExperts.load, work), functools.partial(shutil.rmtree, work)
            return loaded_experts(load, (), (), finish)

        convert(run.model, out, run.options(k, refit=refit), threads=run.threads, find_experts=find_experts)

    return make


def cut_of(plan: Plan) -> Slicing:
    """How the plan cuts; every plan here does."""
    assert plan.slicing is not None
    return plan.slicing


def _calibrate(run: Run, plan: Plan, slicing: Slicing, work: Path, slicer: Slicer) -> None:
    settings, text = CalibrationSettings(run.n_token, N_CONTEXT), read_text(run.calibration)
    calibrate(open_calibration_model(plan.source), text, slicing, settings, work, silent, slicer)


def flap(keep: Callable[[Sequence[rivals.Fluctuation], float], list[torch.Tensor]]) -> Any:
    """A dense file with the pruned neurons' columns at zero and a bias in their place."""

    def make(run: Run, k: int, out: Path) -> None:
        layers = _fluctuations(run)
        masks = keep(layers, k / N_EXPERT)
        changed: dict[str, np.ndarray] = {}
        for i, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
            changed[f"blk.{i}.ffn_down.weight"] = (layer.down * mask[:, None]).T.contiguous().numpy()
            changed[f"blk.{i}.ffn_down.bias"] = rivals.flap_bias(layer, mask).numpy()
        rewrite(run.work / "dense.gguf", out, changed)

    return make


@functools.lru_cache(maxsize=1)
def _fluctuations(run: Run) -> list[rivals.Fluctuation]:
    """FLAP's statistics of every layer, from one pass of the dense model."""
    plan = plan_conversion(run.model, run.options(N_EXPERT, group="contiguous", router="least-squares", refit=False))
    found = []

    def watch(mlp: Any, inputs: LayerInputs, slicing: Slicing) -> SlicedLayer:
        found.append(rivals.fluctuation(mlp, inputs.streams[0].x))
        return slice_layer(mlp, inputs, slicing)

    work = run.work / "fluctuations"
    _calibrate(run, plan, cut_of(plan), work, watch)
    shutil.rmtree(work)
    return found


def rewrite(source: Path, target: Path, changed: dict[str, np.ndarray]) -> None:
    """A GGUF file again, with some tensors changed (in their own type) or added (in F32)."""
    import gguf

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, of)
    for tensor in reader.tensors:
        new = changed.pop(tensor.name, None)
        writer.add_tensor(tensor.name, tensor.data if new is None else new.astype(tensor.data.dtype))
    for name, data in changed.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cmoe_shared(k: int) -> int:
    """CMoE's settings S3A3E8 at 75 % and S2A2E8 at 50 %: half of those that run are shared."""
    return k // 2


METHODS = (
    Method("contiguous, zero router", "kalomaze/Mistral-7b-MoEified-8x", by_options(preset="exact")),
    Method(
        "random, least squares",
        "LLaMA-MoE's split, our router",
        by_slicer(lambda _: rivals.random_groups),
    ),
    Method("EMoE", "arXiv 2310.10908", by_slicer(lambda _: rivals.emoe)),
    Method(
        "ExpertWeaver's rule, CMoE's split",
        "arXiv 2602.15521",
        by_slicer(lambda _: functools.partial(rivals.expert_weaver, n_context=N_CONTEXT)),
    ),
    Method("FLAP, uniform", "arXiv 2312.11983", flap(rivals.flap_uniform)),
    Method("FLAP, its standard rule", "arXiv 2312.11983", flap(rivals.flap_standard)),
    Method("static, most important neurons", "ours", by_slicer(lambda _: slice_layer, all_shared=True)),
    Method("static + our refit", "ours", by_slicer(lambda _: slice_layer, all_shared=True, refit=True)),
    Method("ours, no refit", "ours", by_options(refit=False)),
    Method("ours, no refit, fitted loudness", "ours", by_options(refit=False, amplify="fitted")),
    Method("ours, refit", "ours", by_options(refit=True)),
)


def with_shared(count: int) -> Method:
    """Ours with another number of shared experts than the default."""
    return Method(f"ours, refit, {count} shared", "ours", by_options(refit=True, n_shared=count))


def main() -> None:
    """Make every file, score it, remove it; print the table."""
    options = parse()
    run = prepare(options)
    began = time.monotonic()
    dense = run.work / "dense.gguf"
    convert(run.model, dense, Options(dense=True, types=TypeOptions("f16")), force=True, threads=run.threads)
    rows = []
    for k in options.used:
        for method in (*METHODS, *(with_shared(count) for count in options.shared if count < k)):
            if re.search(options.only, method.name):
                rows.append(scored(run, method, k, dense))
        if re.search(options.only, "CMoE"):
            rows.append(cmoe_row(run, k))
    result = {
        "model": options.model.name,
        "machine": machine(),
        "n_expert": N_EXPERT,
        "calibration_tokens": run.n_token,
        "windows": run.n_window,
        "context": N_CONTEXT,
        "text_sha256": hashlib.sha256(run.held_out.encode()).hexdigest(),
        "seconds": round(time.monotonic() - began),
        "rows": rows,
    }
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse() -> argparse.Namespace:
    """The options, checked by bench_quality.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--used", type=numbers, default=[12, 8])
    parser.add_argument("--shared", type=numbers, default=[])
    for name, default in (("tokens", 16384), ("windows", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """12,8 -> [12, 8]."""
    return [int(part) for part in text.split(",")]


def prepare(options: argparse.Namespace) -> Run:
    """Cut the text in two, and make room."""
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    whole = read_text(options.text).text
    cut_at = int(SPLIT * len(whole))
    calibration = options.work / "calibration.txt"
    calibration.write_text(whole[:cut_at], encoding="utf-8")
    return Run(
        options.model, calibration, whole[cut_at:], options.tokens, options.windows, options.threads, options.work
    )


def scored(run: Run, method: Method, k: int, dense: Path) -> dict[str, Any]:
    """Make a method's file, compare it with the dense one in llama.cpp, remove it."""
    out, began = run.work / "rival.gguf", time.monotonic()
    out.unlink(missing_ok=True)
    method.make(run, k, out)
    settings = CompareSettings(
        text=Text(run.held_out, "held-out"), n_token=run.n_window * (N_CONTEXT // 2 - 1), n_context=N_CONTEXT,
        threads=run.threads,
        journal=run.work / "journal.jsonl",
    )  # fmt: skip
    found = compare([out], dense, settings=settings)
    row, base = found.rows[0], found.base
    if row.status != "ok" or base is None:
        raise SystemExit(f"{method.name}: {row.reason}")
    out.unlink()
    flat = row.flat()
    print(f"  {method.name}, {k} of {N_EXPERT}: {flat['perplexity']:.2f}", file=sys.stderr, flush=True)
    return {
        "method": method.name,
        "source": method.source,
        "n_expert_used": k,
        "perplexity": flat["perplexity"],
        "perplexity_dense": base.perplexity_base,
        "kl": flat["kl_mean"],
        "scored_by": "llama.cpp",
        "seconds": round(time.monotonic() - began),
    }


def cmoe_row(run: Run, k: int) -> dict[str, Any]:
    """CMoE in PyTorch, beside the dense model on the same windows."""
    began = time.monotonic()
    plan = plan_conversion(run.model, run.options(k, refit=False))
    layers: list[SlicedLayer] = []

    def keep(mlp: Any, inputs: LayerInputs, slicing: Slicing) -> SlicedLayer:
        layers.append(rivals.cmoe(mlp, inputs, slicing, n_shared=cmoe_shared(k)))
        return layers[-1]

    work = run.work / "cmoe"
    _calibrate(run, plan, cut_of(plan), work, keep)
    shutil.rmtree(work)
    ids = held_out_ids(run, open_checkpoint(run.model).vocabulary.first_id)
    perplexity, perplexity_dense = torch_perplexity(run.model, ids, layers, k), torch_perplexity(run.model, ids, [], k)
    print(f"  CMoE, {k} of {N_EXPERT}: {perplexity:.2f}", file=sys.stderr, flush=True)
    return {
        "method": "CMoE",
        "source": "arXiv 2502.04416",
        "n_expert_used": k,
        "perplexity": perplexity,
        "perplexity_dense": perplexity_dense,
        "kl": None,
        "scored_by": "PyTorch",
        "seconds": round(time.monotonic() - began),
    }


def held_out_ids(run: Run, bos: int | None) -> np.ndarray:
    """The windows that `compare` cuts: (n_window, N_CONTEXT)."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(run.model / "tokenizer.json")).encode(run.held_out, add_special_tokens=False).ids
    first = N_CONTEXT // 2
    n_token = run.n_window * (N_CONTEXT - 1 - first)
    return cut_windows(np.array(tokens, np.int32), n_token=n_token, n_context=N_CONTEXT, first=first, bos=bos).tokens


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
def torch_perplexity(model: Path, ids: np.ndarray, layers: Sequence[SlicedLayer], k: int) -> float:
    """Perplexity of the second half of each window; `layers` take the place of the model's MLPs."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    for block, sliced in zip(network.model.layers, layers, strict=False):
        block.mlp.forward = lambda x, sliced=sliced: sliced(x.flatten(0, 1), k).reshape(x.shape)
    return math.exp(float(np.mean(list(_losses(network, ids)))))


def _losses(network: Any, ids: np.ndarray) -> Iterator[float]:
    first = N_CONTEXT // 2
    for window in ids:
        tokens = torch.from_numpy(window.astype(np.int64))[None]
        logits = network(tokens).logits[0, first:-1]
        yield float(torch.nn.functional.cross_entropy(logits, tokens[0, first + 1 :]))


def report(result: dict[str, Any]) -> str:
    """The Markdown table: one row per method, one pair of columns per count."""
    counts = list(dict.fromkeys(row["n_expert_used"] for row in result["rows"]))
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        cells.setdefault(row["method"], {})[row["n_expert_used"]] = row
    header = ["", *(text for k in counts for text in (f"{k / result['n_expert']:.0%}: perplexity", "over dense"))]
    lines = []
    for name, by_count in cells.items():
        values = [name]
        for k in counts:
            row = by_count.get(k)
            values += (
                [f"{row['perplexity']:,.2f}", f"{row['perplexity'] / row['perplexity_dense']:,.2f}"]
                if row
                else [""] * 2
            )
        lines.append(values)
    dense = result["rows"][0]["perplexity_dense"] if result["rows"] else math.nan
    scored_tokens = result["windows"] * (result["context"] // 2 - 1)
    return "\n".join(
        [
            "",
            table(header, lines),
            "",
            f"{result['model']}, {result['n_expert']} experts, {result['calibration_tokens']:,} calibration tokens, "
            f"{scored_tokens:,} scored tokens of other text of the same kind; dense perplexity {dense:.2f}. CMoE is "
            f"scored in PyTorch, all others in llama.cpp. {result['machine']['processor']}, {result['seconds']:,} s.",
        ]
    )


if __name__ == "__main__":
    main()
