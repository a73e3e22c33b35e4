"""What the paper found, and the rule that says whether a laboratory finds it too. No torch here.

The rule. A finding says that one variant is better than another on a metric. With the values of
both over their seeds, d is the difference of the means (of logarithms for speed and memory), signed
so that the paper's direction is positive, and m the margin

    m = max(least, t * s * sqrt(1/n1 + 1/n2))

where s is the spread over seeds, pooled over all variants of the laboratory that have several (so
that a variant with one seed can be judged too), t Student's 97.5 % point of its degrees of freedom,
and `least` the smallest difference that would mean anything. d > m: agrees. d < -m: disagrees.
Else, or without any spread, or at a size that is a smoke test: not decided at this size. Where the
source says that there is no difference (`same`), |d| > m disagrees, and |d| with the noise (m
without `least`) below three times `least` agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

AGREES, DISAGREES = "agrees", "disagrees"
UNDECIDED = "not decided at this size"
SAME = 3  # times `least`: below it two are called equal

# Student's t, 97.5 %, by degrees of freedom.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
      10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    name: str
    about: str
    larger_is_better: bool
    least: float  # smallest difference that counts; of logarithms where `ratio`
    ratio: bool = False
    exact: bool = False  # follows from the architecture: no spread is needed
    form: str = ".3f"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("bits_per_byte", "held-out bits per byte", False, 0.003),
        Metric("recall", "recall, lengths and numbers as trained", True, 0.02),
        Metric("beyond", "recall beyond training's lengths and numbers", True, 0.02),
        Metric("decode", "decode tokens a second", True, math.log(1.03), True, form=",.0f"),
        Metric("cache", "cache bytes of a sequence", False, math.log(1.03), True, True, ",.0f"),
    )
}


@dataclass(frozen=True)
class Finding:
    """`this` is better than `than` on `metric`, says `source` with `figures`."""

    name: str
    this: str
    than: str
    metric: str
    figures: str
    source: str
    same: bool = False

    @property
    def key(self) -> str:
        """How reasons.json and tables call it."""
        return f"{self.name}: {self.metric}"


def _finding(name: str, this: str, than: str, source: str, **figures: str) -> list[Finding]:
    """One for each metric: not_METRIC where it is the other way round, same_METRIC where both are
    said to be equal."""
    found = []
    for metric, said in figures.items():
        pair = (than, this) if metric.startswith("not_") else (this, than)
        plain = metric.removeprefix("not_").removeprefix("same_")
        found.append(Finding(name, *pair, plain, said, source, metric.startswith("same_")))
    return found


FINDINGS: tuple[Finding, ...] = tuple(
    finding
    for several in (
        _finding("hybrid against attention", "hymba", "llama", "tab. 9, 10",
                 bits_per_byte="perplexity 28.53 against 30.04", recall="51.79 against 39.98",
                 beyond="figure 10: clearly better", decode="2,696 against 721 a second",
                 cache="40.0 against 414.7 MB"),
        _finding("hybrid against Mamba", "hymba", "mamba", "tab. 9, 10",
                 bits_per_byte="perplexity 28.53 against 30.78", recall="51.79 against 19.23",
                 not_decode="2,696 against 4,721 a second", not_cache="40.0 against 1.9 MB"),
        _finding("hybrid against Mamba + MLP", "hymba", "mamba-mlp", "tab. 9",
                 bits_per_byte="perplexity 28.53 against 33.41", recall="51.79 against 15.33"),
        _finding("hybrid against Samba", "hymba", "samba", "tab. 9",
                 bits_per_byte="perplexity 28.53 against 31.41", recall="51.79 against 31.01"),
        _finding("attention against Mamba", "llama", "mamba", "tab. 9",
                 bits_per_byte="perplexity 30.04 against 30.78", recall="39.98 against 19.23"),
        _finding("Mamba's MLP", "mamba", "mamba-mlp", "tab. 9",
                 bits_per_byte="perplexity 30.78 against 33.41", recall="19.23 against 15.33"),
        _finding("A: attention into Mamba", "sequential", "mamba", "tab. 1",
                 bits_per_byte="general 44.07 against 42.98", recall="45.16 against 19.23"),
        _finding("B: parallel, not sequential", "parallel", "sequential", "tab. 1",
                 bits_per_byte="general 45.19 against 44.07", recall="49.90 against 45.16",
                 decode="877 against 776 a second", cache="148.2 against 156.3 MB"),
        _finding("C: windows but in three layers", "local-global", "parallel", "tab. 10 row 8",
                 not_bits_per_byte="general 44.56 against 45.19", not_recall="48.79 against 49.90",
                 decode="2,400 against 877 a second", cache="41.2 against 148.2 MB"),
        _finding("D: shared K/V", "shared", "local-global", "tab. 10 row 9",
                 bits_per_byte="general 45.16 against 44.56", not_recall="48.04 against 48.79",
                 decode="2,757 against 2,400 a second", cache="39.4 against 41.2 MB"),
        _finding("E: meta tokens", "hymba", "shared", "tab. 10 row 13",
                 bits_per_byte="general 45.53 against 45.16", recall="51.79 against 48.04"),
        _finding("windows everywhere", "parallel", "all-window", "tab. 10 row 7",
                 bits_per_byte="general 45.19 against 44.42", recall="49.90 against 29.78"),
        _finding("fusion by concatenation", "concat", "shared", "tab. 10 row 11",
                 not_bits_per_byte="general 44.56 against 45.16", recall="48.94 against 48.04",
                 not_decode="1,414 against 2,757 a second"),
        _finding("more K/V heads", "more-attention", "parallel", "tab. 10 rows 4, 5",
                 not_bits_per_byte="general 45.08 against 45.19", recall="56.46 against 49.90",
                 not_cache="394 against 148 MB"),
        _finding("half the attention", "more-attention", "half-attention", "tab. 10 rows 3, 4",
                 bits_per_byte="general 45.08 against 44.95", recall="56.46 against 52.53"),
        _finding("a quarter of the attention", "half-attention", "quarter-attention",
                 "tab. 10 rows 2, 3", bits_per_byte="general 44.95 against 44.20",
                 recall="52.53 against 44.65"),
        _finding("the same cache without an SSM", "shared", "llama-compressed", "tab. 10 row 10",
                 bits_per_byte="general 45.16 against 43.60", recall="48.04 against 28.18"),
        _finding("meta tokens for Mamba", "mamba-meta", "mamba", "tab. 10 row 12",
                 bits_per_byte="general 44.01 against 42.98", recall="19.34 against 19.23"),
        _finding("fusion by difference", "subtract", "hymba", "FAIR, 2510.04800",
                 bits_per_byte="the best of its hybrids, 54.9 against 52.4"),
        _finding("learned scalars", "scalars", "hymba", "FAIR, 2510.04800",
                 same_bits_per_byte="redundant once normalised"),
        _finding("weight normalisation", "normalized", "hymba", "Nemotron-Flash tab. 4",
                 bits_per_byte="perplexity 17.50 against 17.96"),
        _finding("far-seeing layers scattered", "scattered", "hymba", "FAIR, 2510.04800",
                 bits_per_byte="avoid first and last", recall="avoid first and last"),
        _finding("twice the meta tokens", "more-meta", "hymba", "Nemotron-Flash uses 256",
                 bits_per_byte="not compared", recall="not compared"),
        _finding("Mamba's own start", "own-dt", "hymba", "Mamba, 2312.00752",
                 bits_per_byte="its authors' start", recall="its authors' start"),
        _finding("Mamba's own start, in Mamba", "mamba-own-dt", "mamba", "Mamba, 2312.00752",
                 bits_per_byte="its authors' start", recall="its authors' start"),
        _finding("three far-seeing layers, not two", "hymba", "two-global", "Nemotron-Flash tab. 8",
                 recall="keep at least two", cache="more layers, more cache"),
    )
    for finding in several
)  # fmt: skip

Values = Mapping[str, Sequence[float]]  # of one metric: {variant: a value for each seed}


@dataclass(frozen=True)
class Verdict:
    """`difference` and `margin` in the metric's unit (of logarithms for a ratio), signed so that
    positive is what the paper found."""

    word: str
    difference: float
    margin: float | None
    seeds: tuple[int, int]


def judge(finding: Finding, values: Values, decides: bool = True) -> Verdict | None:
    """None where one of the two was not run."""
    metric = METRICS[finding.metric]
    this, than = (_scaled(values.get(name, ()), metric) for name in (finding.this, finding.than))
    if not this or not than:
        return None
    sign = 1 if metric.larger_is_better else -1
    difference = sign * (_mean(this) - _mean(than))
    noise = 0.0 if metric.exact else _noise(this, than, values.values(), metric)
    margin = None if noise is None else max(metric.least, noise)
    word = UNDECIDED
    if decides and noise is not None and margin is not None:
        word = _word(finding, difference, margin, noise, metric)
    return Verdict(word, difference, margin, (len(this), len(than)))


def _word(finding: Finding, difference: float, margin: float, noise: float, metric: Metric) -> str:
    if not finding.same:
        return AGREES if difference > margin else DISAGREES if difference < -margin else UNDECIDED
    if abs(difference) > margin:
        return DISAGREES
    return AGREES if abs(difference) + noise < SAME * metric.least else UNDECIDED


def _noise(
    this: Sequence[float], than: Sequence[float], every: Iterable[Sequence[float]], metric: Metric
) -> float | None:
    pooled = spread([_scaled(values, metric) for values in every])
    if pooled is None:
        return None
    deviation, freedom = pooled
    return student(freedom) * deviation * math.sqrt(1 / len(this) + 1 / len(than))


def spread(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """(standard deviation within groups, degrees of freedom); None where no group has two."""
    squares, freedom = 0.0, 0
    for values in groups:
        if len(values) > 1:
            squares += sum((value - _mean(values)) ** 2 for value in values)
            freedom += len(values) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def student(freedom: int) -> float:
    """t of so many degrees of freedom, or of the next fewer that the table has."""
    return _T[max(known for known in _T if known <= freedom)]


def _scaled(values: Sequence[float], metric: Metric) -> list[float]:
    return [math.log(value) for value in values] if metric.ratio else list(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
