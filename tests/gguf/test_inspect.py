"""`inspect` tells what a file contains, in numbers that can be checked by hand and in text that is safe to print."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf_bytes as g
import pytest
import tiny_gguf
from rich.console import Console

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.inspect import Experts, Inspection, MetadataRow, TensorRow, TypeUse, inspect, print_inspection
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize


@pytest.fixture
def inspected(tmp_path: Path) -> Any:
    """Inspect a file of these bytes."""

    def _inspect(raw: bytes) -> Inspection:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return inspect(path)

    return _inspect


def printed(inspection: Inspection, *, terminal: bool = False, encoding: str = "utf-8", tensors: bool = False) -> str:
    """What `print_inspection` writes to an 80 columns wide terminal, or to a pipe."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    print_inspection(inspection, Console(file=file, force_terminal=terminal, width=80), tensors=tensors)
    file.flush()
    return raw.getvalue().decode(encoding)


def squeezed(text: str) -> str:
    """Every run of spaces as one, for tables are aligned."""
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


MOE = g.LlamaFile(n_expert=4, n_used=1, n_layer=2, make=g.f16)
# per layer: q 16x16, k and v 8x16, o 16x16, two norms of 16, router 4x16; experts 3 x (4 x 24 x 16)
ALWAYS = 10 * 16 + 16 + 2 * (256 + 128 + 128 + 256 + 32 + 64)
EXPERTS = 2 * 3 * 4 * 24 * 16


def test_the_numbers_of_a_mixture_of_experts(inspected: Any) -> None:
    """Parameters in all and per token, experts, and bits per weight, against a count by hand."""
    it = inspected(MOE.bytes())

    assert it.experts == Experts(count=4, used=1, d_expert=24)
    assert (it.n_parameters, it.n_active) == (ALWAYS + EXPERTS, ALWAYS + EXPERTS // 4)
    n_f32 = 16 + 2 * (32 + 64)
    n_f16 = it.n_parameters - n_f32
    assert it.types == (TypeUse("F16", 15, n_f16, 2 * n_f16), TypeUse("F32", 7, n_f32, 4 * n_f32))
    assert it.bits_per_weight == (16 * n_f16 + 32 * n_f32) / it.n_parameters
    assert (it.architecture, it.name, it.n_layer, it.d_model, it.version) == ("llama", "Tiny", 2, 16, 3)
    assert it.file_size == it.path.stat().st_size


def test_a_dense_model_has_no_experts(inspected: Any) -> None:
    """In a dense file every parameter is active."""
    it = inspected(g.LlamaFile().bytes())

    assert it.experts is None
    assert it.n_active == it.n_parameters


def test_an_unclear_used_count_gives_no_active_number(inspected: Any) -> None:
    """A used count per layer, or one above the count, is shown as unclear, and never guessed."""
    model = g.LlamaFile(n_expert=4).set_array("llama.expert_used_count", "u32", [1, 2])

    it = inspected(model.bytes())

    assert (it.experts, it.n_active) == (Experts(4, None, 24), None)
    assert "4, of which a token uses an unclear number, each 24 wide" in printed(it)
    assert inspected(g.LlamaFile(n_expert=4, n_used=5).bytes()).n_active is None


def test_a_file_made_for_one_count_says_so(inspected: Any) -> None:
    """Where its experts were amplified for a count; a file that was made to be exact says nothing."""
    model = g.LlamaFile(n_expert=4, n_used=2).set("moe2gguf.slicing.amplify", "str", "used")
    assert "amplified for 2 of them; more or fewer make it worse" in printed(inspected(model.bytes()))
    exact = g.LlamaFile(n_expert=4, n_used=2).set("moe2gguf.slicing.amplify", "str", "exact")
    assert inspected(exact.bytes()).experts == Experts(4, 2, 24, "")


def test_tensors_and_metadata_are_listed_in_the_files_order(inspected: Any) -> None:
    """Each tensor with shape, type, size and place; each key with its type, long lists by their beginning."""
    keys = [g.key("b", "f32", 0.5), g.array("a", "u8", list(range(20)))]
    it = inspected(g.gguf(keys, [g.Tensor("q", (2, 32), g.Q8_0, bytes(68)), g.f32("f", (3,))]))

    assert it.metadata == (
        MetadataRow("b", "FLOAT32", 0.5),
        MetadataRow("a", "ARRAY of UINT8", [0, 1, 2, 3, 4, 5, 6, 7], length=20),
    )
    assert it.tensors == (
        TensorRow("q", (2, 32), "Q8_0", 68, 160, 8.5),
        TensorRow("f", (3,), "F32", 12, 256, 32.0),
    )


def test_provenance_is_gathered(inspected: Any) -> None:
    """Our own keys are found together."""
    model = g.LlamaFile(n_expert=4).set("moe2gguf.version", "str", "0.1.0").set("moe2gguf.seed", "u32", 7)

    assert inspected(model.bytes()).provenance == {"moe2gguf.version": "0.1.0", "moe2gguf.seed": 7}


def test_the_record_survives_json(inspected: Any) -> None:
    """Strict JSON, even where the file has NaN and bytes that are no text; nothing else is changed."""
    model = g.LlamaFile(n_expert=4).set("moe2gguf.odd", "f32", float("nan"))
    model.set("general.name", "str", b"\xff\x1b[2J")
    it = inspected(model.bytes())

    record = json.loads(json.dumps(it.to_dict(), allow_nan=False, ensure_ascii=False).encode())

    assert record == it.to_dict()
    assert record["provenance"] == {"moe2gguf.odd": "nan"}
    assert record["name"] == "\\xff\x1b[2J"
    assert record["experts"] == {"count": 4, "used": 2, "d_expert": 24, "note": "", "shared": 0}
    assert record["tensors"][0] == {
        "name": "token_embd.weight",
        "shape": [10, 16],
        "type": "F32",
        "n_bytes": 640,
        "offset": it.tensors[0].offset,
        "bits_per_weight": 32.0,
    }


def test_the_text_says_what_the_file_is(inspected: Any) -> None:
    """Summary first, then metadata and types; the tensors only when asked for."""
    it = inspected(MOE.bytes())

    text, everything = squeezed(printed(it)), squeezed(printed(it, tensors=True))

    assert f"\nparameters {it.n_parameters:,}\n" in text
    assert f"\nactive per token {it.n_active:,} ({it.n_active / it.n_parameters:.1%})\n" in text
    assert "\nexperts 4, of which a token uses 1, each 24 wide\n" in text
    assert "\nllama.attention.layer_norm_rms_epsilon (FLOAT32): 1e-05\n" in text
    assert "\ntokenizer.ggml.tokens (ARRAY of STRING): 10: [t0, t1, t2, t3, t4, t5, t6, t7, ...]\n" in text
    mix = g.LlamaFile().set("general.file_type", "u32", 15)
    assert "\nfile type Q4_K_M\n" in squeezed(printed(inspected(mix.bytes())))
    assert text.index("parameters") < text.index("Metadata") < text.index("Tensor types")
    assert "blk.0.attn_q.weight" not in text
    assert "\nblk.0.ffn_down_exps.weight 4 x 16 x 24 F16 3,072 16\n" in everything


def test_a_pipe_gets_whole_names_and_no_colors(inspected: Any) -> None:
    """Into a pipe, a long key and its value stand on one line, without escapes and without trailing spaces."""
    name = "general." + "very_" * 30 + "long"
    model = g.LlamaFile().set(name, "str", "value " * 15)

    text = printed(inspected(model.bytes()))

    assert f"{name} (STRING): {('value ' * 15).strip()}\n" in text
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line != line.rstrip()] == []


def test_a_terminal_loses_nothing(inspected: Any) -> None:
    """A long key is whole on a line of its own, which the terminal wraps."""
    name = "general." + "abcdefghij" * 10

    text = printed(inspected(g.gguf([g.key(name, "u32", 1)])), terminal=True)

    assert f"\n{name} (UINT32): 1\n" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_hostile_text_cannot_reach_the_terminal(inspected: Any, terminal: bool) -> None:
    """Escape sequences, line ends, direction marks and markup in names and values come out as plain text."""
    evil = "\x1b[2J\x9b31m\r\n\x07\u202e[red]x[/red] :smile: [link=file:///etc]y[/link]"
    keys = [g.key("general.architecture", "str", evil), g.key("general.name", "str", evil), g.key(evil, "str", evil)]
    keys += [g.array("list", "str", [evil, b"\xff"])]

    text = printed(inspected(g.gguf(keys, [g.f32("t\x1b[0m[bold]", (1,))])), terminal=terminal, tensors=True)

    for character in "\x9b\r\x07\u202e":
        assert character not in text
    assert "\x1b[2J" not in text
    assert "\x1b[0m[" not in text
    assert terminal or text.replace("\n", "").isprintable()
    for words in ("\\x1b[2J\\x9b31m\\r\\n\\x07\\u202e", "[red]x[/red]", ":smile:", "t\\x1b[0m[bold]"):
        assert terminal or words in text


def test_an_encoding_without_the_characters_is_no_error(inspected: Any) -> None:
    """Where the output knows only ASCII, other characters are written as escapes."""
    it = inspected(g.gguf([g.array("tokens", "str", ["Ġa", "日"])]))

    assert "2: [\\u0120a, \\u65e5]" in printed(it, encoding="ascii")


def test_long_values_are_shortened_in_the_text_only(inspected: Any) -> None:
    """A chat template fills one line of the table; the record has it whole."""
    template = "{{ message }}" * 1000
    it = inspected(g.gguf([g.key("tokenizer.chat_template", "str", template)]))

    assert f"{template[:120]}... (13,000 characters)" in printed(it)
    assert it.to_dict()["metadata"][0]["value"] == template


def test_a_file_without_tensors_is_inspected(inspected: Any) -> None:
    """A vocabulary file has metadata to show, and no bits per weight."""
    it = inspected(g.gguf([g.key("general.architecture", "u32", 5)]))

    assert (it.architecture, it.n_parameters, it.bits_per_weight, it.types) == (None, 0, None, ())
    assert "architecture  not given" in printed(it)


def test_a_cut_file_is_refused(inspected: Any) -> None:
    """A file that lost its end is an error that names the tensor, not a table of half the truth."""
    with pytest.raises(GGUFError, match=r"'blk\.1\.ffn_down_exps\.weight'; it is cut"):
        inspected(MOE.bytes()[:-40])


def test_a_shard_shows_the_whole_set(tmp_path: Path) -> None:
    """Its tensors, bits per weight and size; a missing shard is named."""
    whole = tiny_gguf.write_gguf(tmp_path / "a.gguf", tiny_gguf.dense_weights())
    done = quantize(whole, tmp_path / "m.gguf", TypeOptions("q8_0"), shard_size=100_000)

    it = inspect(done.path)

    assert 1 < len(done.plan.shards)
    assert (len(done.plan.tensors), done.plan.file_size) == (len(it.tensors), it.file_size)
    assert it.bits_per_weight is not None
    assert round(it.bits_per_weight, 4) == round(done.plan.bits_per_weight, 4)
    done.path.with_name(done.path.name.replace("00001-of", "00002-of")).unlink()
    with pytest.raises(GGUFError, match=r"00002-of-0000.*is missing"):
        inspect(done.path)
