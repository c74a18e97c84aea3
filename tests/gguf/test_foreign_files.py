"""Valid GGUF files made by others: the vocabularies that come with llama.cpp's sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_tokens import LlamaTokens

from moe2gguf import inspect
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.verify import verify

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "experiments" / "vocabularies"


@pytest.fixture(scope="module")
def files() -> Any:
    """The files; skips, with the reason, where the package cannot be had."""
    made = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no vocabulary files: {(made.stderr.strip() or 'scripts/vocabularies failed').splitlines()[-1]}")
    return sorted(Path(made.stdout.strip()).glob("*.gguf"))


def test_all_of_them_read(files: Any) -> None:
    """Header, metadata and JSON of each; the tokens that llama.cpp counts; only the tensors are missing."""
    assert len(files) >= 15
    for path in files:
        file = read_gguf(path)
        assert file.metadata == read_model(path).metadata
        assert json.loads(json.dumps(inspect(path).to_dict()))["architecture"] == file.metadata["general.architecture"]
        assert verify(path, threads=1).problems[0] == "the file holds metadata, but no tensor", path.name
        with LlamaTokens(path) as vocabulary:
            tokens = file.metadata["tokenizer.ggml.tokens"]
            assert isinstance(tokens, list)
            assert vocabulary.size == len(tokens), path.name
