"""AnyLlavaProcessor: conversations and pictures -> what the model takes.

What is surprising: ids are not made from one rendered string. The prompt remembers which characters a user typed, and
those never become special tokens or image placeholders (see `prompts.py`); and each image placeholder becomes its
image's tokens as ids, so the expanded prompt is never tokenised.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    TextKwargs,
    VideosKwargs,
)
from transformers.utils import logging

from .anyres_layout import check_merge_type, check_visual_tokens, plan_image
from .image_processing_fast import AnyLlavaImageProcessor
from .image_processing_llava import AnyLlavaImageProcessorPil, flatten_images, naming_setting
from .messages import check_messages, is_missing, list_pictures, shorten
from .original.original_processor import OriginalProcessorMixin
from .prompt_ids import check_learn_tokens, list_control_tokens
from .prompt_inputs import PromptInputs, check_rows, drop_missing, encode_prompts
from .prompts import Prompt, list_turn_texts, render_prompt
from .transformers_versions import pop_replacement_offsets
from .user_text import TREATMENTS, find_role_markers, treat_role_markers

logger = logging.get_logger(__name__)

IMAGE_BACKENDS = {
    "pil": AnyLlavaImageProcessorPil,
    "torch": AnyLlavaImageProcessor,
    "torchvision": AnyLlavaImageProcessor,
}
"""Image processors by the name that `from_pretrained(backend=...)` takes; transformers calls its fast ones
"torchvision"."""

# Callers that know transformers before 5.4 pass these beside template variables (huggingface/transformers#44881).
_PROCESSOR_KWARGS = set(TextKwargs.__annotations__) | set(ImagesKwargs.__annotations__)


class AnyLlavaProcessor(OriginalProcessorMixin):
    """Prepares text and images for AnyLlavaForConditionalGeneration.

    Args:
        image_processor: Turns pictures into `pixel_values`.
        tokenizer: `image_token` is added to it as a special token if it has none.
        chat_template: Jinja template with `{% generation %}` around what the assistant writes.
        patch_size: Side of a patch of the vision tower, in pixels.
        num_prefix_tokens: Features of a tile that are not patches and are kept (class token, registers).
        patch_merge_type: As in AnyLlavaConfig.
        image_token: The placeholder of one image in a prompt.
        role_markers: What becomes of a line of a user that begins with a role marker of the template, such as
            "ASSISTANT:": "neutralize" puts an invisible character into it, "refuse" raises, "keep" leaves it.
        visual_tokens: As in AnyLlavaConfig: most tokens of an image; None for all.
        learn_tokens: Special tokens that count as such in what the assistant says, such as "<loc_1>"; in all other
            text of messages, and all other tokens, are spelled in characters.

    Raises:
        ValueError: another `role_markers` or `patch_merge_type`, or a wrong `visual_tokens`.
    """

    def __init__(
        self,
        image_processor: AnyLlavaImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        patch_size: int = 14,
        num_prefix_tokens: int = 0,
        patch_merge_type: str = "flat",
        image_token: str = "<image>",
        role_markers: str = "neutralize",
        visual_tokens: int | None = None,
        learn_tokens: Sequence[str] = (),
    ) -> None:
        if role_markers not in TREATMENTS:
            raise ValueError(f"got role_markers={role_markers!r}; expected one of {', '.join(TREATMENTS)}")
        check_visual_tokens(visual_tokens)
        check_merge_type(patch_merge_type)
        self.role_markers = role_markers
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.patch_merge_type = patch_merge_type
        self.visual_tokens = visual_tokens
        self.learn_tokens = list(learn_tokens)
        self.image_token = image_token
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *, backend: str = "pil", **kwargs
    ) -> "AnyLlavaProcessor":
        """As in transformers.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            backend: "pil" prepares images bit for bit as the original LLaVA; "torch" within a level or two of it and
                faster (BENCHMARKS.md: Preprocessing), for training and servers.
            **kwargs: Also `visual_tokens`, instead of what is stored; and `template` and `base_model`, for folders of
                the original LLaVA.

        Raises:
            ValueError: there is no such backend, `visual_tokens` is wrong, or the folder cannot be read.
        """
        if backend not in IMAGE_BACKENDS:
            raise ValueError(f"got backend={backend!r}; expected one of {', '.join(IMAGE_BACKENDS)}")
        # Taken out, or the tokenizer would get it, too (transformers 5.23, processing_utils.py).
        has_visual_tokens = "visual_tokens" in kwargs
        visual_tokens = kwargs.pop("visual_tokens", None)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if has_visual_tokens:
            check_visual_tokens(visual_tokens)
            processor.visual_tokens = visual_tokens
        if type(processor.image_processor) is not IMAGE_BACKENDS[backend]:
            processor.image_processor = IMAGE_BACKENDS[backend].from_dict(processor.image_processor.to_dict())
        return processor

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        return_assistant_tokens_mask: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Encode prompts and their images.

        Args:
            images: One picture, one list for each prompt, or a flat list in reading order for prompts with as many
                pictures each. In a list for each prompt, None, and any other spelling of nothing, is a prompt without
                pictures. A picture is a PIL image, array, `pathlib.Path`, bytes, data URI, or a URL that
                `image_processor.urls` fetches; other texts are refused.
            text: Prompts, as `render` or `apply_chat_template` return them. In a plain `str` every special token
                counts: render user text with a template instead of formatting it yourself.
            return_assistant_tokens_mask: Add `assistant_masks`: 1 on tokens that the assistant writes.
            **kwargs: Those of the tokenizer (`padding`, `padding_side`, `max_length`, `return_tensors`, ...) and of
                the image processor; `return_text_replacement_offsets` as in transformers.

        Returns:
            `input_ids` and `attention_mask` `[B, L]`; with images `pixel_values` and, for tiled ones, `image_sizes`.

        Raises:
            ValueError: if placeholders and images of a row do not match, truncation would cut an image, or an argument
                would have no effect.
        """
        images = None if is_missing(images) else images
        kwargs = self._take_effective(kwargs)
        if text is None and images is None:
            raise ValueError("got neither text nor images; expected at least one of them")
        with naming_setting():
            merged = self._merge_kwargs(
                self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
            )
        wants_offsets = pop_replacement_offsets(merged)
        prompts = [text] if isinstance(text, str) else text or []
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"got {type(text).__name__} as text; expected a string or a list of strings, behind the images"
            )
        image_inputs, num_image_tokens = {}, []
        if images is not None:
            images = drop_missing(images, num_rows=len(prompts))
            flat_images = flatten_images(images)
            if text is not None:
                check_rows(prompts, images, num_images=len(flat_images), image_token=self.image_token)
            if flat_images:
                image_inputs = self.image_processor(flat_images, **merged["images_kwargs"])
                if text is not None:
                    self._check_layout(image_inputs, merged["images_kwargs"])
                num_image_tokens = self.count_image_tokens(image_inputs)
            if text is not None and len(num_image_tokens) != len(flat_images):
                raise ValueError(
                    f"got {len(num_image_tokens)} images in {len(flat_images)} arrays; expected one in each, as a row "
                    "could get the image of another; split them"
                )
        elif prompts:
            check_rows(prompts, [[] for _ in prompts], num_images=0, image_token=self.image_token)
        text_inputs = {}
        if text is not None:
            text_inputs = encode_prompts(
                prompts,
                self.tokenizer,
                image_token=self.image_token,
                image_token_id=self.image_token_id,
                num_image_tokens=iter(num_image_tokens),
                return_assistant_tokens_mask=bool(return_assistant_tokens_mask),
                **merged["text_kwargs"],
            )
        if wants_offsets:
            _, text_inputs["text_replacement_offsets"] = self.get_text_with_replacements(
                [_hide_user_text(prompt) for prompt in prompts], [self.image_token * num for num in num_image_tokens]
            )
        return PromptInputs(
            {**text_inputs, **image_inputs},
            image_token_id=self.image_token_id,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables,
    ) -> Prompt:
        """One conversation in the words of the chat template.

        Args:
            messages: `[{"role": ..., "content": text or [{"type": "image"}, {"type": "text", "text": ...}]}]`.
            chat_template: Instead of the processor's own.
            add_generation_prompt: End where the assistant begins to write.
            continue_final_message: End inside the last message, for the model to go on with.
            **variables: Variables of the template.

        Raises:
            ValueError: if there is no template, it cannot write these messages, they are malformed, or a user typed a
                role marker and those are refused; or for `learn_tokens` that cannot be learned.
        """
        check_messages(messages)
        if self.learn_tokens:
            check_learn_tokens(self.learn_tokens, self.tokenizer, image_token=self.image_token)
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("got a processor without chat template; expected one: set processor.chat_template")
        if self.role_markers != "keep":
            turn_texts = list_turn_texts(template, self.tokenizer.special_tokens_map)
            controls = list_control_tokens(self.tokenizer, image_token=self.image_token)
            markers = find_role_markers(turn_texts, controls)
            messages = treat_role_markers(messages, markers, refuse=self.role_markers == "refuse")
        try:
            # Templates of language models may expect texts where these messages have items.
            return render_prompt(
                messages,
                template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                learn_tokens=self.learn_tokens,
                **self.tokenizer.special_tokens_map | variables,
            )
        except (TemplateError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"got messages that the chat template cannot write ({reason}); expected what it knows; change the "
                "messages, or choose another template"
            ) from error

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> Prompt | list[Prompt] | list | BatchFeature:
        """As in transformers, for one conversation or a list of them; pictures are taken from the messages.

        User text is never read as control tokens, with or without `tokenize`.
        """
        processor_kwargs = dict(processor_kwargs or {})
        for name in _PROCESSOR_KWARGS & set(kwargs):
            processor_kwargs[name] = kwargs.pop(name)
        for name, value in kwargs.items():
            # A server of many models passes None for what some of them do not know.
            if value is not None and not re.search(
                rf"\b{re.escape(name)}\b", chat_template or self.chat_template or ""
            ):
                logger.warning(f"got {name}={value!r}, of which neither template nor processor knows; it is ignored")
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "got add_generation_prompt and continue_final_message; expected one of them: a new answer, or more "
                "of the last message"
            )
        is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
        is_batched = is_list and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batched else [conversation]
        prompts = [
            self.render(
                messages,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
            for messages in conversations
        ]
        if not tokenize:
            return prompts if is_batched else prompts[0]
        images = [list(list_pictures(row)) for row in conversations]
        encoded = self(
            images=images if any(images) else None,
            text=prompts,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            return_tensors=return_tensors,
            **processor_kwargs,
        )
        if return_dict:
            return encoded
        return encoded["input_ids"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image as text, for engines that expand prompts themselves."""
        return self.image_token * self.count_image_tokens(image_inputs)[image_idx]

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None) -> MultiModalData:
        """Tokens and rows of `pixel_values` for images of these (height, width), for the same engines."""
        if image_sizes is None:
            return MultiModalData()
        is_tiled = self.image_processor.image_aspect_ratio == "anyres"
        num_tokens = self.count_image_tokens({"image_sizes" if is_tiled else "pixel_values": image_sizes})
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=[1] * len(image_sizes))

    def count_image_tokens(self, image_inputs: dict) -> list[int]:
        """The number of tokens of each image, from what the image processor returned for them."""
        tile_size = self.image_processor.tile_size
        tile = {
            "tile_size": tile_size,
            "patches_per_side": tile_size // self.patch_size,
            "prefix_tokens": self.num_prefix_tokens,
            "patch_merge_type": self.patch_merge_type,
            "visual_tokens": self.visual_tokens,
        }
        if "image_sizes" not in image_inputs:
            num_tokens = plan_image(1, 1, pinpoints=None, **tile).num_tokens
            return [num_tokens] * len(image_inputs["pixel_values"])
        pinpoints = tuple(map(tuple, self.image_processor.image_grid_pinpoints))
        sizes = torch.as_tensor(image_inputs["image_sizes"]).tolist()
        return [plan_image(height, width, pinpoints=pinpoints, **tile).num_tokens for height, width in sizes]

    def _take_effective(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call without those that ask for nothing.

        Raises:
            ValueError: one of them has no effect.
        """
        parts = {
            "text_kwargs": {*TextKwargs.__annotations__},
            "images_kwargs": {*ImagesKwargs.__annotations__, *self.image_processor.valid_kwargs.__annotations__},
        }
        parts["common_kwargs"] = set.intersection(*parts.values())
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if value is not None and (value or name not in ProcessingKwargs.__annotations__)
        }
        for name in ("videos", "audio", "videos_kwargs", "audio_kwargs"):
            if name in kwargs:
                raise ValueError(
                    f"got {name}; expected pictures: give frames of a video as images, one after the other"
                )
        unknown = kwargs.keys() - set.union(*parts.values(), ProcessingKwargs.__annotations__, parts)
        for part, names in parts.items():
            settings = kwargs.get(part, {})
            if not isinstance(settings, dict):
                raise ValueError(f"got {part}={shorten(settings)}; expected a dict of settings: correct it")
            unknown |= {f"{part}[{name!r}]" for name in settings.keys() - names}
        # Callers of processors of every kind pass settings of media that they may not have.
        if for_others := unknown & {*VideosKwargs.__annotations__, *AudioKwargs.__annotations__}:
            logger.warning_once(f"got {', '.join(sorted(for_others))}, for video or audio; it has no effect here")
        if unknown := unknown - for_others:
            raise ValueError(
                f"got {', '.join(sorted(unknown))}, which has no effect here; expected settings of the tokenizer or "
                "the image processor: take it out"
            )
        return {name: value for name, value in kwargs.items() if name not in for_others}

    def _check_layout(self, image_inputs: dict, settings: dict[str, Any]) -> None:
        """Refuse settings of a call with which images have other tokens than `count_image_tokens` finds."""
        stored = self.image_processor
        pinpoints = settings.get("image_grid_pinpoints") or stored.image_grid_pinpoints
        same = {
            "size": (image_inputs["pixel_values"].shape[-1], stored.tile_size),
            "image_aspect_ratio": ("image_sizes" in image_inputs, stored.image_aspect_ratio == "anyres"),
            "image_grid_pinpoints": ([list(size) for size in pinpoints or ()], stored.image_grid_pinpoints or []),
        }
        for name, (found, expected) in same.items():
            if found != expected:
                raise ValueError(
                    f"got a call whose {name} is not that of the image processor; expected prompts and images of one "
                    f"layout: leave it out, or set it in processor.image_processor and the model"
                )

    @property
    def model_input_names(self) -> list[str]:
        names = dict.fromkeys(self.tokenizer.model_input_names + self.image_processor.model_input_names)
        if self.image_processor.image_aspect_ratio != "anyres":
            del names["image_sizes"]
        return list(names)


def _hide_user_text(prompt: str) -> str:
    """The prompt with user text blanked out, so that no placeholder is found in it; nothing else moves."""
    text = str(prompt)
    for start, end in prompt.user_spans if isinstance(prompt, Prompt) else ():
        text = text[:start] + " " * (end - start) + text[end:]
    return text
