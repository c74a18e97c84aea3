"""What the scripts share before anything is installed: virtual environments that set themselves up once.

Standard library only: it runs on a fresh machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def cache_folder() -> Path:
    """The folder for what is fetched or made once per machine: $MOE2GGUF_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MOE2GGUF_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "moe2gguf"


class Environment:
    """A virtual environment in `folder`, installed by `steps` and left alone until something in it changes.

    Each step is the argument list of one program run by the environment's own Python, such as
    `["-m", "pip", "install", "ruff"]`. A stamp in the folder holds a digest of the steps, of the files
    in `inputs`, of the Python version and of the place of the repository: while it matches, `prepare`
    starts nothing. A `fresh` environment is emptied before it is installed again, the others are updated.
    """

    def __init__(
        self, folder: Path, steps: Sequence[Sequence[str]], inputs: Sequence[Path] = (), fresh: bool = False
    ) -> None:
        self.folder = folder
        self.steps = steps
        self.inputs = inputs
        self.fresh = fresh
        self.programs = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.programs / ("python.exe" if os.name == "nt" else "python")
        self._stamp = folder / "installed.sha256"

    def digest(self) -> str:
        """SHA-256, as hexadecimal, of everything that decides what is installed."""
        known = hashlib.sha256(repr((sys.version, str(ROOT), [list(step) for step in self.steps])).encode())
        for path in self.inputs:
            known.update(hashlib.sha256(path.read_bytes()).digest())
        return known.hexdigest()

    def is_ready(self) -> bool:
        """Whether the environment holds what `steps` install and its Python still starts."""
        current = self._stamp.read_text() if self._stamp.is_file() else ""
        return current == self.digest() and _starts(self.python)

    def prepare(self) -> bool:
        """Install unless it is installed; returns whether something was done. Exits with one line on failure."""
        if self.is_ready():
            return False
        self._create()
        quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        for step in self.steps:
            if subprocess.run([self.python, *step], cwd=ROOT, env=quiet, check=False).returncode != 0:
                fail(f"installing {shorten_path(self.folder)} failed at: python {' '.join(step)}")
        self._stamp.write_text(self.digest())
        return True

    def _create(self) -> None:
        if sys.version_info < OLDEST_PYTHON:
            fail(f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed, this is {sys.version.split()[0]}")
        self._stamp.unlink(missing_ok=True)
        if _starts(self.python) and not self.fresh:
            return
        try:
            venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt", clear=True).create(self.folder)
        except subprocess.CalledProcessError:  # Debian ships Python without ensurepip
            fail("Python cannot make a virtual environment with pip; on Debian and Ubuntu: apt install python3-venv")


def python_with(packages: Sequence[str], *, extra: str, name: str) -> Path:
    """A Python that has all `packages`: this one, else that of .venv/NAME, with moe2gguf[EXTRA] and llama.cpp."""
    if all(importlib.util.find_spec(package) for package in packages):
        return Path(sys.executable)
    native = ROOT / "vendor"
    made = Environment(
        ROOT / ".venv" / name,
        steps=[["-m", "pip", "install", "-qq", "-e", f".[{extra}]"], ["vendor/install", "cpu"]],
        inputs=[ROOT / "pyproject.toml", native / "native.toml", native / "install"],
    )
    made.prepare()
    return made.python


def shorten_path(path: Path) -> str:
    """The path as a reader wants it: relative to the repository where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _starts(python: Path) -> bool:
    return (
        python.exists()
        and subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode == 0
    )
