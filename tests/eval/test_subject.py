"""A subject says of a row what its model says of the row alone: whatever stands beside it, through
our code and through transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.errors import UserError
from hymba.eval.subject import Ours, Subject, Theirs, open_subject, score_logits, until
from hymba.model.batch import Batch
from hymba.tokenizer import Tokenizer
from tests.commands.generating import save_model

ROUNDING = 1e-4  # of float32 log-probabilities that are sums of other groups of numbers
KINDS = ["ours", "ours through transformers", "llama", "gpt2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any, lively: Callable[..., Any]) -> dict[str, Path]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    ours = save_model(root / "ours", lively, seed=3)
    tokenizer = Tokenizer.from_folder(ours)
    torch.manual_seed(0)
    habits = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    llama = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, **sizes, **habits
    )
    gpt2 = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **habits
    )
    for name, model in {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}.items():
        # A checkpoint's own habits of generation must not change what is likeliest.
        model.generation_config.suppress_tokens = list(range(3, 300, 2))
        model.save_pretrained(root / name)
        tokenizer.save(root / name)
    return {"ours": ours, "llama": root / "llama", "gpt2": root / "gpt2"}


@pytest.fixture(scope="module")
def subject(folders: dict[str, Path]) -> Callable[[str], Subject]:
    opened = {name: open_subject(folder, "cpu", "float32") for name, folder in folders.items()}
    again = open_subject(folders["ours"], "cpu", "float32", through="transformers")
    opened["ours through transformers"] = again
    return opened.__getitem__


def alone(subject: Any, row: list[int]) -> torch.Tensor:
    """Log-probabilities (len - 1, V) from the model itself, one row without padding."""
    ids = torch.tensor(row[:-1])
    with torch.no_grad():
        if isinstance(subject, Ours):
            logits = subject.model.logits(subject.model(ids, Batch.of([len(ids)])))
        else:
            logits = subject.peer.model(ids[None]).logits[0]
    return logits.float().log_softmax(-1)


def rows_of(vocab: int = 280) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 2, 31, 17, 3, 1, 40, 5)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_scored_as_it_is_alone(kind: str, subject: Callable[[str], Any]) -> None:
    one, rows = subject(kind), rows_of()
    for batch in (1, 3, 7, 8):
        for row, found in zip(rows, one.score(rows, batch), strict=True):
            assert found.logprobs.dtype == torch.float32 and found.logprobs.shape == (len(row) - 1,)
            if len(row) < 2:
                continue
            want, goals = alone(one, row), torch.tensor(row[1:])
            own = want.gather(1, goals[:, None])
            assert (found.logprobs - own[:, 0]).abs().max() < ROUNDING
            order = want.argsort(dim=1, descending=True, stable=True)  # the likeliest first
            places = (order == goals[:, None]).int().argmax(1)
            assert (found.ranks - places).abs().max() <= 1  # neighbours may round to one number
    assert [x.tolist() for x in one.logprobs(rows, 3)] == [
        x.logprobs.tolist() for x in one.score(rows, 3)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_tails_are_the_ends_of_rows(kind: str, subject: Callable[[str], Any]) -> None:
    one, rows = subject(kind), rows_of()
    tails = [min(len(row) - 1, 3 * (i % 3)) for i, row in enumerate(rows)]
    whole = one.score(rows, 3)
    for row, found, all_of_it in zip(tails, one.score(rows, 3, tails), whole, strict=True):
        assert len(found.ranks) == row
        want = all_of_it.logprobs[len(all_of_it.logprobs) - row :]
        assert torch.allclose(found.logprobs, want, atol=ROUNDING)
    assert not any(len(x.ranks) for x in one.score(rows, 3, [0] * len(rows)))


def test_logits_of_few_rows_at_a_time(
    subject: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where those of a batch are too many; each row alone makes no larger than its own."""
    one, rows, seen = subject("llama"), rows_of(), []
    whole, logits = one.logprobs(rows, 8), one.peer.logits

    def spy(ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return logits(ids, *others)

    monkeypatch.setattr("hymba.eval.subject.THEIRS", 2 * 16 * one.peer.vocab_size)
    monkeypatch.setattr(one.peer, "logits", spy, raising=False)
    for a, b in zip(whole, one.logprobs(rows, 8), strict=True):
        assert torch.allclose(a, b, atol=ROUNDING)
    assert seen[0] == 1 and max(seen) == 4 and sum(seen) == len(rows)


def test_transformers_says_what_we_say(subject: Callable[[str], Any]) -> None:
    ours, theirs = subject("ours"), subject("ours through transformers")
    assert isinstance(ours, Ours) and isinstance(theirs, Theirs)
    assert ours.begin == theirs.begin == [1] and ours.most_tokens == theirs.most_tokens == 2000
    text = "to be or not\n  to </s> be"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    ids = ours.begin + ours.tokenizer.encode(text)
    assert ours.tokenizer.decode(ids) == theirs.tokenizer.decode(ids) == text
    for a, b in zip(ours.logprobs(rows_of(), 4), theirs.logprobs(rows_of(), 4), strict=True):
        assert torch.allclose(a, b, atol=ROUNDING)
    prompts = [row for row in rows_of() if row]
    assert ours.generate(prompts, 6) == theirs.generate(prompts, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_arg_max(kind: str, subject: Callable[[str], Any]) -> None:
    """Prompts of several lengths at once; what the checkpoint would suppress is said."""
    one = subject(kind)
    prompts = [one.begin + one.tokenizer.encode(text) for text in ("to be", "that is the q", "o")]
    want = []
    for prompt in prompts:
        row = [*prompt]
        for _ in range(5):
            row.append(int(alone(one, [*row, 0])[-1].argmax()))
            if row[-1] == 2 and not kind.startswith("ours"):  # ours was saved without an end
                break
        want.append(one.tokenizer.decode(row[len(prompt) :]))
    assert one.generate(prompts, 5) == want
    letter = next(text[len(text) // 2] for text in want if text)
    cut = [text.split(letter)[0] for text in want]
    assert one.generate(prompts, 5, (letter,)) == cut


def test_ranks_count_what_is_likelier() -> None:
    """Of equal ones the first counts, as arg max takes the first."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).expand(4, 4)
    found = score_logits(logits, torch.arange(4))
    assert found.ranks.tolist() == [3, 0, 1, 2]
    assert torch.allclose(found.logprobs, logits[0].log_softmax(0))
    assert until("ab\ncd;e", ("\n", ";")) == "ab" and until("ab", ("\n",)) == "ab"


def test_what_cannot_be_asked(
    folders: dict[str, Path], subject: Callable[[str], Any], tmp_path: Path
) -> None:
    gpt2 = subject("gpt2")
    assert gpt2.last_position == gpt2.most_tokens == 64
    assert subject("llama").last_position is None and subject("llama").most_tokens == 64
    assert len(subject("llama").logprobs([[5] * 100], 1)[0]) == 99  # more than it was made for
    # An answer ends where positions end.
    short, long = gpt2.generate([[5] * 3], 9), gpt2.generate([[5] * 60], 4)
    assert gpt2.generate([[5] * 60, [5] * 3], 9) == [*long, *short]
    ours = subject("ours")
    assert ours.generate([[5] * 1995], 9) == ours.generate([[5] * 1995], 5)
    mistakes: list[tuple[str, Callable[[], Any]]] = [
        ("positions for 64 tokens", lambda: gpt2.logprobs([[5] * 66], 1)),
        ("a prompt takes all", lambda: gpt2.generate([[5] * 64], 3)),
        ("row 1 is empty", lambda: gpt2.logprobs([[5], []], 1)),
        ("cannot be scored", lambda: gpt2.score([[5, 6]], 1, [2])),
        ("1 row or more", lambda: gpt2.score([[5, 6]], 0)),
        ("no model folder", lambda: open_subject(tmp_path / "nothing")),
        ("no config.json", lambda: open_subject(tmp_path)),
        ("no dtype", lambda: open_subject(folders["llama"], "cpu", "float33")),
    ]
    for words, ask in mistakes:
        with pytest.raises(UserError, match=words) as raised:
            ask()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_a_model_without_tokenizer_is_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders[kind].iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="tokenizer") as raised:
        open_subject(tmp_path, "cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [{"model_type": "nobody knows"}, {"model_type": "t5"}, [], {}])
def test_what_is_no_causal_model_is_refused(
    config: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    Tokenizer.from_folder(folders["ours"]).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        open_subject(tmp_path, "cpu")
    assert "\n" not in str(raised.value)
