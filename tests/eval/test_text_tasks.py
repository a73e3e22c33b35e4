"""Recall as text: rows have exactly the length asked for, every task can be solved from the text
alone, and labels are what a reader of the text would say. The oracle is written from the tasks'
docstrings and sees nothing but decoded text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers

from hymba.errors import UserError
from hymba.eval import figures
from hymba.eval.hay import Hay, Pen
from hymba.eval.recall_suite import contained, default_lengths, run_suite, table
from hymba.eval.subject import Ours, Scored, open_subject
from hymba.eval.text_tasks import TASKS, Ask
from hymba.tokenizer import Tokenizer
from tests.commands.generating import save_model

TEXT = "".join(
    f"def step_{i}(values):\n    # Half of what is asked, {i} more.\n    return values[{i}:]\n\n"
    for i in range(60)
)
ROUNDING = 1e-4  # of float32 log-probabilities


def released_kind() -> Tokenizer:
    """As Llama 2's: spaces are ▁, one is put in front, everything else by bytes."""
    words = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocab = {word: i for i, word in enumerate(words + [f"<0x{b:02X}>" for b in range(256)])}
    merges = [("▁", "t"), ("▁", "a"), ("i", "s"), ("e", "r"), ("4", "2")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return Tokenizer({"tokenizer.json": inner.to_str().encode()})


class Oracle:
    """Reads a prompt and says the answer, or what `says` makes of it."""

    name, most_tokens, last_position = "oracle", 4000, None

    def __init__(self, tokenizer: Tokenizer, says: Callable[[str], str] | None = None) -> None:
        self.tokenizer, self.says = tokenizer, says
        self.begin = [tokenizer.bos_id]
        self.prompts: list[str] = []

    def score(self, rows: list[list[int]], batch: int, tails: Sequence[int]) -> list[Scored]:
        """Odd ids are the likeliest; each token costs its id."""
        parts = [torch.tensor(row[len(row) - n :]) for row, n in zip(rows, tails, strict=True)]
        return [Scored(-part.float(), 1 - part % 2) for part in parts]

    def logprobs(self, rows: list[list[int]], batch: int) -> list[torch.Tensor]:
        raise NotImplementedError

    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        assert stop == ("\n",)
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.prompts += texts
        said = [f" {solve(text)}." for text in texts]
        assert all(len(self.tokenizer.encode(text)) <= max_tokens for text in said)
        return said if self.says is None else [self.says(text) for text in said]


def solve(text: str) -> str:
    if text.endswith("The pass key is"):
        (key,) = set(re.findall(r"The pass key is (\d+)\. Keep it", text))
        return key
    if name := re.search(r"What is the magic number of (.+)\? The magic number of \1 is$", text):
        (value,) = re.findall(rf"^The magic number of {name[1]} is (\d+)\.$", text, re.M)
        return value
    if name := re.search(r"What are .* The magic numbers of (.+) are$", text):
        found = re.findall(rf"^A magic number of {name[1]} is (\d+)\.$", text, re.M)
        return " and ".join(found)
    if value := re.search(r"have the value (\d+), .* The names are$", text):
        same = [value[1]]
        for name, what in re.findall(r"^Set (\w+) to (\w+)\.$", text, re.M):
            same += [name] if what in same else []
        return " and ".join(same[1:])
    asked = text[text.rindex("\n") + 1 :]
    before = text[: text.rindex("\n")]
    (value,) = set(re.findall(rf"^{re.escape(asked)} (\S+)$", before, re.M))
    return value


@pytest.fixture(scope="module", params=["bytes", "released"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train([TEXT], 400) if request.param == "bytes" else released_kind()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [700, 1501])
def test_an_oracle_solves_every_task(name: str, length: int, tokenizer: Tokenizer) -> None:
    oracle = Oracle(tokenizer)
    result = run_suite(oracle, [name], [length], (0, 0.3, 1), samples=3, seed=5, text=TEXT)
    found = result["tasks"][name]
    assert found["generated"] == 1.0
    assert len(set(oracle.prompts)) == len(oracle.prompts)
    shifted = Oracle(tokenizer, says=lambda said: re.sub(r"\w", "7", said))
    wrong = run_suite(shifted, [name], [length], (0.5,), samples=3, seed=5, text=TEXT)
    assert wrong["tasks"][name]["generated"] == 0.0


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [640, 641, 1000])
def test_rows_are_what_they_say(name: str, length: int, tokenizer: Tokenizer) -> None:
    """Exact lengths; answers stand where the spans say; the same row on every call."""
    hay, task = Hay(Pen(tokenizer), TEXT), TASKS[name]
    seen = set()
    for number, depth in enumerate([0.0, 0.5, 1.0, None]):
        row = task.sample(hay, [1], length, depth, seed=3, number=number)
        assert row == task.sample(Hay(Pen(tokenizer), TEXT), [1], length, depth, 3, number)
        assert row.ids[0] == 1 and len(row.ids) == length and 1 not in row.ids[1:]
        seen.add(tuple(row.ids))
        for ask in row.asks:
            assert ask.at == ask.spans[0][0]
            said = [hay.pen.text(row.ids[a:b]).strip() for a, b in ask.spans]
            assert tuple(said) == ask.answers
        assert row.asks[-1].spans[-1][1] == length
        if depth is not None and task.has_depth:
            assert row.depth is not None
            near = 0 if depth in (0, 1) else 0.1  # a line of the text, a line of the book
            assert abs(row.depth - depth) <= near
    assert len(seen) == 4


@pytest.mark.parametrize("name", [name for name in TASKS if name != "passkey"])
def test_rows_are_cut_as_their_text_is(name: str, tokenizer: Tokenizer) -> None:
    """Pieces laid end to end have the tokens of the whole text, but for a word that is cut where
    the text around it ends."""
    hay = Hay(Pen(tokenizer), TEXT)
    row = TASKS[name].sample(hay, [], 700, 0.4, seed=1)
    text = hay.pen.text(row.ids)
    again = hay.pen.ids(text)
    assert abs(len(again) - len(row.ids)) <= 4
    assert again[-60:] == row.ids[-60:]


def test_a_guess_that_is_blind(tokenizer: Tokenizer) -> None:
    """`blind` is one over the things that stand there to be confused."""
    hay = Hay(Pen(tokenizer), TEXT)
    for name, pattern in {
        "needle": r"magic number of .* is (\d{7})\.",
        "multikey": r"magic number of .* is (\d{7})\.",
        "multivalue": r"magic number of .* is (\d{7})\.",
        "phonebook": r"^\w+ \w\. \w+: (\d{3}-\d{4})$",
    }.items():
        row = TASKS[name].sample(hay, [1], 1200, 0.5, seed=2)
        text = tokenizer.decode(row.ids[: row.asks[0].at])
        told = set(re.findall(pattern, text, re.M))
        assert row.blind == len(row.asks[0].answers) / len(told), name


def test_numbers_are_not_in_the_text_around(tokenizer: Tokenizer) -> None:
    """A haystack that holds most numbers of five digits: the key is one of the others."""
    taken = random.Random(1).sample(range(10_000, 100_000), 80_000)
    hay = Hay(Pen(tokenizer), "\n".join(map(str, taken)))
    for number in range(20):
        (ask,) = TASKS["passkey"].sample(hay, [1], 500, 0.5, number=number).asks
        assert int(ask.answers[0]) not in taken


def test_figures_count_answer_tokens() -> None:
    """`score` of the oracle says which: forced and exact by hand, from the spans alone."""
    tokenizer = Tokenizer.train([TEXT], 400)
    oracle = Oracle(tokenizer)
    for name in ("needle", "multivalue", "mqar"):
        result = run_suite(oracle, [name], [600], (0.5,), samples=4, generate=False, text=TEXT)
        (cell,) = result["tasks"][name]["cells"]
        hay, task = Hay(Pen(tokenizer), TEXT), TASKS[name]
        depth = 0.5 if task.has_depth else None
        rows = [task.sample(hay, oracle.begin, 600, depth, 0, i) for i in range(4)]
        answers = [
            [row.ids[a:b] for a, b in ask.spans] for row in rows for ask in row.asks
        ]  # [ask][span] ids
        flat = [[token for span in ask for token in span] for ask in answers]
        each = [sum(token % 2 for token in ask) / len(ask) for ask in flat]
        assert cell["forced"] == pytest.approx(sum(each) / len(each))
        assert cell["nats"] == pytest.approx(sum(sum(a) / len(a) for a in flat) / len(flat))
        exact = [sum(all(t % 2 for t in s) for s in ask) / len(ask) for ask in answers]
        assert cell["exact"] == pytest.approx(sum(exact) / len(exact))
        first = [sum(s[0] % 2 for s in ask) / len(ask) for ask in answers]
        assert cell["first"] == pytest.approx(sum(first) / len(first))
        assert cell["generated"] is None and cell["answers"] == len(answers)


def test_contained_means_as_whole_words() -> None:
    ask = Ask(0, ("key", "1234"), ((0, 1), (1, 2)))
    assert contained(ask, " key and 1234.") == 1.0
    assert contained(ask, " keys, 12345, 1234") == 0.5
    assert contained(ask, " monkey 01234") == 0.0 and contained(ask, None) is None


def test_scores_do_not_depend_on_the_batch(tmp_path: Path, lively: Callable[..., Any]) -> None:
    subject = open_subject(save_model(tmp_path / "model", lively, 1), "cpu", "float32")
    assert isinstance(subject, Ours) and default_lengths(subject) == (256, 512, 1024)
    kinds = ["needle", "mqar", "variables"]
    results = [
        run_suite(subject, kinds, [520, 600], (0, 1), samples=2, batch=batch, text=TEXT)
        for batch in (1, 3)
    ]
    for one, two in zip(*(result["tasks"].values() for result in results), strict=True):
        for a, b in zip(one.pop("cells"), two.pop("cells"), strict=True):
            assert a.pop("nats") == pytest.approx(b.pop("nats"), abs=ROUNDING)
            assert a == b
        assert one.pop("nats") == pytest.approx(two.pop("nats"), abs=ROUNDING)
    assert json.loads(json.dumps(results[0])) == json.loads(json.dumps(results[1]))


def test_beyond_its_positions_a_model_is_forced_only() -> None:
    oracle = Oracle(Tokenizer.train([TEXT], 400))
    oracle.most_tokens = 700
    result = run_suite(oracle, ["needle"], [600, 800], (0.5,), samples=2, text=TEXT)
    short, long = result["tasks"]["needle"]["cells"]
    assert short["generated"] == 1.0 and long["generated"] is None and long["forced"] is not None


def test_what_people_see(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told: list[tuple[str, int, int | None]] = []
    oracle = Oracle(Tokenizer.train([TEXT], 400))
    names = ["needle", "phonebook", "mqar"]
    result = run_suite(
        oracle, names, [600, 800], (0, 1), 1, progress=lambda *x: told.append(x), text=TEXT
    )
    assert told[-1] == ("mqar", 2, 2) and told[1] == ("needle", 4, 4) and len(told) == 6
    lines = table(result).splitlines()
    assert [line.split()[:3] for line in lines[1:7:2]] == [[n, "600", "100.0"] for n in names]
    assert max(map(len, lines)) <= 100
    assert figures.draw_recall(result, tmp_path / "a" / "map.png").stat().st_size > 1000
    cells = result["tasks"]["needle"]["cells"]
    grid = figures.heat(cells, [600, 800], [0, 1], "generated")
    assert grid == [[1.0, 1.0], [1.0, 1.0]]
    assert figures.heat(cells[:1], [600, 800], [0, 1], "generated") == [[1.0, None], [None, None]]


def test_recall_mistakes(tokenizer: Tokenizer) -> None:
    oracle = Oracle(tokenizer)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("did you mean needle", {"names": ["needl"]}),
        ("there are: needle", {"names": ["xyz"]}),
        ("10 tokens are too few for needle", {"lengths": [10]}),
        ("too few for phonebook", {"names": ["phonebook"], "lengths": [30]}),
        ("between 0", {"depths": [1.5]}),
        ("no depths", {"depths": []}),
        ("samples is 0", {"samples": 0}),
        ("is empty", {"text": " \n"}),
    ]
    for words, options in asked:
        given: dict[str, Any] = {"names": ["needle"], "lengths": [600], "text": TEXT} | options
        with pytest.raises(UserError, match=words) as raised:
            run_suite(oracle, **given)
        assert "\n" not in str(raised.value)


def test_the_least_length_that_is_named_is_enough(tokenizer: Tokenizer) -> None:
    """But for what a longer name needs."""
    hay = Hay(Pen(tokenizer), TEXT)
    for task in TASKS.values():
        with pytest.raises(UserError) as raised:
            task.sample(hay, [1], 20, 0.5)
        least = int(re.findall(r"lengths of (\d+) or more", str(raised.value))[0])
        assert len(task.sample(hay, [1], least + 60, 0.5).ids) == least + 60
