"""Which tokens are learnt, token by token, and that they are those that inference would see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hymba.finetune.lines import Example
from hymba.finetune.masks import IGNORE, Encoder, Learnt
from hymba.finetune.settings import FinetuneError
from hymba.finetune.template import TEMPLATE, with_template
from hymba.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "look"}}
LONG_CHAT = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "say red"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "say it once more\n"},
    {"role": "assistant", "content": "\nlook "},
    {"role": "tool", "content": "found: red"},
    {"role": "assistant", "content": "red, ré"},
]
RENDERED = """\
<extra_id_0>System
be brief

<tool> {"type": "function", "function": {"name": "look"}} </tool>

<extra_id_1>User
say red
<extra_id_1>Assistant
[red</s>]
<extra_id_1>User
say it once more
<extra_id_1>Assistant
[look</s>]
<extra_id_1>Tool
found: red
<extra_id_1>Assistant
[red, ré</s>]"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As NVIDIA's own: no end of turn is written.
BARE = (
    "{% for m in messages %}<extra_id_1>{{ m.role }}\n{{ m.content.strip() }}\n{% endfor %}"
    "{% if add_generation_prompt %}<extra_id_1>assistant\n{% endif %}"
)
# The last answer gets its end, earlier ones lose a part of what they said.
REWRITES = (
    "{% for m in messages %}{{ m.role }}:\n"
    "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def given(tokenizer: Tokenizer, template: str) -> Encoder:
    return Encoder(Tokenizer(tokenizer.files | {"chat_template.jinja": template.encode()}))


def whole(messages: list[Any], tools: Any = None) -> Example:
    return Example("x line 1", [], (messages,), tools)


def shown(encoder: Encoder, learnt: Learnt) -> str:
    """The text with the learnt tokens in brackets."""
    pieces, inside = [], False
    for token, label in zip(learnt.ids, learnt.labels, strict=True):
        assert label in (token, IGNORE)
        if (label != IGNORE) != inside:
            pieces.append(b"]" if inside else b"[")
            inside = not inside
        pieces.append(encoder.tokenizer.token_bytes(token))
    return b"".join([*pieces, b"]" if inside else b""]).decode()


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(with_template(tokenizer))


def test_answers_and_their_ends_are_learnt_and_nothing_else(encoder: Encoder) -> None:
    learnt = encoder.learnt(whole(LONG_CHAT, [TOOL]))
    assert shown(encoder, learnt) == RENDERED
    assert encoder.ends == {encoder.tokenizer.eos_id}


def test_the_format_is_the_released_one(encoder: Encoder) -> None:
    ids = encoder.tokenizer.chat([{"role": "user", "content": "hi"}])
    text = "<extra_id_0>System\n\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\n"
    assert encoder.tokenizer.decode(ids) == text


def test_each_turn_is_learnt_behind_the_prompt_that_inference_makes(encoder: Encoder) -> None:
    """What stands before an answer in training is what `hymba chat` gives the model, id by id."""
    learnt = encoder.learnt(whole(LONG_CHAT, [TOOL]))
    starts = [
        i
        for i, label in enumerate(learnt.labels)
        if label != IGNORE and learnt.labels[i - 1] == IGNORE
    ]
    turns = [i for i, m in enumerate(LONG_CHAT) if m["role"] == "assistant"]
    for start, turn in zip(starts, turns, strict=True):
        asked = encoder.tokenizer.chat(LONG_CHAT[:turn], tools=[TOOL])
        assert learnt.ids[:start] == asked


def test_both_ways_to_find_answers_agree(encoder: Encoder, tokenizer: Tokenizer) -> None:
    """The template's own marks, and renderings of the prompts alone. The marks are transformers'
    too: its mask is the same."""
    unmarked = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    example = whole(LONG_CHAT, [TOOL])
    want = encoder.learnt(example)
    assert given(tokenizer, unmarked).learnt(example) == want
    theirs = encoder.hf.apply_chat_template(
        LONG_CHAT, tools=[TOOL], return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == want.ids
    assert [bool(m) for m in theirs["assistant_masks"]] == [x != IGNORE for x in want.labels]


def test_a_prompt_of_messages_is_not_learnt(encoder: Encoder) -> None:
    """Not even the answers in it."""
    learnt = encoder.learnt(Example("x", LONG_CHAT[:4], ([LONG_CHAT[6]],)))
    assert shown(encoder, learnt).count("[") == 1
    assert shown(encoder, learnt).endswith("Assistant\n[red, ré</s>]")


def test_an_end_of_turn_of_the_template_is_learnt(tokenizer: Tokenizer) -> None:
    """What stands behind it, a newline here, is not: the model never has to say it."""
    files = dict(tokenizer.files)
    content = json.loads(files["tokenizer.json"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [
        {"id": tokenizer.vocab_size + i, "content": name, "special": True, **flags}
        for i, name in enumerate(("<|im_start|>", "<|im_end|>"))
    ]
    files["tokenizer.json"] = json.dumps(content).encode()
    encoder = given(Tokenizer(files), CHATML)
    text = shown(encoder, encoder.learnt(whole(LONG_CHAT[1:5])))
    assert text == (
        "<|im_start|>user\nsay red<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n"
        "<|im_start|>user\nsay it once more\n<|im_end|>\n<|im_start|>assistant\n"
        "[\nlook <|im_end|>]\n"
    )
    assert [encoder.tokenizer.token_bytes(end) for end in encoder.ends] == [b"<|im_end|>"]


def test_a_template_without_ends_gets_one_behind_the_last_answer(tokenizer: Tokenizer) -> None:
    encoder = given(tokenizer, BARE)
    text = shown(encoder, encoder.learnt(whole(LONG_CHAT[1:5])))
    assert text == (
        "<extra_id_1>user\nsay red\n<extra_id_1>assistant\n[red]\n<extra_id_1>user\n"
        "say it once more\n<extra_id_1>assistant\n[look</s>]"
    )


def test_marks_that_stop_before_the_end_of_text_mean_it_too(tokenizer: Tokenizer) -> None:
    early = TEMPLATE.replace("message.content | trim + eos_token -}}", "message.content | trim -}}")
    early = early.replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}")
    encoder = given(tokenizer, early)
    assert shown(encoder, encoder.learnt(whole(LONG_CHAT, [TOOL]))) == RENDERED


def test_a_template_that_rewrites_turns_is_refused(tokenizer: Tokenizer) -> None:
    encoder = given(tokenizer, REWRITES)
    assert shown(encoder, encoder.learnt(whole(LONG_CHAT[1:3]))).endswith("assistant:\n[red</s>]")
    with pytest.raises(FinetuneError, match="x line 1: .* writes a turn in another way"):
        encoder.learnt(whole(LONG_CHAT[1:5]))


def test_a_prompt_that_ends_inside_a_token_is_refused(tokenizer: Tokenizer) -> None:
    """Of "assistant: red" the tokenizer makes " red", but generation begins behind the space."""
    encoder = given(tokenizer, REWRITES.replace(":\n", ": "))
    with pytest.raises(FinetuneError, match="reaches from the prompt into the answer"):
        encoder.learnt(whole(LONG_CHAT[1:3]))


def test_what_the_template_refuses_names_the_line(encoder: Encoder) -> None:
    odd = [{"role": "judge", "content": "x"}, *LONG_CHAT[1:3]]
    with pytest.raises(FinetuneError, match="x line 1: .* there is no role judge"):
        encoder.learnt(whole(odd))
    calls = [LONG_CHAT[1], {"role": "assistant", "tool_calls": [TOOL]}]
    with pytest.raises(FinetuneError, match="text alone"):
        encoder.learnt(whole(calls))


@pytest.mark.parametrize(
    "prompt, answer", [("a:", " red"), ("a: ", "red"), ("", "red"), ("é", "é")]
)
def test_text_goes_on_behind_the_prompts_own_tokens(
    encoder: Encoder, prompt: str, answer: str
) -> None:
    tokenizer = encoder.tokenizer
    learnt = encoder.learnt(Example("x", prompt, (answer,)))
    asked = tokenizer.encode(prompt, bos=True)
    assert learnt.ids[: len(asked)] == asked
    assert learnt.labels == [IGNORE] * len(asked) + learnt.ids[len(asked) :]
    assert tokenizer.decode(learnt.ids) == prompt + answer and learnt.ids[-1] == tokenizer.eos_id


def test_a_pair_is_a_prompt_and_two_answers(encoder: Encoder) -> None:
    red, blue = ([{"role": "assistant", "content": word}] for word in ("red", "blue blue"))
    pair = encoder.pair(Example("x", LONG_CHAT[:2], (red, blue)))
    assert pair.prompt == encoder.tokenizer.chat(LONG_CHAT[:2])
    for ids, text in ((pair.chosen, "red"), (pair.rejected, "blue blue")):
        assert ids == [*encoder.tokenizer.encode(text), encoder.tokenizer.eos_id]
    two = [*red, LONG_CHAT[1], *red]
    with pytest.raises(FinetuneError, match="must each be one answer"):
        encoder.pair(Example("x", LONG_CHAT[:2], (red, two)))
    text = encoder.pair(Example("x", "a:", (" b", " c")))
    assert encoder.tokenizer.decode(text.chosen) == " b"


def test_an_own_template_is_never_changed(tokenizer: Tokenizer) -> None:
    own = Tokenizer(tokenizer.files | {"chat_template.jinja": BARE.encode()})
    assert with_template(own) is own
    assert with_template(tokenizer).files["chat_template.jinja"].decode() == TEMPLATE
