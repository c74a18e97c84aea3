"""What a person sees of a plan and of a calibration."""

from __future__ import annotations

import io
from dataclasses import replace

import click
import pytest
from rich.console import Console

from moe2gguf.cli.tables import VERBOSE, make_table
from moe2gguf.cli.tables_convert import print_layers
from moe2gguf.experts.layer import LayerReport

LAYER = LayerReport(1, [1.0, 0.5], 1.0, [0.6, 1.0], energy_kept=0.5, energy_oracle=0.6, hit_rate=0.5, refit_error=0.2)


def test_a_narrow_terminal_loses_nothing() -> None:
    """What is too wide goes on in the next line, numbers and names alike."""
    cells = ["blk.0.attn_norm.weight", "149,937,408"]
    table, shown = make_table("tensor", "bytes", numbers=slice(1, None)), io.StringIO()
    table.add_row(*cells)

    Console(file=shown, width=16).print(table)

    assert sorted("".join(["tensor", "bytes", *cells])) == sorted("".join(shown.getvalue().split()))


def test_a_calibration_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model of 80 layers nobody reads a table that was not asked for."""
    print_layers({0: LAYER, 1: replace(LAYER, energy_kept=0.7, energy_oracle=None)})
    print_layers({0: replace(LAYER, refit_error=None)})

    more = "(--verbose shows every layer)"
    held = "the chosen experts hold {} of the routed experts' output, the best choice would hold 60.0%"
    assert capsys.readouterr().out.splitlines() == [
        f"mean over the layers: {held.format('60.0%')}; the refit leaves 20.0% of the error {more}",
        f"mean over the layers: {held.format('50.0%')} {more}",
    ]


def test_verbose_shows_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """With what the columns mean; a layer whose shared experts some tokens do not use is a warning always."""
    with click.Context(click.Command("convert")) as context:
        context.meta[VERBOSE] = True
        print_layers({1: LAYER, 2: replace(LAYER, shared_rate=0.5)})

    shown = capsys.readouterr()
    assert [["1", "1", "100.0%"], ["2", "1", "50.0%"]] == [line.split()[:3] for line in shown.out.splitlines()[1:3]]
    assert "hit rate: share of choices that are the same" in shown.out
    assert "some tokens do not use the shared experts in layers [2]" in shown.err
