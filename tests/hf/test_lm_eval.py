"""lm-eval over a local file: the scores must not depend on how questions share a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hymba.hf import HymbaForCausalLM

QUESTIONS = [
    {"query": "the cat sat on", "choices": [" the mat", " a dog", " it"], "gold": 0},
    {"query": "dogs", "choices": [" bark", " fly away now", " sing"], "gold": 0},
    {"query": "one two three", "choices": [" four", " ten", " nine"], "gold": 0},
    {"query": "red and", "choices": [" blue", " up", " the"], "gold": 1},
    {"query": "a", "choices": [" b", " q", " z"], "gold": 2},
]
TASK = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch(
    build: Callable[..., HymbaForCausalLM],
    letters: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=file))
    tasks, model = TaskManager(include_path=str(tmp_path), include_defaults=False), build()

    def scores(batch_size: int) -> tuple[float, list[float]]:
        run: dict[str, Any] = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=letters, batch_size=batch_size),
            tasks=["letters"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
        likelihoods = [x for one in run["samples"]["letters"] for x, _ in one["filtered_resps"]]
        return run["results"]["letters"]["acc,none"], likelihoods

    (accuracy, one), (same, three) = scores(1), scores(3)
    assert len(one) == 15 and len(set(one)) == 15
    assert one == pytest.approx(three, abs=1e-3)
    assert accuracy == same
