"""The rule that judges: told with numbers that can be checked by hand."""

import dataclasses
import math

import pytest

from hymba.lab.variants import VARIANTS
from hymba.lab.verdict import (
    AGREES,
    DISAGREES,
    FINDINGS,
    METRICS,
    UNDECIDED,
    Finding,
    judge,
    spread,
    student,
)

BITS = Finding("a test", "hymba", "llama", "bits_per_byte", "1 against 2", "nowhere")
RECALL = dataclasses.replace(BITS, metric="recall")
CACHE, DECODE = (dataclasses.replace(BITS, metric=metric) for metric in ("cache", "decode"))
SAME = dataclasses.replace(BITS, same=True)


def word(finding: Finding, this: list[float], than: list[float], **more: object) -> str | None:
    verdict = judge(finding, {"hymba": this, "llama": than, **more.pop("others", {})}, **more)
    return verdict and verdict.word


def test_a_large_difference_decides_in_its_direction() -> None:
    low, high = [1.00, 1.01, 1.02], [1.10, 1.11, 1.12]
    assert word(BITS, low, high) == AGREES  # fewer bits are better
    assert word(BITS, high, low) == DISAGREES
    assert word(RECALL, high, low) == AGREES  # more recall is better
    assert word(RECALL, low, high) == DISAGREES


def test_the_margin_by_hand() -> None:
    """s = 0.01 pooled over two groups of three (4 degrees), t = 2.776, m = 2.776 * 0.01 *
    sqrt(2 / 3) = 0.0227."""
    verdict = judge(BITS, {"hymba": [1.00, 1.01, 1.02], "llama": [1.01, 1.02, 1.03]})
    assert verdict is not None and verdict.seeds == (3, 3)
    assert verdict.margin == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3))
    assert verdict.difference == pytest.approx(0.01)
    assert verdict.word == UNDECIDED
    assert word(BITS, [1.00, 1.01, 1.02], [1.023, 1.033, 1.043]) == AGREES
    assert word(BITS, [1.00, 1.01, 1.02], [1.022, 1.032, 1.042]) == UNDECIDED


def test_one_seed_is_judged_by_the_spread_of_others_or_not_at_all() -> None:
    assert word(BITS, [1.0], [2.0]) == UNDECIDED
    others = {"mamba": [1.0, 1.01, 1.02, 1.03]}
    assert word(BITS, [1.0], [2.0], others=others) == AGREES
    assert word(BITS, [1.0], [1.01], others=others) == UNDECIDED


def test_a_difference_that_means_nothing_decides_nothing() -> None:
    tiny = METRICS["bits_per_byte"].least / 2
    assert word(BITS, [1.0, 1.0, 1.0], [1 + tiny] * 3) == UNDECIDED
    assert word(BITS, [1.0, 1.0, 1.0], [1 + 4 * tiny] * 3) == AGREES


def test_a_smoke_test_decides_nothing() -> None:
    assert word(BITS, [1.0] * 3, [2.0] * 3, decides=False) == UNDECIDED


def test_what_was_not_run_has_no_verdict() -> None:
    assert judge(BITS, {"hymba": [1.0]}) is None
    assert judge(BITS, {"hymba": [1.0], "llama": []}) is None


def test_bytes_need_no_spread_and_speed_is_a_ratio() -> None:
    assert word(CACHE, [100.0], [200.0]) == AGREES
    assert word(CACHE, [200.0], [100.0]) == DISAGREES
    assert word(CACHE, [100.0], [101.0]) == UNDECIDED
    verdict = judge(DECODE, {"hymba": [400.0, 410.0], "llama": [100.0, 102.0]})
    assert verdict is not None and verdict.word == AGREES
    assert math.exp(verdict.difference) == pytest.approx(4.0, rel=0.02)


def test_equal_is_a_finding_too() -> None:
    close = [1.0, 1.0005, 1.001]
    assert word(SAME, close, close) == AGREES
    assert word(SAME, close, [x + 0.1 for x in close]) == DISAGREES
    assert word(SAME, close, [x - 0.1 for x in close]) == DISAGREES  # either way
    assert word(SAME, [1.0, 1.1, 1.2], [1.0, 1.1, 1.2]) == UNDECIDED  # too noisy to call equal


def test_pooled_spread() -> None:
    assert spread([[1.0], [2.0]]) is None
    assert spread([[1.0, 3.0], [5.0]]) == (pytest.approx(math.sqrt(2)), 1)
    found = spread([[0.0, 2.0], [10.0, 12.0, 14.0]])
    assert found == (pytest.approx(math.sqrt((2 + 8) / 3)), 3)
    assert student(1) == 12.71 and student(11) == student(10) and student(500) == 2.042


def test_findings_name_what_exists() -> None:
    assert len({finding.key for finding in FINDINGS}) == len(FINDINGS)
    for finding in FINDINGS:
        assert {finding.this, finding.than} <= VARIANTS.keys() and finding.this != finding.than
        assert finding.metric in METRICS and finding.figures and finding.source


def test_every_variant_is_in_a_finding() -> None:
    assert VARIANTS.keys() == {name for f in FINDINGS for name in (f.this, f.than)}


@pytest.mark.parametrize(
    ("name", "metric", "better"),
    [
        ("B: parallel, not sequential", "recall", "parallel"),
        ("C: windows but in three layers", "recall", "parallel"),
        ("C: windows but in three layers", "decode", "local-global"),
        ("D: shared K/V", "recall", "local-global"),
        ("D: shared K/V", "bits_per_byte", "shared"),
        ("E: meta tokens", "recall", "hymba"),
        ("windows everywhere", "recall", "parallel"),
        ("fusion by concatenation", "bits_per_byte", "shared"),
        ("hybrid against Mamba", "cache", "mamba"),
    ],
)
def test_directions_are_the_papers(name: str, metric: str, better: str) -> None:
    """Tables 1, 9 and 10, read again."""
    (finding,) = [f for f in FINDINGS if (f.name, f.metric) == (name, metric)]
    assert finding.this == better
