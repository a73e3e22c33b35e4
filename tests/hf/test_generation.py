"""generate() of transformers: a row of a batch gives, token for token, what it gives alone.

The window is 5 and the prompts are up to 40 tokens long, so rings wrap in prefill and decode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hymba.hf import HymbaCache, HymbaForCausalLM, InputError

LENGTHS = (5, 23, 40)
WIDEST = max(LENGTHS)
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
BEAMS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
Pad = Callable[..., dict[str, Tensor]]
Text = Callable[..., Any]
Build = Callable[..., HymbaForCausalLM]

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")


def alone(model: HymbaForCausalLM, rows: list[Tensor], **options: Any) -> list[list[int]]:
    """The new tokens of each row by itself."""
    device = model.device
    return [model.generate(r[None].to(device), **options)[0, len(r) :].tolist() for r in rows]


def together(model: HymbaForCausalLM, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    batch = {name: x.to(model.device) for name, x in batch.items()}
    return model.generate(**batch, **options)[:, WIDEST:].tolist()


@pytest.mark.parametrize("plan", ["hymba", "hymba-no-meta", "llama", "mamba", "samba"])
def test_a_cache_changes_nothing(build: Build, text: Text, plan: str, device: str) -> None:
    model, rows = build(plan).to(device), text(LENGTHS)
    with_cache = alone(model, rows, **GREEDY)
    assert with_cache == alone(model, rows, use_cache=False, **GREEDY)
    assert len({tuple(row) for row in with_cache}) == len(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 7}],
    ids=["cache", "no_cache", "chunks_of_1", "chunks_of_7"],
)
def test_batches_are_right(
    build: Build, text: Text, pad: Pad, side: str, options: dict[str, Any], device: str
) -> None:
    """Padded left or right, prefilled at once or in chunks: a chunk may then hold nothing but
    padding of a row, before its text or after it."""
    model, rows = build().to(device), text(LENGTHS)
    got = together(model, pad(rows, side), **GREEDY, **options)
    assert got == alone(model, rows, **GREEDY)


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams(model: HymbaForCausalLM, text: Text, pad: Pad, side: str) -> None:
    rows = text(LENGTHS)
    want = alone(model, rows, use_cache=False, **BEAMS)
    assert want != alone(model, rows, max_new_tokens=12, do_sample=False)
    assert alone(model, rows, **BEAMS) == want
    assert together(model, pad(rows, side), **BEAMS) == want


def test_sampling_several_answers(model: HymbaForCausalLM, text: Text, pad: Pad) -> None:
    batch = pad(text(LENGTHS), "left")
    options = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2, "top_k": 5}
    torch.manual_seed(0)
    got = together(model, batch, **options)
    torch.manual_seed(0)
    assert got == together(model, batch, use_cache=False, **options)
    assert got[0] != got[1]


def test_soft_prompts(model: HymbaForCausalLM, text: Text) -> None:
    row = text(23)
    embeddings = model.get_input_embeddings()(row[None])
    got = model.generate(inputs_embeds=embeddings, **GREEDY)[0].tolist()
    assert [got] == alone(model, [row], **GREEDY)


def test_a_conversation_goes_on_with_its_cache(
    model: HymbaForCausalLM, text: Text, pad: Pad
) -> None:
    """Two turns of a padded batch with a cache that the caller keeps."""
    batch, cache = pad(text(LENGTHS), "left"), HymbaCache(model)
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    turn = torch.cat([first, torch.stack(text([6, 6, 6], seed=3))], dim=1)
    mask = torch.ones_like(turn)
    mask[:, :WIDEST] = batch["attention_mask"]
    got = model.generate(turn, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(got, model.generate(turn, attention_mask=mask, **GREEDY))
    # Columns count padding, text does not, and the last token of all was never fed.
    assert cache.get_seq_length() == got.shape[1] - 1
    assert cache.lengths == [n + 20 + 6 + 20 - 1 for n in LENGTHS]


def test_a_prompt_cache_is_used_twice(model: HymbaForCausalLM, text: Text) -> None:
    prompt, cache = text(23), HymbaCache(model)
    with torch.inference_mode():  # must not make the cache unusable outside
        model(prompt[None, :17], past_key_values=cache)
    want = alone(model, [prompt], **GREEDY)
    for _ in range(2):
        copied = copy.deepcopy(cache)
        assert alone(model, [prompt], past_key_values=copied, **GREEDY) == want
        assert copied.decoder is cache.decoder
    assert cache.lengths == [17]


def test_steps_by_hand(model: HymbaForCausalLM, text: Text) -> None:
    """Chunks of any size through forward itself give the logits of one forward."""
    ids = torch.stack(text([40, 40]))
    want, cache, got = model(ids).logits, HymbaCache(model), []
    for chunk in ids.split([1, 13, 2, 5, 18, 1], dim=1):
        got.append(model(chunk, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="holds 2 rows, the input has 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(InputError, match=r"attention_mask must be \(2, 41\)"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each roll-back had to run again."""
    widths: list[int] = []
    replay = HymbaCache._replay

    def watched(cache: HymbaCache, record: Any, width: int) -> None:
        widths.append(width)
        replay(cache, record, width)

    monkeypatch.setattr(HymbaCache, "_replay", watched)
    return widths


def test_assisted_generation(build: Build, text: Text, replayed: list[int]) -> None:
    """The assistant is a noisy copy, so that it is right often and wrong often."""
    model, assistant, rows = build(), build(), text([5, 23])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    assistant.generation_config.num_assistant_tokens = 5
    assert alone(model, rows, assistant_model=assistant, **GREEDY) == alone(model, rows, **GREEDY)
    assert len(set(replayed)) > 1 and max(replayed) > 1


def test_prompt_lookup(model: HymbaForCausalLM, text: Text, replayed: list[int]) -> None:
    rows = [row.repeat(2) for row in text([5, 11, 20])]
    got = alone(model, rows, prompt_lookup_num_tokens=3, **GREEDY)
    assert got == alone(model, rows, **GREEDY)
    assert replayed


def test_roll_back_needs_a_record(model: HymbaForCausalLM, text: Text) -> None:
    ids, cache = text(20)[None], HymbaCache(model)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        with pytest.raises(InputError, match="activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        for token in ids[:, 10:].split(1, dim=1):
            model(token, past_key_values=cache)
        cache.crop(-6)
        assert (cache.get_seq_length(), cache.lengths) == (14, [14])
        got = model(ids[:, 14:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 14:], rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match="as a negative number"):
            cache.crop(3)


def test_rows_of_a_cache_are_picked_and_repeated(model: HymbaForCausalLM, text: Text) -> None:
    ids, cache = torch.stack(text([12, 12])), HymbaCache(model)
    with torch.no_grad():
        want = model(ids).logits[:, 9:]
        model(ids[:, :9], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        cache.reset()
        got = model(ids[:1], past_key_values=cache).logits[:, 9:]
        torch.testing.assert_close(got, want[:1], rtol=1e-4, atol=1e-4)


def test_everything_generate_can_return(model: HymbaForCausalLM, text: Text) -> None:
    out = model.generate(
        text(5)[None],
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_scores=True,
        output_logits=True,
        **GREEDY,
    )
    assert len(out.logits) == len(out.hidden_states) == 20
    assert out.logits[0].argmax().item() == out.sequences[0, 5].item()
    assert isinstance(out.past_key_values, HymbaCache)


def test_it_stops_where_positions_end(build: Build, text: Text) -> None:
    model, limit = build(), 512
    with pytest.warns(UserWarning, match="stops at 512 columns"):
        out = model.generate(text(508)[None], max_new_tokens=50, do_sample=False)
    assert out.shape == (1, limit)


REFUSED: dict[str, dict[str, Any]] = {
    "prompt 0 is empty": {
        "inputs": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]]),
    },
    "is empty": {"inputs": torch.zeros(1, 0, dtype=torch.long)},
    "outside the vocabulary": {"inputs": torch.tensor([[99]])},
    "has 513 text tokens": {"inputs": torch.ones(1, 513, dtype=torch.long)},
    "cache_implementation='static'": {"cache_implementation": "static"},
    "cache_implementation='quantized'": {"cache_implementation": "quantized"},
    "not DynamicCache": {"past_key_values": DynamicCache()},
    "no argument output_attentions": {"output_attentions": True},
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:generation stops")
def test_bad_requests_are_refused(model: HymbaForCausalLM, text: Text, message: str) -> None:
    options = {"inputs": text(9)[None], "max_new_tokens": 3, **REFUSED[message]}
    with pytest.raises(ValueError, match=message):
        model.generate(**options)


def test_continuous_batching_is_refused(model: HymbaForCausalLM, text: Text) -> None:
    """transformers' own answers with empty lists and an error in the log."""
    prompts = [text(5).tolist()]
    with pytest.raises(NotImplementedError, match="no place for SSM states"):
        model.generate_batch(prompts)
    with pytest.raises(NotImplementedError, match="no place for SSM states"):
        model.generate(torch.tensor(prompts), cache_implementation="paged")
