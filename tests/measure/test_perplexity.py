"""Our numbers beside llama-perplexity's own (scripts/experiments/record-perplexity): four digits of every one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from perplexity_cases import Case, smollm2, tiny
from smollm2 import smollm2_folder

from moe2gguf.experts.text import Text
from moe2gguf.measure.compare import CompareSettings, compare
from moe2gguf.measure.metrics import Summary

DIGITS = 5e-5
"""Four digits: half a unit of the fourth, relative."""


CUT = {"Mean PPL(base)": 1e-3, "Mean PPL(Q)/PPL(base)": 1e-3, "Mean ln(PPL(Q)/PPL(base))": 3e-3}
"""Of a real model: what llama-perplexity says of the base once its improbable tokens were cut off, and how far off that
is, relative; "Final" is the same perplexity without the cut."""

CODE = 1e-5
"""Nats that 16-bit codes of the base's log probabilities (steps of up to 2.4e-4) may move a percentile."""


KERNELS = 2e-4
"""Relative: what other vector instructions may move the perplexity of an F16 model: 7e-5 with AVX2 beside the record.

Q4_0, whose products are rounded otherwise, moves by 5e-3."""


def told(case: Case) -> dict[str, tuple[float, float | None]]:
    """Name -> value and its ± of the record, in the order of its lines; the base's own perplexity is "Final"."""
    found = {}
    for line in case.record.read_text("utf-8").splitlines():
        if match := re.match(r".*Final estimate: PPL = (\S+) \+/- (\S+)", line):
            found["Final"] = (float(match[1]), float(match[2]))
        elif match := re.match(r" *(\S[^:]*?) *: *(-?[\d.]+)%?(?: ± +([\d.]+))?", line):
            found[re.sub(r"\s+", " ", match[1])] = (float(match[2]), float(match[3]) if match[3] else None)  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def ours(s: Summary) -> dict[str, tuple[float, float | None]]:
    """The same names, from a summary; shares in percent as the program prints them."""
    values = {
        "Final": (s.perplexity_base, s.perplexity_base_error),
        "Mean PPL(Q)": (s.perplexity, s.perplexity_error),
        "Mean PPL(base)": (s.perplexity_base, s.perplexity_base_error),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * s.correlation, None),
        "Mean ln(PPL(Q)/PPL(base))": (s.log_ratio, s.log_ratio_error),
        "Mean PPL(Q)/PPL(base)": (s.ratio, s.ratio_error),
        "Mean KLD": (s.kl_mean, s.kl_error),
        "Maximum KLD": (s.kl_max, None),
        "Mean Δp": (100 * s.p_change_mean, None),
        "RMS Δp": (100 * s.p_change_rms, 100 * s.p_change_rms_error),
        "Same top p": (100 * s.top1, 100 * s.top1_error),
    }
    names = {"99.9": "99.9%", "99": "99.0%", "95": "95.0%", "90": "90.0%", "50": "Median", "10": "10.0%", "5": "5.0%"}
    names |= {"1": "1.0%", "0.1": "0.1%"}
    return values | {f"{words} KLD": (s.kl_percentiles[name], None) for name, words in names.items()}


def measured(case: Case, folder: Path) -> Summary:
    settings = CompareSettings(
        text=Text(case.text, "case"),
        n_token=case.n_token,
        n_context=case.n_context,
        threads=1,
        journal=folder / "journal",
    )
    used = [] if case.n_expert_used is None else [case.n_expert_used]
    (row,) = compare([case.other], case.base, used=used, settings=settings).rows
    assert row.quality is not None, row.reason
    assert case.n_token == row.quality.summary.n_token
    return row.quality.summary


def assert_equal(found: Summary, case: Case, *, is_cut: bool) -> None:
    """Every number to four digits, or to the last one printed.

    llama-perplexity keeps the base's log probabilities in 16 bits, nothing below the highest less 16; `is_cut` means
    that tokens of the text are below, as in every real model.
    """
    expected = told(case)
    units = {"Same": 1e-3, "RMS ": 1e-3, "Mean Δp": 1e-3, "Cor(": 1e-2, "Final": 1e-4}
    for name, (value, error) in ours(found).items():
        theirs, their_error = expected[name]
        unit = next((unit for start, unit in units.items() if name.startswith(start)), 1e-6)
        loose = CUT.get(name, DIGITS) if is_cut else DIGITS
        code = CODE if is_cut and name.endswith("KLD") else 0.0
        assert value == pytest.approx(theirs, rel=loose, abs=unit + code), name
        if error is not None and their_error is not None:
            assert error == pytest.approx(their_error, rel=2e-3, abs=unit), f"{name} ±"


def test_the_tiny_model(tmp_path: Path) -> None:
    """Dense against two of four experts: perplexity, divergence with its percentiles, changes of probability."""
    case = tiny(tmp_path)
    assert_equal(measured(case, tmp_path), case, is_cut=False)


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_the_real_model(tmp_path: Path) -> None:
    """SmolLM2 in Q4_0 against F16, on the license; Q4_0's numbers only where the processor is like the record's."""
    case = smollm2(tmp_path, smollm2_folder())
    found, (base, _) = measured(case, tmp_path), told(case)["Final"]

    assert found.perplexity_base == pytest.approx(base, rel=KERNELS)
    if found.perplexity_base != pytest.approx(base, rel=DIGITS):
        pytest.skip(f"other kernels than the record's: F16 has {found.perplexity_base:.4f} here and {base} there")
    assert_equal(found, case, is_cut=True)
