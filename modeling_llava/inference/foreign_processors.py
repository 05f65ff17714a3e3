"""Conversations for processors of transformers, which take what a user types for control tokens and open any address.

Ours needs none of this. The checkpoints of transformers' own classes bring theirs, and keep it: so what they must not
see is taken out of the messages.
"""

from collections.abc import Iterator
from typing import Any

from transformers import (
    AddedToken,
    BatchFeature,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

from processing_llava.image_loading import load_images
from processing_llava.messages import check_messages, list_pictures
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.role_markers import INVISIBLE

_NUM_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def complete_processor(processor: ProcessorMixin, config: PreTrainedConfig, *, name: str) -> None:
    """Give transformers' own LLaVA processors, in place, what their files lack and config.json has.

    Older folders have no `patch_size`, or no image token in the tokenizer.

    Args:
        processor: Of any class; others stay as they are.
        config: Of the model.
        name: Of the model, for errors.

    Raises:
        ValueError: the files of processor and model contradict each other, or neither has a value.
    """
    if not isinstance(processor, (LlavaProcessor, LlavaNextProcessor)):
        return
    patch_size = config.vision_config.patch_size
    if processor.patch_size is None:
        if config.vision_config.model_type not in _NUM_CLASS_TOKENS:
            raise ValueError(
                f"got model {name!r} without patch_size in processor_config.json, on a tower of type "
                f"{config.vision_config.model_type!r}; expected {' or '.join(_NUM_CLASS_TOKENS)}: add patch_size, "
                "num_additional_image_tokens and vision_feature_select_strategy"
            )
        processor.patch_size = patch_size
        processor.num_additional_image_tokens = _NUM_CLASS_TOKENS[config.vision_config.model_type]
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    for field, own, expected in (
        ("patch_size", processor.patch_size, patch_size),
        (
            "vision_feature_select_strategy",
            processor.vision_feature_select_strategy,
            config.vision_feature_select_strategy,
        ),
    ):
        if own != expected:
            raise ValueError(
                f"got model {name!r} with {field} {own!r} in the files of its processor and {expected!r} in "
                "config.json; expected one value: correct the wrong one"
            )
    _settle_image_token(processor, config.image_token_id, name=name)


def _settle_image_token(processor: ProcessorMixin, image_token_id: int, *, name: str) -> None:
    tokenizer, token = processor.tokenizer, processor.image_token
    if token not in tokenizer.get_vocab() and len(tokenizer) == image_token_id:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    own = tokenizer.get_vocab().get(token)
    if own != image_token_id:
        raise ValueError(
            f"got model {name!r} whose config.json has the image token id {image_token_id} and whose tokenizer has "
            f"{own} for {token}; expected one id: correct image_token_id in config.json, or the tokenizer's files"
        )
    processor.image_token_id = image_token_id


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
    pictures = iter(load_images(list_pictures(messages)))
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
