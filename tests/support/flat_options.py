"""The options of a conversion by flat names, as the command line has them: short to write in a test."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe2gguf import Options


def flat_options(experts: int | None = None, used: int | None = None, **values: Any) -> Options:
    """`Options` whose records are filled from `values` by the names of their fields."""
    return change_options(Options(experts, used), **values)


def change_options(options: Options, **values: Any) -> Options:
    """The options with other `values`, each in the record that has a field of its name."""
    changes: dict[str, Any] = {}
    for name in ("types", "method", "calibration"):
        record = getattr(options, name)
        own = {field.name: values.pop(field.name) for field in dataclasses.fields(record) if field.name in values}
        changes[name] = dataclasses.replace(record, **own)
    return dataclasses.replace(options, **changes, **values)
