"""The chat format of a tokenizer, and the one given to tokenizers that have none.

A tokenizer's own template is never changed: what a model was trained on is what it understands.
A base model gets the format of the released Instruct model, written out here:

    <extra_id_0>System
    {system}

    <extra_id_1>User
    {user}
    <extra_id_1>Assistant
    {answer}</s>

Tools stand behind the system text, a tool's results are turns of "Tool". Each answer ends with
</s>, not only the last one: so every turn of a chat teaches to stop, and the next prompt begins
with the very tokens the model has said. `{% generation %}` marks for other tools what is learnt.
"""

from __future__ import annotations

import re

from hymba.finetune.settings import FinetuneError
from hymba.tokenizer import Tokenizer

TEMPLATE = """\
{#- The format of Hymba-1.5B-Instruct; every answer ends with the end-of-text token. -#}
{%- set ns = namespace(system="") -%}
{%- for message in messages if message.role == "system" -%}
{%- set ns.system = (ns.system + "\\n" + message.content) | trim -%}
{%- endfor -%}
{{- "<extra_id_0>System" -}}
{%- if ns.system -%}{{- "\\n" + ns.system -}}{%- endif -%}
{%- if tools or contexts -%}{{- "\\n" -}}{%- endif -%}
{%- for tool in tools or [] -%}{{- "\\n<tool> " + tool | tojson + " </tool>" -}}{%- endfor -%}
{%- for context in contexts or [] -%}
{{- "\\n<context> " + context | trim + " </context>" -}}
{%- endfor -%}
{{- "\\n\\n" -}}
{%- for message in messages if message.role != "system" -%}
{%- if message.content is not string -%}
{{- raise_exception("this chat format has text alone: no tool_calls, no images") -}}
{%- elif message.role == "user" -%}
{{- "<extra_id_1>User\\n" + message.content | trim + "\\n" -}}
{%- elif message.role == "tool" -%}
{{- "<extra_id_1>Tool\\n" + message.content | trim + "\\n" -}}
{%- elif message.role == "assistant" -%}
{{- "<extra_id_1>Assistant\\n" -}}
{%- generation -%}{{- message.content | trim + eos_token -}}{%- endgeneration -%}
{%- if not loop.last or add_generation_prompt -%}{{- "\\n" -}}{%- endif -%}
{%- else -%}
{{- raise_exception("there is no role " + message.role + ": system, user, assistant, tool") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<extra_id_1>Assistant\\n" -}}{%- endif -%}
"""
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself where it has a chat template, else one with the format above."""
    if tokenizer.has_chat_template:
        return tokenizer
    if tokenizer.eos_id is None:
        raise FinetuneError("the tokenizer names no eos_token in tokenizer_config.json")
    return Tokenizer(tokenizer.files | {"chat_template.jinja": TEMPLATE.encode()})
