"""What numbers depend on besides the files: the versions and the machine they were measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe2gguf.gguf.system import count_processors


def describe_machine() -> dict[str, Any]:
    """Return versions and machine as JSON types."""
    return {
        "moe2gguf": read_package_version("moe2gguf"),
        "llama-cpp-python": read_package_version("llama-cpp-python"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": name_processor(),
        "processors": count_processors(),
        "system": platform.platform(),
    }


def read_package_version(package: str) -> str:
    """Return the version of an installed package, or that it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def name_processor() -> str:
    """Return what this machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def describe_load() -> str:
    """Return a sentence where twice as many processes want a processor as there are; empty otherwise, and on Windows.

    llama.cpp's threads wait for each other in busy loops: beside other work it falls to a tenth of its speed. The
    number is the average of the last minute, this program included.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return ""
    n = os.cpu_count() or 1
    return f"the machine is busy: {load:.0f} processes want its {n} processors" if load > 2 * n else ""
