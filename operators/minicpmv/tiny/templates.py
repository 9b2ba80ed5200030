"""Chat templates that build the prompts of the released ones; tools and earlier answers are left out."""

from typing import Final

PARTS_TEMPLATE: Final = """\
{%- macro body(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if not loop.first %}{{ "\\n" }}{% endif -%}
            {%- if part.type in ("image", "video") and message.role == "system" -%}
                {{- raise_exception("a system message holds text only") -}}
            {%- elif part.type == "image" -%}
                {{- "<|image_pad|>" -}}
            {%- elif part.type == "video" -%}
                {{- "<|video_pad|>" -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages | selectattr("role", "equalto", "user") | list | length == 0 -%}
    {{- raise_exception("there is no user message") -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" + (body(message) | trim) + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n<think>\\n" -}}
    {%- if not (enable_thinking is defined and enable_thinking) -%}
        {{- "\\n</think>\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
"""
"""A message holds a text, or parts with pictures in between; turns are trimmed."""

TURNS_TEMPLATE: Final = """\
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""A message holds a text, and stays as it is."""

SYSTEM_TEMPLATE: Final = (
    """\
{%- if messages[0].role != "system" -%}
    {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
"""
    + TURNS_TEMPLATE
)
"""The same, after a system turn of the template's own where the caller has none."""

THOUGHT_TEMPLATE: Final = (
    TURNS_TEMPLATE
    + """\
{%- if add_generation_prompt and enable_thinking is defined -%}
    {{- "<think>\\n" if enable_thinking else "<think>\\n\\n</think>\\n\\n" -}}
{%- endif -%}
"""
)
"""As `TURNS_TEMPLATE`, with a thought that is opened, or left empty, where the caller says which."""
