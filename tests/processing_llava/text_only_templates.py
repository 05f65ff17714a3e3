"""Chat templates of language models, which read text alone, in the words of their published ones.

Those in `PUBLISHED` are read from the tokenizers that `real_tokenizers.py` fetches, where they are there. The others
do what matters of them, written anew, for machines without: Llama 3's trims whatever the content is, so that a list of
items is printed as Python prints it; Qwen 3's cuts thoughts out of answers; Mistral's (mistralai/Mistral-7B-Instruct-
v0.3, tokenizer_config.json) writes the system message in front of the last question and nowhere else.
"""

import json

from tests.processing_llava.real_tokenizers import FOLDER, NAMES

_LLAMA_3 = """{%- for message in messages -%}
    {%- set written = "<|start_header_id|>" ~ message["role"] ~ "<|end_header_id|>\\n\\n" ~ (message["content"] | trim)
        ~ "<|eot_id|>" -%}
    {{- (bos_token if loop.first else "") ~ written -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}{%- endif -%}"""

_QWEN_3 = """{%- for message in messages -%}
    {%- set answer = message.content -%}
    {%- set thoughts = "" -%}
    {%- if message.role == "assistant" and "</think>" in answer -%}
        {%- set thoughts = answer.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") -%}
        {%- set answer = answer.split("</think>")[-1].lstrip("\\n") -%}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\\n" -}}
    {%- if thoughts and loop.last -%}{{- "<think>\\n" + thoughts + "\\n</think>\\n\\n" -}}{%- endif -%}
    {{- answer + "<|im_end|>\\n" -}}
    {%- for call in message.tool_calls -%}
        {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) ~ "}" -}}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}"""

_GEMMA_3 = """{{- bos_token -}}
{%- for message in messages -%}
    {{- "<start_of_turn>" + ("model" if message["role"] == "assistant" else message["role"]) + "\\n" -}}
    {%- if message["content"] is string -%}
        {{- message["content"] | trim -}}
    {%- else -%}
        {%- for item in message["content"] -%}
            {{- "<start_of_image>" if item["type"] == "image" else item["text"] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- "<end_of_turn>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<start_of_turn>model\\n" -}}{%- endif -%}"""

_MISTRAL = """{%- set first = messages[0]["content"] ~ "\\n\\n" if messages[0]["role"] == "system" else "" -%}
{{- bos_token -}}
{%- for message in messages if message["role"] != "system" -%}
    {%- if message["role"] == "user" -%}
        {{- "[INST] " + (first if loop.last else "") + message["content"] + "[/INST]" -}}
    {%- else -%}
        {{- " " + message["content"] | trim + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""

TEXT_ONLY = {"llama-3": _LLAMA_3, "qwen-3": _QWEN_3, "gemma-3": _GEMMA_3, "mistral": _MISTRAL}


def read_published() -> dict[str, str]:
    """The templates of the real tokenizers that are on this machine, as they were published."""
    found = {}
    for name in NAMES:
        path = FOLDER / name / "tokenizer_config.json"
        if path.is_file():
            found[f"{name}, published"] = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    return found
