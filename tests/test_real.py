"""SmolLM2-135M-Instruct: the sliced file is the dense model, on real weights, real text and a real tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from flat_options import flat_options
from llama_tokens import LlamaTokens
from smollm2 import smollm2_folder, smollm2_gguf

from moe2gguf import compare_with_dense, convert

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

CHECKED: Any = {"n_token": 512, "n_context": 128}  # short windows: the first one runs again, token by token


@pytest.fixture(scope="module")
def folder() -> Any:
    """The Hugging Face folder."""
    return smollm2_folder()


@pytest.mark.parametrize(
    ("kind", "experts", "kl"),
    [("f32", 8, 2e-6), ("f32", 16, 2e-6), ("bf16", 8, None), ("q8_0", 8, None)],
)
def test_all_experts_are_the_dense_model(
    folder: Any, tmp_path: Path, kind: str, experts: int, kl: float | None, record_property: Any
) -> None:
    """F32: KL <= 2e-6 and 99.7 % top-1; every type: within three times what another batch size changes.

    In the other types llama.cpp rounds activations in blocks along the MLP's width, which slicing moves, so the
    noise floor is that rounding, not only the order of sums.
    """
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True, type=kind))
    convert(folder, tmp_path / "sliced.gguf", flat_options(experts=experts, type=kind))

    found = compare_with_dense(tmp_path / "sliced.gguf", tmp_path / "dense.gguf", **CHECKED)

    record_property("check", json.dumps(found.to_dict()))
    print(json.dumps(found.to_dict()))
    assert found.difference.n_token >= CHECKED["n_token"]
    if kl is not None:
        assert found.difference.kl_mean <= kl
        assert found.difference.top1 >= 0.997
    assert found.ok, found.reason


@pytest.mark.parametrize("experts", [8, 6])
def test_a_quantized_file_is_cut_without_loss(tmp_path: Path, experts: int, record_property: Any) -> None:
    """The published Q4_1 file: every weight decodes to the same number, and k = n is the same model in llama.cpp.

    With 6 experts by a tensor of scales, as 6 is no power of two.
    """
    source, out = smollm2_gguf(), tmp_path / "out.gguf"
    done = convert(source, out, flat_options(experts=experts))
    assert not [
        tensor.name for tensor in done.plan.tensors if tensor.type.name in ("Q4_1", "Q8_0") and not tensor.copied
    ]

    dense, sliced = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, out))
    for name, tensor in dense.items():
        other = sliced[re.sub(r"ffn_(gate|up|down)\.", r"ffn_\1_exps.", name)]
        expected, found = (gguf.quants.dequantize(t.data, t.tensor_type) for t in (tensor, other))
        if name.endswith("ffn_down.weight"):
            found = np.concatenate(list(found if experts == 6 else found / np.float32(experts)), axis=1)
        np.testing.assert_array_equal(expected, found.reshape(expected.shape), err_msg=name)

    compared = compare_with_dense(out, source, **CHECKED)

    record_property("check", json.dumps(compared.to_dict()))
    print(json.dumps(compared.to_dict()))
    assert compared.ok, compared.reason


def test_tokenization_equals_hugging_faces(folder: Any, tmp_path: Path) -> None:
    """The whole vocabulary's file, on hard strings."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True, type="q8_0"))
    texts = [
        "Hello world",
        "  3.14159 and 2024!\n\n\tdef f(x):",
        "naïve café 🦙 漢字",
        "<|im_start|>user\nHi<|im_end|>",
        "",
    ]

    with LlamaTokens(tmp_path / "dense.gguf") as vocabulary:
        assert [tokenizer(text).input_ids for text in texts] == [vocabulary.encode(text) for text in texts]
