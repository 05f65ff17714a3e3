"""What a batch asks for, and what becomes of an answer: captions, alternative texts, tags, or JSON of a schema.

A task is a question and a condition that every answer meets afterwards, whatever the model wrote. A small model may
know another question better: the question can be chosen, the condition stays.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_ALT_CHARACTERS = 125
"""What screen readers read in one go."""
MOST_TAGS = 10
MOST_TAG_CHARACTERS = 50
_LEAST_SENTENCES = 40
"""A text is cut behind a sentence if so many characters of it remain, and else behind a word."""


@dataclass(frozen=True)
class Task:
    """A question, and what makes a result of its answer."""

    question: str
    finish: Callable[[str], Any]


def finish_caption(text: str) -> str:
    """An answer in one line.

    Raises:
        ValueError: there is nothing in it.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("got an empty answer; expected text; ask another question")
    return text


# Alternative texts.

_MEDIUM = r"(?:image|picture|photo(?:graph)?|pic|snapshot)s?"
_KINDS = (
    r"(?:(?:close[- ]?up|black[- ]and[- ]white|colou?r(?:ed|ful)?|digital|stock|aerial|vintage|old|blurry|detailed"
    r"|beautiful|vibrant|simple|single|small|large|square|high[- ](?:quality|resolution)|low[- ]resolution)\s+)*"
)
_NAMES = rf"(?:(?:an?|the|this|that|one)\s+)?(?:{_KINDS}{_MEDIUM}|(?:[\w-]+\s+){{0,2}}images?)"
_SEEN = r"(?:(?:we|you|i|one)\s+(?:can\s+)?see|there\s+(?:is|are)|can\s+be\s+seen|it\s+(?:is|shows))"
_SHOWS = (
    r"(?:is\s+(?:a\s+)?(?:showing|depicting|an?\s+" + _MEDIUM + r"\s+of|of)|of|shows?|showing|depicts?|depicting"
    r"|features?|featuring|contains?|containing|displays?|displaying|captures?|capturing|presents?|portrays?"
    r"|illustrates?|with|that\s+(?:shows?|depicts?))"
)
_LABEL = rf"(?:alt(?:ernative)?[- ]?text|caption|description|{_MEDIUM})\s*(?:[:\u2013\u2014-]|is\s*:)"
_OPENING = re.compile(
    rf"""[\s"'*_]*(?:
    {_LABEL}
    | (?:here\s+(?:is|we\s+see)|here's|this\s+is|it\s+is|it's|there\s+is|we\s+(?:can\s+)?see)\s+{_NAMES}\s+{_SHOWS}\b
    | (?:in|on)\s+{_NAMES}\s*,?\s*{_SEEN}\b
    | {_NAMES}\s+{_SHOWS}\b
    )\s*[:,]?\s*(?:that\s+)?""",
    flags=re.IGNORECASE | re.VERBOSE,
)
_IMAGE_OF = re.compile(r"\b(i)mage(s?)(\s+of)\b", flags=re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def finish_alt_text(text: str) -> str:
    """At most 125 characters that say what there is to see, and not that it is a picture; never "image of".

    An opening such as "The photo shows" goes, and "image of" inside, as in "a man with an image of a dog", becomes
    "picture of". What is too long ends behind a sentence, or behind a word.

    Raises:
        ValueError: nothing remains.
    """
    text = _unwrap(" ".join(text.split()))
    while opening := _OPENING.match(text):
        text = _unwrap(text[opening.end() :])
    text = _IMAGE_OF.sub(lambda found: f"{'P' if found[1] == 'I' else 'p'}icture{found[2]}{found[3]}", text)
    text = re.sub(r"\b([Aa])n( pictures? of)\b", r"\1\2", text)
    text = _cut(text[:1].upper() + text[1:], MOST_ALT_CHARACTERS)
    if not re.search(r"\w", text):
        raise ValueError("got an answer without a description; expected text; ask another question")
    return text


def _unwrap(text: str) -> str:
    """Without quotes around all of it, and without the marks of Markdown at its ends."""
    text = text.strip(" *_")
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip(" *_")
    return text


def _cut(text: str, size: int) -> str:
    if len(text) <= size:
        return text
    ends = [found.end() for found in _SENTENCE.finditer(text) if _LEAST_SENTENCES <= found.end() <= size]
    if ends:
        return text[: ends[-1]]
    words = text[: size + 1].rsplit(" ", 1)[0] if " " in text[: size + 1] else text[:size]
    return words.rstrip(" ,;:-(\u2013\u2014")


# Tags.

_BULLET = re.compile(r"^[\s\-*\u2022#]*(?:\d+\s*[.):]\s*)?")


def finish_tags(text: str) -> list[str]:
    """At most 10 different tags, in lower case: what stands between commas or in lines of their own.

    Raises:
        ValueError: there is none.
    """
    text = re.sub(r"^\s*(?:the\s+)?(?:tags|keywords)(?:\s+are)?\s*:", "", text, flags=re.IGNORECASE)
    tags: dict[str, None] = {}
    for part in re.split(r"[,;\n]", text):
        tag = _BULLET.sub("", part)
        tag = " ".join(re.sub(r"^and\s+", "", tag.strip(), flags=re.IGNORECASE).split()).strip(" .\"'*_#").lower()
        if tag and len(tag) <= MOST_TAG_CHARACTERS:
            tags[tag] = None
    if not tags:
        raise ValueError(f"got the answer {text[:80]!r}; expected tags between commas; ask another question")
    return list(tags)[:MOST_TAGS]


def finish_json(text: str) -> Any:
    """The value that an answer spells.

    Raises:
        ValueError: it is no JSON, as one that was cut off.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"got the answer {text[:80]!r}, which is no JSON ({error}); expected whole JSON; raise --max-new-tokens"
        ) from error


TASKS = {
    "caption": Task("Describe this picture in one or two sentences.", finish_caption),
    "alt-text": Task("Describe this picture in one short sentence, for somebody who cannot see it.", finish_alt_text),
    "tags": Task("Name up to 10 things that are seen in this picture, in single words between commas.", finish_tags),
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that decides the answers of a batch, and is the same for its rows."""

    model: str
    task: str | None = None
    """One of `TASKS`; None for questions whose answers stay as they are."""
    questions: tuple[str, ...] = ()
    """Asked about each picture; each row brings its own if there is none, and no task."""
    schema: dict[str, Any] | None = None
    """What answers are to be, as JSON."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decides the answers, by name, as it stands in each record."""

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"got the task {self.task!r}; expected one of {', '.join(TASKS)}; choose one")
        if self.task is not None and self.schema is not None:
            raise ValueError("got a task and a schema; expected one of them: a task has its own form")
        if len(set(self.questions)) < len(self.questions):
            raise ValueError("got a question twice; expected each once; take one out")

    @property
    def asked(self) -> tuple[str | None, ...]:
        """The questions about each picture; None for that of the row."""
        if self.questions:
            return self.questions
        return (None,) if self.task is None else (TASKS[self.task].question,)

    def finish(self, text: str) -> Any:
        """What a record holds as the answer.

        Raises:
            ValueError: the text does not meet the condition of the task.
        """
        if self.schema is not None:
            return finish_json(text)
        return text.strip() if self.task is None else TASKS[self.task].finish(text)
