"""moe2gguf.recipes.outlook: what to expect of each count, from measured figures and the bandwidth bound."""

import pytest

from moe2gguf.recipes.options import Options
from moe2gguf.recipes.outlook import MEASURED, Outlook, curve, outlook, read_off, recommended, to_dict, words
from moe2gguf.spec import COHERENT, SEED, Recipe


def test_between_two_points_the_logarithm_is_straight():
    """Halfway between 1 and 4 is 2; on a point its own value; below the last point nothing is claimed."""
    known = ((1.0, 1.0), (0.5, 4.0))

    assert [1.0, 4.0] == [read_off(known, 1.0), read_off(known, 0.5)]
    assert read_off(known, 0.75) == pytest.approx(2)
    assert read_off(known, 0.49) is None


@pytest.mark.parametrize(
    ("recipe", "own_text", "expected"),
    [
        (COHERENT, True, MEASURED["refit", True]),
        (COHERENT, False, MEASURED["refit", False]),
        (Recipe("routed", None, "least-squares", False, "used"), True, MEASURED["used", True]),
        (Recipe("routed", None, "least-squares", False, "fitted"), False, MEASURED["fitted", False]),
        (Recipe("routed", None, "least-squares", False, "any"), True, MEASURED["any", True]),
        (Recipe("routed", None, "least-squares", False, "any"), False, None),
        (Recipe("routed", None, "least-squares", True, "any"), True, None),
        (Recipe("routed", None, "least-squares", False, "exact"), True, None),
        (Recipe("activations", None, "least-squares", False, "used"), True, None),
        (Recipe("weights", 2, "gate-mean", False, "used"), True, None),
        (SEED, True, None),
    ],
)
def test_only_what_was_measured_is_expected(recipe, own_text, expected):
    """Another grouping, a zero router, or `any` on the embedded text have no curve."""
    assert expected == curve(recipe, own_text=own_text, all_used=False)


def test_all_experts_are_the_dense_model():
    """At k = n the default file is exact."""
    rows = outlook(Options(experts=16), lambda k: 16 / k, own_text=False)

    assert (16, 1.0) == (rows[-1].n_expert_used, rows[-1].perplexity)
    assert not rows[-1].recommended  # nothing is gained
    assert len(rows) == 16


def test_recommended_is_good_enough_and_fast_enough(tmp_path):
    """From the cheapest count that is good enough to the largest that gains something; with the basis in words."""
    rows = outlook(
        Options(experts=16, used=8, calibration=tmp_path / "text"), lambda k: 1 + (16 - k) / 16, own_text=True
    )

    assert (8, 14) == recommended(rows)
    assert "recommended: 8 to 14 experts used, judged by SmolLM2-135M" in words(rows)
    assert [8, 14] == list(to_dict(rows)["recommended"])
    assert to_dict(rows)["perplexity_over_dense"][3] is None


def test_nothing_is_recommended_where_nothing_is_gained():
    """A small MLP beside a large vocabulary: the bound stays below 1.1."""
    rows = [Outlook(k, 1.2, 1.05) for k in (1, 2)]

    assert recommended(rows) is None
    assert "recommended: none" in words(rows)
    assert to_dict(rows)["recommended"] is None
