"""`LLM.run`: prompts without end, in the order in which they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hymba.engine import LLM, Limits, Output, Sampling
from hymba.engine.llm import in_order
from hymba.errors import UserError


@pytest.fixture
def llm(lively: Callable[..., Any], tiny: Callable[..., Any]) -> LLM:
    config = tiny("hymba").replace(eos_token_id=None)
    return LLM(lively(config), limits=Limits(max_sequences=2))


def test_each_comes_as_it_is_done_and_in_order_it_is_generate(llm: LLM) -> None:
    prompts = [[1, 2, 3 + i] for i in range(9)]
    each = [Sampling(max_tokens=1 + 7 * i % 11) for i in range(9)]
    found = list(llm.run(zip(prompts, each, strict=True)))
    assert sorted(index for index, _ in found) == list(range(9))
    assert [index for index, _ in found] != list(range(9)), "all as long as each other?"
    outputs = list(in_order(iter(found)))
    assert [output.tokens for output in outputs] == [x.tokens for x in llm.generate(prompts, each)]
    assert [len(output.tokens) for output in outputs] == [x.max_tokens for x in each]


def test_no_more_is_read_than_there_is_room_for(llm: LLM) -> None:
    read = 0

    def endless() -> Iterator[tuple[list[int], Sampling]]:
        nonlocal read
        while True:
            read += 1
            yield [1, 2, 3], Sampling(max_tokens=2, n=1 + read % 3)

    run = llm.run(endless())
    for done in range(1, 30):
        next(run)
        assert read <= done + 2 + 2 + 2, "as many as run and wait, no more"
    run.close()
    assert not llm.engine.busy, "who leaves early leaves nothing behind"


def test_what_cannot_be_served_is_told_in_its_place(llm: LLM) -> None:
    asked: list[Any] = [[1, 2], [], [999], "text", [3, 4], [5] * 600]
    found = dict(llm.run((prompt, Sampling(max_tokens=3)) for prompt in asked))
    assert [isinstance(found[i], Output) for i in range(6)] == [True, False, False, False, True, 0]
    assert "vocabulary" in str(found[2]) and "no tokenizer" in str(found[3])
    with pytest.raises(UserError, match="vocabulary"):
        list(llm.generate([[1], [999]]))
    assert not llm.engine.busy


def test_a_run_can_be_ended_between_steps(llm: LLM) -> None:
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(llm.run([([1, 2], Sampling(max_tokens=100))], after_step))
    assert steps == 5 and not llm.engine.busy
    assert list(llm.run([])) == []
