"""Suites by name: lm-eval's tasks, shots and metrics, and what the paper reports. No torch here.

    SUITES["paper-base"].tasks[0]     Entry("MMLU", "mmlu", 5, "acc")

Figures are those of tables 2, 3 and 4 of arXiv 2411.13676, in percent but for perplexities. Where
the paper does not say which of a task's metrics it means, `note` says what was taken and why.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One column of a paper's table."""

    label: str
    task: str
    shots: int | None  # None: the task's own
    metric: str  # of lm-eval: name, or name,filter
    percent: bool = True
    lower: bool = False  # is better
    note: str = ""


@dataclass(frozen=True)
class Suite:
    about: str
    tasks: tuple[Entry, ...]
    paper: dict[str, tuple[float | None, ...]]  # a row: in the order of `tasks`
    averaged: int  # the last so many columns, as the paper's average takes them
    chat: bool = False
    left_out: str = ""
    gen_kwargs: tuple[tuple[str, object], ...] = ()


CHECKED = "acc: an independent measurement of the released weights agrees"
NORMED = "acc_norm: usual where models of this size are compared; the paper does not say"

_BASE = (
    Entry("MMLU", "mmlu", 5, "acc"),
    Entry("ARC-E", "arc_easy", 0, "acc", note=CHECKED),
    Entry("ARC-C", "arc_challenge", 0, "acc", note=CHECKED),
    Entry("PIQA", "piqa", 0, "acc", note=CHECKED),
    Entry("Wino", "winogrande", 0, "acc", note=CHECKED),
    Entry("Hella", "hellaswag", 0, "acc", note=CHECKED),
    Entry("SQuAD-C", "squad_completion", 1, "contains"),
)
_1B = (
    Entry("Wiki ppl", "wikitext", None, "word_perplexity", percent=False, lower=True),
    Entry("LMB ppl", "lambada_openai", 0, "perplexity", percent=False, lower=True),
    Entry("SWDE", "swde", 0, "contains"),
    Entry("SQuAD-C", "squad_completion", 0, "contains"),
    Entry("Lambada", "lambada_openai", 0, "acc"),
    Entry("PIQA", "piqa", 0, "acc"),
    Entry("ARC-C", "arc_challenge", 0, "acc_norm", note=NORMED),
    Entry("ARC-E", "arc_easy", 0, "acc"),
    Entry("Hella", "hellaswag", 0, "acc_norm", note=NORMED),
    Entry("Wino", "winogrande", 0, "acc"),
    Entry("TruthfulQA", "truthfulqa_mc1", 0, "acc", note="mc1: the paper does not say which"),
    Entry("SIQA", "social_iqa", 0, "acc"),
)
_INSTRUCT = (
    Entry("MMLU", "mmlu", 5, "acc"),
    Entry(
        "IFEval",
        "ifeval",
        0,
        "prompt_level_strict_acc",
        note="strict, by prompt: the paper does not say which of four",
    ),
    Entry(
        "GSM8K",
        "gsm8k",
        5,
        "exact_match,flexible-extract",
        note="the last number of the answer; the paper does not say which filter",
    ),
    Entry(
        "GPQA",
        "gpqa_main_zeroshot",
        0,
        "acc_norm",
        note="the main set (gated: accept its terms on the hub); the paper does not say which",
    ),
)

SUITES: dict[str, Suite] = {
    "paper-base": Suite(
        "the paper's table 2: MMLU 5-shot, SQuAD-C 1-shot, the rest 0-shot",
        _BASE,
        {
            "Hymba": (51.19, 76.94, 45.90, 77.31, 66.61, 53.55, 55.93),
            "Hymba (public data)": (44.31, 78.58, 47.01, 77.53, 64.56, 53.89, 59.82),
            "Llama-3.2-3B": (56.03, 74.54, 42.32, 76.66, 69.85, 55.29, 43.46),
            "Llama-3.2-1B": (32.12, 65.53, 31.39, 74.43, 60.69, 47.72, 40.18),
            "SmolLM2-1.7B": (50.29, 77.78, 44.71, 77.09, 66.38, 53.55, 50.50),
            "Qwen2.5-1.5B": (60.92, 75.51, 41.21, 75.79, 63.38, 50.20, 49.53),
            "h2o-danube2-1.8B": (40.05, 70.66, 33.19, 76.01, 66.93, 53.70, 49.03),
            "Phi-1.5": (42.56, 76.18, 44.71, 76.56, 72.85, 48.00, 30.09),
            "Rene-v0.1": (32.94, 67.05, 31.06, 76.49, 62.75, 51.16, 48.36),
        },
        averaged=7,
    ),
    "paper-1b": Suite(
        "the paper's table 3: 1B models on 100B tokens of SmolLM-Corpus, 0-shot",
        _1B,
        {
            "Hymba": (18.62, 10.38, 54.29, 44.71)
            + (52.84, 74.97, 41.72, 74.12, 60.05, 57.85, 31.76, 43.24),
            "Llama3": (19.28, 13.09, 75.95, None)
            + (47.95, 73.45, 39.68, 73.74, 57.64, 56.20, 31.64, 42.22),
            "Samba": (19.91, 12.65, 30.00, 42.33)
            + (49.08, 73.23, 39.59, 73.36, 58.49, 57.54, 28.84, 42.48),
            "Mamba2": (19.17, 12.59, 50.24, 36.43)
            + (47.51, 73.94, 38.91, 70.96, 57.73, 58.48, 30.75, 41.86),
            "Mamba2+FFN": (20.42, 14.43, 26.43, 31.40)
            + (44.54, 73.07, 37.03, 71.00, 55.83, 55.56, 29.86, 42.22),
        },
        averaged=8,
    ),
    "paper-instruct": Suite(
        "the paper's table 4: instruction-tuned models, with the model's chat template",
        _INSTRUCT,
        {
            "Hymba-1.5B": (52.79, 57.14, 58.76, 31.03),
            "Llama-3.2-1B": (44.41, 58.92, 42.99, 24.11),
            "Qwen2.5-1.5B": (59.73, 46.78, 56.03, 30.13),
            "SmolLM2-1.7B": (49.11, 55.06, 47.68, 29.24),
            "SmolLM-1.7B": (27.80, 25.16, 1.36, 25.67),
        },
        averaged=4,
        chat=True,
        left_out="BFCLv2 is left out: it has a package of its own (the paper: Hymba 46.40,"
        " Qwen2.5-1.5B 43.85); averages here are without it",
    ),
}


def mean(figures: tuple[float | None, ...], averaged: int) -> float | None:
    """Of the last `averaged` figures, None where one is missing."""
    known = [figure for figure in figures[-averaged:] if figure is not None]
    return sum(known) / averaged if len(known) == averaged else None
