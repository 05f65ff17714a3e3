"""The conversation format as llama.cpp and Ollama take it: a chat template, and a Modelfile.

What is surprising:
- llama.cpp gives a template one text for pictures and question, in which marks of its own stand for the pictures, and
  no line break between (llama.cpp b11549, common/chat.cpp). The template that is written finds them and puts the line
  break where models were trained with it.
- Ollama repeats one template for every turn, so what stands before the first question has to be what stands before the
  others. A format for which that is not so gets no TEMPLATE, and Ollama takes the chat template of the file. Ollama
  itself was not run.
"""

from pathlib import Path

from processing_llava import AnyLlavaProcessor
from processing_llava.prompts import list_template_spans

_STRING_CONTENT = """    {%- if content is string -%}
        {{- content -}}
"""
"""The part of `processing_llava/templates/_content.jinja` that writes a content that is one text."""
_MARKED_CONTENT = """    {%- if content is string -%}
        {%- set state = namespace(leading=true) -%}
        {%- set parts = content.split("__>") -%}
        {%- for part in parts -%}
            {%- set pieces = part.split("<__media") -%}
            {%- set state.leading = state.leading and not pieces[0] -%}
            {%- if loop.last -%}
                {{- part -}}
            {%- elif pieces | length == 2 -%}
                {{- pieces[0] ~ (image_text | replace("<image>", "<__media" ~ pieces[1] ~ "__>")) -}}
                {{- "\\n" if state.leading and (loop.index + 1 < parts | length or parts[-1]) -}}
            {%- else -%}
                {{- part ~ "__>" -}}
            {%- endif -%}
        {%- endfor -%}
"""
_SYSTEM, _USER, _ASSISTANT = ({"role": role, "content": "."} for role in ("system", "user", "assistant"))


def write_modelfile(processor: AnyLlavaProcessor, path: Path, *, files: tuple[str, ...]) -> list[str]:
    """Write it beside its files; returns what a person should know.

    Args:
        processor: Its template is translated.
        path: Of the Modelfile.
        files: Names of the GGUF files, the language model first.
    """
    lines = [f"FROM ./{name}" for name in files]
    found = translate_template(processor)
    notices = []
    if found is None:
        notices.append("the Modelfile has no TEMPLATE, as Ollama repeats one for each turn and this format differs")
    else:
        template, system, stops = found
        lines.append(f'TEMPLATE """{template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append("PARAMETER temperature 0")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notices


def translate_template(processor: AnyLlavaProcessor) -> tuple[str, str, list[str]] | None:
    """A format in the words of Ollama, its own system text, and what ends an answer; None if it cannot be said."""
    turns = _list_texts(processor, [_USER, _ASSISTANT, _USER])
    ended = _list_texts(processor, [_USER, _ASSISTANT])
    with_system = _list_texts(processor, [_SYSTEM, _USER])
    if (len(turns), len(ended)) != (4, 3) or len(with_system) not in (0, 3):
        return None
    first, before_answer, between, begin = turns
    answer_end = ended[2]
    question = between.removeprefix(answer_end)
    system_start, to_question, _ = with_system or ("", question, "")
    system_end = to_question.removesuffix(question)
    # Without a system text a format writes its own, or nothing.
    start, end = (system_start, system_end + question) if first != question else ("", first)
    is_whole = first.startswith(start) and first.endswith(end) and len(first) >= len(start) + len(end)
    is_repeated = between == answer_end + question and to_question == system_end + question
    if not (is_whole and is_repeated and before_answer.startswith(begin)):
        return None
    system = first[len(start) : len(first) - len(end)]
    texts = (system_start, system_end, question, begin, answer_end, system)
    if not answer_end.strip() or any('"""' in text or "{{" in text for text in texts):
        return None
    has_system = f"{{{{ if .System }}}}{system_start}{{{{ .System }}}}{system_end}{{{{ end }}}}" if with_system else ""
    template = f"{has_system}{question}{{{{ .Prompt }}}}{begin}{{{{ .Response }}}}{answer_end}"
    stops = list(dict.fromkeys(text for text in (answer_end.strip(), question.strip()) if '"' not in text and text))
    return template, system, [stop for stop in stops if "\n" not in stop]


def _list_texts(processor: AnyLlavaProcessor, messages: list[dict[str, str]]) -> list[str]:
    """What the template writes before, between and behind these messages; nothing if it does not take them."""
    try:
        prompt = processor.render(messages, add_generation_prompt=messages[-1] is _USER)
    except ValueError:
        return []
    return [str(prompt)[start:end] for start, end in list_template_spans(prompt)]


def adapt_template(template: str) -> str:
    """The chat template as llama.cpp takes it; one of others stays as it is."""
    return template.replace(_STRING_CONTENT, _MARKED_CONTENT)


def has_own_content(template: str) -> bool:
    """Whether a template is one of this package, which writes pictures as `adapt_template` knows it."""
    return _STRING_CONTENT in template
