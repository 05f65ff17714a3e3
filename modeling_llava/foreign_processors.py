"""Conversations for processors of transformers, which take what a user types for control tokens and open any address.

Ours needs none of this. The checkpoints of transformers' own classes bring theirs, and keep it: so what they must not
see is taken out of the messages.
"""

from collections.abc import Iterator
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from processing_llava.image_loading import load_image
from processing_llava.messages import check_messages, list_pictures
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.role_markers import INVISIBLE


def encode_messages(messages: list[dict[str, Any]], processor: ProcessorMixin) -> BatchFeature:
    """What a model takes to answer a conversation, whoever wrote it and whoever made the processor.

    Raises:
        ValueError: as `protect_messages` and the processor.
    """
    return processor.apply_chat_template(
        protect_messages(messages, processor),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def protect_messages(messages: list[dict[str, Any]], processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Messages whose texts hold no control token, and whose pictures are opened.

    An invisible character is put into each control token that somebody typed. Messages for our processor stay as they
    are.

    Raises:
        ValueError: if they are no conversation, or a picture is refused.
    """
    if isinstance(processor, AnyLlavaProcessor):
        return messages
    check_messages(messages)
    pictures = iter([load_image(picture) for picture in list_pictures(messages)])
    tokens = sorted(_list_control_tokens(processor), key=len, reverse=True)
    return [
        {
            "role": _break(message["role"], tokens),
            "content": _protect_content(message.get("content") or "", tokens, pictures),
        }
        for message in messages
    ]


def _list_control_tokens(processor: ProcessorMixin) -> set[str]:
    tokenizer = processor.tokenizer
    return {processor.image_token, *tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}


def _protect_content(content: str | list[dict[str, Any]], tokens: list[str], pictures: Iterator[Any]) -> Any:
    if isinstance(content, str):
        return _break(content, tokens)
    items = []
    for item in content:
        if item["type"] in ("image", "image_url"):
            items.append({"type": "image", "image": next(pictures)})
        elif item["type"] == "text":
            items.append({"type": "text", "text": _break(item["text"], tokens)})
        else:
            raise ValueError(f"got an item of type {item['type']!r}; expected text or image: take it out")
    return items


def _break(text: str, tokens: list[str]) -> str:
    for token in tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]}{INVISIBLE}{token[1:]}")
    return text
