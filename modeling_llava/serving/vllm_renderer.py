"""Chats of vLLM in the words of AnyLlavaProcessor (`--tokenizer-mode any_llava`): what a user typed is only text.

vLLM reads messages and fetches pictures. It gets ids with one image id for each picture, and writes the others itself.
"""

import asyncio
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.transformers_utils.processor import cached_processor_from_config

from processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import encode_prompt
from processing_llava.prompts import count_images

_OF_TOKENIZERS = {"return_dict", "tokenize"}
"""What vLLM says to a tokenizer, beside the variables of a template."""


class AnyLlavaRenderer(HfRenderer):
    """Writes conversations as ids with our processor."""

    def render_messages(self, messages: list[dict[str, Any]], params: ChatParams) -> tuple[list[dict], TokensPrompt]:
        """A conversation and its prompt, with the pictures of its messages."""
        conversation, pictures, uuids = parse_chat_messages(messages, self.model_config, **_parsing(params))
        return conversation, _add_pictures(self._write(conversation, params), pictures, uuids)

    async def render_messages_async(
        self, messages: list[dict[str, Any]], params: ChatParams
    ) -> tuple[list[dict], TokensPrompt]:
        """As `render_messages`; other requests go on meanwhile."""
        parsed = await parse_chat_messages_async(messages, self.model_config, **_parsing(params))
        conversation, pictures, uuids = parsed
        return conversation, _add_pictures(await asyncio.to_thread(self._write, conversation, params), pictures, uuids)

    def _write(self, conversation: list[dict[str, Any]], params: ChatParams) -> list[int]:
        processor = cached_processor_from_config(self.model_config, processor_cls=AnyLlavaProcessor)
        given = params.get_apply_chat_template_kwargs()
        variables = {name: value for name, value in given.items() if name not in _OF_TOKENIZERS}
        # OpenAI's later word for the system.
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in conversation]
        prompt = processor.apply_chat_template(messages, **variables)
        ids, _ = encode_prompt(
            prompt,
            processor.tokenizer,
            image_token=processor.image_token,
            image_token_id=processor.image_token_id,
            num_image_tokens=[1] * count_images(prompt, processor.image_token),
        )
        return ids


def _parsing(params: ChatParams) -> dict[str, Any]:
    return {
        "content_format": "openai",
        "media_io_kwargs": params.media_io_kwargs,
        "mm_processor_kwargs": params.mm_processor_kwargs,
    }


def _add_pictures(ids: list[int], pictures: Any, uuids: Any) -> TokensPrompt:
    prompt = TokensPrompt(prompt_token_ids=ids)
    if pictures is not None:
        prompt["multi_modal_data"] = pictures
    if uuids is not None:
        prompt["multi_modal_uuids"] = uuids
    return prompt
