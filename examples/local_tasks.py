#!/usr/bin/env python3
"""Three tasks for `hymba eval`, without a download: made from the Python files of this machine.

    python examples/local_tasks.py tasks/ && hymba eval MODEL --include-path tasks/ \\
        --tasks next_line python_text recall_value

    next_line      which of four lines comes next? multiple choice, two examples in front
    python_text    perplexity of whole files, in windows where they are longer than the context
    recall_value   the argument that is still missing; the answer must contain it

A task of your own is a file like these: lm-eval's YAML and a JSONL of questions.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, train: {folder}/{name}.train.jsonl}}}}
test_split: test
"""
NEXT_LINE = """training_split: train
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
PYTHON_TEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
RECALL_VALUE = """training_split: train
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{value}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
process_results: !function contains.process_results
metric_list:
  - {metric: contains, aggregation: mean, higher_is_better: true}
"""
NAMES = (
    *("width", "height", "depth", "limit", "first", "last", "source", "target", "parent", "child"),
    *("prefix", "suffix", "reader", "writer", "buffer", "timeout", "encoding", "errors", "level"),
)
CONTAINS = '''"""The score of SQuAD completion and SWDE: is the value in the answer?"""


def process_results(doc, results):
    return {"contains": float(doc["value"].lower() in results[0].lower())}
'''


def write_tasks(folder: Path, count: int = 40, seed: int = 0, lines: int = 12) -> None:
    """The YAML and the questions of all three; `lines` of a file stand in front of a question."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    files = _files(draw, 4 * count)
    _write(folder, "next_line", NEXT_LINE, [_next_line(files, draw, lines) for _ in range(count)])
    _write(folder, "python_text", PYTHON_TEXT, [{"text": draw.choice(files)} for _ in range(8)])
    _write(folder, "recall_value", RECALL_VALUE, [_recall(draw) for _ in range(count)])
    (folder / "contains.py").write_text(CONTAINS, encoding="utf-8")


def _write(folder: Path, name: str, yaml: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + yaml)
    _write_lines(folder / f"{name}.jsonl", rows[2:])
    _write_lines(folder / f"{name}.train.jsonl", rows[:2])


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _files(draw: random.Random, count: int) -> list[str]:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    some = [text[:6000] for text in texts if text.isascii() and text.count("\n") > 80]
    return draw.sample(some, min(count, len(some)))


def _next_line(files: list[str], draw: random.Random, lines: int) -> dict[str, Any]:
    """Some lines of a file and four that may follow, three of them from elsewhere."""
    text = draw.choice(files).splitlines(keepends=True)
    at = draw.randrange(lines, len(text) - 1)
    while not text[at].strip():
        at = draw.randrange(lines, len(text) - 1)
    choices = [text[at].rstrip("\n")]
    while len(choices) < 4:
        line = draw.choice(draw.choice(files).splitlines())
        if line.strip() and line not in choices:
            choices.append(line)
    draw.shuffle(choices)
    answer = choices.index(text[at].rstrip("\n"))
    return {"text": "".join(text[at - lines : at]), "choices": choices, "answer": answer}


def _recall(draw: random.Random) -> dict[str, str]:
    """A constructor that keeps its arguments; which one comes next stood at its head."""
    names = draw.sample(NAMES, 4)
    kept = "".join(f"        self.{name} = {name}\n" for name in names[:-1])
    text = f"class Thing:\n\n    def __init__(self, {', '.join(names)}):\n{kept}"
    return {"text": f"{text}        self.", "value": names[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=40, help="questions of a task")
    args = parser.parse_args()
    write_tasks(args.folder, args.count)
    print(f"tasks next_line, python_text, recall_value in {args.folder}")


if __name__ == "__main__":
    main()
