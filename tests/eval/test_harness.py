"""lm-eval over local tasks: scores and log-likelihoods depend neither on the batch nor on padding,
and are those of lm-eval's own class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

import hymba
from hymba.config import Config
from hymba.errors import UserError
from hymba.eval.harness import OurLM, Shelf, evaluate
from hymba.hf import HymbaForCausalLM
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from tests.eval.local import TASKS, WORDS, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multiple choice with examples, whole texts longer than the context, and answers that must
    contain a value."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(
    tiny: Callable[[str], Config],
    lively: Callable[..., LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> LanguageModel:
    """A lively model with all features and a context of 160, in a folder with a tokenizer."""
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 4, vocab_size=300)
    config = tiny("hymba").replace(vocab_size=tokenizer.vocab_size, max_positions=160)
    folder = tmp_path_factory.mktemp("model")
    hymba.save(lively(config), folder, tokenizer)
    return hymba.load(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scored(model: LanguageModel, tasks: Path) -> Callable[..., tuple[dict[str, float], list[Any]]]:
    """scored("choice", "ours", 7) -> metrics, and what was said of each question."""

    @cache
    def found(task: str, whose: str, batch: int | None) -> tuple[dict[str, float], list[Any]]:
        if whose == "ours":
            lm: Any = OurLM(model, batch=batch, progress=False)
        else:
            peer = HymbaForCausalLM.from_pretrained(model.folder)
            lm = HFLM(peer, tokenizer=str(model.folder), batch_size=batch)
        result = evaluate(lm, Shelf.of([task], tasks), task)
        assert result is not None
        return result["results"][task], said(result, task)

    return found


def said(result: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def numbers(answers: Sequence[Any]) -> list[float]:
    """Every log-likelihood and whether it was greedy, in order."""
    flat: list[float] = []
    for answer in answers:
        if isinstance(answer, (list, tuple)):
            flat += numbers(answer)
        else:
            flat.append(float(answer))
    return flat


@pytest.mark.parametrize(
    ("whose", "batch"), [("ours", 1), ("ours", 7), ("lm-eval's", 1), ("lm-eval's", 7)]
)
@pytest.mark.parametrize("task", list(TASKS))
def test_nothing_depends_on_the_batch(
    scored: Callable[..., tuple[dict[str, float], list[Any]]],
    task: str,
    whose: str,
    batch: int,
) -> None:
    """float32: 1e-4, or 5e-6 of a sum that is larger than 20, is rounding (a lively model makes
    more of it than a trained one). Texts are equal letter by letter.

    lm-eval's own class pads questions on the right and prompts on the left."""
    metrics, answers = scored(task, whose, batch)
    auto_metrics, auto = scored(task, "ours", None)
    if task == "answer":
        assert answers == auto
        assert len({str(answer) for answer in auto}) > 6
    else:
        assert numbers(answers) == pytest.approx(numbers(auto), abs=1e-4, rel=5e-6)
        assert len(set(numbers(auto))) > 10
    for name, value in auto_metrics.items():
        if isinstance(value, float):
            assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_the_tasks_can_tell(scored: Callable[..., tuple[dict[str, float], list[Any]]]) -> None:
    """None of the three is so easy or so hard that a wrong model would score the same."""
    for task, metric in (("choice", "acc,none"), ("answer", "contains,none")):
        assert 0 < scored(task, "ours", None)[0][metric] < 1
    assert scored("rolling", "ours", None)[0]["bits_per_byte,none"] > 0.1


@pytest.mark.parametrize("task", list(TASKS))
def test_long_prompts_are_cut_on_the_left_and_counted(
    model: LanguageModel, tasks: Path, task: str
) -> None:
    """As lm-eval's own class does; at a context of 20 most are too long."""
    peer = HymbaForCausalLM.from_pretrained(model.folder)
    theirs = HFLM(peer, tokenizer=str(model.folder), batch_size=1, max_length=20)
    ours, shelf = OurLM(model, progress=False), Shelf.of([task], tasks)
    whole = evaluate(ours, shelf, task)
    ours.max_length = 20
    found, twin = (evaluate(lm, shelf, task) for lm in (ours, theirs))
    assert said(found, task) != said(whole, task)
    if task == "answer":
        assert said(found, task) == said(twin, task)
    else:
        expected = pytest.approx(numbers(said(twin, task)), abs=1e-4, rel=5e-6)
        assert numbers(said(found, task)) == expected
    assert whole["cut"] == 0 and (found["cut"] > 0) == (task != "rolling")


@pytest.mark.parametrize("task", ["choice", "answer"])
def test_a_context_too_short(model: LanguageModel, tasks: Path, task: str) -> None:
    lm = OurLM(model, progress=False)
    lm.max_length = 2
    with pytest.raises(UserError, match="context is 2: too short for this task"):
        evaluate(lm, Shelf.of([task], tasks), task)


def test_examples_and_limits_are_followed(model: LanguageModel, tasks: Path) -> None:
    lm, shelf = OurLM(model, progress=False), Shelf.of(["choice"], tasks)
    lengths = []
    for shots in (0, 3):
        found = evaluate(lm, shelf, "choice", shots=shots, limit=4)
        assert found["n-shot"]["choice"] == shots and len(found["samples"]["choice"]) == 4
        sample = found["samples"]["choice"][0]
        lengths.append(len(sample["arguments"][0][0]))
    assert lengths[1] > 2 * lengths[0]


def test_no_task_of_that_name_but_some_are_near(tasks: Path) -> None:
    shelf = Shelf.of(["choice"], tasks)
    assert shelf.near("chioce") == "did you mean 'choice'?"
    assert "did you mean" not in shelf.near("zzzz")


def test_a_model_without_tokenizer(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer.json: tasks are of text"):
        OurLM(model, tmp_path)


def test_chats_need_a_template(model: LanguageModel, tasks: Path) -> None:
    with pytest.raises(UserError, match="no chat template: leave out"):
        evaluate(OurLM(model, progress=False), Shelf.of(["choice"], tasks), "choice", chat=True)


def test_chats_are_put_into_the_template(model: LanguageModel, tasks: Path) -> None:
    """Examples are turns; the token that begins a text comes once, from the tokenizer."""
    lm, shelf = OurLM(model, progress=False), Shelf.of(["choice"], tasks)
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = evaluate(lm, shelf, "choice", chat=True, limit=2)
    prompt = found["samples"]["choice"][0]["arguments"][0][0]
    assert prompt.count("[user]") == 3 and prompt.count("[assistant]") == 3
    assert lm.tok_encode(prompt).count(lm.tokenizer.bos_token_id) == 1


def test_more_ends_than_the_engine_takes(model: LanguageModel) -> None:
    lm = OurLM(model, progress=False)
    wishes = {"until": [chr(97 + i) * 3 for i in range(20)], "max_gen_toks": 8}
    _, sampling, ends = lm._question("a", wishes)
    assert len(sampling.stop) == 16 and len(ends) == 20


def test_what_a_model_wrote_is_not_run(model: LanguageModel, tasks: Path) -> None:
    shelf = Shelf.of(["answer"], tasks)
    shelf.load("answer")["tasks"]["answer"].UNSAFE_CODE = True
    with pytest.raises(UserError, match="runs code that the model writes"):
        evaluate(OurLM(model, progress=False), shelf, "answer")
