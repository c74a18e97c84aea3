"""--target-size and --target-bpw: a file under the size, the rules of the user first, unreachable targets refused."""

from pathlib import Path
from typing import Any

import checkpoints
import imatrix_files
import pytest
import tiny_gguf
from click.testing import CliRunner
from flat_options import change_options, flat_options
from llama_logits import llama_logits, mean_kl

from moe2gguf import convert, plan_conversion
from moe2gguf.cli import cli
from moe2gguf.errors import PlanError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import plan_quantization, quantize

TOKENS = [1, *range(10, 60)]


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four experts, 256 wide, with a random router."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(0, n_layer=2, d_model=256, d_ff=1024), 4, router_seed=1)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("sliced") / "sliced.gguf", weights)


def test_a_file_comes_out_just_under_the_size(sliced: Any, tmp_path: Path) -> None:
    """Two percent at most are left; twice the same bytes; router and norms are F32; llama.cpp runs it."""
    n_bytes = 2_300_000
    options = TypeOptions(target_size=n_bytes)

    quantize(sliced, tmp_path / "a.gguf", options, threads=2)
    quantize(sliced, tmp_path / "b.gguf", options, threads=1)

    file = read_gguf(tmp_path / "a.gguf")
    assert 0.98 * n_bytes <= file.file_size <= n_bytes
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    kept = {t.type.name for name, t in file.tensors.items() if "norm" in name or "gate_inp" in name}
    assert {"F32"} == kept
    assert mean_kl(llama_logits(sliced, TOKENS), llama_logits(tmp_path / "a.gguf", TOKENS)) < 0.2


def test_bits_per_weight_and_the_users_rules(sliced: Any) -> None:
    """Of all tensors together; what the user pins stays pinned, and the plan names the rules."""
    options = TypeOptions(target_bpw=7.0, tensor_types=(r"token_embd\.weight=q8_0",))

    plan = plan_quantization(sliced, options)

    assert 6.9 <= plan.bits_per_weight <= 7.0
    assert "Q8_0" == plan.assigned.types["token_embd.weight"].name
    origins = {rule["origin"] for rule in plan.to_dict()["rules"]}
    assert {"--tensor-type token_embd\\.weight=q8_0", "--target-bpw"} == origins
    assert sum(rule["tensors"] for rule in plan.to_dict()["rules"]) == 2 + 2 * 7


def test_more_room_is_never_worse(sliced: Any, tmp_path: Path) -> None:
    """Nearer to the source with every step of the target."""
    base = llama_logits(sliced, TOKENS)
    losses = []
    for bits in (5.5, 7.0, 9.0):
        quantize(sliced, tmp_path / f"{bits}.gguf", TypeOptions(target_bpw=bits))
        losses.append(mean_kl(base, llama_logits(tmp_path / f"{bits}.gguf", TOKENS)))

    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_size": 1000}, r"--target-size 1,000: reachable are [\d,]+ to [\d,]+ bytes"),
        ({"target_bpw": 0.6}, r"--target-bpw 0\.6: reachable are \d+\.\d\d to \d+\.\d\d bits per weight"),
        ({"target_bpw": 30.0}, "reachable are"),
        ({"target_size": 2_500_000, "target_bpw": 5.0}, "give one of them"),
        ({"target_bpw": 7.0, "type": "q4_k"}, "a target chooses the types"),
        ({"target_bpw": 7.0, "pure": True}, "--pure: has no meaning"),
    ],
)
def test_targets_that_are_refused(sliced: Any, changes: Any, words: str) -> None:
    """Out of reach, with the range; together with choices that say something else."""
    with pytest.raises(PlanError, match=words):
        plan_quantization(sliced, TypeOptions(**changes))


def test_the_named_range_is_reachable(sliced: Any) -> None:
    """Its lower end, and its upper end, are targets that are met."""
    with pytest.raises(PlanError) as caught:
        plan_quantization(sliced, TypeOptions(target_size=1000))
    words = caught.value.refusals[0].split("reachable are ")[1].split(" bytes")[0]
    high = int(words.split(" to ")[1].replace(",", ""))

    assert plan_quantization(sliced, TypeOptions(target_size=high)).file_size <= high
    with pytest.raises(PlanError):
        plan_quantization(sliced, TypeOptions(target_size=high + 1))


def test_convert_meets_a_target_with_and_without_a_matrix(tmp_path: Path) -> None:
    """In one pass, in experts padded to whole blocks; an importance matrix changes what is chosen or how it is made."""
    folder = checkpoints.make(tmp_path / "model", num_hidden_layers=1)
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True))
    shapes = {t.name: t.shape for t in read_gguf(tmp_path / "dense.gguf").tensors.values()}
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", imatrix_files.statistics_for(shapes))
    options = flat_options(4, align=32, target_bpw=8.0)

    for name, chosen in {"plain": options, "guided": change_options(options, imatrix=matrix)}.items():
        done = convert(folder, tmp_path / f"{name}.gguf", chosen)
        assert 7.0 <= done.plan.bits_per_weight <= 8.0
        assert read_gguf(tmp_path / f"{name}.gguf").tensors["blk.0.ffn_gate_inp.weight"].type.name == "F32"
    with pytest.raises(PlanError, match="reachable are"):
        plan_conversion(folder, change_options(options, target_bpw=2.0))


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("2.3MB", 2_300_000), ("2.2MiB", 2_306_867), ("2300k", 2_300_000), ("2300000", 2_300_000)]
)
def test_sizes_as_people_write_them(sliced: Any, tmp_path: Path, text: str, n_bytes: int) -> None:
    """Decimal and binary; the type may be left out then; nonsense is wrong usage."""
    out = tmp_path / "out.gguf"
    done = CliRunner().invoke(cli, ["quantize", str(sliced), str(out), "--target-size", text])

    assert 0 == done.exit_code, done.output
    assert 0.95 * n_bytes <= out.stat().st_size <= n_bytes
    assert 2 == CliRunner().invoke(cli, ["quantize", str(sliced), str(out), "--target-size", "much"]).exit_code
    assert 2 == CliRunner().invoke(cli, ["quantize", str(sliced), str(tmp_path / "other.gguf")]).exit_code
