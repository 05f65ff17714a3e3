"""Conversation -> prompt that remembers who wrote what, so that nothing a user types can act as control or image.

A prompt is a `str` that knows which characters people wrote. Control tokens and image placeholders are read only where
the template wrote every character; all other text, template and user alike, is tokenised in one go between them, so
that harmless text gets the ids it always had (`prompt_ids.py`).
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers.utils import get_json_schema

from .messages import open_value, shorten
from .template_bounds import CostlyTemplateError, write_template
from .user_text import (
    InertTexts,
    TemplateSource,
    TextMarks,
    Wrap,
    choose_marks,
    compile_literals,
    list_numbers,
    list_texts,
    read_source,
    replace_texts,
)

Span = tuple[int, int]
Variables = tuple[tuple[str, str], ...]
Render = Callable[[Wrap], tuple[str, list[Span]]]

_SYSTEM, _USER, _ASSISTANT = ({"role": role, "content": "."} for role in ("system", "user", "assistant"))
_TOOL = {"role": "tool", "content": ".", "name": "a", "tool_call_id": "a"}
# Not every format knows system messages, several turns, or tools.
_SAMPLES = ([_SYSTEM, _USER, _ASSISTANT, _USER], [_USER, _ASSISTANT, _USER], [_USER], [_USER, _ASSISTANT, _TOOL])
_CAPTIONED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_END = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_TRUSTED = 4096
_trusted: set[tuple[Any, ...]] = set()
"""What templates wrote around the texts of conversations, where inert texts had shown that it is theirs."""


class Prompt(str):
    """A rendered conversation: text, and the character ranges [start, end) that people and assistant wrote.

    Slicing or formatting gives a plain `str`, which `encode_prompt` reads as template text from end to end.

    Args:
        text: What the model reads.
        user_spans: Ranges that came from messages, whatever their role. In order, not empty, not overlapping.
        assistant_spans: Ranges inside `{% generation %}`: what the model learns to write.
        learned_spans: Ranges of tokens that the assistant may write; each lies in a range of both others.
        template_text: What the template can write whatever the messages say. Added tokens in it are control tokens,
            even if this prompt holds none of them yet, such as the end token of an answer in a first question.
    """

    user_spans: tuple[Span, ...]
    assistant_spans: tuple[Span, ...]
    learned_spans: tuple[Span, ...]
    template_text: str

    def __new__(
        cls,
        text: str,
        *,
        user_spans: Iterable[Span] = (),
        assistant_spans: Iterable[Span] = (),
        learned_spans: Iterable[Span] = (),
        template_text: str = "",
    ) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.learned_spans = tuple(learned_spans)
        prompt.user_spans = tuple(user_spans)
        prompt.assistant_spans = tuple(assistant_spans)
        prompt.template_text = template_text
        return prompt


def render_prompt(
    messages: list[dict[str, Any]],
    template: str,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    learn_tokens: Iterable[str] = (),
    **template_variables: Any,
) -> Prompt:
    """Writes a conversation in the words of a chat template.

    Every string of a message counts as written by a user: texts, names, keys, and what stands in objects. Roles, item
    types and keys that the template itself names stay as they are. Every other string is marked, and wherever the
    template prints it, the marks must come out whole. Templates that cut texts into pieces get marks around each
    character. Numbers cannot be marked; what is printed of them is found by its digits.

    A text that the template leaves out is an error if it is the content of a message: a model would answer something
    else than what was asked, and nobody would know. A name, a key or a reasoning text may be left out, as most
    templates do, and so may pieces of a content that the template cuts, such as Qwen 3's thoughts of earlier turns;
    and "plain" leaves out what its users say before a caption, which is its purpose.

    Args:
        messages: `[{"role": ..., "content": text or [{"type": "image"}, {"type": "text", "text": ...}]}]`.
        template: Jinja text, rendered within the bounds of `template_bounds.py`.
        add_generation_prompt: End where the assistant begins to write.
        continue_final_message: End inside the last message, for the model to go on with.
        learn_tokens: Tokens that count as such where the assistant wrote them, inside `{% generation %}`.
        **template_variables: Variables of the template; trusted, like the template.

    Raises:
        ValueError: if the template prints texts in a way that marks do not survive, or leaves a content out.
    """
    text, user_spans, assistant_spans = _render(
        messages,
        template,
        {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message},
        template_variables,
    )
    return Prompt(
        text,
        user_spans=user_spans,
        assistant_spans=assistant_spans,
        learned_spans=_find_learned(text, user_spans, assistant_spans, compile_literals(tuple(learn_tokens))),
        template_text=_list_template_text(template, _pick_strings(template_variables)),
    )


def list_turn_texts(template: str, template_variables: dict[str, Any]) -> tuple[str, ...]:
    """What a template writes before, between and behind the messages of a sample; nothing if it can write none.

    The first text is empty where a template has no place for a system message, since it may write one of its own.

    Args:
        template: Jinja text.
        template_variables: Variables of the template.
    """
    for sample in _render_samples(template, _pick_strings(template_variables))[:1]:
        before, *others = (sample[start:end] for start, end in list_template_spans(sample))
        return (before if len(sample.user_spans) == len(_SAMPLES[0]) else "", *others)
    return ()


def count_images(prompt: str, image_token: str) -> int:
    """How many images a prompt asks for: an `image_token` that a user typed does not count."""
    return sum(prompt.count(image_token, start, end) for start, end in list_template_spans(prompt))


def list_template_spans(prompt: str) -> list[Span]:
    """The ranges that no user wrote: everything, in a plain `str`."""
    user_spans = prompt.user_spans if isinstance(prompt, Prompt) else ()
    starts = [0, *(end for _, end in user_spans)]
    ends = [*(start for start, _ in user_spans), len(prompt)]
    return list(zip(starts, ends))


def _find_learned(
    text: str, user_spans: list[Span], assistant_spans: list[Span], learned: re.Pattern[str] | None
) -> list[Span]:
    """The learned tokens in what the assistant wrote; the template's own words around it are no part of that."""
    if learned is None:
        return []
    overlaps = ((max(start, first), min(end, last)) for start, end in user_spans for first, last in assistant_spans)
    return [match.span() for start, end in overlaps if start < end for match in learned.finditer(text, start, end)]


def _pick_strings(variables: dict[str, Any]) -> Variables:
    return tuple((name, value) for name, value in variables.items() if isinstance(value, str))


@lru_cache(maxsize=64)
def _list_template_text(template: str, variables: Variables) -> str:
    """Source, variables and samples: tokens may be put together from pieces, as in "<|" ~ role ~ "|>"."""
    source = read_source(template)
    samples = (sample[start:end] for sample in _render_samples(template, variables) for start, end in
               list_template_spans(sample))  # fmt: skip
    return "\0".join(chain([source.text], (value for name, value in variables if name in source.names), samples))


@lru_cache(maxsize=64)
def _render_samples(template: str, variables: Variables) -> tuple[Prompt, ...]:
    samples = []
    for messages in _SAMPLES:
        try:
            text, user_spans, _ = _render(messages, template, {"add_generation_prompt": True}, dict(variables))
        except CostlyTemplateError:
            raise
        except (TemplateError, TypeError, ValueError):
            continue
        samples.append(Prompt(text, user_spans=user_spans))
    return tuple(samples)


def _render(
    messages: list[dict[str, Any]], template: str, options: dict[str, Any], variables: dict[str, Any]
) -> tuple[str, list[Span], list[Span]]:
    """Text, user spans and assistant spans."""
    source = read_source(template)
    # An end token can be a word.
    names = source.names.difference(value for _, value in _pick_strings(variables))

    def render(wrap: Wrap) -> tuple[str, list[Span]]:
        return _write(replace_texts(messages, wrap, names), template, **options, **variables)

    marks = choose_marks(chain(list_texts(messages), list_texts(variables)), template)
    cores = set()

    def wrap(core: str) -> str:
        cores.add(core)
        return marks.wrap(core)

    try:
        marked, generation_spans = render(wrap)
    except TemplateError as error:
        # Templates quote roles and types that they do not know.
        error.args = tuple(marks.drop(part) if isinstance(part, str) else part for part in error.args)
        raise
    pieces = marks.split(marked)
    positions = [match.start() for match in marks.either.finditer(marked)]
    # Marks of two pieces can pair around what the template wrote between them.
    are_whole = len(positions) == len(pieces) - 1 and cores.issuperset(pieces[1::2])
    if are_whole and _check_pieces(pieces, messages, template, render, marks, source, _pick_strings(variables)):
        text = "".join(pieces)
        user_spans = _find_spans(pieces)
        generation_spans = [
            (start - bisect_left(positions, start), end - bisect_left(positions, end))
            for start, end in generation_spans
        ]
    else:
        text, user_spans, generation_spans = _render_units(render, marks, source)
    assistant_spans = [(start, min(end, len(text))) for start, end in generation_spans]
    assistant_spans = [(start, end) for start, end in assistant_spans if start < end]
    return text, _find_number_spans(text, user_spans, messages), assistant_spans


def _write(
    messages: list[dict[str, Any]],
    template: str,
    *,
    tools: list[Any] | None = None,
    documents: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """What a template writes of messages that nobody else has, as transformers has it written (5.24,
    utils/chat_template_utils.py: render_jinja_template); and the spans of `{% generation %}`.

    Raises:
        ValueError: the template does not write the message that it shall end in.
    """
    messages = list(map(_name_thoughts, messages))
    last = _mark_end(messages[-1], continue_final_message) if continue_final_message else ""
    if tools is not None:
        tools = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt, **variables}
    written, spans = write_template(template, {"messages": messages, **replace_texts(given, str, frozenset())})
    if continue_final_message:
        end = written.rfind(_END.strip())
        if end < 0 or last.strip() not in written:
            raise ValueError(
                "got a chat template that does not write the whole last message; expected one that does, with "
                "continue_final_message: leave that out, or choose another template"
            )
        written = written[:end] if written.startswith(_END, end) else written[:end].rstrip()
    return written, spans


def _name_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thoughts by each name that templates know them by."""
    thoughts = next((message[name] for name in _THOUGHTS if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _mark_end(message: dict[str, Any], field: str | bool) -> str:
    """Puts `_END` behind the text that the model goes on with, which is returned."""
    holder, name = message, field if isinstance(field, str) else "content"
    if isinstance(holder.get(name), list):
        holder, name = next((item for item in reversed(holder[name]) if "text" in item), {}), "text"
    text = holder.get(name)
    if not isinstance(text, str):
        raise ValueError(
            "got a last message without a text; expected one to go on with: give one, or leave "
            "continue_final_message out"
        )
    names = [other for other in _THOUGHTS if holder.get(other) == text] if name in _THOUGHTS else [name]
    holder |= dict.fromkeys(names, text + _END)
    return text


def _check_pieces(
    pieces: list[str],
    messages: list[dict[str, Any]],
    template: str,
    render: Render,
    marks: TextMarks,
    source: TemplateSource,
    variables: Variables,
) -> bool:
    """Whether the template alone wrote what stands outside of marks: it writes the same around inert texts.

    Most conversations have the form of an earlier one, so that they are rendered once.

    Raises:
        ValueError: the template leaves out the content of a message.
    """
    skeleton = _join_skeleton(pieces, marks)
    # A digest, since what strangers send shall not stay here.
    digest = blake2b(skeleton.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    key = (template, tuple(str(message.get("role")) for message in messages), digest)
    if key in _trusted:
        return True
    inert = InertTexts(source)
    try:
        rendered, _ = render(lambda core: marks.wrap(inert(core)))
    except CostlyTemplateError:
        raise
    except (TemplateError, TypeError, ValueError):
        return False
    if _join_skeleton(marks.split(rendered), marks) != skeleton:
        return False
    missing = inert.list_missing(_list_contents(messages), rendered)
    if missing and not _is_for_captions(template, variables):
        raise ValueError(
            f"got a chat template that leaves out {shorten(missing[0])}, the content of a message; expected one that "
            "writes all of them; take the message out, write its text elsewhere, or choose another template"
        )
    if len(_trusted) >= _MAX_TRUSTED:
        _trusted.clear()
    _trusted.add(key)
    return True


def _join_skeleton(pieces: list[str], marks: TextMarks) -> str:
    """What stands outside of marks, and where texts stand. White space around texts belongs to them."""
    return marks.opening.join(map(str.strip, pieces[::2]))


def _find_spans(pieces: list[str]) -> list[Span]:
    """Where the texts at odd places stand, as positions in all of them; touching ranges are joined."""
    spans: list[Span] = []
    end = 0
    for number, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        if number % 2 and piece:
            spans.append((spans.pop()[0] if spans and spans[-1][1] == start else start, end))
    return spans


def _render_units(render: Render, marks: TextMarks, source: TemplateSource) -> tuple[str, list[Span], list[Span]]:
    """What a template writes that cuts texts: itself, and who wrote which character by marks around each of them.

    Marks can keep a template from trimming pieces, so that white space is not compared.

    Raises:
        ValueError: marks do not come out, or they change what the template writes.
    """
    inert = InertTexts(source)
    pieces = _read_units(render, marks, source, lambda core: core)
    inert_pieces = _read_units(render, marks, source, inert)
    text, generation_spans = render(lambda core: core)
    # Where pieces stand is not compared: some are empty here, and inert ones never are.
    own, inert_own = ("".join(piece for piece, owned in found if not owned) for found in (pieces, inert_pieces))
    if own != inert_own or "".join(piece for piece, _ in pieces) != "".join(text.split()):
        raise ValueError(
            "got a chat template that does not write the texts of messages as they are: it prints lists or objects as "
            "Python does, escapes texts, or cuts them. What people type could act as control tokens there; expected "
            "a template that writes each text whole; give the content of each message as plain text, or choose "
            "another template"
        )
    owners = b"".join(bytes([owned]) * len(piece) for piece, owned in pieces)
    spans, position = [], 0
    for word in re.finditer(r"\S+", text):
        owned = owners[position : position + len(word[0])]
        position += len(word[0])
        spans += [(word.start() + run.start(), word.start() + run.end()) for run in re.finditer(b"\1+", owned)]
    return text, spans, generation_spans


def _read_units(render: Render, marks: TextMarks, source: TemplateSource, change: Wrap) -> list[tuple[str, bool]]:
    """What a template writes with marks around each character, without white space, and whether it is of a text."""
    units: set[str] = set()

    def wrap(core: str) -> str:
        changed = change(core)
        units.update(source.units.findall(changed))
        return source.units.sub(lambda unit: marks.wrap(unit[0]), changed)

    rendered, _ = render(wrap)
    found: list[tuple[str, bool]] = []
    for number, piece in enumerate(marks.split(rendered)):
        # A constant that the template cut at left one mark on each side of what is written instead.
        owned = number % 2 == 1 and (piece in units or not re.search(r"\s", piece))
        written = "".join(marks.drop(piece).split())
        if found and found[-1][1] == owned:
            written = found.pop()[0] + written
        found.append((written, owned))
    return found


def _list_contents(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The texts that are the content of messages."""
    for message in messages:
        content = message.get("content")
        items = content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
        for item in map(open_value, items):
            text = item.get("text") if isinstance(item, dict) and item.get("type") == "text" else None
            if isinstance(text, str) and text.strip():
                yield str.__str__(text).strip()


@lru_cache(maxsize=64)
def _is_for_captions(template: str, variables: Variables) -> bool:
    """Whether a template leaves out what a user says beside a picture, before every answer."""
    marks = choose_marks([], template)
    names = read_source(template).names
    is_written = False
    for user in (_USER, _CAPTIONED):
        conversation = replace_texts([user, {**_ASSISTANT, "content": "a"}], marks.wrap, names)
        try:
            rendered, _ = _write(conversation, template, **dict(variables))
        except CostlyTemplateError:
            raise
        except (TemplateError, TypeError, ValueError):
            continue
        is_written = marks.wrap("a") in rendered
        if marks.wrap(".") in rendered or not is_written:
            return False
    return is_written


def _find_number_spans(text: str, user_spans: list[Span], messages: list[dict[str, Any]]) -> list[Span]:
    """User spans, and the numbers of messages where a template prints them, which cannot be marked."""
    numbers = {str(number) for number in list_numbers(messages)}
    if not numbers:
        return user_spans
    found = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, numbers))})(?![\w.])")
    spans = list_template_spans(Prompt(text, user_spans=user_spans))
    return sorted(user_spans + [match.span() for span in spans for match in found.finditer(text, *span)])
