"""moe2gguf.hf.config: typed reads that collect every problem, and every way rope settings are written."""

import copy
from typing import Any

import pytest
from transformers import LlamaConfig

from moe2gguf.hf.config import read_family, read_model
from moe2gguf.hf.families import FAMILIES, REFUSED
from moe2gguf.spec import Rope

GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def read(**changes: Any) -> Any:
    """(model, problems, warnings) of GOOD with changes; None removes a key."""
    values = {key: value for key, value in (GOOD | changes).items() if value is not None}
    problems: list[str] = []
    warnings: list[str] = []
    family = read_family(values, problems)
    model = read_model(values, family, problems, warnings) if family else None
    return model, problems, warnings


def test_a_sound_config_has_no_problems() -> None:
    """Everything is read under its glossary name."""
    model, problems, warnings = read()

    assert ([], []) == (problems, warnings)
    assert (64, 96, 2, 4, 2, 16) == (
        model.d_model,
        model.d_ff,
        model.n_layer,
        model.n_head,
        model.n_head_kv,
        model.d_head,
    )
    assert (False, False, False) == (model.tied_embeddings, model.bias_qkv, model.bias_output)


@pytest.mark.parametrize("kind", [None, "llama", "smollm", 5])
def test_a_model_type_that_transformers_would_not_take_for_another_is_let_be(kind: object) -> None:
    """Its own, none, and one of nobody's."""
    assert [] == read(model_type=kind)[1]


def test_without_its_sizes_there_is_no_model() -> None:
    """Nothing is compared with sizes that are not there."""
    assert read(hidden_size="64")[0] is None
    assert read(rms_norm_eps="tiny")[0] is not None


def test_all_problems_come_at_once() -> None:
    """Three faults, three messages, each naming the key and what was expected."""
    _, problems, _ = read(hidden_act="gelu", mlp_bias=True, rms_norm_eps="tiny", vocab_size=None)

    assert ["hidden_act", "mlp_bias", "vocab_size", "rms_norm_eps"] == [
        next(key for key in (*GOOD, "mlp_bias") if f" {key} " in problem) for problem in problems
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu_new"}, "SiLU only"),
        ({"mlp_bias": True}, "no MLP biases"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        ({"use_qk_norm": True}, "q/k norms"),
        ({"model_type": "deepseek_v2"}, "model_type, which counts in transformers, is 'deepseek_v2'"),
        ({"model_type": "qwen2"}, "model_type, which counts in transformers, is 'qwen2'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast is not 32"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [1]}, "one flat object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat object"),
        ({"rope_theta": float("inf")}, "finite"),
        ({"rms_norm_eps": 10**400}, "finite"),
        ({"num_hidden_layers": 10**9}, "1 to 512"),
        ({"num_hidden_layers": True}, "expected an integer"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 15}, "odd"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"architectures": ["A", "B"]}, "list with one name"),
        ({"architectures": None}, "list with one name"),
        ({"architectures": ["UnheardOf"]}, "does not know it"),
    ],
)
def test_each_refusal_says_what_and_why(changes: Any, words: str) -> None:
    """Anything the target graph cannot express, and anything mistyped."""
    _, problems, _ = read(**changes)

    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize("name", REFUSED)
def test_known_foreign_architectures_are_refused_with_their_reason(name: Any) -> None:
    """Each names what the target graph lacks, and what is supported."""
    _, problems, _ = read(architectures=[name])

    assert [f"config.json: {name} is not supported: {REFUSED[name]}. Supported: {', '.join(FAMILIES)}"] == problems


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Rope(10000.0)),
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}, Rope(3e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(5e5, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, Rope(10000.0, "yarn", 4.0, 128)),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 32,
                                 "original_max_position_embeddings": 32, "attention_factor": 1.5}},
            Rope(1e6, "yarn", 4.0, 32, attention_factor=1.5),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
            Rope(5e5, "llama3", 8.0, 64, 1.0, 4.0),
        ),
    ],
)  # fmt: skip
def test_rope_settings_old_and_new(changes: Any, expected: Any) -> None:
    """`rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`, mean the same."""
    model, problems, _ = read(**changes)

    assert ([], expected) == (problems, model.rope)


LINEAR, LLAMA3 = {"rope_type": "linear", "factor": 2.0}, {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": PLAIN, "rope_theta": 5e5, "rope_scaling": LINEAR},
        {"rope_parameters": PLAIN, "rope_scaling": LINEAR | {"rope_theta": 5e5}},
        {"rope_parameters": PLAIN, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": {}},
        {"rope_parameters": {}, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if not key.startswith("original")}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ],
)
def test_both_rope_objects_are_read_as_transformers_reads_them(changes: Any) -> None:
    """`rope_scaling` counts, `rope_theta` comes from the objects or from beside them."""
    values = {key: value for key, value in GOOD.items() if key != "architectures"}
    theirs = LlamaConfig(**values | copy.deepcopy(changes)).rope_parameters

    model, problems, _ = read(**changes)

    assert [] == problems
    assert (theirs["rope_theta"], theirs["rope_type"], theirs["factor"]) == (
        model.rope.theta, model.rope.kind, model.rope.factor,
    )  # fmt: skip
    assert theirs.get("original_max_position_embeddings") == model.rope.original_context


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": LINEAR}, "rope_parameters: rope_theta is 500000.0"),
        ({"rope_parameters": PLAIN, "rope_theta": 1e4}, "config.json: rope_theta is 10000.0"),
        ({"rope_parameters": LLAMA3, "rope_scaling": LINEAR}, "rope_type is 'llama3'"),
        ({"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "default"}}, "rope_type is 'llama3'"),
        ({"rope_parameters": LINEAR | {"factor": 4.0}, "rope_scaling": LINEAR}, "factor is 4.0"),
        ({"rope_scaling": LINEAR | {"type": "yarn"}}, "type is 'yarn'"),
    ],
)
def test_two_values_for_one_rope_setting_are_refused(changes: Any, words: str) -> None:
    """Both are named; nobody can know which was meant."""
    problems = read(**changes)[1]

    assert any(words in problem and "remove the wrong one" in problem for problem in problems), problems


def test_the_number_of_experts_has_two_names() -> None:
    """transformers reads num_experts as num_local_experts; a dense family has neither, whatever config.json says."""
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}

    assert (8, []) == (read(**mixtral, num_experts=8)[0].n_expert, read(**mixtral, num_experts=8)[1])
    assert "num_experts 4" in read(**mixtral, num_local_experts=8, num_experts=4)[1][0]
    assert (0, []) == (read(num_local_experts=8)[0].n_expert, read(num_local_experts=8)[1])


def test_families_differ_by_data_only() -> None:
    """Qwen2 always has q/k/v biases, LLaMA all four when it says so, Mistral none."""
    qwen, _, _ = read(architectures=["Qwen2ForCausalLM"])
    llama, _, _ = read(attention_bias=True)
    mistral, _, _ = read(architectures=["MistralForCausalLM"])

    assert [(True, False), (True, True), (False, False)] == [
        (m.bias_qkv, m.bias_output) for m in (qwen, llama, mistral)
    ]


def test_a_sliding_window_shorter_than_the_context_is_a_warning() -> None:
    """Arch `llama` has full attention; the difference begins beyond the window."""
    assert "beyond 64 tokens" in read(sliding_window=64)[2][0]
    assert [] == read(sliding_window=64, use_sliding_window=False)[2]
    assert [] == read(sliding_window=128)[2]
