"""Local tasks of lm-eval for tests: one of each type that the paper's suites have."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = "the cat sat on a mat and dogs bark at red birds that fly away over green hills".split()
HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choice": """output_type: multiple_choice
num_fewshot: 2
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "answer": """output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{value}}"
generation_kwargs: {until: ["q"], max_gen_toks: 9, do_sample: false}
process_results: !function contains.process_results
metric_list:
  - {metric: contains, aggregation: mean, higher_is_better: true}
""",
}
CONTAINS = """def process_results(doc, results):
    return {"contains": float(doc["value"].lower() in results[0].lower())}
"""


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def write_tasks(folder: Path, names: Sequence[tuple[str, str]] = (), count: int = 12) -> Path:
    """(name, type) of each; without any, the three types under their own names. Texts of "rolling"
    are up to 150 words: longer than a context of 160."""
    draw = random.Random(0)
    for name, kind in names or [(kind, kind) for kind in TASKS]:
        file = folder / f"{name}.jsonl"
        rows = [_row(kind, number, draw) for number in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, file=file) + TASKS[kind])
    (folder / "contains.py").write_text(CONTAINS)
    return folder


def _row(kind: str, number: int, draw: random.Random) -> dict[str, Any]:
    if kind == "choice":
        choices = [" " + sentence(draw, draw.randrange(1, 4)) for _ in range(4)]
        query = sentence(draw, draw.randrange(1, 12))
        return {"query": query, "choices": choices, "gold": number % 4}
    if kind == "rolling":
        return {"query": sentence(draw, (3, 30, 150)[number % 3])}
    return {"query": sentence(draw, draw.randrange(1, 20)), "value": "e"}
