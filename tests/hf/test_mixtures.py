"""Checkpoints that are mixtures of experts already: one error says what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from command import moe2gguf

from moe2gguf.errors import HarnessError, PlanError
from moe2gguf.graphs import EXPERT_COMMANDS
from moe2gguf.hf.mixtures import ARCHITECTURES, CONVERTED, NO_GRAPH
from moe2gguf.llama.model import read_facts
from moe2gguf.recipes.convert import plan_conversion


def refuse(folder: Path, **config: Any) -> str:
    """The one refusal of a folder with this config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError) as caught:
        plan_conversion(folder)
    (refusal,) = caught.value.refusals
    return refusal


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixture_that_llama_cpp_runs_is_sent_to_its_converter(tmp_path: Path, name: str) -> None:
    """The name, llama.cpp's architecture, its converter, and what works on the file it makes."""
    refusal = refuse(tmp_path / "model", architectures=[name])

    assert f"{name} is a mixture of experts already" in refusal
    assert f"as architecture {ARCHITECTURES[name]};" in refusal
    assert "convert_hf_to_gguf.py" in refusal
    assert EXPERT_COMMANDS in refusal


@pytest.mark.parametrize("architecture", [*CONVERTED, "unheard-of"])
def test_llama_cpp_knows_the_architectures(tmp_path: Path, architecture: str) -> None:
    """It misses the sizes in a file that has a name only, or says that it does not know the name."""
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    with pytest.raises(HarnessError) as caught:
        read_facts(tmp_path / "empty.gguf")
    assert ("unknown model architecture" in str(caught.value)) == (architecture == "unheard-of")


@pytest.mark.parametrize("name", NO_GRAPH)
def test_a_mixture_without_a_graph_is_told_the_reason(tmp_path: Path, name: str) -> None:
    """No converter is promised where llama.cpp cannot compute the model."""
    refusal = refuse(tmp_path / "model", architectures=[name])

    assert f"llama.cpp has no graph for it either: {NO_GRAPH[name]}" in refusal
    assert "convert_hf_to_gguf" not in refusal


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "deepseek_v2"}, "DeepseekV2ForCausalLM is a mixture"),
        ({"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1"}, "architecture grok;"),
        ({"model_type": "switch_transformers"}, "no graph"),
        ({"architectures": ["OpenMoeForCausalLM"], "model_type": "llama"}, "no graph"),
        ({"architectures": ["UnheardOf"], "n_routed_experts": 64}, "(n_routed_experts is 64). If llama.cpp's"),
        ({"architectures": ["UnheardOf"], "text_config": {"num_experts": 8}}, "(num_experts is 8)"),
        ({"architectures": ["Glm4MoeForCausalLM"], "n_group": 1}, "none that moe2gguf wrote: norm_topk_prob is"),
    ],
)
def test_a_mixture_is_recognised_by_more_than_its_class(tmp_path: Path, config: Any, words: str) -> None:
    """By its model_type, by a count of experts, and a GLM-4.5 by the settings that ours does not have."""
    assert words in refuse(tmp_path / "model", **config)


@pytest.mark.parametrize("config", [{"num_experts": 1}, {"num_experts": True}, {"ffn_config": [8]}, {"model_type": []}])
def test_what_has_no_experts_is_no_mixture(tmp_path: Path, config: Any) -> None:
    """One expert, or a setting of another kind, leaves the usual refusal."""
    assert "UnheardOf is not supported" in refuse(tmp_path / "model", architectures=["UnheardOf"], **config)


def test_the_command_line_says_it_and_writes_nothing(tmp_path: Path) -> None:
    """Exit code 1, one message, no file."""
    refuse(tmp_path / "model", architectures=["Qwen3MoeForCausalLM"])
    done = moe2gguf("convert", tmp_path / "model", tmp_path / "out.gguf")

    assert (done.returncode, done.stderr.count("architecture qwen3moe")) == (1, 1)
    assert not list(tmp_path.glob("out*"))
