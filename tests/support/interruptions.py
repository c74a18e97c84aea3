"""Ways to stop a long job in the middle."""

from typing import Any

import pytest

from moe2gguf.experts import calibration
from moe2gguf.experts.slice_layer import slice_layer


def stop_in_third_layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Interrupt the first calibration to come to its third layer; the list grows by one with every layer begun."""
    real, done = slice_layer, []

    def stops(*args: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibration, "slice_layer", stops)
    return done
